"""The embedding of Linen with a quantized head."""

from typing import Any

import jax
from flax import linen as nn

from lowprec_jax.linen.dot_general import DotGeneral
from lowprec_jax.recipes import Recipe


class Embed(nn.Embed):
    """`flax.linen.Embed` whose `attend` follows a recipe; see `lowprec_jax.nnx.Embed`.

    Scaling state of the head is made when `attend` runs during `init`, as in a whole model.

    Attributes:
      recipe: of `attend`, a recipe or its registered name.
      logits_dtype: type of what `attend` returns; default: the compute type.
    """

    recipe: Recipe | str = "fp8_delayed"
    logits_dtype: Any = None

    def setup(self):
        """Makes the table, and the call site of the head."""
        super().setup()
        self.attend_dot = DotGeneral(self.recipe)

    def attend(self, query: jax.Array) -> jax.Array:
        """Logits [..., num_embeddings]: products of the query, float [..., features]."""
        promote: Any = self.promote_dtype
        query, embedding = promote(query, self.embedding, dtype=self.dtype)
        return self.attend_dot(
            query,
            embedding,
            (((query.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=self.logits_dtype,
        )
