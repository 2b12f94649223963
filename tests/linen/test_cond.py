import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowprec_jax as lp
from linen.helpers import newest_amax, sum_of_squares


class Switch(nn.Module):
    ours: bool = True

    def setup(self):
        self.yes = lp.linen.Dense(5, recipe="fp8_delayed")
        self.no = lp.linen.Dense(5, recipe="fp8_delayed")

    def __call__(self, x):
        if not self.ours and self.is_initializing():
            return self.yes(x) + self.no(x)
        cond = lp.linen.cond if self.ours else nn.cond
        return cond(x[0, 0] > 0, lambda m, x: m.yes(x), lambda m, x: m.no(x), self, x)


@pytest.mark.parametrize(("taken", "other"), [("yes", "no"), ("no", "yes")])
@pytest.mark.parametrize("jit", [True, False])
def test_cond__either_branch__only_the_taken_layer_is_observed(x, taken, other, jit):
    model = Switch()
    x = x.at[0, 0].set(1.0 if taken == "yes" else -1.0)
    variables = model.init(jax.random.key(0), x)
    f = lp.linen.value_and_grad(sum_of_squares(model))
    value, grads = (jax.jit(f) if jit else f)(variables, x)
    dense = lp.linen.Dense(5, recipe="fp8_delayed")
    alone = {k: v[taken] for k, v in variables.items()}
    expected, expected_grads = lp.linen.value_and_grad(sum_of_squares(dense))(alone, x)
    assert value == expected
    assert not jnp.any(newest_amax(grads)[other])
    (expected_amax,) = newest_amax(expected_grads).values()
    np.testing.assert_array_equal(newest_amax(grads)[taken], expected_amax)
    assert not jnp.any(grads["params"][other]["kernel"])


def test_cond__of_flax__error_names_ours(x):
    model = Switch(ours=False)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(KeyError) as caught:
        jax.jit(lp.linen.value_and_grad(sum_of_squares(model)))(variables, x)
    assert any("lowprec_jax.linen.cond" in note for note in caught.value.__notes__)
