"""`--sync-budget`: the lines that read a value in a step, by name."""

import torch
from torch import nn

import fivestep as fs
from fivestep.run.reads import HostReads
from tests.run.cli import fivestep  # noqa: F401  (a fixture)


class Curious(nn.Linear):
    def forward(self, x):
        if x.sum() > 0:  # reads
            x = x * 1.0
        return super().forward(x)


def steps(model, n=4):
    data = [(torch.ones(3, 2), torch.ones(3, 1))] * n
    with HostReads() as reads:
        for result in fs.train(model, data, nn.MSELoss(), torch.optim.AdamW(model.parameters()), epochs=1):
            float(result.loss)  # the caller's own, outside of a step
    return reads


def test_an_eager_step_reads_at_its_marked_line_alone():
    reads = steps(nn.Linear(2, 1))
    assert not reads.beyond()
    (sentence,) = reads.sentences(4)
    assert sentence.startswith("within the budget: 1.00 host reads a step at") and "step.py" in sentence


def test_any_other_line_is_named():
    reads = steps(Curious(2, 1))
    assert reads.beyond()
    _, sentence = reads.sentences(4)
    assert (
        sentence.startswith("BEYOND the budget: 1.00") and "test_reads.py" in sentence and "x.sum() > 0" in sentence
    )


class Listing(nn.Linear):
    def forward(self, x):
        self.largest = max(x.flatten().tolist())
        return super().forward(x)


def test_a_whole_tensor_read_is_named():
    reads = steps(Listing(2, 1))
    _, sentence = reads.sentences(4)
    assert sentence.startswith("BEYOND the budget: 1.00") and "x.flatten().tolist()" in sentence


def test_the_switch(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 40)
    flags = ("--data", "a.txt", "--max-iters", 20, "--eval-every", 10, "--sample-tokens", 0)
    outcome = fivestep("train", "bigram", *flags, "--sync-budget")
    assert outcome.code == 0
    assert "within the budget: 1.00 host reads a step" in outcome.out + outcome.err
