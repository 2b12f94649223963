"""The sizes of the model of a run. Imports no JAX. Public name: `ModelConfig`."""

import dataclasses
from typing import Literal

from lowprec_jax.training.config_checks import (
    divisors,
    multiples,
    require,
    require_at_least,
    require_between,
    require_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = 4
    """Blocks of attention and MLP."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads; None: one for each query head."""
    width: int = 128
    """Width of the residual stream."""
    mlp_width: int | None = None
    """Hidden width of the MLP; None: 8/3 width rounded up to 32 (swiglu) or 4 width (gelu)."""
    context: int = 64
    """Tokens of a training window."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Gated (swiglu) or plain (gelu) MLP."""
    tied_head: bool = True
    """The output layer shares the embedding's weights."""
    scan_layers: bool = True
    """One compiled block for all layers: compiles faster."""
    remat: Literal["none", "full", "dots"] = "none"
    """Recompute in the backward pass: nothing, every block, or all but matrix products."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations between the quantized products."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that the optimizer updates."""
    init_scale: float = 0.02
    """Standard deviation of the initial weights of a standard model."""
    parametrization: Literal["standard", "unit_scaled"] = "standard"
    """unit_scaled: weights, activations and gradients near one, for precision.recipe fp8_static;
    learning rates are larger, and carry over between widths with optim.base_width."""
    residual_tau: float | None = None
    """Share of a branch in a unit-scaled residual sum; None: 0.4 at 4 layers, less in deeper."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "width", "context"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "mlp_width"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name in ("rope_base", "init_scale"):
            require_positive(name, getattr(self, name))
        if self.residual_tau is not None:
            require_between("residual_tau", self.residual_tau, 0, 1, open_low=True)
        require(
            self.width % self.num_heads == 0,
            f"width {self.width} is not divisible by num_heads {self.num_heads}. "
            f"Use {multiples(self.width, self.num_heads)}.",
        )
        require(
            self.head_dim % 2 == 0,
            f"width {self.width} / num_heads {self.num_heads} = {self.head_dim} is odd; rotary "
            f"positions need an even head size. Use width "
            f"{multiples(self.width, 2 * self.num_heads)}.",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}. "
            f"Use one of {', '.join(map(str, divisors(self.num_heads)))}.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with None resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP, with None resolved."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.mlp == "gelu":
            return 4 * self.width
        return 32 * -(-8 * self.width // (3 * 32))
