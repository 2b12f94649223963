"""Recipes on chips: what is renamed, what is emulated, what stays."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec_jax import ops, recipes
from lowprec_jax.errors import UserError
from lowprec_jax.numerics import E2M3, E4M3, E4M3FN, E5M2, Quantizer, get_format
from lowprec_jax.recipes import Gemm, Recipe, Role
from lowprec_jax.recipes import target as target_module
from lowprec_jax.recipes.target import (
    Target,
    register_target,
    targets,
    translate,
    translate_rules,
)

ALL = ("fwd", "dgrad", "wgrad")


def formats_of(recipe):
    return {
        name: tuple(side and side.format.name for side in (gemm.left, gemm.right))
        for name in ALL
        if (gemm := getattr(recipe, name)) is not None
    }


def test_targets__table_in_the_docs__is_the_registry():
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    lines = text.split("| target | multiplies codes")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows == [
        [
            target.name,
            ", ".join(target.native),
            ", ".join(target.mx),
            ", ".join(target.nvfp4),
            ", ".join(f"{ocp}: {own}" for ocp, own in target.dialect.items()),
            ", ".join(target.no_gain),
        ]
        for target in targets()
    ]


@pytest.mark.parametrize(
    ("name", "e4m3", "e5m2", "e4m3_max"),
    [
        ("nvidia-hopper", "e4m3fn", "e5m2", 448),
        ("nvidia-blackwell", "e4m3fn", "e5m2", 448),
        ("amd-mi300", "e4m3fnuz", "e5m2fnuz", 240),
        ("amd-mi350", "e4m3fn", "e5m2", 448),
        ("tpu-v5", "e4m3b11fnuz", "e5m2", 30),
        ("tpu-v6", "e4m3b11fnuz", "e5m2", 30),
        ("tpu-v7", "e4m3fn", "e5m2", 448),
        ("trainium1", "e4m3", "e5m2", 240),
        ("trainium2", "e4m3", "e5m2", 240),
        ("trainium3", "e4m3fn", "e5m2", 448),
    ],
)
def test_translate__hybrid_fp8__has_the_formats_of_the_chip(name, e4m3, e5m2, e4m3_max):
    recipe, messages = translate("fp8_delayed", name)
    assert formats_of(recipe) == {
        "fwd": (e4m3, e4m3),
        "dgrad": (e5m2, e4m3),
        "wgrad": (e4m3, e5m2),
    }
    assert recipe.scale(Role.LHS, jnp.float32(e4m3_max)) == 1
    assert not any("first" in message for message in messages)  # nothing is emulated
    same = e4m3 == "e4m3fn"
    assert recipe.name == ("fp8_delayed" if same else f"fp8_delayed@{name}")
    assert (recipe == recipes.FP8_DELAYED) == same


def test_translate__changed_format__is_said_once_with_both_ranges():
    assert translate("fp8_current", "trainium2").messages == (
        "fp8_current on trainium2: e4m3fn becomes e4m3 (0.00195312 to 240, not 0.00195312 to 448).",
    )


BLOCKS = "block-scaled matmuls are dequantized to bf16 first"
PARTNER = "the quantized operand is dequantized first, its partner is in high precision"
CODES = "codes are converted to a wider type first"
THREE = "(fwd, dgrad, wgrad)"


@pytest.mark.parametrize(
    ("recipe", "target", "expected"),
    [
        ("none", "cpu", []),
        ("mxfp8", "nvidia-hopper", [f"{BLOCKS} {THREE}"]),
        ("mxfp8", "amd-mi300", [f"{BLOCKS} {THREE}"]),  # in OCP's elements: any are exact
        ("mxfp8", "tpu-v7", [f"{BLOCKS} {THREE}"]),
        ("mxfp8", "nvidia-blackwell", []),
        ("mxfp8", "amd-mi350", []),
        ("mxfp8", "trainium3", []),
        ("mxfp4", "trainium3", []),
        ("mxfp4", "nvidia-hopper", [f"{BLOCKS} {THREE}"]),
        ("nvfp4", "nvidia-blackwell", []),
        ("nvfp4", "amd-mi350", [f"{BLOCKS} {THREE}"]),
        ("fp8_block", "nvidia-hopper", []),  # a matmul of codes for each block
        ("fp8_block", "cpu", [f"{BLOCKS.replace('bf16', 'f32')} {THREE}"]),
        ("fp8_delayed", "cpu", [f"{CODES} {THREE}"]),
        ("int8", "nvidia-hopper", []),
        ("int8", "tpu-v5", []),
        ("int8", "tpu-v7", [f"{CODES} {THREE}"]),
        ("int4_weights", "nvidia-hopper", [f"{PARTNER} (fwd, dgrad)"]),
        ("w4a4", "tpu-v6", [f"{PARTNER} (dgrad, wgrad)"]),
        ("w4a8", "tpu-v6", [f"{CODES} (fwd)", f"{PARTNER} (dgrad, wgrad)"]),
    ],
)
def test_translate__what_the_chip_lacks__is_said_with_its_gemms(recipe, target, expected):
    translated, messages = translate(recipe, target)
    assert messages == tuple(f"{recipe} on {target}: {text}." for text in expected)
    in_blocks = recipe in ("mxfp8", "mxfp4", "nvfp4") and not expected and target != "cpu"
    backend = "block_scaled" if in_blocks else None
    assert translated == dataclasses.replace(recipes.get_recipe(recipe), backend=backend)


def test_translate__backend_that_was_asked_for__is_kept():
    recipe = dataclasses.replace(recipes.MXFP8, backend="upcast")
    assert translate(recipe, "nvidia-blackwell").recipe.backend == "upcast"


def test_translate__fp8_without_a_rate_of_its_own__is_said():
    said = "fp8_rowwise on tpu-v6: no gain in speed over bf16 is published (fwd, dgrad, wgrad)."
    assert said in translate("fp8_rowwise", "tpu-v6").messages


def test_translate__power_of_two_scales_in_blocks__are_dequantized_to_bf16():
    recipe = dataclasses.replace(recipes.FP8_BLOCK, scale_rounding="power_of_two")
    assert translate(recipe, "cpu").messages == (f"fp8_block on cpu: {BLOCKS} {THREE}.",)


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        (Quantizer(E4M3FN, contract=16, free=1, scale="rceil"), BLOCKS),  # hardware has 32
        (Quantizer(E4M3FN, free=16), BLOCKS.replace("bf16", "f32")),
        (Quantizer(E2M3), CODES),  # XLA has no arrays of 6 bits
    ],
)
def test_translate__shapes_and_types_without_a_kernel__are_emulated(quantizer, text):
    recipe = Recipe(name="mine", fwd=Gemm(quantizer, quantizer))
    assert translate(recipe, "nvidia-blackwell").messages == (
        f"mine on nvidia-blackwell: {text} (fwd).",
    )


@pytest.mark.parametrize("target", [target.name for target in targets()])
@pytest.mark.parametrize("recipe", [*(r.name for r in recipes.recipes()), "w4a8"])
def test_translate__any_recipe_on_any_chip__keeps_its_state_and_settles(recipe, target):
    recipe = dataclasses.replace(recipes.get_recipe(recipe), observe=True)
    translated, _ = translate(recipe, target)
    before, after = (
        jax.eval_shape(lambda r=r: recipes.init_state(r, (2,))) for r in (recipe, translated)
    )
    assert before == after
    assert translate(translated, target).recipe == translated
    changed = dataclasses.replace(
        translated,
        name=recipe.name,
        backend=recipe.backend,
        **{name: getattr(recipe, name) for name in ALL},
    )
    assert changed == recipe


def test_translate__dot_general__computes_in_the_format_of_the_chip():
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16), (16, 4)))
    recipe = translate("fp8_current", "amd-mi300").recipe
    out = ops.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), recipe=recipe)

    def rounded(x):
        scale = np.float32(np.abs(x).max() * np.float32(1 / 240))
        codes = np.clip(x * (np.float32(1) / scale), -240, 240).astype(ml_dtypes.float8_e4m3fnuz)
        return codes.astype(np.float64) * scale

    # Codes are the same bits; sums of 16 products in f32: 16 half units in the last place.
    np.testing.assert_allclose(out, rounded(lhs) @ rounded(rhs), rtol=0, atol=16 * 2**-24 * 16)


def test_translate_rules__several_recipes__each_message_once():
    rules, messages = translate_rules(
        [("a", "fp8_rowwise"), ("b", "fp8_rowwise"), (".*", "none")], "trainium2"
    )
    assert [(rule.path, rule.recipe.name) for rule in rules] == [
        ("a", "fp8_rowwise@trainium2"),
        ("b", "fp8_rowwise@trainium2"),
        (".*", "none"),
    ]
    assert len(messages) == 1


def test_get_target__unknown_name__lists_and_suggests():
    with pytest.raises(UserError, match=r"'amd-mi30'\. Known: nvidia-hopper, .*Did you mean 'amd"):
        translate("fp8_delayed", "amd-mi30")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(target_module, "_REGISTRY", dict(target_module._REGISTRY))


@pytest.mark.usefixtures("registry")
def test_register_target__new_chip__is_translated_to():
    mine = Target(name="mine", native=("e4m3", "e5m2"), dialect={"e4m3fn": "e4m3"})
    assert register_target(mine) is register_target(mine)  # twice the same is fine
    recipe = translate(Recipe(name="r", fwd=Gemm(E4M3FN, E5M2)), "mine").recipe
    assert recipe == Recipe(name="r@mine", fwd=Gemm(E4M3, E5M2))


@pytest.mark.usefixtures("registry")
def test_register_target__bad_rows__are_refused():
    with pytest.raises(ValueError, match="'cpu' is registered already"):
        register_target(Target(name="cpu", native=("e4m3fn",)))
    with pytest.raises(ValueError, match="Unknown format 'e4m4'"):
        register_target(Target(name="mine", dialect={"e4m3fn": "e4m4"}))
    assert get_format("e4m3").max == 240
