"""Configuration to models: the sizes that a run is built with."""

import pytest

import fivestep as fs
from fivestep.models.gpt2 import GPT2
from fivestep.run.build import build_job
from fivestep.run.config import load_config

TINY = {"model": "gpt2", "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "tied": True, "device": "cpu"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and looked at the moon\n" * 40)
    return str(path)


def test_gpt2_has_as_many_rows_as_asked(text):
    job = build_job(load_config("gpt-chars", {**TINY, "data": [text], "vocab_size": 97}))
    assert isinstance(job.model, GPT2)
    assert job.model.token_embedding_table.weight.shape == (97, 16)
    assert job.model.lm_head.weight is job.model.token_embedding_table.weight
    assert job.data.inputs == job.data.outputs == 97
    assert job.data.tokenizer.vocab_size < 97


def test_without_vocab_size_the_rows_are_the_tokenizers(text):
    job = build_job(load_config("gpt-chars", {**TINY, "data": [text], "tied": False}))
    assert job.model.token_embedding_table.num_embeddings == job.data.tokenizer.vocab_size
    assert job.model.lm_head.weight is not job.model.token_embedding_table.weight


@pytest.mark.parametrize("model", ["bigram", "rnn", "transformer", "gpt", "gpt2"])
def test_fewer_rows_than_the_vocabulary_are_refused(text, model):
    with pytest.raises(fs.UsageError, match=r"vocab_size = 5 is below the \d+ tokens .*--vocab-size"):
        build_job(load_config("gpt-chars", {**TINY, "model": model, "data": [text], "vocab_size": 5}))


def test_ngrams_are_gpts_own(text):
    """Another model in its place is made without them."""
    small = {**TINY, "data": [text], "ngrams": 3}
    assert not hasattr(build_job(load_config("gpt-chars", small)).model, "ngrams")
    assert build_job(load_config("gpt-chars", {**small, "model": "gpt"})).model.ngrams.longest == 3
    assert build_job(load_config("gpt-chars", {**small, "model": "gpt", "ngrams": 1})).model.ngrams is None


@pytest.mark.parametrize(
    ("optimizer", "fused"), [("sgd", [True]), ("adam", [True]), ("adamw", [True]), ("muon", [None, True])]
)
def test_fused_where_it_is_asked_for(text, optimizer, fused):
    """Of Muon's two the one that has such a kernel. Unasked, it stays torch's loop: the seeds' bits depend on it."""
    options = {**TINY, "model": "gpt", "data": [text], "optimizer": optimizer}
    for asked, expected in ((True, fused), (False, [None] * len(fused))):
        job = build_job(load_config("gpt-chars", {**options, "fused": asked}))
        assert [one.defaults.get("fused") for one in job.optimizers] == expected
