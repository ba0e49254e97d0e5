"""What users do beside the plain path is right in all processes, or refused in all; never wrong without a word."""

import json

import pytest

from tests.processes import misuse
from tests.processes.launched import started

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misuse")
    done = started(2, misuse.__file__, folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"made-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("parts_of_a_model", "not through the model's forward"),
        ("unfrozen_meanwhile", "was frozen or unfrozen meanwhile"),
        ("used_in_one", "took no part in the loss"),
        ("other_data", "have other batches than each other"),
        ("longer_in_one", "has 2 batches an epoch in one process and 4 in another"),
    ],
)
def test_what_would_be_wrong_is_refused_in_all(made, case, sentence):
    assert all(sentence in str(one[case]) for one in made), made[0][case]


@pytest.mark.parametrize("case", ["draws_in_the_body", "rate_of_a_batch"])
def test_all_have_the_same_weights(made, case):
    assert made[0][case] == 0.0


def test_a_row_that_stands_in_may_have_nothing_to_learn(made):
    losses = made[0]["nothing_to_stand_in"]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_what_is_evaluated_is_what_is_saved(made):
    told, real = made[0]["statistics"]
    assert told == pytest.approx(real, rel=1e-5)
    assert made[1]["statistics"][0] == told


def test_each_training_and_each_process_drops_others(made):
    masks = [str(mask) for one in made for mask in one["masks"]]
    assert len(set(masks)) == len(masks) == 6


def test_a_carried_state_is_joined_as_it_was_parted(made):
    assert all(all(one["carried"]) for one in made)


@pytest.mark.parametrize("mode", ["body", "metric"])
def test_an_error_of_the_callers_own_is_told_to_all(tmp_path, mode):
    done = started(2, misuse.__file__, tmp_path, mode, timeout=60)
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr and "failed first: 'a " in done.stderr
    assert "ProcessError: rank 1 on " in done.stderr, done.stderr
