"""LoRA on a quantized, frozen base, for Linen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowprec_jax.ops.lora import LORA_A_INIT, LORA_B_INIT, lora_dense, store_kernel
from lowprec_jax.recipes import Recipe

# The collection of arrays that are never trained.
FROZEN = "frozen"


class LoRADense(nn.Module):
    """``x W + (x A) B * alpha / rank + bias`` with W stored in few bits; see `nnx.LoRALinear`.

    The base is in the collection ``frozen``, the adapters ``lora_a`` and ``lora_b`` in ``params``.
    Give a loss the two apart: ``loss({"params": params}, frozen, x)``.

    Attributes:
      features: features of the output.
      rank: of the adapters.
      alpha: weight of the adapters, over the rank; default: `rank`, a weight of 1.
      recipe: how W is stored, see `lowprec_jax.ops.lora`.
      use_bias: whether there is a bias, frozen.
      dtype: compute type; default: the promoted type of input and adapters.
      param_dtype: type of the adapters.
      precision: of the matmuls.
      kernel_init: initialiser of W, for a layer without a trained one.
    """

    features: int
    rank: int
    alpha: float | None = None
    recipe: Recipe | str = "nf4_weights"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output, [..., features], of float [..., inputs].

        Raises:
          UserError: the recipe leaves weights in high precision.
        """
        inputs = x.shape[-1]
        base = self.variable(FROZEN, "kernel", self._init_base, (inputs, self.features)).value
        bias = None
        if self.use_bias:
            zeros = jnp.zeros((self.features,), self.param_dtype)
            bias = self.variable(FROZEN, "bias", lambda: zeros).value
        a = self.param("lora_a", LORA_A_INIT, (inputs, self.rank), self.param_dtype)
        b = self.param("lora_b", LORA_B_INIT, (self.rank, self.features), self.param_dtype)
        return lora_dense(
            x,
            base,
            a,
            b,
            recipe=self.recipe,
            scaling=(self.rank if self.alpha is None else self.alpha) / self.rank,
            bias=bias,
            dtype=self.dtype,
            precision=self.precision,
        )

    def _init_base(self, shape: tuple[int, int]) -> dict[str, jax.Array]:
        kernel = self.kernel_init(self.make_rng("params"), shape, self.param_dtype)
        return store_kernel(kernel, self.recipe)


def lora_from_dense(
    params: Mapping[str, jax.Array],
    rank: int,
    *,
    rng: jax.Array,
    recipe: Recipe | str = "nf4_weights",
    param_dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Variables of a `LoRADense` on a trained `flax.linen.Dense`.

    Args:
      params: parameters of the layer: ``kernel``, and ``bias`` if it has one.
      rank: of the adapters.
      rng: PRNG key of the adapters.
      recipe: how the kernel is stored; that of the `LoRADense`.
      param_dtype: type of the adapters.

    Returns:
      ``{"params": adapters, "frozen": base}``.

    Raises:
      UserError: the recipe leaves weights in high precision.
    """
    kernel = params["kernel"]
    frozen: dict[str, Any] = {"kernel": store_kernel(kernel, recipe)}
    if "bias" in params:
        frozen["bias"] = params["bias"]
    adapters = {
        "lora_a": LORA_A_INIT(rng, (kernel.shape[0], rank), param_dtype),
        "lora_b": LORA_B_INIT(rng, (rank, kernel.shape[1]), param_dtype),
    }
    return {"params": adapters, FROZEN: frozen}
