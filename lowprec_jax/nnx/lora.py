"""LoRA on a quantized, frozen base, for NNX."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax.ops.lora import (
    LORA_A_INIT,
    LORA_B_INIT,
    lora_dense,
    read_kernel,
    store_kernel,
)
from lowprec_jax.recipes import Recipe, get_recipe


class Frozen(nnx.Variable):
    """An array that is never trained: no `nnx.Param`, so that gradients and optimizers miss it."""


class LoRALinear(nnx.Module):
    """``x W + (x A) B * alpha / rank + bias`` with W stored in few bits: LoRA, and QLoRA.

    Only A and B are parameters (`nnx.LoRAParam`, a kind of `nnx.Param`). B starts as zeros, so that
    the layer starts as its base. No scaling state: W does not change.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      rank: of the adapters.
      alpha: weight of the adapters, over the rank; default: `rank`, a weight of 1.
      recipe: how W is stored: as the recipe quantizes weights, see `lowprec_jax.ops.lora`.
      kernel: W, float [in_features, out_features]; default: freshly initialised.
      bias: float [out_features] or None; frozen, in high precision.
      dtype: compute type; default: the promoted type of input and adapters.
      param_dtype: type of the adapters.
      precision: of the matmuls.
      rngs: random keys of the initialisers.

    Raises:
      UserError: the recipe leaves weights in high precision.

    Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
    Differs from: `nnx.LoRALinear`, whose base stays in high precision and is an `nnx.Param`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None = None,
        recipe: Recipe | str = "nf4_weights",
        kernel: jax.Array | None = None,
        bias: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        if kernel is None:
            init = nnx.initializers.lecun_normal()
            kernel = init(rngs.params(), (in_features, out_features), param_dtype)
        self.recipe = get_recipe(recipe)
        stored = store_kernel(kernel, self.recipe)
        self.base = nnx.Dict({name: Frozen(array) for name, array in stored.items()})
        self.bias = nnx.data(None) if bias is None else Frozen(bias)
        a_shape, b_shape = (in_features, rank), (rank, out_features)
        self.lora_a = nnx.LoRAParam(LORA_A_INIT(rngs.params(), a_shape, param_dtype))
        self.lora_b = nnx.LoRAParam(LORA_B_INIT(rngs.params(), b_shape, param_dtype))
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dtype, self.precision = dtype, precision

    @classmethod
    def from_linear(cls, layer: nnx.Linear, rank: int, *, rngs: nnx.Rngs, **options: Any) -> Self:
        """An adapter on a trained layer, which is left as it is.

        Args:
          layer: the layer; its kernel is quantized, its bias kept.
          rank: of the adapters.
          rngs: random keys of the initialisers.
          **options: as in the constructor.
        """
        bias = None if layer.bias is None else layer.bias[...]
        options = {"dtype": layer.dtype, "precision": layer.precision, **options}
        return cls(
            layer.in_features,
            layer.out_features,
            rank=rank,
            kernel=layer.kernel[...],
            bias=bias,
            rngs=rngs,
            **options,
        )

    def kernel(self) -> jax.Array:
        """The base with the adapters added, f32: what a layer without adapters would have."""
        a, b = (x[...].astype(jnp.float32) for x in (self.lora_a, self.lora_b))
        base = read_kernel(self._stored(), self.recipe, (a.shape[0], b.shape[1]))
        return base + jnp.dot(a, b, precision="highest") * self.scaling

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output, [..., out_features], of float [..., in_features]."""
        return lora_dense(
            x,
            self._stored(),
            self.lora_a[...],
            self.lora_b[...],
            recipe=self.recipe,
            scaling=self.scaling,
            bias=None if self.bias is None else self.bias[...],
            dtype=self.dtype,
            precision=self.precision,
        )

    def _stored(self) -> dict[str, jax.Array]:
        return {name: variable[...] for name, variable in self.base.items()}
