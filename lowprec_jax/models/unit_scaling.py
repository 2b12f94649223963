"""Unit scaling: operands of hidden products near unit variance, so that FP8 needs no scales.

Weights are N(0, 1) and a fixed multiplier follows each product. The multiplier is outside of the
quantized product, and so is the change of size that its output gradient needs; both are exact
algebra: the loss has its true gradients, which clipping and any optimizer may use.

Imports JAX and Flax only. Public names: `UnitScaledLinear`, `scaled`, `residual_sum`,
`gradient_scale`.

Source: mu-nit scaling (Narayan et al., arXiv:2502.05967); unit scaling (Blake et al.,
arXiv:2303.11257), section 4, for gradients with a factor of their own.
Differs from: both, which change the gradients of weights by constants that Adam does not see.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from lowprec_jax.models.config import TransformerConfig


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def scaled(x: jax.Array, value: float, gradient: float) -> jax.Array:
    """Returns ``value * x``, whose derivative is taken to be `gradient`.

    For pairs of calls around a product, so that their gradients multiply to the true one.
    """
    del gradient
    return x * value


@scaled.defjvp
def _scaled_jvp(value: float, gradient: float, primals: Any, tangents: Any) -> Any:
    return primals[0] * value, tangents[0] * gradient


@dataclasses.dataclass(frozen=True)
class _ScaleGradients:
    """A ``promote_dtype`` of Flax's layers: operands as they are, gradients times `factor`."""

    factor: float

    def __call__(self, operands: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
        operands = [x if x is None else scaled(x, 1.0, self.factor) for x in operands]
        return dtypes.promote_dtype(tuple(operands), dtype=dtype, inexact=inexact)


class UnitScaledLinear(nnx.LinearGeneral):
    """``multiplier * x @ kernel`` with kernel N(0, 1); a linear layer that `quantize` reaches.

    The product sees output gradients that are `grad_scale` times the true ones, without the
    multiplier. Gradients of `x` and the kernel are the true ones.

    Attributes:
      multiplier: 1 / sqrt(fan_in) in hidden layers, 1 / fan_in in the head.
      grad_scale: inverse of the expected size of the true output gradient.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | tuple[int, ...],
        *,
        multiplier: float,
        grad_scale: float,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes the kernel; `options` are those of `nnx.LinearGeneral`."""
        super().__init__(
            inputs,
            outputs,
            use_bias=False,
            kernel_init=nnx.initializers.normal(1.0),
            promote_dtype=_ScaleGradients(multiplier / grad_scale),
            rngs=rngs,
            **options,
        )
        self.multiplier = multiplier
        self.grad_scale = grad_scale

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the product over the last axis, in the compute dtype."""
        return scaled(super().__call__(inputs, out_sharding), self.multiplier, self.grad_scale)


def residual_sum(x: jax.Array, branch: jax.Array, tau: float) -> jax.Array:
    """``sqrt(1 - tau) x + sqrt(tau) branch``: unit variance if both have it, f32."""
    return math.sqrt(1 - tau) * x + math.sqrt(tau) * branch.astype(jnp.float32)


def gradient_scale(config: TransformerConfig) -> float:
    """Inverse of the size of the residual stream's gradient at initialization, a power of two.

    The gradient of a mean loss in the logits of one token has norm 1 / tokens, as all but one
    probability is small. The head turns it into width entries of 1 / (tokens width) each, and the
    blocks below keep its size to within a small factor, for which e5m2 has room.
    """
    return 2.0 ** round(math.log2(config.loss_tokens * config.width))
