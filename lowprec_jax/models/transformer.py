"""Decoder-only transformer in plain Flax NNX: the reference model of training and tests.

Every matrix multiplication with a weight is a stock `nnx.Linear` that knows nothing of
quantization; `lowprec_jax.nnx.quantize` replaces their `dot_general` from outside. The
paths that precision rules match are `embedding`, `blocks/attention/qkv`,
`blocks/attention/out`, `blocks/mlp/gate_up` (`up` for gelu), `blocks/mlp/down`,
`final_norm` and `head`, with the layer's index after `blocks` where layers are not scanned.

Imports JAX and Flax only. Public names: `Transformer`, `Block`, `Attention`, `Mlp`,
`rope`.

Shape suffixes: B batch, T tokens (S when attended to), D width, N query heads, K kv heads,
G query heads per kv head, H head dim, F mlp width, V vocabulary, L layers.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax.models.config import TransformerConfig


class Transformer(nnx.Module):
    """Decoder-only language model: pre-norm blocks, RoPE, grouped-query attention.

    The initial parameters of a scanned and an unrolled model are equal for equal `rngs`:
    `blocks` of the one is the stack of those of the other. The residual stream is f32
    whatever the compute dtype, so that a bfloat16 model does not lose small updates of it.
    Anything but Refs that a layer writes into its own Variables is not kept where layers
    are scanned or rematerialized.

    Source: LLaMA (Touvron et al., arXiv:2302.13971, section 2.2); GQA (Ainslie et al.,
    arXiv:2305.13245); residual scaling of GPT-2 (Radford et al., 2019, section 2.3).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, from the `params` stream of `rngs`."""
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=jnp.dtype(config.param_dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.init_scale),
            rngs=rngs,
        )
        keys_L = jax.random.split(rngs.params(), config.num_layers)
        if config.scan_layers:
            self.blocks = nnx.vmap(lambda key: _block_from_key(config, key))(keys_L)
        else:
            self.blocks = nnx.List([_block_from_key(config, key) for key in keys_L])
        self.final_norm = _norm(config, rngs)
        if not config.tied_head:
            self.head = _linear(
                config, config.width, config.vocab_size, rngs, preferred_element_type=jnp.float32
            )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns next-token logits; a position sees itself and earlier ones only.

        The head multiplies in the compute dtype and accumulates in f32, tied or not.

        Args:
          tokens_BT: token ids, integer, in [0, V); others give NaN.

        Returns:
          Logits, f32[B, T, V].
        """
        x_BTD = self.embedding(tokens_BT).astype(jnp.float32)
        x_BTD = self._run_blocks(x_BTD)
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.final_norm(x_BTD).astype(dtype)
        if not self.config.tied_head:
            return self.head(x_BTD)
        table_VD = self.embedding.embedding[...].astype(dtype)
        return jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)

    def _run_blocks(self, x_BTD: jax.Array) -> jax.Array:
        remat = self.config.remat
        if isinstance(self.blocks, Block):  # stacked
            graphdef, stacked = nnx.split(self.blocks)
            # Within a scan, XLA cannot undo the recomputation; elsewhere JAX has to prevent it.
            run = _rematerialized(
                lambda x, state: nnx.merge(graphdef, state)(x), remat, prevent_cse=False
            )
            return jax.lax.scan(lambda x, state: (run(x, state), None), x_BTD, stacked)[0]
        for block in self.blocks:
            if remat == "none":
                x_BTD = block(x_BTD)
            else:
                graphdef, state = nnx.split(block)
                run = _rematerialized(lambda x, s, g=graphdef: nnx.merge(g, s)(x), remat)
                x_BTD = run(x_BTD, state)
        return x_BTD


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream after an RMS norm."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the next residual stream, f32[B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD)).astype(jnp.float32)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)).astype(jnp.float32)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions and a fused qkv projection.

    The columns of `qkv` are N query heads, K key heads, K value heads, H each; query heads
    n*G ... n*G + G-1 share key and value head n, where G = N / K.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = _linear(config, config.width, heads * config.head_dim, rngs)
        self.out = _linear(config, config.width, config.width, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the attention output, [B, T, D] in the compute dtype."""
        n, k, h = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        batch, tokens, _ = x_BTD.shape
        qkv_BTJH = self.qkv(x_BTD).reshape(batch, tokens, n + 2 * k, h)
        positions_T = jnp.arange(tokens)
        q_BTNH = rope(qkv_BTJH[:, :, :n], positions_T, self.config.rope_base)
        k_BSKH = rope(qkv_BTJH[:, :, n : n + k], positions_T, self.config.rope_base)
        v_BSKH = qkv_BTJH[:, :, n + k :]
        q_BTKGH = q_BTNH.reshape(batch, tokens, k, n // k, h)
        scores_BKGTS = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
        ) / math.sqrt(h)
        causal_TS = positions_T[:, None] >= positions_T[None, :]
        scores_BKGTS = jnp.where(causal_TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
        weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
        out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
        return self.out(out_BTKGH.reshape(batch, tokens, n * h))


class Mlp(nnx.Module):
    """SwiGLU or GELU feed-forward layer; `gate_up` holds the gate's F columns, then up's."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.kind = config.mlp
        if config.mlp == "swiglu":
            self.gate_up = _linear(config, config.width, 2 * config.mlp_width, rngs)
        else:
            self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the layer's output, [B, T, D] in the compute dtype."""
        if self.kind == "gelu":
            return self.down(jax.nn.gelu(self.up(x_BTD)))
        gate_BTF, up_BTF = jnp.split(self.gate_up(x_BTD), 2, axis=-1)
        return self.down(jax.nn.silu(gate_BTF) * up_BTF)


def rope(x_BTNH: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """Returns heads rotated by their position, so that scores depend on distances only.

    Dimension i < H/2 is paired with i + H/2 and turned by ``position * base**(-2 i / H)``
    radians, in f32.

    Args:
      x_BTNH: queries or keys, any float dtype, H even.
      positions_T: position of each token, integer.
      base: longest wavelength in units of 2 pi tokens.

    Returns:
      Array of the shape and dtype of `x_BTNH`.

    Source: Su et al., RoFormer, arXiv:2104.09864, section 3.4.2.
    Differs from: the paper, which pairs neighbouring dimensions; halves are GPT-NeoX's form.
    """
    half = x_BTNH.shape[-1] // 2
    frequencies = jnp.asarray([base ** (-i / half) for i in range(half)], jnp.float32)
    angles_T1H = positions_T.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles_T1H), jnp.sin(angles_T1H)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _block_from_key(config: TransformerConfig, key: jax.Array) -> Block:
    """One block whose parameters depend on its own key only, stacked or not."""
    return Block(config, rngs=nnx.Rngs(params=key))


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm with f32 statistics, scale and output."""
    return nnx.RMSNorm(config.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


def _linear(
    config: TransformerConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    residual: bool = False,
    preferred_element_type: jnp.dtype | type | None = None,
) -> nnx.Linear:
    """Stock linear layer without bias; `residual` ones start smaller by sqrt(2 L)."""
    scale = config.init_scale / (math.sqrt(2 * config.num_layers) if residual else 1.0)
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(scale),
        preferred_element_type=preferred_element_type,
        rngs=rngs,
    )


def _rematerialized(
    run: Callable[[jax.Array, nnx.State], jax.Array], remat: str, prevent_cse: bool = True
) -> Callable[[jax.Array, nnx.State], jax.Array]:
    """`run` under the checkpoint policy that `remat` names."""
    if remat == "none":
        return run
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else None
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)
