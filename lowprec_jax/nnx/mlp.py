"""The gated MLP of NNX with a recipe, and the op that smooths its outlier channels."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lowprec_jax.nnx.layers import DEFAULT_RECIPE, Linear, LinearGeneral
from lowprec_jax.nnx.sites import DotGeneral
from lowprec_jax.ops.smoothing import smooth_dot_general
from lowprec_jax.recipes import Recipe


class SmoothDotGeneral(DotGeneral):
    """`DotGeneral` of smoothed operands, see `lowprec_jax.ops.smoothing`.

    For the layer after a gated activation, in any model:
    ``nnx.Linear(..., dot_general=SmoothDotGeneral("fp8_delayed"), rngs=rngs)``.
    """

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dimension_numbers, *args, **kwargs):
        """As `jax.lax.dot_general`, with one contracted axis."""
        return smooth_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            *args,
            recipe=self.recipe,
            state=self.state,
            rhs_gather=self.gather,
            **kwargs,
        )


class GatedMlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``: SwiGLU, GeGLU and their like.

    Args:
      features: features of input and output.
      hidden_features: width of the hidden layer.
      recipe: of all matmuls, a recipe or its name.
      fused: gate and up are one matmul, ``gate_up``, of kernel [features, 2, hidden_features], or
        two, ``gate`` and ``up``. A fused one has one scale per tensor for both.
      smooth: Smooth-SwiGLU: outlier channels share their range with the rows of the kernel of
        ``down``, see `lowprec_jax.ops.smoothing`.
      activation: of the gate; `jax.nn.silu` makes it SwiGLU, `jax.nn.gelu` GeGLU.
      use_bias: whether the layers have biases.
      rngs: random keys of the initialisers.
      **kwargs: ``dtype``, ``param_dtype``, ``kernel_init``, ... of all layers, as in `nnx.Linear`.

    Source: Shazeer 2020 (GLU variants), arXiv:2002.05202.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        recipe: Recipe | str = DEFAULT_RECIPE,
        fused: bool = True,
        smooth: bool = False,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        options: dict[str, Any] = {"use_bias": use_bias, "rngs": rngs, **kwargs}
        self.fused, self.activation = fused, activation
        if fused:
            self.gate_up = LinearGeneral(features, (2, hidden_features), recipe=recipe, **options)
        else:
            self.gate = Linear(features, hidden_features, recipe=recipe, **options)
            self.up = Linear(features, hidden_features, recipe=recipe, **options)
        down = (SmoothDotGeneral if smooth else DotGeneral)(recipe)
        self.down = nnx.Linear(hidden_features, features, dot_general=down, **options)

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
