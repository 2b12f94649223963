"""A model with dense layers and with experts that are split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from lowprec_jax.recipes import Column, Role

TOKENS, WIDTH, EXPERTS, PARTS = 32, 16, 8, 4


class Mixed(nnx.Module):
    def __init__(self):
        self.dense = lp.nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.moe = lp.nnx.MoE(WIDTH, 12, EXPERTS, expert_axis="expert", rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.moe(self.dense(x)).out


def test_value_and_grad__dense_layer_beside_split_experts__is_reduced_by_itself():
    graphdef, state = nnx.split(Mixed())
    mesh = jax.make_mesh(
        (PARTS,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:PARTS]
    )

    def spec(path, _):
        split = path[0].key == "moe" and path[1].key != "router"
        return P("expert") if split else P()

    specs = jax.tree.map_with_path(spec, state)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(specs, P("expert")), out_specs=specs)
    def step(state, x):
        model = nnx.merge(graphdef, state)

        def loss(model, x):
            return jax.lax.psum(model(x).sum(), "expert")

        lp.nnx.value_and_grad(loss)(model, x)
        return nnx.state(model)

    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    after = step(state, x)
    observed = np.asarray(after["dense"]["dot_general"]["scaling"]["observed"][...])
    np.testing.assert_array_equal(observed[Role.LHS, Column.AMAX], jnp.abs(x).max())
    assert observed[Role.LHS, Column.SIZE] == TOKENS * WIDTH
