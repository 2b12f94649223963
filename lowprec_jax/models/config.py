"""Sizes and options of the reference transformer; plain data, without JAX.

Public names: `TransformerConfig`, `DtypeName`.
"""

import dataclasses
import math
from typing import Literal, get_args

DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a `Transformer`.

    Raises:
      ValueError: a size is not positive, heads do not divide, or an option is unknown.
    """

    vocab_size: int
    """Number of token ids, V."""
    num_layers: int = 4
    """Number of blocks, L."""
    num_heads: int = 4
    """Query heads, N; `width / num_heads` is the head dim H and must be even (RoPE)."""
    num_kv_heads: int = 4
    """Key and value heads, K; divides `num_heads`, which query heads share them."""
    width: int = 128
    """Size of the residual stream, D."""
    mlp_width: int = 352
    """Size of the hidden layer, F."""
    max_context: int = 256
    """Tokens a training window has; longer inputs work, RoPE has no table."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """silu(gate) * up, from one fused matrix [D, 2, F], or gelu(up) (tanh form), [D, F]."""
    tied_head: bool = True
    """Logits from the embedding table instead of a `head` of their own."""
    scan_layers: bool = True
    """One stacked block and `lax.scan` (compiles once) instead of a list of blocks."""
    remat: Literal["none", "full", "dots"] = "none"
    """Recompute nothing, everything, or everything but matrix products in backward."""
    rope_base: float = 10_000.0
    """Longest wavelength of the rotary embedding, in units of 2 pi tokens."""
    compute_dtype: DtypeName = "float32"
    """Dtype of activations inside blocks; norms, softmax, residual and logits are f32."""
    param_dtype: DtypeName = "float32"
    """Dtype of the matrices; norm scales are always float32."""
    init_scale: float = 0.02
    """Standard deviation of initial weights; `out` and `down` have it / sqrt(2 L). Standard
    parametrization only."""
    parametrization: Literal["standard", "unit_scaled"] = "standard"
    """Or mu-nit scaling: weights N(0, 1), multipliers after products, norms after branches."""
    residual_tau: float | None = None
    """Part of the variance of a unit-scaled residual sum that is its branch's; None: by depth."""
    loss_tokens: int = 1
    """Tokens over which the loss is averaged; it sets the range of unit-scaled gradients."""

    def __post_init__(self):
        """Rejects values that no model can be built from."""
        for name in (
            "vocab_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "width",
            "mlp_width",
            "max_context",
            "rope_base",
            "init_scale",
            "loss_tokens",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        _check_option("mlp", self.mlp, ("swiglu", "gelu"))
        _check_option("parametrization", self.parametrization, ("standard", "unit_scaled"))
        if self.residual_tau is not None and not 0 < self.residual_tau < 1:
            raise ValueError(f"residual_tau is {self.residual_tau}; it must be between 0 and 1.")
        _check_option("remat", self.remat, ("none", "full", "dots"))
        _check_option("compute_dtype", self.compute_dtype, get_args(DtypeName))
        _check_option("param_dtype", self.param_dtype, get_args(DtypeName))
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width {self.width} over num_heads {self.num_heads} gives no even head dim; "
                f"rotary embeddings rotate pairs. Make width a multiple of {2 * self.num_heads}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"use one of {_divisors(self.num_heads)}."
            )

    @property
    def head_dim(self) -> int:
        """Size of a head, H."""
        return self.width // self.num_heads

    @property
    def tau(self) -> float | None:
        """Part of a residual sum's variance that is its branch's; None: an unweighted sum.

        By depth: the power law through the two values that arXiv:2502.05967 gives, 0.4 at 4 layers
        and 0.1 at 100.
        """
        if self.parametrization == "standard":
            return None
        if self.residual_tau is not None:
            return self.residual_tau
        return 0.4 * (self.num_layers / 4) ** (math.log(0.1 / 0.4) / math.log(100 / 4))


def _check_option(name: str, given: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is not one of the allowed."""
    if given not in allowed:
        raise ValueError(f"{name} is {given!r}; use one of {', '.join(map(repr, allowed))}.")


def _divisors(number: int) -> list[int]:
    """Positive divisors, ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]
