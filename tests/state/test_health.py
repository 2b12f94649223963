"""Health figures, from observations written by hand and from two layers with broken inputs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax import compat, ops, state
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import FP8_CURRENT, FP8_DELAYED, Column, Record, init_state
from lowprec_jax.state import (
    Health,
    OperandColumn,
    health,
    nonfinite,
    operand_names,
    operand_table,
    summarize,
)

#                amax, saturated, underflow, nonfinite, size
QUIET = [[1.0, 0, 0, 0, 100], [1.0, 0, 0, 0, 50], [1.0, 0, 0, 0, 25]]
NOISY = [[9.0, 10, 5, 0, 100], [1.0, 0, 2, 0, 50], [np.inf, 3, 5, 1, 25]]


def _record(observed, age=0, dropped=0):
    """f32[..., 3, 7] of an observation [..., 3, 5], ages and dropped ones [..., 3]."""
    observed = np.asarray(observed, np.float32)
    since = np.stack(np.broadcast_arrays(age, dropped, observed[..., 0])[:2], axis=-1)
    return jnp.asarray(np.concatenate([observed, since], axis=-1), jnp.float32)


def _site(observed, age=0):
    return init_state(FP8_DELAYED) | {"observed": _record(observed, age)}


def test_health__two_sites__fractions_are_of_all_elements():
    report = health({"a": _site(QUIET, (0, 7, 1)), "b": _site(NOISY, (2, 3, 0))})
    assert report.saturated == pytest.approx(13 / 350)
    assert report.underflow == pytest.approx(12 / 350)
    assert (report.nonfinite, report.scale_age) == (1.0, 7.0)
    assert report.worst == "b output_grad"  # 8 of 25, more than 15 of 100


def test_health__stack__names_the_layer():
    site = init_state(FP8_DELAYED, (2,)) | {"observed": _record([QUIET, NOISY])}
    report = health({"blocks": {"up": site}})
    assert report.worst == "blocks/up[1] output_grad"
    assert report.saturated == pytest.approx(13 / 350)


def test_health__deep_stacks__is_what_numpy_sums():
    rng = np.random.default_rng(0)
    observed = rng.integers(0, 1000, (3, 40, 3, 5)).astype(np.float32)
    observed[..., Column.SIZE] += 1
    age = rng.integers(0, 50, (3, 40, 3)).astype(np.float32)
    fresh = init_state(FP8_DELAYED, (40,))
    tree = {str(i): fresh | {"observed": _record(observed[i], age[i])} for i in range(3)}
    rows = observed.reshape(-1, 5)
    _, saturated, underflow, broken, size = rows.sum(0, dtype=np.float64)
    report = health(tree)
    # A fraction of an operand is rounded to f32, once.
    assert report.saturated == pytest.approx(saturated / size, rel=2**-24)
    assert report.underflow == pytest.approx(underflow / size, rel=2**-24)
    assert (report.nonfinite, report.scale_age) == (broken, age.max())
    lost = (rows[:, Column.SATURATED] + rows[:, Column.UNDERFLOW]) / np.maximum(rows[:, -1], 1)
    assert report.worst == operand_names(tree)[lost.argmax()]


def test_summarize__fewer_names_than_rows__is_an_error():
    with pytest.raises(ValueError, match="1 names for 3 operands"):
        summarize(np.zeros((3, len(OperandColumn)), np.float32), ["a lhs"])


@pytest.mark.parametrize("tree", [{}, {"layer": {}}])
def test_health__no_sites__is_zero_and_names_nothing(tree):
    assert health(tree) == Health(0.0, 0.0, 0.0, 0.0, "")


def test_health__nothing_observed_yet__is_zero_and_finite():
    assert health({"a": init_state(FP8_DELAYED)})[:4] == (0.0, 0.0, 0.0, 0.0)


def test_health__values_before_advance__are_not_counted():
    pending = init_state(FP8_DELAYED) | {"pending": jnp.array(NOISY, jnp.float32)}
    assert health({"a": pending}).saturated == 0
    assert health(state.advance({"a": pending})).saturated == pytest.approx(13 / 175)


# The table of operands.

DELAYED = dataclasses.replace(FP8_DELAYED, margin=1)
CURRENT = dataclasses.replace(FP8_CURRENT, observe=True, scale_rounding="power_of_two")
FORWARD = dataclasses.replace(
    CURRENT, name="forward", scale_rounding="none", dgrad=None, wgrad=None
)
RECIPES = {"blocks": DELAYED, "head": CURRENT, "tail": FORWARD}
BROKEN = [*NOISY[:2], [0.0, *NOISY[2][1:]]]  # `advance` keeps no amax that is not finite


def _tree():
    stacked = init_state(DELAYED, (2,)) | {
        "observed": _record([QUIET, BROKEN], [[0, 7, 1], [2, 3, 0]]),
    }
    # The largest amax of a history is not the newest.
    peaks = np.array([[2, 3, 4], [5, 6, 0]], np.float32)
    history = np.zeros((2, 3, DELAYED.window), np.float32)
    history[..., 0], history[..., 5] = peaks / 2, peaks
    stacked["amax_history"] = jnp.asarray(history)
    current = init_state(CURRENT) | {"observed": _record(BROKEN)}
    return {"blocks": stacked, "head": current, "tail": dict(current)}, peaks


def _numpy_scale(amax, largest, *, margin=0, power_of_two=False):
    """1 where an amax says nothing of the range."""
    amax = np.asarray(amax, np.float64)
    scale = np.where(amax > 0, amax / largest * 2.0**margin, 1.0)
    return 2.0 ** np.ceil(np.log2(scale)) if power_of_two else scale


def test_operand_table__delayed_current_and_forward_only__is_what_numpy_says():
    tree, peaks = _tree()
    table = np.asarray(jax.jit(lambda t: operand_table(t, RECIPES))(tree), np.float64)
    assert table.shape == (12, 7)
    noisy = np.array(BROKEN, np.float64)
    observed = np.concatenate([QUIET, noisy, noisy, noisy])
    largest = np.array([448, 448, 57344])  # e4m3fn, e4m3fn, e5m2
    scales = [
        *_numpy_scale(peaks, largest, margin=1).ravel(),
        *_numpy_scale(noisy[:, 0], largest, power_of_two=True),
        *_numpy_scale(noisy[:2, 0], largest[:2]),
        0,  # the output gradient of "tail" is not quantized
    ]
    expected = {
        OperandColumn.AMAX: observed[:, 0],
        OperandColumn.SCALE: scales,
        OperandColumn.SATURATED: observed[:, 1] / observed[:, 4],
        OperandColumn.UNDERFLOW: observed[:, 2] / observed[:, 4],
        OperandColumn.NONFINITE: observed[:, 3],
        OperandColumn.AGE: [0, 7, 1, 2, 3, 0, *[0] * 6],
        OperandColumn.SIZE: observed[:, 4],
    }
    for column, values in expected.items():
        np.testing.assert_allclose(table[:, column], values, rtol=2e-7, err_msg=column.name)


def test_operand_table__rows__are_those_of_the_names():
    tree, _ = _tree()
    table = np.asarray(operand_table(tree, RECIPES))
    rows = dict(zip(operand_names(tree), table[:, OperandColumn.SATURATED], strict=True))
    assert rows["blocks[0] lhs"] == 0
    assert rows["blocks[1] lhs"] == rows["head lhs"] == np.float32(0.1)
    assert rows["blocks[1] output_grad"] == np.float32(3 / 25)


def test_operand_table__one_recipe__is_that_of_every_site():
    tree = {"a": _site(QUIET), "b": _site(NOISY)}
    alike = {"a": FP8_DELAYED, "b": FP8_DELAYED}
    np.testing.assert_array_equal(
        operand_table(tree, FP8_DELAYED), operand_table(tree, alike), strict=True
    )


def test_operand_table__fresh_state__is_zero_with_the_scale_of_an_unknown_amax():
    table = np.asarray(operand_table({"a": init_state(FP8_DELAYED)}, FP8_DELAYED))
    assert (table[:, OperandColumn.SCALE] == 1).all()
    assert not np.delete(table, OperandColumn.SCALE, axis=1).any()


@pytest.mark.parametrize("tree", [{}, {"layer": {}}])
def test_operand_table__no_sites__has_no_rows(tree):
    assert operand_table(tree, {}).shape == (0, 7)


def test_operand_table__missing_recipe__is_named():
    with pytest.raises(UserError, match=r"no recipe for 'b'; known: a\."):
        operand_table({"a": _site(QUIET), "b": _site(NOISY)}, {"a": FP8_DELAYED})


def test_operand_table__longer_stack__has_no_more_operations():
    def operations(layers: int) -> int:
        tree = {"blocks": init_state(FP8_DELAYED, (layers,))}
        return len(jax.make_jaxpr(lambda t: operand_table(t, FP8_DELAYED))(tree).eqns)

    assert operations(96) == operations(2)


# Non-finite values.

NN = (((1,), (0,)), ((), ()))
STATE = {name: init_state(CURRENT) for name in ("first", "second")}
X, W = np.ones((8, 16), np.float32), np.ones((16, 16), np.float32) / 16


def _layer(w, live, x):
    return ops.dot_general(x, w, NN, recipe=CURRENT, state=live)


def _loss(w, live, x):
    return _layer(w, live["second"], _layer(w, live["first"], x)).sum() / x.shape[0]


def _with(x, *values):
    x = x.copy()
    x[3, : len(values)] = values
    return x


@jax.jit
def _step(tree, x):
    """Loss, gradients, the advanced state and the screen of one step of two layers."""
    (loss, grads), seen = state.value_and_grad(_loss)(W, tree, x)
    after = state.advance(seen)
    return loss, grads, after, nonfinite(tree, after), operand_table(after, CURRENT)


def _nonfinite(table):
    return np.asarray(table)[:, OperandColumn.NONFINITE].sum()


def test_nonfinite__nan_in_an_activation__is_counted_and_over_with_the_next_step():
    _, _, broken, count, table = _step(STATE, _with(X, np.nan, np.nan))
    # Two inputs; row 3 of the next layer's input is NaN; output gradients are clean.
    assert (float(count), _nonfinite(table)) == (18, 18)
    assert np.asarray(broken["first"]["observed"])[:, Record.DROPPED].tolist() == [1, 0, 0]
    _, _, _, count, table = _step(broken, X)
    assert (float(count), _nonfinite(table)) == (0, 0)


def test_nonfinite__inf_that_saturates__is_counted_where_loss_and_gradients_are_finite():
    loss, grads, _, count, _ = _step(STATE, _with(X, np.inf, -np.inf, np.inf))
    assert np.isfinite(loss)
    assert np.isfinite(grads).all()
    assert float(count) == 3


@pytest.mark.parametrize("amax", [np.nan, np.inf])
def test_nonfinite__amax_without_counts__is_one(amax):
    """The observation of a frozen trunk: its backward pass did not run."""
    seen = jnp.zeros((3, 5)).at[0, Column.AMAX].set(amax)
    before = {"a": init_state(FP8_DELAYED)}
    after = state.advance(state.add_observations(before, [seen]))
    assert float(nonfinite(before, after)) == 1
    assert health(after).nonfinite == 1
    assert operand_table(after, FP8_DELAYED)[:, OperandColumn.NONFINITE].tolist() == [1, 0, 0]


@pytest.mark.parametrize("recipe", [CURRENT, FP8_DELAYED], ids=lambda recipe: recipe.scaling)
def test_nonfinite__layer_that_did_not_run__is_not_counted_again(recipe):
    broken = [[np.nan, 0, 0, 4, 100], *QUIET[1:]]
    counted = [[1.0, 0, 0, 4, 100], *QUIET[1:]]  # the NaN was another device's
    unused = np.zeros((3, 5))
    trees = [{"expert": init_state(recipe)}]
    for seen in (QUIET, broken, unused, broken, counted, counted, QUIET):
        pending = state.add_observations(trees[-1], [jnp.array(seen, jnp.float32)])
        trees.append(state.advance(pending))
    counts = [float(nonfinite(*pair)) for pair in itertools.pairwise(trees)]
    assert counts == [0, 4, 0, 4, 4, 4, 0]
    assert health(trees[3]).nonfinite == 4  # the report still has the last run


def test_nonfinite__one_device_of_eight__is_counted_on_all():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])

    def region(tree, x):
        w = compat.to_varying(jnp.asarray(W), ("data",))
        _, seen = state.value_and_grad(_loss)(w, tree, x)
        return nonfinite(tree, state.advance(seen))

    screen = jax.shard_map(region, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert float(jax.jit(screen)(STATE, _with(X, np.nan))) == 17


@pytest.mark.parametrize("sites", [1, 3])
def test_nonfinite__stack_of_more_than_32_rows__compiles_no_windowed_reduction(sites):
    tree = {str(i): init_state(FP8_DELAYED, (40,)) for i in range(sites)}
    assert "reduce-window" not in jax.jit(nonfinite).lower(tree, tree).compile().as_text()


@pytest.mark.parametrize("tree", [{}, {"layer": {}}])
def test_nonfinite__no_sites__is_zero(tree):
    assert float(nonfinite(tree, tree)) == 0
