"""Row 5: truncated back-propagation in time, carried, exact, resumed, and flat in memory.

That it equals the plain loop bit for bit, for each cell and for the Transformer, is held by tests/seeds; here what
is carried survives a resume, and the memory of an epoch does not grow with the text.
"""

import gc

import numpy as np
import pytest
import torch

import fivestep as fs
from fivestep.data.segments import Segments
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer
from fivestep.run.difference import difference

TEXT = np.random.default_rng(0).integers(0, 11, 300)
MODELS = {
    "lstm": lambda: RNN(11, 6, 8, 2, dropout=0.2, cell="lstm"),
    "gru": lambda: RNN(11, 6, 8, 2, dropout=0.2, cell="gru"),
    "transformer": lambda: Transformer(11, 8, 2, 8, 1, dropout=0.2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_hidden_state_goes_on(tmp_path, name):
    def trained(path, stop=None):
        torch.manual_seed(0)
        model = MODELS[name]()
        losses, kinds = [], set()
        with fs.Run(path, say=lambda text: None) as run:
            optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
            options = {"clip_norm": 0.25, "epochs": 2, "run": run}
            for info in fs.train(model, Segments(TEXT, 7, 4), fs.TruncatedBPTT(), optimizer, **options):
                losses.append(float(info.loss))
                kinds.add(type(info.state.carry).__name__)
                if info.step == stop:
                    break
        return losses, kinds

    whole, kinds = trained(tmp_path / "whole")
    assert kinds == {{"lstm": "tuple", "gru": "Tensor", "transformer": "NoneType"}[name]}
    for stop in (1, 6, 11, 12, 19):
        path = tmp_path / str(stop)
        assert trained(path, stop)[0] + trained(path)[0] == whole
        assert difference(tmp_path / "whole", path) is None


def test_memory_is_flat_in_the_length_of_the_text():
    def tensors(length):
        torch.manual_seed(0)
        model = MODELS["lstm"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        most = 0
        for info in fs.train(model, Segments(np.resize(TEXT, length), 7, 4), fs.TruncatedBPTT(), optimizer, epochs=1):
            if info.step % 20 == 0:
                gc.collect()
                most = max(most, sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
        return most

    short, long = tensors(700), tensors(7_000)
    assert long <= short + 10 + 2 * 220, "the losses of the epoch, which are packed, and nothing else"
