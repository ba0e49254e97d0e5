"""What several tests share: small text, small models, and no trace in the user's cache."""

import os
import signal

# Before torch is imported, for this process and all that it starts: the tensors here are tiny, and the threads of
# several processes that share two cores would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    """2,003 token ids of a vocabulary of 29, with structure to learn: each depends on the one before."""
    random = np.random.default_rng(0)
    ids = [0]
    for step in random.integers(0, 4, 2002):
        ids.append((ids[-1] * 5 + int(step)) % 29)
    return np.array(ids, dtype=np.uint8)
