"""The option ``precision.target``: from the command line to the recipes of the layers."""

import jax
import pytest

from lowprec_jax.cli.config_file import load_config, resolve_config_path
from lowprec_jax.errors import UserError
from lowprec_jax.training.config import PhaseConfig, TrainConfig
from lowprec_jax.training.network import build_network, precision_rules, target_messages
from training.helpers import VOCAB, tiny_config


def test_target__command_line__decides_the_formats_of_every_layer():
    words = ["--precision.target", "trainium2"]
    config = load_config(TrainConfig, resolve_config_path("quickstart"), words)
    last = precision_rules(config.precision)[-1].recipe
    assert last.name == "fp8_delayed@trainium2"
    assert str(last.fwd.left.format) == "e4m3"
    assert last.observe
    assert last.history_length == config.precision.history_length


def test_target__network__has_the_state_of_the_recipe_without_one():
    plain, target = (
        build_network(tiny_config(precision=precision), VOCAB)
        for precision in ({}, {"target": "amd-mi300"})
    )
    states = [jax.eval_shape(network.init, jax.random.key(0)) for network in (plain, target)]
    assert states[0] == states[1]
    assert {recipe.name for recipe in target.recipes.values()} == {"fp8_delayed@amd-mi300"}


def test_target_messages__phases__are_included_and_none_is_said_twice():
    names = {5: "mxfp8", 9: "fp8_rowwise", 12: "mxfp8"}
    phases = tuple(PhaseConfig(step=step, recipe=name) for step, name in names.items())
    precision = {"target": "nvidia-hopper", "phases": phases}
    assert target_messages(tiny_config(recipe="fp8_rowwise", precision=precision)) == [
        "mxfp8 on nvidia-hopper: block-scaled matmuls are dequantized to bf16 first "
        "(fwd, dgrad, wgrad)."
    ]


def test_target_messages__no_target__are_none():
    assert target_messages(tiny_config(recipe="mxfp8")) == []


def test_target__unknown__is_an_error_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'nvidia-hopper'"):
        precision_rules(tiny_config(precision={"target": "nvidia-hoper"}).precision)


def test_target__empty__is_an_error():
    with pytest.raises(ValueError, match="target is empty; give the name of a chip, or null"):
        tiny_config(precision={"target": ""})
