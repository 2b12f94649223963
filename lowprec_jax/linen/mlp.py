"""The gated MLP of Linen with a recipe: the numerics and the state of `lowprec_jax.nnx`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowprec_jax.linen.dot_general import DotGeneral, Injection, state_of
from lowprec_jax.linen.modules import Dense, DenseGeneral
from lowprec_jax.ops.smoothing import smooth_dot_general
from lowprec_jax.recipes import Recipe, get_recipe


class SmoothDotGeneral(DotGeneral):
    """`DotGeneral` of smoothed operands, see `lowprec_jax.ops.smoothing`."""

    @nn.compact
    def __call__(self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args, **kwargs):
        """As `jax.lax.dot_general`, with one contracted axis.

        Raises:
          UserError: the variables given to `apply` have no scaling state for this layer.
        """
        return smooth_dot_general(
            lhs, rhs, dimension_numbers, *args, recipe=self.recipe, state=state_of(self), **kwargs
        )


def smooth_dot_general_cls(recipe: Recipe | str) -> Injection:
    """What ``nn.Dense(dot_general_cls=...)`` takes, for the layer after a gated activation.

    Raises:
      UserError: an unknown recipe.
    """
    return Injection(SmoothDotGeneral, get_recipe(recipe))


class GatedMlp(nn.Module):
    """``down(activation(gate(x)) * up(x))``; see `lowprec_jax.nnx.GatedMlp`.

    Attributes:
      features: features of input and output.
      hidden_features: width of the hidden layer.
      recipe: of all matmuls, a recipe or its registered name.
      fused: gate and up are one matmul, ``gate_up``, or two, ``gate`` and ``up``.
      smooth: outlier channels share their range with the rows of the kernel of ``down``.
      activation: of the gate.
      use_bias: whether the layers have biases.
      dtype: compute type; default: the promoted type of input and parameters.
      param_dtype: type of the parameters.
      kernel_init: initialiser of all kernels.
    """

    features: int
    hidden_features: int
    recipe: Recipe | str = "fp8_delayed"
    fused: bool = True
    smooth: bool = False
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init

    def setup(self):
        """Makes the layers."""
        names = ("use_bias", "dtype", "param_dtype", "kernel_init")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.fused:
            shape = (2, self.hidden_features)
            self.gate_up = DenseGeneral(shape, recipe=self.recipe, **options)
        else:
            self.gate = Dense(self.hidden_features, recipe=self.recipe, **options)
            self.up = Dense(self.hidden_features, recipe=self.recipe, **options)
        down = SmoothDotGeneral if self.smooth else DotGeneral
        injection = Injection(down, get_recipe(self.recipe))
        self.down = nn.Dense(self.features, dot_general_cls=injection, **options)

    def hidden(self, x: jax.Array) -> jax.Array:
        """The input of ``down``, [..., hidden_features], of float [..., features]."""
        if self.fused:
            gate_up = self.gate_up(x)
            gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        else:
            gate, up = self.gate(x), self.up(x)
        return self.activation(gate) * up

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output, of the shape of x, float [..., features]."""
        return self.down(self.hidden(x))
