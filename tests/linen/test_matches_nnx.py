"""The two Flax interfaces are equals: same numbers, same state."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import lowprec_jax as lp
from linen.helpers import scaling_of


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(lp.linen.Dense(9, recipe="fp8_delayed", name="up")(x))
        return lp.linen.Dense(5, recipe="fp8_delayed", name="down")(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.up = lp.nnx.Linear(12, 9, recipe="fp8_delayed", rngs=rngs)
        self.down = lp.nnx.Linear(9, 5, recipe="fp8_delayed", rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_linen_and_nnx__same_parameters_three_steps__losses_gradients_states_equal_bitwise(x):
    linen, twin = LinenMlp(), NnxMlp(nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), x)
    for name, layer in (("up", twin.up), ("down", twin.down)):
        layer.kernel.set_value(variables["params"][name]["kernel"])
    linen_step = jax.jit(lp.linen.value_and_grad(lambda v, x: jnp.square(linen.apply(v, x)).sum()))
    nnx_step = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m(x)).sum()))
    for i in range(3):
        value, grads = linen_step(variables, (i + 1) * x)
        expected, nnx_grads = nnx_step(twin, (i + 1) * x)
        variables = {**grads, "params": variables["params"]}
        assert value == expected
        for name in ("up", "down"):
            for leaf in ("kernel", "bias"):
                np.testing.assert_array_equal(
                    grads["params"][name][leaf], nnx_grads[name][leaf][...]
                )
    states = lp.nnx.scaling_state(twin)
    for path, site in scaling_of(variables).items():
        (same,) = (state for key, state in states.items() if path in key)
        assert site.keys() == same.keys()
        jax.tree.map(np.testing.assert_array_equal, dict(site), dict(same))
