"""Attention layers of NNX with recipes."""

import functools
from typing import Any

import jax
from flax import nnx

from lowprec_jax.nnx.layers import DEFAULT_RECIPE
from lowprec_jax.nnx.quantize import quantize
from lowprec_jax.nnx.sites import EinsumOp
from lowprec_jax.ops.attention import dot_product_attention, kv_quantizer, weights_einsum
from lowprec_jax.recipes import Recipe


class WeightsEinsum(EinsumOp):
    """The product of attention weights and values; see `lowprec_jax.ops.attention`."""

    def __call__(self, subscripts: str, lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
        """As `EinsumOp`, and ``amax=``, what no weight exceeds."""
        return weights_einsum(subscripts, lhs, rhs, recipe=self.recipe, state=self.state, **kwargs)


class DotProductAttention(nnx.Module):
    """`nnx.dot_product_attention` with its two matmuls as recipes say. One per layer.

    Fits the ``attention_fn`` argument of `nnx.MultiHeadAttention`. Softmax is never quantized.

    Args:
      qk_recipe: of ``Q K^T``, a recipe or its name.
      pv_recipe: of ``P V``. The scale of the weights P is known beforehand and never from history.
        A recipe without scales (``fp8_static``) loses weights below 2**-10: no choice for it.
      kv_recipe: how keys and values are rounded beforehand, as by a cache in low precision; see
        `lowprec_jax.ops.attention.as_cached`.

    Raises:
      UserError: an unknown recipe, or a `kv_recipe` that quantizes no activations.
    """

    def __init__(
        self,
        *,
        qk_recipe: Recipe | str = "none",
        pv_recipe: Recipe | str = "none",
        kv_recipe: Recipe | str | None = None,
    ):
        self.qk = EinsumOp(qk_recipe)
        self.pv = WeightsEinsum(pv_recipe)
        if kv_recipe is not None:
            kv_quantizer(kv_recipe)
        self.kv_recipe = kv_recipe

    @property
    def quantizes(self) -> bool:
        """Whether any recipe is one of low precision."""
        return any((self.qk.recipe.quantizes, self.pv.recipe.quantizes, self.kv_recipe))

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        module: nnx.Module | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The output, [..., queries, heads, value depth].

        Args:
          query: float [..., queries, heads, depth].
          key: float [..., keys, key heads, depth].
          value: float [..., keys, key heads, value depth].
          module: sows the weights, as ``attention_weights``.
          **kwargs: see `lowprec_jax.ops.attention.dot_product_attention`.
        """
        if module is not None:
            kwargs["on_weights"] = functools.partial(
                module.sow, nnx.Intermediate, "attention_weights"
            )
        return dot_product_attention(
            query,
            key,
            value,
            qk=self.qk,
            pv=self.pv,
            kv_recipe=self.kv_recipe,
            **kwargs,
        )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` computed as recipes say; parameters and initial values are the same.

    Args:
      num_heads: number of heads.
      in_features: features of the input.
      *args: as in `nnx.MultiHeadAttention`.
      recipe: of the projections ``query``, ``key``, ``value`` and ``out``.
      qk_recipe: of ``Q K^T``, see `DotProductAttention`.
      pv_recipe: of ``P V``, likewise.
      kv_recipe: of keys and values, likewise. Without any of the three, ``attention_fn`` is the
        stock function, or what is given.
      rngs: random keys of the initialisers.
      **kwargs: as in `nnx.MultiHeadAttention`.

    Raises:
      UserError: see `DotProductAttention`.
      TypeError: an ``attention_fn`` and a recipe for it.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args: Any,
        recipe: Recipe | str = DEFAULT_RECIPE,
        qk_recipe: Recipe | str = "none",
        pv_recipe: Recipe | str = "none",
        kv_recipe: Recipe | str | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        core = DotProductAttention(qk_recipe=qk_recipe, pv_recipe=pv_recipe, kv_recipe=kv_recipe)
        attention = {"attention_fn": core} if core.quantizes else {}
        super().__init__(num_heads, in_features, *args, rngs=rngs, **attention, **kwargs)
        quantize(self, [(".*", recipe)])
