"""What a recipe accepts, refuses and derives."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import BF16, E4M3FN, E4M3FNUZ, E5M2, E8M0FNU, F32
from lowprec_jax.recipes import FP8_CURRENT, FP8_DELAYED, NONE, Gemm, Recipe, Role

FWD, DGRAD, WGRAD = Gemm(E4M3FN, E4M3FN), Gemm(E5M2, E4M3FN), Gemm(E4M3FN, E5M2)
E5M2_LIKE = [f for f in numerics.formats() if f.bits == 8 and f.mantissa_bits == 2]


@pytest.mark.parametrize("left", E5M2_LIKE, ids=str)
@pytest.mark.parametrize("right", E5M2_LIKE, ids=str)
def test_gemm__two_mantissa_bits_on_both_sides__is_refused(left, right):
    with pytest.raises(ValueError, match="is refused: one operand needs 3 mantissa bits"):
        Gemm(left, right)


@pytest.mark.parametrize("fmt", [F32, BF16, E8M0FNU], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gemm__not_a_low_precision_element__is_refused(fmt, side):
    formats = {"left": E4M3FN, "right": E4M3FN, side: fmt}
    with pytest.raises(ValueError, match=f"{fmt} is no low-precision element format"):
        Gemm(**formats)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("history_length", 0),
        ("history_length", -3),
        ("amax_reduction", "mean"),
        ("scaling", "static"),
    ],
)
def test_recipe__impossible_option__names_recipe_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"'mine'.*{field} is {re.escape(repr(value))}"):
        Recipe(name="mine", **{field: value})


def test_recipe__positional_arguments__are_refused():
    with pytest.raises(TypeError):
        Recipe("mine", FWD)


def test_recipe__assignment_to_a_field__is_refused():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FP8_DELAYED.margin = 1


def test_fp8_recipes__formats__are_hybrid():
    for recipe in (FP8_DELAYED, FP8_CURRENT):
        assert (recipe.fwd, recipe.dgrad, recipe.wgrad) == (FWD, DGRAD, WGRAD)


def test_fp8_delayed__defaults__are_a_history_of_16_its_max_and_no_margin():
    assert FP8_DELAYED.history_length == 16
    assert FP8_DELAYED.amax_reduction == "max"
    assert FP8_DELAYED.margin == 0
    assert FP8_DELAYED.scaling == "delayed"
    assert FP8_CURRENT.scaling == "current"


@pytest.mark.parametrize(
    ("recipe", "quantizes", "delayed", "stateful"),
    [
        (NONE, False, False, False),
        (Recipe(name="r", scaling="delayed"), False, False, False),
        (Recipe(name="r", observe=True), False, False, False),
        (FP8_CURRENT, True, False, False),
        (dataclasses.replace(FP8_CURRENT, observe=True), True, False, True),
        (FP8_DELAYED, True, True, True),
        (Recipe(name="r", wgrad=WGRAD, scaling="delayed"), True, True, True),
    ],
)
def test_recipe__kinds__tell_what_needs_state(recipe, quantizes, delayed, stateful):
    assert (recipe.quantizes, recipe.delayed, recipe.stateful) == (quantizes, delayed, stateful)


@pytest.mark.parametrize(
    ("reduction", "length", "window"), [("max", 7, 7), ("max", 1, 1), ("most_recent", 7, 1)]
)
def test_window__reduction__keeps_no_more_than_it_reads(reduction, length, window):
    recipe = Recipe(name="r", history_length=length, amax_reduction=reduction)
    assert recipe.window == window


def test_formats_of__hybrid_without_wgrad__is_by_role_and_gemm():
    recipe = Recipe(name="r", fwd=Gemm(E4M3FN, E4M3FNUZ), dgrad=Gemm(E5M2, E4M3FN))
    assert recipe.formats_of(Role.LHS) == (E4M3FN, None)
    assert recipe.formats_of(Role.RHS) == (E4M3FNUZ, E4M3FN)
    assert recipe.formats_of(Role.OUTPUT_GRAD) == (E5M2, None)


def test_format_of__first_gemm_in_high_precision__is_the_second_gemms():
    recipe = Recipe(name="r", wgrad=WGRAD)
    assert recipe.format_of(Role.LHS) == E4M3FN
    assert recipe.format_of(Role.RHS) is None
    assert recipe.format_of(Role.OUTPUT_GRAD) == E5M2


def test_recipe__equal_fields__are_equal_and_hash_alike():
    copy = dataclasses.replace(FP8_DELAYED)
    assert copy == FP8_DELAYED
    assert hash(copy) == hash(FP8_DELAYED)
    assert dataclasses.replace(FP8_DELAYED, margin=1) != FP8_DELAYED


def test_scale__power_of_two__is_the_free_scale_rounded_up():
    free = dataclasses.replace(FP8_DELAYED, margin=1)
    rounded = dataclasses.replace(free, scale_rounding="power_of_two")
    amax = jnp.asarray([448.0, 449.0, 3.0, 0.0], jnp.float32)
    np.testing.assert_array_equal(rounded.scale(Role.LHS, amax), [2.0, 4.0, 2**-6, 1.0])
    np.testing.assert_array_equal(free.scale(Role.LHS, amax)[:2], np.float32([2.0, 449 / 224]))
