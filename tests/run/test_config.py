"""The configuration: strict keys, written precedence, values checked by name (PAINS row 26 from Python)."""

import msgspec
import pytest

import fivestep as fs
from fivestep.run.config import Config, load_config, options, recipes, to_toml

RECIPES = ["bigram", "digits", "gpt-chars", "gpt2-124m", "regression", "rnn-words", "transformer-words"]


def test_recipes_are_complete():
    assert recipes() == RECIPES
    for name in RECIPES:
        config = load_config(name, {})
        assert config.recipe == name
        assert config.max_iters or config.epochs


def test_the_seeds_numbers():
    config = load_config("bigram", {})
    assert (config.max_iters, config.learning_rate, config.optimizer) == (10_000, 3e-4, "adamw")
    assert (config.batch_size, config.block_size, config.replacement) == (32, 8, True)


def test_precedence(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "rnn-words"\nlearning_rate = 1.0\ncell = "gru"\n')
    assert load_config(str(file), {}).learning_rate == 1.0  # the file beats the recipe
    assert load_config(str(file), {}).bptt == 35  # the recipe beats the default
    config = load_config(str(file), {"learning_rate": 2.0})  # flags beat both
    assert (config.learning_rate, config.cell) == (2.0, "gru")


@pytest.mark.parametrize("flags", [{"epochs": 2}, {"max_iters": 7}, {"until": "5min"}])
def test_a_limit_replaces_the_limits_below(flags):
    config = load_config("gpt-chars", {"schedule": "constant", **flags})
    given = {name: getattr(config, name) for name in ("max_iters", "epochs", "until")}
    assert {name: value for name, value in given.items() if value is not None} == flags


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_file_repeats_itself(name, tmp_path):
    config = load_config(name, {"max_iters": 3, "seed": 5})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(str(tmp_path / "config.toml"), {}) == config


@pytest.mark.parametrize(
    "values, match",
    [
        ({"max_iter": 5}, "unknown option 'max_iter'; did you mean 'max_iters'"),
        ({"model": "gtp"}, r"model = 'gtp' is not one of .*\(--model\); did you mean 'gpt'"),
        ({"n_layer": 0}, r"n_layer = 0: expected int >= 1 \(--n-layer\)"),
        ({"dropout": 1.0}, r"dropout = 1.0: .* \(--dropout\)"),
        ({"learning_rate": "fast"}, r"learning_rate = 'fast': .*\(--learning-rate\)"),
        ({"batch_size": 2.5}, "--batch-size"),
        ({"data": [3]}, "--data"),
        ({"data": []}, "--data"),
        ({"max_iters": None}, "--max-iters, --epochs or --until"),
        ({"max_iters": None, "until": "5min"}, "linear schedule needs a planned end"),
        ({"min_learning_rate": 1.0}, "min_learning_rate = 1.0 is above"),
    ],
)
def test_refused(values, match):
    with pytest.raises(fs.UsageError, match=match):
        load_config("gpt-chars", values)


@pytest.mark.parametrize(
    "text, match", [("learning_rate = ", "not valid TOML"), ("learnin_rate = 1", "did you mean")]
)
def test_refused_files(tmp_path, text, match):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(fs.UsageError, match=match):
        load_config(str(tmp_path / "bad.toml"), {})
    with pytest.raises(fs.UsageError, match="cannot read"):
        load_config(str(tmp_path / "none.toml"), {})
    with pytest.raises(fs.UsageError, match="neither a recipe.*did you mean 'bigram'"):
        load_config("bigran", {})


def test_every_option_is_a_flag_with_help():
    """Fails when an option is added without a thought for its help or its kind."""
    names = [field.name for field in msgspec.structs.fields(Config)]
    assert [option.name for option in options()] == [name for name in names if name != "recipe"]
    for option in options():
        assert option.help.endswith(".") or option.help.endswith("."), option.name
        assert option.kind in (bool, int, float, str, list) or isinstance(option.kind, tuple), option.name
    assert len(names) <= 75
