"""Reference models in plain Flax NNX, to be quantized from outside like anybody's."""

from lowprec_jax.models.config import TransformerConfig
from lowprec_jax.models.generate import generate
from lowprec_jax.models.loss import next_token_loss
from lowprec_jax.models.transformer import Attention, Block, Mlp, Transformer, rope

__all__ = [
    "Attention",
    "Block",
    "Mlp",
    "Transformer",
    "TransformerConfig",
    "generate",
    "next_token_loss",
    "rope",
]
