"""The mixture of experts in Linen: the numbers and the state of the NNX block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT
from lowprec_jax.ops.moe import MoEOutput

EXPERTS, FEATURES, HIDDEN = 4, 12, 8


def block(**options):
    return lp.linen.MoE(HIDDEN, EXPERTS, **options)


def test_moe__same_parameters_three_steps__linen_and_nnx_are_bitwise_equal(x):
    linen, twin = block(), lp.nnx.MoE(FEATURES, HIDDEN, EXPERTS, rngs=nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), x)
    for name, value in variables["params"].items():
        getattr(twin, name)[...] = value

    def read(found):
        return jnp.square(found.out).sum() + found.aux_loss

    linen_step = jax.jit(lp.linen.value_and_grad(lambda v, x: read(linen.apply(v, x))))
    nnx_step = nnx.jit(lp.nnx.value_and_grad(lambda m, x: read(m(x))))
    for i in range(3):
        value, grads = linen_step(variables, (i + 1) * x)
        expected, nnx_grads = nnx_step(twin, (i + 1) * x)
        variables = {**grads, "params": variables["params"]}
        assert value == expected
        for name in ("router", "gate_up", "down"):
            np.testing.assert_array_equal(grads["params"][name], nnx_grads[name][...])
    for path, site in lp.nnx.scaling_state(twin).items():
        found = variables[OVERWRITE_WITH_GRADIENT][path]["scaling"]
        jax.tree.map(np.testing.assert_array_equal, dict(found), site)
        assert (site["amax_history"].max(-1) > 0).any()


def test_moe__recipe_without_state__has_parameters_only(x):
    assert set(block(recipe="fp8_current").init(jax.random.key(0), x)) == {"params"}


def test_moe__applied_without_its_state__is_refused(x):
    variables = block().init(jax.random.key(0), x)
    with pytest.raises(UserError, match="gate_up_dot"):
        block().apply({"params": variables["params"]}, x)


def test_shard_map__experts_split__equals_one_device(x):
    variables = block(recipe="none").init(jax.random.key(0), x)
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
    specs = {"params": {"router": P(), "gate_up": P("expert"), "down": P("expert")}}

    @jax.jit
    @jax.shard_map(
        mesh=mesh, in_specs=(specs, P("expert")), out_specs=MoEOutput(P("expert"), P(), P())
    )
    def split(variables, x):
        return block(recipe="none", expert_axis="expert").apply(variables, x)

    found, expected = (
        jax.block_until_ready(split(variables, x)),
        block(recipe="none").apply(variables, x),
    )
    for ours, alone in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - alone) <= 1e-5 * np.linalg.norm(alone)
