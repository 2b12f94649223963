"""Observing gradients: the same state under every transform, once per optimizer step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops, state
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import FP8_DELAYED, Column, Role, init_state

NN = (((1,), (0,)), ((), ()))
BATCH, WIDTH, COLUMNS, DEVICES = 64, 32, 24, 8
# Row i is i + 1 times as large; the amax over all rows is 173.4, over rows 0 to 15 far less.
X = jax.random.normal(jax.random.key(0), (BATCH, WIDTH)) * jnp.arange(1.0, BATCH + 1)[:, None]
X = X * (173.444 / jnp.abs(X).max())
W = jax.random.normal(jax.random.key(1), (WIDTH, COLUMNS)) / WIDTH**0.5
C = jax.random.normal(jax.random.key(2), (BATCH, COLUMNS)) * jnp.arange(BATCH, 0.0, -1)[:, None]


def _tree(**sites):
    return sites or {"layer": init_state(FP8_DELAYED)}


def _layer(w, site, x, recipe=FP8_DELAYED):
    return ops.dot_general(x, w, NN, recipe=recipe, state=site)


def _loss(w, live, x, c):
    return (_layer(w, live["layer"], x) * c).sum()


_step = jax.jit(state.value_and_grad(_loss))


def _amaxes(*arrays):
    """The expectation, by NumPy."""
    return np.array([np.abs(np.asarray(a)).max(initial=0) for a in arrays], np.float32)


def _seen(tree, name="layer"):
    return np.asarray(tree[name]["pending"][..., Column.AMAX])


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _error(actual, expected):
    return np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)


POLICIES = {
    "none": None,
    "named": jax.checkpoint_policies.save_only_these_names("quantized_lhs", "quantized_rhs"),
    "everything": jax.checkpoint_policies.everything_saveable,
}


def test_value_and_grad__eager__observes_the_exact_amaxes_and_leaves_the_argument_alone():
    tree = _tree()
    _, new = state.value_and_grad(_loss)(W, tree, X, C)
    np.testing.assert_array_equal(_seen(new), _amaxes(X, W, C))
    assert _seen(new)[0] == np.float32(173.444)
    _assert_same(tree, _tree())


def test_value_and_grad__jit__equals_eager_state():
    _assert_same(_step(W, _tree(), X, C)[1], state.value_and_grad(_loss)(W, _tree(), X, C)[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_value_and_grad__remat__gradient_and_amax_are_bitwise_those_without(policy):
    def loss(w, live, x, c):
        layer = jax.checkpoint(lambda w: _layer(w, live["layer"], x), policy=POLICIES[policy])
        return (jnp.sin(layer(w)) * c).sum()

    def plain(w, live, x, c):
        return (jnp.sin(_layer(w, live["layer"], x)) * c).sum()

    tree = state.advance(_step(W, _tree(), X, C)[1])
    out, new = jax.jit(state.value_and_grad(loss))(W, tree, X, C)
    expected, expected_new = jax.jit(state.value_and_grad(plain))(W, tree, X, C)
    _assert_same(out, expected)
    np.testing.assert_array_equal(_seen(new), _seen(expected_new))


def test_value_and_grad__aux__is_returned_beside_the_value():
    def loss(w, live, x, c):
        value = _loss(w, live, x, c)
        return value, {"rows": x.shape[0]}

    ((value, aux), grads), new = state.value_and_grad(loss, has_aux=True)(W, _tree(), X, C)
    assert aux == {"rows": BATCH}
    np.testing.assert_array_equal(_seen(new), _amaxes(X, W, C))
    assert grads.shape == W.shape
    assert value.shape == ()


def test_value_and_grad__twice_before_advance__pending_is_the_maximum():
    _, tree = _step(W, _tree(), X, C)
    _, tree = _step(2 * W, tree, X / 4, C / 4)
    np.testing.assert_array_equal(_seen(tree), _amaxes(X, 2 * W, C))


def test_value_and_grad__scan_over_layers__observes_each_layer_in_its_row():
    ws = jax.random.normal(jax.random.key(3), (3, WIDTH, WIDTH)) * jnp.arange(1.0, 4)[:, None, None]

    def loss(ws, live, x):
        body = lambda h, s: (_layer(*s, h), h)  # noqa: E731
        out, inputs = lax.scan(body, x, (ws, live["layer"]))
        return out.sum(), inputs

    tree = {"layer": init_state(FP8_DELAYED, (3,))}
    ((_, inputs), _), new = jax.jit(state.value_and_grad(loss, has_aux=True))(ws, tree, X)
    np.testing.assert_array_equal(_seen(new)[:, Role.RHS], [_amaxes(w)[0] for w in ws])
    np.testing.assert_array_equal(_seen(new)[:, Role.LHS], [_amaxes(h)[0] for h in inputs])
    assert _seen(new)[2, Role.OUTPUT_GRAD] == 1  # of a sum


# Accumulation: one optimizer step, whatever the number of micro-batches.


@functools.cache
def _accumulated(parts):
    return jax.jit(state.accumulate(_loss, parts))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_accumulate__micro_batches__amax_is_bitwise_and_gradients_are_sums(parts):
    tree = state.advance(_step(W, _tree(), X, C)[1])
    (value, grads), new = _accumulated(parts)(W, tree, X, C)
    (expected_value, expected), expected_new = _step(W, tree, X, C)
    np.testing.assert_array_equal(_seen(new), _amaxes(X, W, C))
    _assert_same(
        state.advance(new)["layer"]["amax_history"],
        state.advance(expected_new)["layer"]["amax_history"],
    )
    counted = np.array(new["layer"]["pending"][:, Column.SIZE])
    np.testing.assert_array_equal(counted, [X.size, parts * W.size, C.size])
    assert _error(grads, expected) < 1e-6  # scales are constant: only the order of the sum
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)


@pytest.mark.parametrize("position", range(8))
def test_accumulate__outlier_in_one_micro_batch__is_found_in_any_position(position):
    rows = slice(position * BATCH // 8, (position + 1) * BATCH // 8)
    x, c = jnp.ones_like(X).at[rows].set(8.0), jnp.ones_like(C).at[rows].set(-8.0)
    np.testing.assert_array_equal(
        _seen(_accumulated(8)(W, _tree(), x, c)[1]), [8, _amaxes(W)[0], 8]
    )


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulate__none__gradients_are_those_of_the_batch(parts):
    def loss(w, live, x, c):
        return (_layer(w, None, x, "none") * c).sum()

    (_, grads), new = jax.jit(state.accumulate(loss, parts))(W, {}, X, C)
    assert new == {}
    assert _error(grads, np.float64(X).T @ np.float64(C)) < 1e-6


def test_accumulate__aux__is_stacked_over_micro_batches():
    def loss(w, live, x, c):
        return _loss(w, live, x, c), (x[0, 0], x.shape[0])

    ((_, aux), _), _ = jax.jit(state.accumulate(loss, 4, has_aux=True))(W, _tree(), X, C)
    np.testing.assert_array_equal(aux[0], X[:: BATCH // 4, 0])
    np.testing.assert_array_equal(aux[1], [BATCH // 4] * 4)


@pytest.mark.parametrize("parts", [3, 128])
def test_accumulate__batch_not_divisible__names_the_shape_and_the_remedy(parts):
    with pytest.raises(UserError, match=rf"\(64, 32\) cannot be split into {parts} micro-batches"):
        state.accumulate(_loss, parts)(W, _tree(), X, C)


def test_advance__optax_multi_steps__pushes_once_per_optimizer_step():
    optimizer = optax.MultiSteps(optax.sgd(1e-3), 4)

    @jax.jit
    def step(w, tree, opt_state, x, c):
        (_, grads), tree = state.value_and_grad(_loss)(w, tree, x, c)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts micro-batches in int32
            updates, opt_state = optimizer.update(grads, opt_state, w)
        w = optax.apply_updates(w, updates)
        return w, state.advance(tree, when=optimizer.has_updated(opt_state)), opt_state

    xs, cs = X.reshape(4, 16, WIDTH), C.reshape(4, 16, COLUMNS)
    w, tree, opt_state = W, _tree(), optimizer.init(W)
    for i in range(8):
        before = w
        w, tree, opt_state = step(w, tree, opt_state, xs[i % 4], cs[i % 4])
        pushed = int((tree["layer"]["amax_history"][0] > 0).sum())
        assert pushed == (i + 1) // 4
        if i == 3:
            np.testing.assert_array_equal(
                tree["layer"]["amax_history"][:, 0], _amaxes(X, before, C)
            )


# Reuse, unused layers, frozen layers.


def test_value_and_grad__same_site_three_times__takes_the_maximum():
    def loss(w, live, x, c):
        return sum((_layer(w, live["layer"], f * x) * (c / f)).sum() for f in (1.0, 4.0, 2.0))

    _, new = jax.jit(state.value_and_grad(loss))(W, _tree(), X, C)
    np.testing.assert_array_equal(_seen(new), _amaxes(4 * X, W, C))
    np.testing.assert_array_equal(new["layer"]["pending"][0, Column.SIZE], 3 * X.size)


def test_value_and_grad__layer_that_does_not_run__keeps_its_state():
    """Flax's op zeroes it, and the next output of the layer is zero or NaN."""
    used = state.advance(_step(W, _tree(), X, C)[1])["layer"]
    tree = {"layer": used, "idle": used}
    _, new = jax.jit(state.value_and_grad(_loss))(W, tree, X, C)
    new = state.advance(new)
    _assert_same(new["idle"], used)
    np.testing.assert_array_equal(jax.jit(_layer)(W, new["idle"], X), jax.jit(_layer)(W, used, X))


def test_value_and_grad__layer_off_the_loss_path__operands_observed_output_grad_kept():
    def loss(w, live, x, c):
        _layer(w, live["idle"], 2 * x)  # it runs, but nothing depends on it
        return _loss(w, live, x, c)

    used = state.advance(_step(W, _tree(), X, C)[1])["layer"]
    _, new = jax.jit(state.value_and_grad(loss))(W, {"layer": used, "idle": used}, X, C)
    idle = state.advance(new)["idle"]
    for key, value in idle.items():
        np.testing.assert_array_equal(value[Role.OUTPUT_GRAD], used[key][Role.OUTPUT_GRAD])
    expected = _amaxes(2 * X, W)
    np.testing.assert_array_equal(idle["amax_history"][: Role.OUTPUT_GRAD, 0], expected)


def test_value_and_grad__trunk_frozen_by_stop_gradient_on_its_output__is_observed():
    head = jax.random.normal(jax.random.key(5), (COLUMNS, 8))

    def loss(weights, live, x):
        hidden = lax.stop_gradient(_layer(weights["trunk"], live["trunk"], x))
        return _layer(weights["head"], live["head"], hidden).sum()

    tree = {"trunk": init_state(FP8_DELAYED), "head": init_state(FP8_DELAYED)}
    weights = {"trunk": W, "head": head}
    _, new = jax.jit(state.value_and_grad(loss))(weights, tree, X)
    np.testing.assert_array_equal(_seen(new, "trunk"), [*_amaxes(X, W), 0])
    newest = state.advance(new)["trunk"]["amax_history"][:, 0]
    np.testing.assert_array_equal(newest, [*_amaxes(X, W), 0])


def test_value_and_grad__frozen_trunk__is_still_observed():
    head = jax.random.normal(jax.random.key(5), (COLUMNS, 8))

    def loss(head, live, x, w):
        hidden = _layer(lax.stop_gradient(w), live["trunk"], lax.stop_gradient(x))
        return _layer(head, live["head"], hidden).sum()

    tree = {"trunk": init_state(FP8_DELAYED), "head": init_state(FP8_DELAYED)}
    _, new = jax.jit(state.value_and_grad(loss))(head, tree, X, W)
    np.testing.assert_array_equal(_seen(new, "trunk"), [*_amaxes(X, W), 0])
    assert (_seen(new, "head") > 0).all()


def test_evaluation__state_without_sinks__is_unchanged_and_the_value_is_that_of_training():
    tree = state.advance(_step(W, _tree(), X, C)[1])
    copy = jax.tree.map(np.array, tree)
    value = jax.jit(_loss)(W, tree, X, C)
    _assert_same(jax.tree.map(np.array, tree), copy)
    np.testing.assert_allclose(value, _step(W, tree, X, C)[0][0], rtol=1e-6)


def test_grad__no_sinks__is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"differentiated without a sink.*value_and_grad"):
        jax.grad(_loss)(W, _tree(), X, C)


def test_value_and_grad__recipes_without_state__take_an_empty_tree():
    def loss(w, live, x, c):
        return (_layer(w, live["layer"], x, "fp8_current") * c).sum()

    (_, grads), new = state.value_and_grad(loss)(W, {"layer": {}}, X, C)
    assert new == {"layer": {}}
    assert _error(grads, np.float64(X).T @ np.float64(C)) < 0.08


def test_value_and_grad__observing_current_scaling__reports_without_history():
    recipe = dataclasses.replace(FP8_DELAYED, scaling="current", observe=True)

    def loss(w, live, x, c):
        return (_layer(w, live["layer"], x, recipe) * c).sum()

    _, new = jax.jit(state.value_and_grad(loss))(W, {"layer": init_state(recipe)}, X, C)
    np.testing.assert_array_equal(_seen(new), _amaxes(X, W, C))


# Compilation and devices.


def test_step__donated_and_compiled_ahead__trains_in_place():
    def step(w, tree, x, c):
        (_, grads), tree = state.value_and_grad(_loss)(w, tree, x, c)
        return w - 1e-6 * grads, state.advance(tree)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(W, _tree(), X, C).compile()
    plain = jax.jit(step)
    w, tree = jnp.array(W), jax.tree.map(jnp.array, _tree())
    expected = (w + 0, _tree())
    for _ in range(3):
        old = tree["layer"]["amax_history"]
        w, tree = compiled(w, tree, X, C)
        expected = plain(*expected, X, C)
        assert old.is_deleted()
    _assert_same((w, tree), expected)


def _two_layers(ws, live, x, c):
    return (_layer(ws[1], live["b"], _layer(ws[0], live["a"], x)) * c).sum()


WS = (W / 4, jax.random.normal(jax.random.key(8), (COLUMNS, 16)))
C2 = jnp.round(C[:, :16] * 64) / 64


def _two_sites():
    return {"a": init_state(FP8_DELAYED), "b": init_state(FP8_DELAYED)}


def _two_layer_step(ws, tree, x, c):
    (_, grads), tree = state.value_and_grad(_two_layers)(ws, tree, x, c)
    return grads, state.advance(tree)


@functools.cache
def _single_device():
    """Three steps on one device."""
    return _three_steps(jax.jit(_two_layer_step))


def _three_steps(step, prepare=lambda ws, tree, x, c: (ws, tree, x, c)):
    ws, tree, x, c = prepare(WS, _two_sites(), X, C2)
    for _ in range(3):
        grads, tree = step(ws, tree, x, c)
    return jax.device_get((grads, tree))


def _mesh(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def _assert_same_step(actual, times_observed=1):
    grads, tree = actual
    expected_grads, expected = _single_device()
    for name in expected:
        np.testing.assert_array_equal(tree[name]["amax_history"], expected[name]["amax_history"])
        np.testing.assert_array_equal(tree[name]["pending"], 0)
        # A replicated weight is counted on each device; fractions stay what they are.
        counts = (np.arange(7) != Column.AMAX) & (np.arange(7) < len(Column))
        times = np.array([1, times_observed, 1])[:, None] ** counts
        np.testing.assert_array_equal(
            tree[name]["observed"], expected[name]["observed"] * times, err_msg=name
        )
    for ours, reference in zip(grads, expected_grads, strict=True):
        assert _error(ours, reference) < 1e-5  # the order of an f32 sum


def _sharded_step():
    def region(ws, tree, x, c):
        return _two_layer_step(ws, tree, x, c)

    specs = (P(), P(), P("data"), P("data"))
    mesh = _mesh(AxisType.Auto)
    return jax.shard_map(region, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)


def test_shard_map__eight_devices__state_is_bitwise_that_of_one():
    _assert_same_step(_three_steps(jax.jit(_sharded_step())), times_observed=DEVICES)


def test_shard_map__whole_model__one_pmax_and_one_psum_of_counts():
    jaxpr = str(jax.make_jaxpr(_sharded_step())(WS, _two_sites(), X, C2))
    assert jaxpr.count("pmax") == 1
    sums = [line for line in jaxpr.splitlines() if "psum" in line]
    assert sum("f32[6,4]" in line for line in sums) == 1  # two sites of three roles
    assert len(sums) == 1 + len(WS)  # and the gradients


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_jit__batch_sharded_on_a_mesh__state_is_bitwise_that_of_one_device(kind):
    mesh = _mesh(kind)

    def prepare(ws, tree, x, c):
        ws, tree = jax.device_put((ws, tree), NamedSharding(mesh, P()))
        return ws, tree, *jax.device_put((x, c), NamedSharding(mesh, P("data")))

    with jax.set_mesh(mesh):
        _assert_same_step(_three_steps(jax.jit(_two_layer_step), prepare))


def _pmapped(step):
    split = lambda x: x.reshape(DEVICES, -1, *x.shape[1:])  # noqa: E731
    run = jax.pmap(step, "data", in_axes=(None, None, 0, 0))
    return jax.device_get(run(WS, _two_sites(), split(X), split(C2))[1])


def test_pmap__every_device__state_is_that_of_one_device():
    expected = state.advance(jax.jit(state.value_and_grad(_two_layers))(WS, _two_sites(), X, C2)[1])
    for name, site in _pmapped(_two_layer_step).items():
        for device in range(DEVICES):
            np.testing.assert_array_equal(
                site["amax_history"][device], expected[name]["amax_history"]
            )
