"""What a command imports before it has anything to do, and what it leaves out."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.measure import child
from fivestep.errors import UsageError
from fivestep.run import training
from fivestep.run.build import build_model
from fivestep.run.config import load_config
from fivestep.run.start import weights_at_most

FREE_OF_TORCH = "heavy = {'torch', 'numpy', 'rich'} & set(sys.modules)\nassert not heavy, heavy\n"


def fresh(code):
    """Run `code` in an interpreter of its own; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, timeout=300, env=child()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.multiprocess
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "bigram", "--show-config"]])
def test_help_imports_no_torch(arguments):
    code = f"import fivestep.cli as c\ntry: c.main({arguments})\nexcept SystemExit as stop: assert not stop.code\n"
    assert fresh(code + FREE_OF_TORCH)


@pytest.mark.multiprocess
def test_import_fivestep_imports_no_torch():
    fresh("import fivestep\nassert 'fit' in dir(fivestep)\n" + FREE_OF_TORCH)


@pytest.mark.multiprocess
def test_imports_collect_no_garbage_and_are_set_aside():
    """In a command's own process; one that has torch already (a test, a notebook) is left as it is."""
    fresh(
        "import gc\nfrom fivestep.cli import importing\n"
        "before = gc.get_freeze_count()\n"
        "with importing():\n    assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > before + 1000\n"
        "gc.unfreeze()\nsys.modules['torch'] = sys\n"
        "with importing():\n    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == 0\n"
    )


@pytest.mark.multiprocess
def test_imports_that_fail_leave_the_collector_on():
    fresh(
        "import gc\nfrom fivestep.cli import importing\n"
        "try:\n    with importing(): raise ImportError\nexcept ImportError: pass\n"
        "assert gc.isenabled()\n"
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_optimizer_does_without_the_compiler():
    """Its marked methods do what they do anyway, and torch's compiler stays out until somebody wants it."""
    fresh(
        "import torch\nfrom fivestep.run.start import postpone_compiler\n"
        "postpone_compiler()\n"
        "weight = torch.nn.Parameter(torch.ones(3))\n"
        "optimizer = torch.optim.AdamW([weight], lr=0.1)\n"
        "optimizer.add_param_group({'params': [torch.nn.Parameter(torch.ones(2))], 'lr': 0.5})\n"
        "weight.grad = torch.ones(3)\noptimizer.zero_grad()\nassert weight.grad is None\n"
        "saved = optimizer.state_dict()\nsaved['param_groups'][0]['lr'] = 0.2\noptimizer.load_state_dict(saved)\n"
        "assert [group['lr'] for group in optimizer.param_groups] == [0.2, 0.5]\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "weight.grad = torch.ones(3)\noptimizer.step()\nassert (weight < 1).all()\n"
    )


@pytest.mark.parametrize(
    ("recipe", "vocabulary"),
    [
        ("bigram", 500),
        ("gpt-chars", 9),
        ("gpt-chars", 5000),
        ("rnn-words", 3000),
        ("transformer-words", 3000),
        ("regression", 40),
        ("digits", 64),
    ],
)
def test_no_model_exceeds_the_bound(recipe, vocabulary):
    sizes = [{}, {"n_embd": 64, "n_hidden": 300, "n_layer": 1}, {"n_embd": 256, "n_hidden": 8, "n_layer": 7}]
    for config in (load_config(recipe, size) for size in sizes):
        outputs = 10 if config.model == "mlp" else vocabulary
        need = sum(p.numel() * p.element_size() for p in build_model(config, vocabulary, outputs).parameters())
        assert 0 < need <= weights_at_most(config, vocabulary, outputs)


def test_a_model_that_memory_cannot_hold_is_refused(monkeypatch):
    """One that fits for certain is not even laid out; one that may not is, and is told where it does not."""
    data = SimpleNamespace(inputs=100, outputs=100)
    with pytest.raises(UsageError, match="weights alone need .* GB"):
        training.check_memory(load_config("gpt-chars", {"n_embd": 1 << 17, "n_layer": 50}), data)
    laid_out = []
    monkeypatch.setattr(training, "build_model", lambda *sizes: laid_out.append(sizes) or build_model(*sizes))
    training.check_memory(load_config("gpt-chars", {}), data)
    assert not laid_out
    monkeypatch.setattr(training, "free", lambda device: 20_000_000)  # below the bound, above the 3.2 MB it needs
    training.check_memory(load_config("gpt-chars", {}), data)
    assert laid_out
    monkeypatch.setattr(training, "free", lambda device: 2_000_000)
    with pytest.raises(UsageError, match="weights alone need"):
        training.check_memory(load_config("gpt-chars", {}), data)
