"""Observing gradients under NNX and JAX transforms: the exact state every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from lowprec_jax.recipes import Column, Role

from .helpers import (
    C,
    Pair,
    X,
    amaxes,
    assert_same,
    kernel_of,
    linear,
    linear_loss,
    newest,
    pair_loss,
    stack,
)

POLICIES = {
    "plain": None,
    "named": jax.checkpoint_policies.save_only_these_names("quantized_lhs", "quantized_rhs"),
    "everything": jax.checkpoint_policies.everything_saveable,
}
LAYERS, DEVICES = 3, 8


@pytest.fixture(scope="module")
def expected():
    """Value, gradient and state of the plain layer after two steps."""
    return _two_steps(linear_loss)


def _two_steps(loss):
    layer = linear()
    step = nnx.jit(lp.nnx.value_and_grad(loss))
    outs = [step(layer, X, C), step(layer, 2 * X, C)]
    np.testing.assert_array_equal(newest(layer)[""], amaxes(2 * X, kernel_of(layer), C))
    return outs, lp.nnx.scaling_state(layer)["dot_general"]


def _without_counts(state):
    """A recomputed forward pass counts its elements twice."""
    return {k: v for k, v in state.items() if k not in ("observed", "pending")}


@pytest.mark.parametrize("policy", POLICIES)
def test_value_and_grad__nnx_remat__is_bitwise_the_plain_call(policy, expected):
    def loss(layer, x, c):
        return (nnx.remat(lambda layer, x: layer(x), policy=POLICIES[policy])(layer, x) * c).sum()

    outs, state = _two_steps(loss)
    assert_same(outs, expected[0])
    assert_same(_without_counts(state), _without_counts(expected[1]))


def test_value_and_grad__nnx_remat_of_a_method__observes_exactly(expected):
    class Block(nnx.Module):
        def __init__(self):
            self.layer = linear()

        @nnx.remat
        def __call__(self, x):
            return self.layer(x)

    block = Block()
    lp.nnx.value_and_grad(linear_loss)(block, X, C)
    np.testing.assert_array_equal(newest(block)["layer"], amaxes(X, kernel_of(block.layer), C))


# A scan whose every layer has known amaxes: layer i reads 2**i x, its output gradient is C_i.
C_STACK = jnp.stack([C, 5 * C, 3 * C])


def _body(x, layer):
    return 2 * x, layer(x)


def _nnx_scan(layers, x):
    return nnx.scan(_body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, layers)[1]


def _nnx_scan_of_remat(layers, x):
    body = nnx.remat(_body)
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, layers)[1]


def _lax_scan(layers, x):
    graphdef, state = nnx.split(layers)
    return jax.lax.scan(lambda x, s: _body(x, nnx.merge(graphdef, s)), x, state)[1]


def _lax_scan_of_checkpoint(layers, x):
    graphdef, state = nnx.split(layers)
    body = jax.checkpoint(lambda x, s: _body(x, nnx.merge(graphdef, s)))
    return jax.lax.scan(body, x, state)[1]


def _loop(layers, x):
    graphdef, state = nnx.split(layers)
    outs = []
    for i in range(LAYERS):
        x, y = _body(x, nnx.merge(graphdef, jax.tree.map(lambda s, i=i: s[i], state)))
        outs.append(y)
    return jnp.stack(outs)


@pytest.mark.parametrize(
    "run",
    [_nnx_scan, _nnx_scan_of_remat, _lax_scan, _lax_scan_of_checkpoint, _loop],
    ids=lambda f: f.__name__.strip("_"),
)
def test_value_and_grad__scan_over_layers__every_layer_observes_its_own(run):
    layers = stack(LAYERS)
    step = nnx.jit(lp.nnx.value_and_grad(lambda m, x, c: (run(m, x) * c).sum()))
    for _ in range(2):
        step(layers, X, C_STACK)
    kernels = layers.kernel[...]
    rows = [amaxes(2.0**i * X, kernels[i], C_STACK[i]) for i in range(LAYERS)]
    np.testing.assert_array_equal(newest(layers)[""], rows)
    (state,) = lp.nnx.scaling_state(layers).values()
    assert ((state["amax_history"] > 0).sum(-1) == 2).all()


def test_calibrate__scan_over_layers__every_layer_observes_its_own():
    layers = stack(LAYERS)
    lp.nnx.calibrate(lambda m, x, c: (_nnx_scan(m, x) * c).sum(), layers, X, C_STACK)
    rows = [amaxes(2.0**i * X, layers.kernel[...][i], C_STACK[i]) for i in range(LAYERS)]
    np.testing.assert_array_equal(newest(layers)[""], rows)


# Several devices.


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def _pair():
    return lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")


@pytest.fixture(scope="module")
def single_device():
    model = _pair()
    step = nnx.jit(lp.nnx.value_and_grad(pair_loss))
    out = [step(model, f * X, C) for f in (1.0, 2.0)][-1]
    return out, lp.nnx.scaling_state(model)


def _assert_same_step(model, out, single_device):
    """States bitwise; gradients to the order of summation.

    Under `shard_map` every device observes the whole weights: their size counts once for each.
    """
    state = jax.tree.map(np.array, [lp.nnx.scaling_state(model), single_device[1]])
    for found, expected in zip(*(tree.values() for tree in state), strict=True):
        ours, theirs = found["observed"][Role.RHS], expected["observed"][Role.RHS]
        assert ours[Column.AMAX] == theirs[Column.AMAX]
        assert ours[Column.SIZE] in (theirs[Column.SIZE], DEVICES * theirs[Column.SIZE])
        found["observed"][Role.RHS, : len(Column)] = expected["observed"][Role.RHS, : len(Column)]
        assert_same(found, expected)
    found, expected = jax.tree.leaves(out), jax.tree.leaves(single_device[0])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_shard_map__split_and_merge_with_check_vma__state_is_bitwise_that_of_one_device(
    single_device,
):
    graphdef, state = nnx.split(_pair())

    @jax.jit
    @jax.shard_map(mesh=_mesh(), in_specs=(P(), P("data"), P("data")), out_specs=P())
    def step(state, x, c):
        model = nnx.merge(graphdef, state)
        loss = lambda m, x, c: jax.lax.psum(pair_loss(m, x, c), "data")  # noqa: E731
        out = lp.nnx.value_and_grad(loss)(model, x, c)
        return out, nnx.state(model)

    for f in (1.0, 2.0):
        out, state = jax.block_until_ready(step(state, f * X, C))
    _assert_same_step(nnx.merge(graphdef, state), out, single_device)


def test_shard_map__of_nnx__state_is_bitwise_that_of_one_device(single_device):
    def step(model, x, c):
        loss = lambda m, x, c: jax.lax.psum(pair_loss(m, x, c), "data")  # noqa: E731
        return lp.nnx.value_and_grad(loss)(model, x, c)

    model = _pair()
    sharded = nnx.jit(
        nnx.shard_map(
            step, mesh=_mesh(), in_specs=(P(), P("data"), P("data")), out_specs=(P(), P())
        )
    )
    for f in (1.0, 2.0):
        out = jax.block_until_ready(sharded(model, f * X, C))
    _assert_same_step(model, out, single_device)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_nnx_jit__batch_sharded_on_a_mesh__state_is_bitwise_that_of_one_device(kind, single_device):
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        model = _pair()
        nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
        step = nnx.jit(lp.nnx.value_and_grad(pair_loss))
        for f in (1.0, 2.0):
            x, c = jax.device_put((f * X, C), NamedSharding(mesh, P("data")))
            out = jax.block_until_ready(step(model, x, c))
        _assert_same_step(model, jax.device_get(out), single_device)
