"""Attention layers of Linen with recipes: the numerics and the state of `lowprec_jax.nnx`."""

import functools
from typing import Any

import jax
from flax import linen as nn

from lowprec_jax.linen.dot_general import EinsumOp, dot_general_cls, state_of
from lowprec_jax.ops.attention import dot_product_attention, kv_quantizer, weights_einsum
from lowprec_jax.recipes import Recipe, get_recipe


class WeightsEinsum(EinsumOp):
    """The product of attention weights and values; see `lowprec_jax.ops.attention`."""

    @nn.compact
    def __call__(self, subscripts: str, lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
        """As `EinsumOp`, and ``amax=``, what no weight exceeds."""
        return weights_einsum(
            subscripts, lhs, rhs, recipe=self.recipe, state=state_of(self), **kwargs
        )


class DotProductAttention(nn.Module):
    """`flax.linen.dot_product_attention` with its two matmuls as recipes say.

    Fits the ``attention_fn`` of stock attention. See `lowprec_jax.nnx.DotProductAttention`.

    Attributes:
      qk_recipe: of ``Q K^T``, a recipe or its name.
      pv_recipe: of ``P V``.
      kv_recipe: how keys and values are rounded beforehand, as by a cache in low precision.
    """

    qk_recipe: Recipe | str = "none"
    pv_recipe: Recipe | str = "none"
    kv_recipe: Recipe | str | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any recipe is one of low precision."""
        products = (get_recipe(self.qk_recipe), get_recipe(self.pv_recipe))
        return any(recipe.quantizes for recipe in products) or self.kv_recipe is not None

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        force_fp32_for_softmax: bool = False,
        module: nn.Module | None = None,
    ) -> jax.Array:
        """The output, [..., queries, heads, value depth].

        Arguments are those of `lowprec_jax.ops.attention.dot_product_attention`; they are spelled
        out because stock attention reads them from the signature. `module` sows the weights.

        Raises:
          UserError: heads that do not fit, or a `kv_recipe` that quantizes no activations.
        """
        options: dict[str, Any] = {}
        if module is not None:
            options["on_weights"] = functools.partial(
                module.sow, "intermediates", "attention_weights"
            )
        return dot_product_attention(
            query,
            key,
            value,
            qk=EinsumOp(self.qk_recipe, name="qk"),
            pv=WeightsEinsum(self.pv_recipe, name="pv"),
            kv_recipe=self.kv_recipe,
            bias=bias,
            mask=mask,
            is_causal=is_causal,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            force_fp32_for_softmax=force_fp32_for_softmax,
            **options,
        )


class MultiHeadAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` computed as recipes say; parameters are the same.

    Attributes:
      recipe: of the projections ``query``, ``key``, ``value`` and ``out``.
      qk_recipe: of ``Q K^T``, see `DotProductAttention`.
      pv_recipe: of ``P V``, likewise.
      kv_recipe: of keys and values, likewise. Without any of the three, ``attention_fn`` is the
        stock function, or what is given; with one of them it is replaced.

    Raises:
      UserError: an unknown recipe, or a `kv_recipe` that quantizes no activations.
    """

    recipe: Recipe | str = "fp8_delayed"
    qk_recipe: Recipe | str = "none"
    pv_recipe: Recipe | str = "none"
    kv_recipe: Recipe | str | None = None

    def __post_init__(self):
        self.qkv_dot_general_cls = self.out_dot_general_cls = dot_general_cls(self.recipe)
        if self.kv_recipe is not None:
            kv_quantizer(self.kv_recipe)
        recipes = (self.qk_recipe, self.pv_recipe, self.kv_recipe)
        core = DotProductAttention(*recipes, parent=None)
        if core.quantizes:
            self.attention_fn = core
        super().__post_init__()
