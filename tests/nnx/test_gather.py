"""Telling the layers of a model that their kernels are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from lowprec_jax.nnx.sites import DotGeneral
from lowprec_jax.ops import Gather, stablehlo_collectives

N, LAYERS, WIDTH = 4, 3, 8
NAMES = ("first", "second", "third")
X = np.random.default_rng(0).integers(-4, 5, (8, WIDTH)).astype(np.float32)
HOW = Gather(("fsdp",), 0)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.second = nnx.LinearGeneral(WIDTH, (2, 4), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.third = nnx.Einsum("bi,io->bo", (WIDTH, WIDTH), rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(self.first(x)).reshape(x.shape))


def stacked():
    create = nnx.vmap(lambda key: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(key)))
    return create(jax.random.split(jax.random.key(0), LAYERS))


def mesh():
    kinds = (AxisType.Auto,)
    return jax.make_mesh((N,), ("fsdp",), axis_types=kinds, devices=jax.devices()[:N])


def run_sharded(model, call, specs):
    """``(outputs, collectives)`` of a model on 4 devices; `specs` split its parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def f(params, x):
        return call(nnx.merge(graphdef, params, rest), x)

    mapped = jax.shard_map(f, mesh=mesh(), in_specs=(specs, P("fsdp")), out_specs=P("fsdp"))
    program = jax.jit(mapped)
    found = stablehlo_collectives(program.lower(params, X))
    return program(params, X), [c for c in found if c.kind == "all-gather"]


def test_gather_kernels__unrolled__linears_bring_their_kernels_together():
    model = lp.nnx.quantize(Layers(nnx.Rngs(0)), "fp8_current")
    expected = nnx.jit(lambda model, x: model(x))(model, X)
    kernels = {f"{name}/kernel": HOW for name in ("first", "second", "head")}
    assert lp.nnx.gather_kernels(model, kernels) == set(kernels)
    specs = jax.tree.map(lambda _: P("fsdp"), nnx.state(model, nnx.Param))
    actual, found = run_sharded(model, lambda model, x: model(x), specs)
    # The head is in high precision.
    assert [(c.dtype, c.results[0].shape) for c in found] == [
        ("u8", (8, 8)),
        ("u8", (8, 2, 4)),
        ("f32", (8, 8)),
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_gather_kernels__high_precision_layer__gets_an_op_with_recipe_none():
    model = lp.nnx.quantize(Layers(nnx.Rngs(0)), "fp8_current")
    assert not isinstance(model.head.dot_general, DotGeneral)
    lp.nnx.gather_kernels(model, {"head/kernel": HOW})
    op = model.head.dot_general
    assert (op.recipe.name, op.gather) == ("none", HOW)
    assert model.first.dot_general.gather is None


def test_gather_kernels__einsum_and_unknown_paths__are_left_to_the_caller():
    model = lp.nnx.quantize(Layers(nnx.Rngs(0)), "fp8_current")
    kernels = dict.fromkeys(["third/kernel", "embedding/embedding", "first/kernel"], HOW)
    assert lp.nnx.gather_kernels(model, kernels) == {"first/kernel"}
    assert not hasattr(model.third.einsum_op, "gather")


@pytest.mark.parametrize(("axis", "own"), [(1, 0), (2, 1)])
def test_gather_kernels__stacked_layers__axis_is_that_of_one_layer(axis, own):
    holder = nnx.Dict(blocks=lp.nnx.quantize(stacked(), "fp8_current"))
    how = Gather(("fsdp",), axis, jnp.bfloat16)
    assert lp.nnx.gather_kernels(holder, {"blocks/kernel": how}) == {"blocks/kernel"}
    assert holder["blocks"].dot_general.gather == Gather(("fsdp",), own, jnp.bfloat16)


def test_gather_kernels__scanned_stack__gathers_one_layer_at_a_time():
    def call(model, x):
        graphdef, layers = nnx.split(model["blocks"])
        body = lambda x, layer: (nnx.merge(graphdef, layer)(x), None)  # noqa: E731
        return jax.lax.scan(body, x, layers)[0]

    holder = nnx.Dict(blocks=lp.nnx.quantize(stacked(), "fp8_current"))
    expected = jax.jit(call)(holder, X)
    lp.nnx.gather_kernels(holder, {"blocks/kernel": Gather(("fsdp",), 2)})
    specs = jax.tree.map(lambda _: P(None, None, "fsdp"), nnx.state(holder, nnx.Param))
    actual, found = run_sharded(holder, call, specs)
    assert [(c.dtype, c.results[0].shape, c.executed) for c in found] == [("u8", (8, 8), LAYERS)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
