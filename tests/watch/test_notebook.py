"""In a notebook: one output, replaced in place, that ends as the table."""

import pytest

nbclient = pytest.importorskip("nbclient", reason="a real kernel is driven through nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="a real kernel is needed")

CELL = """
import torch
from torch import nn
import fivestep as fs
import fivestep.watch.screen as screen

screen.Notebook.every = 0.0  # every step redraws
updates = []
show = screen.Notebook.show
def counting(self, share, lines):
    updates.append(share)
    show(self, share, lines)
screen.Notebook.show = counting

model = nn.Linear(3, 1)
data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(10)]
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
history = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=3, val=data)
"""


@pytest.mark.multiprocess
def test_one_updating_output(tmp_path):
    cells = [nbformat.v4.new_code_cell(code) for code in (CELL, "print(len(updates), max(filter(None, updates)))")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, second = (cell["outputs"] for cell in notebook.cells)
    assert len(first) == 1, [output["output_type"] for output in first]
    shown = first[0]["data"]
    plain = shown["text/plain"].splitlines()
    assert plain[0].split() == ["step", "epoch", "train", "val", "samples/s", "time", "lr", "grad", "norm", "waiting"]
    assert [line.split()[0] for line in plain[1:]] == ["10", "20", "30"], "the table stays, the bar is gone"
    assert "<progress" not in shown["text/html"]
    assert shown["text/html"].count("<b>") == 1, "the titles"
    count, share = second[0]["text"].split()
    assert int(count) > 30, "it was drawn at every step"
    assert float(share) == 1.0
