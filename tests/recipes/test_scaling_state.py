"""Delayed scaling, bit for bit against an oracle written from the documented formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.numerics import E4M3FN, E5M2, MIN_AMAX, Quantizer
from lowprec_jax.recipes import (
    FP8_CURRENT,
    FP8_DELAYED,
    NONE,
    Column,
    Gemm,
    Recipe,
    Record,
    Role,
    advance_state,
    history_amax,
    history_scales,
    init_state,
    is_calibrated,
    merge_observations,
)

from .oracles import DelayedScaling

INF, NAN = float("inf"), float("nan")
_advance = jax.jit(advance_state)
FORMATS = [FP8_DELAYED.format_of(role) for role in Role]


def _recipe(length=16, margin=0, reduction="max"):
    return dataclasses.replace(
        FP8_DELAYED, history_length=length, margin=margin, amax_reduction=reduction
    )


def _script(length):
    """f32[> 2 * length, 3]: a different story for each role, with non-finite and tiny values."""
    rng = np.random.default_rng(0)
    growth = 0.3 * 1.17 ** np.arange(12)
    tail = 2.0 ** rng.uniform(-3, 3, 2 * length + 7)
    stories = (
        [*growth, 100 * growth[-1], 0.0, *growth[:3], INF, 2.5, NAN, 1e-40, 3.0, 0.0, *tail],
        [NAN, 1e-40, 0.0, 5.0, -0.0, 1e30, 1e-30, INF, INF, 2e-38, *growth, *tail[::-1], NAN],
        [1e-8, 1e-6, *growth * 1e-5, 1e-12, 3e38, 1.2e-38, INF, NAN, 0.0, 7e-6, *tail * 1e-6],
    )
    return np.stack([np.array(s[: min(map(len, stories))]) for s in stories], 1).astype(np.float32)


def _observation(amax):
    """f32[3, 5] with the given amaxes, of tensors of one element."""
    return jnp.zeros((3, 5)).at[:, Column.AMAX].set(amax).at[:, Column.SIZE].set(1)


@functools.cache
def _compiled(recipe):
    def step(state, amax):
        state = state | {"pending": merge_observations(state["pending"], _observation(amax))}
        state = advance_state(state)
        return state, (state, history_scales(state["amax_history"], recipe))

    return jax.jit(lambda script: jax.lax.scan(step, init_state(recipe), script)[1])


def _run(recipe, script):
    """States and scales after every step, the observation merged into pending as ops do."""
    states, scales = _compiled(recipe)(jnp.asarray(script))
    _assert_same_bits(scales[..., 0], scales[..., 1])  # both GEMMs multiply the same codes
    return states, scales[..., 0]


def _expected(recipe, script):
    """The same trajectory from the oracle: ring, scale, dropped, age by step and role."""
    columns = []
    for role, story in zip(Role, script.T, strict=True):
        fmt = recipe.format_of(role).name
        oracle = DelayedScaling(fmt, recipe.history_length, recipe.margin, recipe.amax_reduction)
        rows = []
        for amax in story:
            oracle.push(amax)
            rows.append((oracle.ring.copy(), oracle.scale(), oracle.dropped, oracle.age))
        columns.append([np.array(x, np.float32) for x in zip(*rows, strict=True)])
    return [np.stack(parts, 1) for parts in zip(*columns, strict=True)]


def _assert_same_bits(actual, expected):
    np.testing.assert_array_equal(
        np.asarray(actual).view(np.uint32), np.asarray(expected, np.float32).view(np.uint32)
    )


@pytest.mark.parametrize("reduction", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 3, 16])
def test_advance_state__scripted_amaxes__equals_the_oracle_bit_for_bit(length, margin, reduction):
    recipe, script = _recipe(length, margin, reduction), _script(length)
    assert len(script) > 2 * length
    states, scales = _run(recipe, script)
    ring, scale, dropped, age = _expected(recipe, script)
    _assert_same_bits(states["amax_history"], ring[..., : recipe.window])
    _assert_same_bits(scales, scale)
    _assert_same_bits(states["observed"][..., Record.DROPPED], dropped)
    _assert_same_bits(states["observed"][..., Record.AGE], age)


def test_advance_state__history_of_1024__equals_the_oracle_and_forgets_after_1024_steps():
    recipe = _recipe(1024)
    script = np.full((2100, 3), 2.0, np.float32)
    script[5], script[900, 1], script[901, 2] = 500.0, NAN, INF
    states, scales = _run(recipe, script)
    ring, scale, *_ = _expected(recipe, script)
    _assert_same_bits(states["amax_history"], ring)
    _assert_same_bits(scales, scale)
    # Role by role the outlier leaves after 1024 pushes; one push was dropped in two of the rows.
    largest = np.asarray(states["amax_history"]).max(-1)
    last = [int(np.flatnonzero(largest[:, role] == 500)[-1]) for role in Role]
    assert last == [5 + 1023, 5 + 1024, 5 + 1024]


@pytest.mark.parametrize("length", [1, 3, 16])
def test_advance_state__outlier__holds_the_scale_for_exactly_the_window(length):
    script = np.ones((2 * length + 5, 3), np.float32)
    script[2] = 64.0
    _, scales = _run(_recipe(length), script)
    high = np.asarray(scales)[:, Role.LHS] > 1 / 448 * 1.5
    assert list(np.flatnonzero(high)) == list(range(2, 2 + length))


@pytest.mark.parametrize("bad", [NAN, INF, 0.0, 1e-40])
@pytest.mark.parametrize("length", [1, 16, 1024])
def test_advance_state__one_unusable_amax__next_step_follows_the_data(bad, length):
    states, scales = _run(_recipe(length), np.array([[1.0], [bad], [7.0]] * np.ones(3), np.float32))
    np.testing.assert_array_equal(scales[1], scales[0])
    expected = [np.float32(7) * (np.float32(1) / np.float32(f.max)) for f in FORMATS]
    _assert_same_bits(scales[2], expected)
    np.testing.assert_array_equal(states["observed"][-1, :, Record.DROPPED], 1)


def test_advance_state__nothing_observed__nothing_changes():
    state = init_state(_recipe(3))
    state = _advance(state | {"pending": _observation(2.0)})
    assert state["amax_history"][0, 0] == 2
    _assert_same_tree(_advance(state), state)


def test_advance_state__one_role_unobserved__only_that_row_is_kept():
    state = _advance(init_state(_recipe(3)) | {"pending": _observation(2.0)})
    seen = _observation(3.0).at[Role.OUTPUT_GRAD].set(0)
    new = _advance(state | {"pending": seen})
    np.testing.assert_array_equal(new["amax_history"], [[3, 2, 0], [3, 2, 0], [2, 0, 0]])
    np.testing.assert_array_equal(new["observed"][:, Column.AMAX], [3, 3, 2])
    np.testing.assert_array_equal(new["observed"][:, Record.AGE], 0)


@pytest.mark.parametrize("when", [False, jnp.array(False)])
def test_advance_state__step_not_complete__goes_on_collecting(when):
    state = init_state(_recipe(3)) | {"pending": _observation(2.0)}
    _assert_same_tree(advance_state(state, when), state)


def test_advance_state__stack__equals_layer_by_layer():
    recipe = _recipe(3)
    amaxes = np.array([[1, 2, 3], [NAN, 5, 6], [7, 0, 9], [10, 11, INF]], np.float32)
    singles = [init_state(recipe) | {"pending": _observation(a)} for a in amaxes]
    stacked = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 2, *x[0].shape), *singles)
    expected = [_advance(s) for s in singles]
    expected = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 2, *x[0].shape), *expected)
    _assert_same_tree(_advance(stacked), expected)


def test_advance_state__observed__holds_the_last_completed_step():
    state = _advance(init_state(_recipe(3)) | {"pending": _observation(2.0)})
    np.testing.assert_array_equal(state["observed"][:, : len(Column)], _observation(2.0))
    np.testing.assert_array_equal(state["pending"], 0)


def test_advance_state__observing_recipe_without_delay__keeps_no_history():
    state = init_state(dataclasses.replace(FP8_CURRENT, observe=True))
    assert "amax_history" not in state
    new = _advance(state | {"pending": _observation(2.0)})
    np.testing.assert_array_equal(new["observed"][:, : len(Column)], _observation(2.0))
    assert new.keys() == state.keys()


@pytest.mark.parametrize("recipe", [NONE, FP8_CURRENT])
def test_init_state__recipe_without_state__is_empty(recipe):
    assert init_state(recipe, (4,)) == {}


@pytest.mark.parametrize("stack", [(), (4,), (4, 2)])
def test_init_state__delayed__has_the_documented_layout(stack):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), init_state(_recipe(7), stack))
    assert shapes == {
        "amax_history": ((*stack, 3, 7), "float32"),
        "pending": ((*stack, 3, 5), "float32"),
        "observed": ((*stack, 3, 7), "float32"),
    }


def test_merge_observations__two__takes_the_larger_amax_and_adds_the_counts():
    a = jnp.broadcast_to(jnp.array([2.0, 1, 2, 3, 100]), (3, 5))
    b = jnp.broadcast_to(jnp.array([5.0, 10, 20, 30, 50]), (3, 5))
    np.testing.assert_array_equal(merge_observations(a, b)[1], [5, 11, 22, 33, 150])


@pytest.mark.parametrize("amax", [0.0, 2.0, INF])
def test_merge_observations__zeros__are_the_identity(amax):
    seen = _observation(amax)
    np.testing.assert_array_equal(merge_observations(seen, jnp.zeros((3, 5))), seen)
    np.testing.assert_array_equal(merge_observations(jnp.zeros((3, 5)), seen), seen)


def test_merge_observations__nan_in_one__stays_nan_in_any_order():
    a, b = _observation(NAN), _observation(3.0)
    for merged in (merge_observations(a, b), merge_observations(b, a)):
        assert jnp.isnan(merged[:, Column.AMAX]).all()
        np.testing.assert_array_equal(merged[:, Column.SIZE], 2)


@pytest.mark.parametrize("rounding", ["none", "power_of_two"])
def test_history_scales__formats_of_their_own__are_those_of_the_amax(rounding):
    recipe = Recipe(
        name="mixed",
        fwd=Gemm(E4M3FN, Quantizer(E5M2, margin=2)),
        dgrad=Gemm(E5M2, E4M3FN),
        wgrad=Gemm(Quantizer(E4M3FN, scale="power_of_two"), E4M3FN),
        scaling="delayed",
        scale_rounding=rounding,
    )
    rng = np.random.default_rng(0)
    history = np.float32(2.0) ** rng.uniform(-130, 127, (50, 3, 4)).astype(np.float32)
    history[rng.random(history.shape) < 0.3] = 0
    history[7] = 0
    history[8, :, 1] = INF  # no amax that advances: it is passed over

    scales = history_scales(jnp.asarray(history), recipe)

    usable = (history >= np.finfo(np.float32).tiny) & (history < INF)
    largest = np.where(usable, history, 0).max(-1)
    for role in Role:
        for place, quantizer in enumerate(recipe.quantizers_of(role)):
            limit = np.float32(1) / np.float32(quantizer.format.max)
            scale = np.clip(largest[:, role] * (limit * 2.0**quantizer.margin), 2.0**-126, 2.0**126)
            if quantizer.scale == "power_of_two":
                scale = np.float32(2) ** np.ceil(np.log2(scale.astype(np.float64)))
            expected = np.where(largest[:, role] > 0, scale, 1)
            _assert_same_bits(scales[:, role, place], expected)
            if place == 0:
                amax = history_amax({"amax_history": np.where(usable, history, 0)})[:, role]
                _assert_same_bits(recipe.scale(role, amax), expected)


def test_history_scales__scale_rule_one_and_high_precision__are_one():
    one = Quantizer(E4M3FN, scale="one")
    recipe = Recipe(name="mixed", fwd=Gemm(one, E4M3FN), dgrad=Gemm(E5M2, one), scaling="delayed")
    scales = history_scales(jnp.full((3, 4), 896.0), recipe)
    e4m3fn, e5m2 = (np.float32(896) * (np.float32(1) / np.float32(limit)) for limit in (448, 57344))
    np.testing.assert_array_equal(scales, [[1, 1], [e4m3fn, 1], [e5m2, 1]])


@pytest.mark.parametrize(("smallest", "expected"), [(0.0, False), (MIN_AMAX, True), (1.0, True)])
def test_is_calibrated__smallest_amax_of_a_site__decides(smallest, expected):
    state = init_state(_recipe(3), (2,))
    state["amax_history"] = state["amax_history"].at[:, :, 1].set(1.0).at[1, 2, 1].set(smallest)
    np.testing.assert_array_equal(is_calibrated(state), [True, expected])


def _assert_same_tree(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
