"""Of several processes: their steps by program are those one operation at a time, and Muon's are torch's."""

import json

import pytest

from fivestep.loop.program import compiler
from tests.processes import compiled, matrices, programs
from tests.processes.launched import started

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
needs_compiler = pytest.mark.skipif(not compiler(), reason="programs need a C++ compiler")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    done = started(2, programs.__file__, folder, timeout=300, FIVESTEP_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiling the step") == 2, "of a program for both processes, and by one of them"
    return [json.loads((folder / f"made-{rank}.json").read_text()) for rank in (0, 1)]


@needs_compiler
@pytest.mark.parametrize("case", programs.CASES)
def test_they_are_the_same_steps(made, case):
    for one in made:
        eager, program = one[case]["eager"], one[case]["program"]
        assert eager["apart"] == program["apart"] == 0.0
        assert len(eager["figures"]) == len(program["figures"]) > 3
        for mine, theirs in zip(program["figures"], eager["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)
        assert program["weights"] == pytest.approx(eager["weights"], abs=1e-3)
        assert eager["error"] == program["error"] and eager.get("skipped") == program.get("skipped")
    assert made[0][case]["program"]["steps"][0] == made[1][case]["program"]["steps"][0], "a step is one in both"


@needs_compiler
def test_full_windows_are_steps_of_the_program(made):
    made_by_program, wasted = made[0]["plain"]["program"]["steps"]
    assert made_by_program == 30 - 2 - 5 and wasted == 0, "two steps come before, and five windows are short"
    assert made[0]["gone_on_with"]["program"]["steps"][0] == 10 - 2 - 1


@needs_compiler
def test_where_one_has_no_full_window_nobody_makes_a_program_of_it(made):
    assert made[1]["own_batches"]["program"]["steps"][1] > 0


@needs_compiler
def test_where_one_can_have_no_program_none_has(made):
    assert made[0]["hooked_in_one"]["program"]["steps"][0] == 0
    told = [one["hooked_in_one"]["program"]["told"] for one in made]
    assert "not in rank 1: 2 has hooks, which a program would not call; the steps run" in told[0][0]
    assert len(told[0]) == 1 and not told[1], "it is said once"
    _, wasted = made[0]["watched_in_one"]["program"]["steps"]
    assert wasted == 21 and "are seldom full at once" in made[0]["watched_in_one"]["program"]["told"][0]


@needs_compiler
def test_a_step_that_is_not_finite_is_looked_into(made):
    assert "step 5 (epoch 1, batch 4) was not finite" in made[0]["not_finite"]["program"]["error"]
    assert made[0]["skipped"]["program"]["skipped"]


@needs_compiler
@pytest.mark.torture
def test_an_error_inside_a_program_is_named(made, cache, tmp_path):
    done = started(2, programs.__file__, tmp_path, "out_of_range", FIVESTEP_CACHE=str(cache))
    assert done.returncode == 1
    assert "failed first: index out of range" in done.stderr and "compiling" not in done.stderr


@needs_compiler
@pytest.mark.torture
def test_where_programs_would_differ_there_are_none(made, cache, tmp_path):
    """With other threads a norm is added up in another order, and the processes' weights would part."""
    done = started(2, programs.__file__, tmp_path, "other_threads", timeout=300, FIVESTEP_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"made-{rank}.json").read_text())["other_threads"]["program"] for rank in (0, 1)]
    assert all(one["apart"] == 0.0 and one["steps"] == [0, 1] for one in found), found
    assert "as many threads (OMP_NUM_THREADS)" in found[0]["told"][0] and not found[1]["told"]


@needs_compiler
@pytest.mark.torture
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_model_that_torch_compiles_trains_alike(kind, cache, tmp_path):
    for n, layout in ((1, "alone"), (2, kind)):
        done = started(n, compiled.__file__, tmp_path, layout, timeout=400, TORCHINDUCTOR_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "alone-0.json").read_text())[0]["as it is"]
    for rank in (0, 1):
        found, made = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
        assert set(made) == set(compiled.COMPILED) and all(made.values()), "torch has compiled something of each"
        for how, losses in found.items():
            for mine, theirs in zip(losses, alone, strict=True):
                assert mine == pytest.approx(theirs, rel=3e-6), how


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (2, "ddp"),
        (2, "fsdp"),
        *[pytest.param(n, kind, marks=pytest.mark.torture) for n in (3, 4, 6) for kind in ("ddp", "fsdp")],
    ],
)
def test_muon_has_the_bits_of_torchs_on_whole_matrices(size, kind, tmp_path):
    done = started(size, matrices.__file__, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    for rank in range(size):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert len(found) == (23 if (size, kind) == (6, "fsdp") else 24) and all(found), found
