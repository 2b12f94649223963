"""A kernel sharded over devices: the matmul, its gradient, and what travels, against one device.

Exact-grid data: small integers and scales that are powers of two, so that every layout gives the
same bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops
from lowprec_jax.ops import Gather, gather
from lowprec_jax.recipes import get_recipe, init_state

N = 4
NN = (((1,), (0,)), ((), ()))
# Each shard of four rows is 16 times as large as the one before it.
X = np.random.default_rng(0).integers(-4, 5, (8, 16)).astype(np.float32)
W = np.random.default_rng(1).integers(-2, 3, (16, 12)).astype(np.float32)
W *= 2.0 ** (np.arange(16) // 4 * 4)[:, None].astype(np.float32)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((N,), ("fsdp",), axis_types=(kind,), devices=jax.devices()[:N])


def recipe_of(name, **changes):
    if name == "none":
        return get_recipe(name)
    return dataclasses.replace(get_recipe(name), scale_rounding="power_of_two", **changes)


def loss(x, w, recipe, how=None):
    return ops.dot_general(x, w, NN, recipe=recipe, rhs_gather=how).sum()


def reference(recipe):
    return jax.jit(jax.value_and_grad(functools.partial(loss, recipe=recipe), (0, 1)))(X, W)


def manual(recipe, axis=0, reduce_dtype=jnp.float32):
    """``(x split by rows, w split by `axis`) -> (loss [N], gradients split in the same way)``."""
    specs = (P("fsdp"), P("fsdp") if axis == 0 else P(None, "fsdp"))
    how = Gather(("fsdp",), axis, reduce_dtype)

    def f(x, w):
        value, grads = jax.value_and_grad(loss, (0, 1))(x, w, recipe, how)
        return value[None], grads

    return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=specs, out_specs=(P("fsdp"), specs)))


def kinds(program):
    return sorted((c.kind, c.dtype) for c in ops.stablehlo_collectives(program))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["none", "fp8_current"])
def test_gather__manual__loss_and_gradients_are_those_of_one_device(name, axis):
    value, actual = manual(recipe_of(name), axis)(X, W)
    whole, expected = reference(recipe_of(name))
    assert value.sum() == whole
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gather__manual_with_local_amaxes__kernel_codes_share_a_scale():
    value, _ = manual(recipe_of("fp8_current", amax_scope="local"))(X, W)
    assert value.sum() == reference(recipe_of("fp8_current"))[0]


def test_gather__manual_fp8__codes_travel_twice_and_the_gradient_once():
    program = manual(recipe_of("fp8_current")).lower(X, W)
    # Two all-reduces: the amaxes of both operands, and that of the output gradient.
    assert kinds(program) == [
        ("all-gather", "u8"),
        ("all-gather", "u8"),
        ("all-reduce", "f32"),
        ("all-reduce", "f32"),
        ("reduce-scatter", "f32"),
    ]


def test_gather__manual_in_high_precision__the_kernel_travels_twice_too():
    program = manual(recipe_of("none")).lower(X, W)
    assert kinds(program) == [
        ("all-gather", "f32"),
        ("all-gather", "f32"),
        ("reduce-scatter", "f32"),
    ]


@pytest.mark.parametrize("name", ["none", "fp8_current"])
def test_gather__reduce_dtype__is_the_type_in_which_the_gradient_is_summed(name):
    program = manual(recipe_of(name), reduce_dtype=jnp.bfloat16)
    assert ("reduce-scatter", "bf16") in kinds(program.lower(X, W))
    grad = program(X, W)[1][1]
    assert grad.dtype == jnp.float32
    # Each device's part is rounded to bf16, then their sum (on CPU added in f32).
    parts = [np.repeat(x.sum(0)[:, None], 12, axis=1) for x in np.split(X, N)]
    expected = sum(p.astype(jnp.bfloat16).astype(np.float32) for p in parts)
    np.testing.assert_array_equal(grad, expected.astype(jnp.bfloat16).astype(np.float32))


def test_gather__residuals__hold_the_codes_of_the_shard():
    how = Gather(("fsdp",), 0)

    def local(x, w):
        f = functools.partial(loss, recipe=recipe_of("fp8_current"), how=how)
        kept = jax.tree.leaves(jax.vjp(f, x, w)[1])
        shapes.extend((str(r.dtype), r.shape) for r in kept if r.ndim == 2)
        return jax.lax.psum(f(x, w), "fsdp")

    shapes = []
    jax.eval_shape(jax.shard_map(local, mesh=mesh(), in_specs=P("fsdp"), out_specs=P()), X, W)
    assert sorted(shapes) == [("uint8", (4, 12)), ("uint8", (16, 2))]  # w; x, transposed


def test_gather__delayed_scaling__needs_no_amax_before_the_matmul():
    recipe = recipe_of("fp8_delayed")
    state = init_state(recipe)
    amaxes = jnp.array([4.0, float(np.abs(W).max()), 1.0])
    state["amax_history"] = state["amax_history"].at[:, 0].set(amaxes)

    def f(x, w, how=None):
        return ops.dot_general(x, w, NN, recipe=recipe, state=state, rhs_gather=how)

    gathered = functools.partial(f, how=Gather(("fsdp",), 0))
    specs = P("fsdp")
    program = jax.jit(jax.shard_map(gathered, mesh=mesh(), in_specs=specs, out_specs=specs))
    assert kinds(program.lower(X, W)) == [("all-gather", "u8")]
    np.testing.assert_array_equal(program(X, W), jax.jit(f)(X, W))


@pytest.mark.parametrize(("scope", "reductions"), [("global", 2), ("local", 0)])
def test_gather__amax_scope__decides_whether_devices_share_an_amax(scope, reductions):
    """Of a replicated kernel; amaxes of the operands, and of the output gradient."""
    recipe = recipe_of("fp8_current", amax_scope=scope)
    f = jax.grad(functools.partial(loss, recipe=recipe), (0, 1))
    program = jax.jit(
        jax.shard_map(f, mesh=mesh(), in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp"))
    )
    found = kinds(program.lower(X, np.tile(W, (N, 1))))
    assert found == [("all-reduce", "f32")] * reductions


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["none", "fp8_current"])
def test_gather__plain_jit__asks_the_compiler_for_the_same(kind, name):
    recipe, over = recipe_of(name), mesh(kind)
    x, w = (jax.device_put(a, NamedSharding(over, P("fsdp"))) for a in (X, W))
    how = Gather(("fsdp",), 0)
    assert not how.is_manual
    with jax.set_mesh(over):
        f = jax.jit(lambda x, w: ops.dot_general(x, w, NN, recipe=recipe, rhs_gather=how))
        program = f.lower(x, w).compile()
        gradient = jax.jit(jax.grad(functools.partial(loss, recipe=recipe, how=how), (0, 1)))
        actual = gradient(x, w)
    found = [c for c in ops.collectives(program) if c.kind == "all-gather"]
    wire = "u8" if name == "fp8_current" else "f32"
    assert [c.dtype for c in found if c.results[0].shape == W.shape] == [wire]
    for a, b in zip(actual, reference(recipe)[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_gather_function__manual__gives_the_whole_and_scatters_the_gradient():
    how = Gather(("fsdp",), 1, jnp.bfloat16)
    c = np.random.default_rng(2).integers(-4, 5, (N, 16, 12)).astype(np.float32)

    def f(w, c):
        return jax.value_and_grad(lambda w: (gather(w, how) * c[0]).sum())(w)

    mapped = jax.shard_map(
        lambda w, c: (gather(w, how), f(w, c)[1]),
        mesh=mesh(),
        in_specs=(P(None, "fsdp"), P("fsdp")),
        out_specs=(P("fsdp"), P(None, "fsdp")),
    )
    whole, grad = jax.jit(mapped)(W, c)
    np.testing.assert_array_equal(whole, np.tile(W, (N, 1)))
    np.testing.assert_array_equal(grad, c.sum(axis=0))
    assert kinds(jax.jit(mapped).lower(W, c)).count(("reduce-scatter", "bf16")) == 1


def test_gather_function__outside_of_a_mesh__is_the_array():
    np.testing.assert_array_equal(gather(jnp.asarray(W), Gather(("fsdp",), 0)), W)
