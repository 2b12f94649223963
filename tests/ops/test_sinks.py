"""Where observations go, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops, state
from lowprec_jax.recipes import FP8_DELAYED, Column, Role, init_state

NN = (((1,), (0,)), ((), ()))
DEPTH = 3
X = jax.random.normal(jax.random.key(0), (16, 32))
C = jax.random.normal(jax.random.key(1), (16, 24))
W = jax.random.normal(jax.random.key(2), (32, 24))


def _layer(x, w, **site):
    return ops.dot_general(x, w, NN, recipe=FP8_DELAYED, state={**init_state(FP8_DELAYED), **site})


@pytest.fixture(scope="module")
def observation():
    """f32[3, 5] of the plain ref sink."""

    def run(w):
        ref = jax.new_ref(jnp.zeros((3, 5)))
        jax.grad(lambda w: (_layer(X, w, sink=ref) * C).sum())(w)
        return ref[...]

    return np.asarray(jax.jit(run)(W))


def test_ref__observation__has_the_three_amaxes_and_sizes(observation):
    expected = [jnp.abs(a).max() for a in (X, W, C)]
    np.testing.assert_array_equal(observation[:, Column.AMAX], expected)
    np.testing.assert_array_equal(observation[:2, Column.SIZE] % X.size, [0, W.size % X.size])


def test_ref__forward_and_backward__count_each_operand_once_a_pass(observation):
    assert observation[Role.OUTPUT_GRAD, Column.SIZE] == C.size
    assert observation[Role.LHS, Column.SIZE] == X.size


@pytest.mark.parametrize("sink", [jnp.zeros((3, 5)), np.zeros((3, 5), np.float32), 0.0])
def test_check_sink__array__is_refused_with_the_alternatives(sink):
    with pytest.raises(
        TypeError, match=r"must be a ref.*one ref per call site, IndexedSink.*Probe"
    ):
        _layer(X, W, sink=sink)


def test_check_sink__row_read_from_a_stacked_ref__is_refused():
    ref = jax.new_ref(jnp.zeros((DEPTH, 3, 5)))
    with pytest.raises(TypeError, match=r"not float32\[3,5\]\. `ref\[i\]` reads a ref"):
        _layer(X, W, sink=ref[1])


def test_probe__gradient__is_the_observation_of_a_ref(observation):
    def loss(w, probe):
        return (_layer(X, w, sink=probe) * C).sum()

    probe = ops.Probe(jnp.zeros((3, 5)))
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(W, probe)
    np.testing.assert_array_equal(grads[1].value, observation)


def test_probe__mapped_over_examples__gives_one_observation_each():
    def loss(w, probe, x, c):
        return (_layer(x, w, sink=probe) * c).sum()

    xs, probes = X.reshape(4, 4, 32), ops.Probe(jnp.zeros((4, 3, 5)))
    grad = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0, 0, 0))
    seen = jax.jit(grad)(W, probes, xs, C.reshape(4, 4, 24)).value
    np.testing.assert_array_equal(seen[:, Role.LHS, Column.AMAX], jnp.abs(xs).max((1, 2)))
    np.testing.assert_array_equal(
        seen[:, Role.OUTPUT_GRAD, Column.AMAX], jnp.abs(C.reshape(4, -1)).max(1)
    )


def test_indexed_sink__in_a_scan__writes_the_row_of_each_layer_as_refs_in_xs_do():
    ws = jax.random.normal(jax.random.key(7), (DEPTH, 32, 32)) * jnp.arange(1.0, 4)[:, None, None]

    def run(ws, indexed):
        ref = jax.new_ref(jnp.zeros((DEPTH, 3, 5)))

        def loss(ws):
            def body(h, s):
                w, sink = s
                sink = ops.IndexedSink(ref, sink) if indexed else sink
                return _layer(h, w, sink=sink), None

            return (lax.scan(body, X, (ws, jnp.arange(DEPTH) if indexed else ref))[0] ** 2).sum()

        jax.grad(loss)(ws)
        return ref[...]

    seen = jax.jit(run, static_argnums=1)(ws, True)
    np.testing.assert_array_equal(seen, jax.jit(run, static_argnums=1)(ws, False))
    np.testing.assert_array_equal(seen[:, Role.RHS, Column.AMAX], jnp.abs(ws).max((1, 2)))
    assert (seen[:, Role.OUTPUT_GRAD, Column.AMAX] > 0).all()


def test_write__ref_made_outside_the_shard_map__is_refused_with_the_remedy():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(x):
        ref = jax.new_ref(jnp.zeros((3, 5)))
        inside = jax.shard_map(
            lambda x: _layer(x, W, sink=ref), mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
        return inside(x)

    with pytest.raises(ValueError, match=r"made outside the shard_map over \['data'\]"):
        jax.jit(run)(X)


def test_vjp__delayed_without_a_sink__is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"differentiated without a sink.*value_and_grad"):
        jax.grad(lambda w: _layer(X, w).sum())(W)


def test_evaluation__no_sink__is_the_value_of_training():
    live = state.make_sinks(init_state(FP8_DELAYED))
    np.testing.assert_array_equal(_layer(X, W), _layer(X, W, sink=live["sink"]))
