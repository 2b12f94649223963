"""The embedding of NNX with a quantized head."""

import jax
from flax import nnx

from lowprec_jax.nnx.layers import DEFAULT_RECIPE
from lowprec_jax.nnx.sites import DotGeneral
from lowprec_jax.recipes import Recipe


class Embed(nnx.Embed):
    """`nnx.Embed` whose `attend`, the head of a model with tied embeddings, follows a recipe.

    The lookup stays in high precision: it multiplies nothing. Rules leave heads high by default,
    since their error is that of the logits; this layer is how to ask for a quantized one.

    Args:
      num_embeddings: size of the vocabulary.
      features: size of an embedding.
      recipe: of `attend`, a recipe or its name.
      logits_dtype: type of what `attend` returns; default: the compute type. Products are summed in
        f32 in any case.
      rngs: random keys of the initialisers.
      **kwargs: as in `nnx.Embed`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        recipe: Recipe | str = DEFAULT_RECIPE,
        logits_dtype=None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(num_embeddings, features, rngs=rngs, **kwargs)
        self.attend_dot = DotGeneral(recipe)
        self.logits_dtype = logits_dtype

    def attend(self, query: jax.Array, out_sharding=None) -> jax.Array:
        """Logits [..., num_embeddings]: products of the query with every embedding.

        Args:
          query: float [..., features].
          out_sharding: sharding of the result on a mesh with explicit axes.
        """
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return self.attend_dot(
            query,
            embedding,
            (((query.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=self.logits_dtype,
            out_sharding=out_sharding,
        )
