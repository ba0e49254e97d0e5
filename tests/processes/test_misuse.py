"""What users do beside the plain path is right in all processes, or refused in all; never wrong without a word."""

import json
import signal
import socket
from pathlib import Path

import pytest

import fivestep as fs
from fivestep import processes
from fivestep.loop.shares import Sharing
from tests.processes import misuse
from tests.processes.launched import started

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misuse")
    done = started(2, misuse.__file__, folder)
    assert done.returncode == 0, done.stderr
    return [{"folder": folder} | json.loads((folder / f"made-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("parts_of_a_model", "not through the model's forward"),
        ("unfrozen_meanwhile", "was frozen or unfrozen meanwhile"),
        ("used_in_one", "took no part in the loss"),
        ("other_data", "have other batches than each other"),
        ("longer_in_one", "has 2 batches an epoch in one process and 4 in another"),
        ("other_order", "have other batches than each other"),
        ("evaluated_on_others", "have other batches than each other"),
        ("rows_that_a_process_has", "max_norm"),
        ("apart", "is not the run directory of rank 0"),
        ("other_rate", "start all processes with the same model and the same options"),
    ],
)
def test_what_would_be_wrong_is_refused_in_all(made, case, sentence):
    assert all(sentence in str(one[case]) for one in made), made[0][case]


@pytest.mark.parametrize("case", ["draws_in_the_body", "rate_of_a_batch"])
def test_all_have_the_same_weights(made, case):
    assert made[0][case] == 0.0


def test_who_all_fail_alike_have_told_so_as_often(made):
    told = "else one would take another's old failure for a new one"
    assert [one["all_fail_alike"] for one in made] == [[3, None], [3, None]], told


def test_a_row_that_stands_in_may_have_nothing_to_learn(made):
    losses = made[0]["nothing_to_stand_in"]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_targets_without_weight_add_nothing(made):
    for weights, loss in (one["targets_without_weight"] for one in made):
        assert weights < 1e-6 and abs(loss) < 1e-6


def test_empty_batches_are_left_out_in_all(made):
    one, other = made[0]["empty_batches"], made[1]["empty_batches"]
    assert one == other and [apart for apart, *_ in one] == [0, 0, 0]
    assert [count for *_, count in one] == [16, 16, 32]
    with pytest.raises(fs.UsageError, match="the first batch of rank 0 is empty"):
        Sharing(None, []).window([None], 1)


@pytest.mark.parametrize("case", ["statistics", "running_buffers"])
def test_what_is_evaluated_is_what_is_saved(made, case):
    told, real, *held = made[0][case]
    assert told == pytest.approx(real, rel=1e-5)
    assert made[1][case] == made[0][case]
    assert all(one == held[0] for one in held)


def test_a_shuffled_split_is_evaluated_whole(made):
    told, real = made[0]["evaluated_shuffled"]
    assert told == pytest.approx(real, rel=1e-6) and made[1]["evaluated_shuffled"][0] == told


def test_an_objective_has_the_model_itself(made):
    for one in made:
        scale, more, penalty = one["asked_of_the_model"]
        assert scale == pytest.approx(0.9**4) and more == pytest.approx(penalty, rel=1e-4)


def test_batches_keep_their_kind(made):
    assert made[0]["batches_of_other_kinds"] == ["Encoded", 2, ["b", "c"]]


def test_weights_that_are_not_finite_are_not_saved(made):
    sentence, newest = made[0]["not_finite"]
    assert "parameters not finite themselves" in sentence and newest == "step-00000004"
    assert made[1]["not_finite"][0] == sentence


def test_batches_of_each_go_on_with_as_many_processes(made):
    folder = Path(made[0]["folder"])
    with pytest.raises(fs.UsageError, match="with world size 2, and this start has world size 1"):
        misuse.sampled(folder, 6)


def test_each_training_and_each_process_drops_others(made):
    masks = [str(mask) for one in made for mask in one["masks"]]
    assert len(set(masks)) == len(masks) == 6


def test_a_carried_state_is_joined_as_it_was_parted(made):
    assert all(all(one["carried"]) for one in made)


def test_other_options_are_refused_with_a_sentence(tmp_path):
    done = started(2, misuse.__file__, tmp_path, "options", timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "learning_rate is 0.1 in rank 0 and 0.2 in rank 1: start all processes with the same options" in done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "needs RANK too"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "must be below WORLD_SIZE"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "must be a whole number"),
    ],
)
def test_a_forgotten_variable_is_no_training_alone(monkeypatch, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(fs.UsageError, match=sentence):
        processes.announced()


@pytest.mark.torture
@pytest.mark.parametrize("mode", ["body", "metric", "leaves", "plain"])
def test_an_error_of_the_callers_own_is_told_to_all(tmp_path, mode):
    done = started(2, misuse.__file__, tmp_path, mode, timeout=300)
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr and "failed first: " in done.stderr
    assert "ProcessError: rank 1 on " in done.stderr, done.stderr


ELSEWHERE = {
    "alone": "rank 1 on HOST is at step 8: forward and backward, and rank 0 on HOST at an evaluation: all processes",
    "alone_in_shards": "rank 1 on HOST is at step 8: forward and backward, and rank 0 on HOST at an evaluation: all",
    "saves_alone": "rank 0 on HOST is at step 8: forward and backward, and rank 1 on HOST at a checkpoint of step 7",
    "begins_anew": "rank 0 on HOST is at step 8: forward and backward, and rank 1 on HOST at the start of a training",
    "shorter": "rank 0 on HOST is at step 2: forward and backward, and rank 1 on HOST at epoch 2: all processes must",
    "evaluates_last": "rank 1 on HOST has ended, and ",  # seen by its beat, or by its connections
    "sampler_in_one": "rank 1 on HOST is at epoch 1, with a DistributedSampler, and rank 0 on HOST at epoch 1: all",
    "waits_elsewhere": "rank 1 on HOST is at step 7: forward and backward, and waits for a collective, and rank 0 on",
    "ends": "rank 1 on HOST has ended, and this one was at step 8: forward and backward: all processes must leave",
}


@pytest.mark.parametrize(
    "mode", ["alone", *(pytest.param(one, marks=pytest.mark.torture) for one in [*ELSEWHERE][1:])]
)
def test_calls_that_do_not_match_are_named(tmp_path, mode):
    """gloo would abort one, or all would wait for ever."""
    done = started(2, misuse.__file__, tmp_path, mode, timeout=300)
    assert done.returncode == 1
    assert ELSEWHERE[mode].replace("HOST", socket.gethostname()) in done.stderr, done.stderr


@pytest.mark.torture
def test_one_that_is_killed_is_named_where_it_is_waited_for(tmp_path):
    done = started(2, misuse.__file__, tmp_path, "killed_before", timeout=300)
    assert done.returncode == signal.SIGKILL
    assert "ProcessError: rank 1 on " in done.stderr and "is gone: killed, or" in done.stderr, done.stderr


@pytest.mark.torture
def test_where_gloo_aborts_one_it_is_shown_where_it_stood(tmp_path):
    done = started(2, misuse.__file__, tmp_path, "stray", timeout=300)
    assert done.returncode == signal.SIGABRT
    assert "distributed collective mismatch" in done.stderr
    assert "Fatal Python error: Aborted" in done.stderr and "in stray\n" in done.stderr, done.stderr
