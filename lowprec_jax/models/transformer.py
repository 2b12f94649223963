"""Decoder-only transformer in plain Flax NNX: the reference model of training and tests.

Every matrix multiplication with a weight is a stock `nnx.Linear`, or a subclass of one where the
model is unit-scaled, that knows nothing of quantization; `lowprec_jax.nnx.quantize` replaces its
`dot_general` from outside. The paths that precision rules match are `embedding`,
`blocks/attention/qkv`, `blocks/attention/out`, `blocks/mlp/gate_up` (`up` for gelu),
`blocks/mlp/down`,
`final_norm` and `head`, with the layer's index after `blocks` where layers are not scanned.

Imports JAX and Flax only. Public names: `Transformer`, `Block`, `Attention`, `Mlp`,
`rope`.

Shape suffixes: B batch, T tokens (S when attended to), D width, N query heads, K kv heads,
G query heads per kv head, H head dim, F mlp width, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lowprec_jax import compat
from lowprec_jax.models.config import TransformerConfig
from lowprec_jax.models.unit_scaling import UnitScaledLinear, gradient_scale, residual_sum


class Transformer(nnx.Module):
    """Decoder-only language model: pre-norm blocks, RoPE, grouped-query attention.

    With ``parametrization="unit_scaled"``, mu-nit scaling: see `lowprec_jax.models.unit_scaling`.

    The initial parameters of a scanned and an unrolled model are equal for equal `rngs`:
    `blocks` of the one is the stack of those of the other. The residual stream is f32
    whatever the compute dtype, so that a bfloat16 model does not lose small updates of it.
    Anything but Refs that a layer writes into its own Variables is not kept where layers
    are scanned or rematerialized.

    Attributes:
      sequence_axis: mesh axis along which the residual stream between the blocks is split by
        position, or None; an automatic axis of the mesh in use. Norms and residual sums are then
        split too (Korthikanti et al., arXiv:2205.05198, section 4.2.2).

    Source: LLaMA (Touvron et al., arXiv:2302.13971, section 2.2); GQA (Ainslie et al.,
    arXiv:2305.13245); residual scaling of GPT-2 (Radford et al., 2019, section 2.3).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, from the `params` stream of `rngs`."""
        self.config = config
        self.sequence_axis: str | None = None
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=jnp.dtype(config.param_dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(
                config.init_scale if config.parametrization == "standard" else 1.0
            ),
            rngs=rngs,
        )
        keys_L = jax.random.split(rngs.params(), config.num_layers)
        if config.scan_layers:
            self.blocks = nnx.vmap(lambda key: _block_from_key(config, key))(keys_L)
        else:
            self.blocks = nnx.List([_block_from_key(config, key) for key in keys_L])
        self.final_norm = _norm(config, rngs)
        if not config.tied_head:
            self.head = _head(config, rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns next-token logits; a position sees itself and earlier ones only.

        The head multiplies in the compute dtype and accumulates in f32, tied or not.

        Args:
          tokens_BT: token ids, integer, in [0, V); others give NaN.

        Returns:
          Logits, f32[B, T, V].
        """
        out_sharding = compat.with_trailing_axes(tokens_BT, 1)
        x_BTD = self.embedding(tokens_BT, out_sharding=out_sharding).astype(jnp.float32)
        x_BTD = self._run_blocks(self._split_sequence(x_BTD))
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.final_norm(x_BTD).astype(dtype)
        if not self.config.tied_head:
            return self.head(x_BTD)
        table_VD = self.embedding.embedding[...].astype(dtype)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
        if self.config.parametrization == "standard":
            return logits_BTV
        return logits_BTV / self.config.width

    def _run_blocks(self, x_BTD: jax.Array) -> jax.Array:
        remat = self.config.remat
        if isinstance(self.blocks, Block):  # stacked
            graphdef, stacked = nnx.split(self.blocks)
            # Within a scan, XLA cannot undo the recomputation; elsewhere JAX has to prevent it.
            run = _rematerialized(
                lambda x, state: self._split_sequence(nnx.merge(graphdef, state)(x)),
                remat,
                prevent_cse=False,
            )
            return jax.lax.scan(lambda x, state: (run(x, state), None), x_BTD, stacked)[0]
        for block in self.blocks:
            if remat == "none":
                x_BTD = block(x_BTD)
            else:
                graphdef, state = nnx.split(block)
                run = _rematerialized(lambda x, s, g=graphdef: nnx.merge(g, s)(x), remat)
                x_BTD = run(x_BTD, state)
            x_BTD = self._split_sequence(x_BTD)
        return x_BTD

    def _split_sequence(self, x_BTD: jax.Array) -> jax.Array:
        if self.sequence_axis is None:
            return x_BTD
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(free, self.sequence_axis, None)
        return jax.lax.with_sharding_constraint(x_BTD, spec)


class Block(nnx.Module):
    """Attention and MLP with an RMS norm each: of its input, or unit-scaled of its output."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.tau = config.tau
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the next residual stream, f32[B, T, D]."""
        if self.tau is not None:
            x_BTD = residual_sum(x_BTD, self.attention_norm(self.attention(x_BTD)), self.tau)
            return residual_sum(x_BTD, self.mlp_norm(self.mlp(x_BTD)), self.tau)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD)).astype(jnp.float32)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)).astype(jnp.float32)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions and a fused qkv projection.

    The columns of `qkv` are K groups of G query heads, a key head and a value head, H each, where
    G = N / K: query head n*G + g shares key and value head n. In this order a tensor-parallel part
    of the columns is a number of whole groups, and attention needs no communication.
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
        group = n // k
        qkv_BTKJH = self.qkv(x_BTD).reshape(batch, tokens, k, group + 2, h)
        positions_T = jnp.arange(tokens)
        q_BTKGH = rope(qkv_BTKJH[:, :, :, :group], positions_T, self.config.rope_base)
        k_BSKH = rope(qkv_BTKJH[:, :, :, group], positions_T, self.config.rope_base)
        v_BSKH = qkv_BTKJH[:, :, :, group + 1]
        scores_BKGTS = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
        ) / math.sqrt(h)
        causal_TS = positions_T[:, None] >= positions_T[None, :]
        scores_BKGTS = jnp.where(causal_TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
        weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
        out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
        return self.out(out_BTKGH.reshape(batch, tokens, n * h))


class Mlp(nnx.Module):
    """SwiGLU or GELU feed-forward layer; the kernel of `gate_up` is [D, 2, F]: gate, then up."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.kind = config.mlp
        if config.mlp == "swiglu":
            self.gate_up = _linear(config, config.width, (2, config.mlp_width), rngs)
        else:
            self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the layer's output, [B, T, D] in the compute dtype."""
        if self.kind == "gelu":
            return self.down(jax.nn.gelu(self.up(x_BTD)))
        gate_up_BT2F = self.gate_up(x_BTD)
        return self.down(jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1])


def rope(x_BTxH: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """Returns heads rotated by their position, so that scores depend on distances only.

    Dimension i < H/2 is paired with i + H/2 and turned by ``position * base**(-2 i / H)``
    radians, in f32.

    Args:
      x_BTxH: queries or keys, any float dtype, H even; heads are the axes between T and H.
      positions_T: position of each token, integer.
      base: longest wavelength in units of 2 pi tokens.

    Returns:
      Array of the shape and dtype of `x_BTxH`.

    Source: Su et al., RoFormer, arXiv:2104.09864, section 3.4.2.
    Differs from: the paper, which pairs neighbouring dimensions; halves are GPT-NeoX's form.
    """
    half = x_BTxH.shape[-1] // 2
    frequencies = jnp.asarray([base ** (-i / half) for i in range(half)], jnp.float32)
    angles_TH = positions_T.astype(jnp.float32)[:, None] * frequencies
    angles_TxH = jnp.expand_dims(angles_TH, tuple(range(1, x_BTxH.ndim - 2)))
    cos, sin = jnp.cos(angles_TxH), jnp.sin(angles_TxH)
    a, b = jnp.split(x_BTxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTxH.dtype)


def _block_from_key(config: TransformerConfig, key: jax.Array) -> Block:
    """One block whose parameters depend on its own key only, stacked or not."""
    return Block(config, rngs=nnx.Rngs(params=key))


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm with f32 statistics, scale and output."""
    return nnx.RMSNorm(config.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


def _linear(
    config: TransformerConfig,
    inputs: int,
    outputs: int | tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    residual: bool = False,
) -> nnx.Linear | nnx.LinearGeneral:
    """Hidden layer without bias; unless unit-scaled, `residual` ones start smaller by sqrt(2 L)."""
    if config.parametrization == "unit_scaled":
        factors = {"multiplier": inputs**-0.5, "grad_scale": gradient_scale(config)}
        return UnitScaledLinear(inputs, outputs, rngs=rngs, **factors, **_dtypes(config))
    scale = config.init_scale / (math.sqrt(2 * config.num_layers) if residual else 1.0)
    options: Any = {"use_bias": False, "kernel_init": nnx.initializers.normal(scale), "rngs": rngs}
    if isinstance(outputs, int):
        return nnx.Linear(inputs, outputs, **options, **_dtypes(config))
    return nnx.LinearGeneral(inputs, outputs, **options, **_dtypes(config))


def _head(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Linear | nnx.LinearGeneral:
    """Output layer with f32 logits; their gradients are of the size of 1 / tokens."""
    sizes = config.width, config.vocab_size
    options: Any = {"preferred_element_type": jnp.float32, "rngs": rngs, **_dtypes(config)}
    if config.parametrization == "unit_scaled":
        factors = {"multiplier": 1 / config.width, "grad_scale": float(config.loss_tokens)}
        return UnitScaledLinear(*sizes, **factors, **options)
    init = nnx.initializers.normal(config.init_scale)
    return nnx.Linear(*sizes, use_bias=False, kernel_init=init, **options)


def _dtypes(config: TransformerConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.compute_dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def _rematerialized(
    run: Callable[[jax.Array, nnx.State], jax.Array], remat: str, prevent_cse: bool = True
) -> Callable[[jax.Array, nnx.State], jax.Array]:
    """`run` under the checkpoint policy that `remat` names."""
    if remat == "none":
        return run
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else None
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)
