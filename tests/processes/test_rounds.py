"""Rounds of a launch are told apart, whatever earlier ones left in the store that torchrun keeps."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from fivestep import rounds
from fivestep.errors import FivestepError

SOON = timedelta(seconds=10)


def meet(store, size, found):
    """The processes of a round, as threads."""

    def one(rank):
        found[rank] = rounds.met(store, rank, size, SOON)

    return [threading.Thread(target=one, args=(rank,)) for rank in range(size)]


def test_all_of_a_round_agree_and_no_two_rounds_do():
    store, names = HashStore(), []
    for size in (3, 2, 3, 1, 3):  # what the earlier ones wrote stays
        found = {}
        threads = meet(store, size, found)
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == size and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == len(names)


def test_what_a_broken_off_round_left_answers_nobody():
    """Process 1 of an earlier round asked, was answered, and was gone; process 0 waits for the one of its own."""
    store = HashStore()
    with pytest.raises(FivestepError, match="not all of the 3 processes"):
        rounds.met(store, 1, 3, timedelta(seconds=0.1))
    early = {}
    first, second, third = meet(store, 3, early)
    for one in (first, third):
        one.start()
    first.join(0.3)
    assert first.is_alive() and not early, "nobody goes before all are there"
    second.start()
    for one in (first, second, third):
        one.join()
    assert len(set(early.values())) == 1 and len(early) == 3


def test_a_later_start_ends_an_earlier_one_that_still_waits():
    store, failed = HashStore(), []

    def stale():
        try:
            rounds.met(store, 0, 2, SOON)
        except FivestepError as error:
            failed.append(str(error))

    waiting = threading.Thread(target=stale)
    waiting.start()
    while not store.check(["called"]):
        pass
    found = {}
    for one in (threads := meet(store, 2, found)):
        one.start()
    for one in [waiting, *threads]:
        one.join()
    assert found[0] == found[1]
    assert failed == ["another start of this training has begun meanwhile: this one ends"]


def test_one_that_counts_others_is_not_of_the_round():
    store, failed = HashStore(), []

    def one(rank, size):
        with pytest.raises(FivestepError, match=f"not all of the {size} processes"):
            rounds.met(store, rank, size, timedelta(seconds=0.5))
        failed.append(rank)

    for thread in (both := [threading.Thread(target=one, args=what) for what in ((0, 2), (1, 4))]):
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(failed) == [0, 1]


def test_a_launcher_is_named_only_under_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert rounds.launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert rounds.launcher() == rounds.launcher() != ""
    own = rounds.launcher()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert rounds.launcher() != own


def test_no_answer_is_a_sentence(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(rounds, "REFUSED", 0.3)
    with pytest.raises(FivestepError, match=r"localhost:1 does not answer.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        rounds.connected(SOON)
    monkeypatch.delenv("MASTER_PORT")
    assert rounds.connected(SOON) is None
