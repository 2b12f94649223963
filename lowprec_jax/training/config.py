"""The typed config of a training run: what each option is, its default, and its checks.

Imports no JAX and no Flax, so that the help is quick. Names of recipes are checked later, by
their registry. Public names: `TrainConfig` and its sections `ModelConfig`, `DataConfig`,
`PrecisionConfig`, `RuleConfig`, `OptimConfig`, `MeshConfig`, `DistributedConfig`.
"""

import dataclasses
import re
from typing import Literal

from lowprec_jax.training.config_checks import (
    divisors,
    multiples,
    require,
    require_at_least,
    require_between,
    require_positive,
)
from lowprec_jax.training.mesh_config import MeshConfig
from lowprec_jax.training.optim_config import OptimConfig
from lowprec_jax.training.process_settings import DistributedConfig

__all__ = [
    "DataConfig",
    "DistributedConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "RuleConfig",
    "TrainConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model is trained on."""

    source: str = "stdlib"
    """"stdlib" (the Python standard library's own source) or the path of a file or folder."""
    tokenizer: Literal["byte", "char", "bpe"] = "byte"
    """Bytes, the characters of the training text, or byte pairs trained on it."""
    vocab_size: int = 1024
    """Tokens of the bpe tokenizer; the others find their own size."""
    validation_fraction: float = 0.1
    """Part of the text that is never trained on."""

    def __post_init__(self) -> None:
        require(self.source != "", "source is empty; give 'stdlib' or a path.")
        require(
            self.tokenizer != "bpe" or self.vocab_size > 256,
            f"vocab_size {self.vocab_size} is too small for bpe, which starts from 256 bytes. "
            f"Use 257 or more.",
        )
        require_between("validation_fraction", self.validation_fraction, 0, 1, open_low=True)


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
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "width", "context"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "mlp_width"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name in ("rope_base", "init_scale"):
            require_positive(name, getattr(self, name))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Gives the layers whose path matches another recipe."""

    path: str
    """Regular expression for the whole path of a layer, its parts joined by '/'."""
    recipe: str
    """Recipe of the layers that match."""

    def __post_init__(self) -> None:
        require(self.recipe != "", "recipe is empty; give the name of a recipe.")
        try:
            re.compile(self.path)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"path {self.path!r} is not a regular expression: {error}. Write '.*' for any text."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which recipe the matrix products follow."""

    recipe: str = "fp8_delayed"
    """Recipe of every layer that no rule names; "none" trains without FP8."""
    rules: tuple[RuleConfig, ...] = ()
    """Rules that come before the defaults; the first that matches decides."""
    history_length: int = 16
    """Steps that a delayed scale looks back."""
    margin: int = 0
    """Powers of two of head-room in a scale."""
    amax_reduction: Literal["max", "most_recent"] = "max"
    """A delayed scale follows the largest, or the most recent amax of its history."""
    scale_rounding: Literal["none", "power_of_two"] = "none"
    """Round scales up to powers of two."""
    amax_scope: Literal["global", "local"] = "global"
    """Current scaling of an array that devices share: one scale, or one for each part."""

    def __post_init__(self) -> None:
        require(self.recipe != "", "recipe is empty; give the name of a recipe.")
        require_at_least("history_length", self.history_length, 1)
        require_at_least("margin", self.margin, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    name: str = "quickstart"
    """Name of the run, in its directory and its reports."""
    seed: int = 0
    """Seed of the weights, the batches and the samples."""
    steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 12
    """Windows of a step, over all devices and micro-batches."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The text and its tokens."""
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    """The FP8 recipe and its exceptions."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """The processes, where there are several."""
    eval_every: int = 250
    """Steps between evaluations; 0: only after the last step."""
    eval_windows: int | None = None
    """Validation windows of an evaluation; None: the whole validation split."""
    log_every: int = 10
    """Steps between lines of the log."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are deleted."""
    run_dir: str = "runs/{name}"
    """Directory of the run; {name} stands for its name."""
    resume: bool = False
    """Continue from the newest checkpoint in the run directory."""
    sample_tokens: int = 400
    """Tokens of the sample that the trained model writes; 0: no sample."""
    sample_prompt: str = "\n"
    """Text the sample continues."""
    plots: bool = True
    """Draw the curves as PNG files."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep_checkpoints"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "checkpoint_every", "sample_tokens"):
            require_at_least(name, getattr(self, name), 0)
        if self.eval_windows is not None:
            require_at_least("eval_windows", self.eval_windows, 1)
        require_between("seed", self.seed, 0, 2**32)
        require(
            re.fullmatch(r"[\w-][\w.-]*", self.name) is not None,
            f"name {self.name!r} is not a file name; allowed: letters, digits, '_', '-', '.'.",
        )
        other = re.findall(r"\{(?!name\})[^}]*\}?", self.run_dir)
        require(
            self.run_dir != "" and not other,
            f"run_dir {self.run_dir!r} is not a directory; allowed: a path, with {{name}} for the "
            f"name of the run.",
        )
        require(self.sample_prompt != "", "sample_prompt is empty; give one character or more.")
        self._check_schedule()
        self._check_batch()

    @property
    def run_path(self) -> str:
        """Directory of the run, with the name put in."""
        return self.run_dir.replace("{name}", self.name)

    def _check_schedule(self) -> None:
        warmup = self.optim.warmup_steps
        require(
            warmup < self.steps,
            f"optim.warmup_steps {warmup} is not below steps {self.steps}. Use "
            f"optim.warmup_steps {self.steps // 10}, or {warmup + 1} steps or more.",
        )

    def _check_batch(self) -> None:
        devices, parts = self.mesh.batch_parts, self.optim.accumulate
        what = f"{devices} devices (mesh.data x mesh.fsdp)"
        if parts > 1:
            what = f"{devices * parts} = {what} x {parts} micro-batches (optim.accumulate)"
        require(
            self.batch_size % (devices * parts) == 0,
            f"batch_size {self.batch_size} is not divisible by {what}. "
            f"Use {multiples(self.batch_size, devices * parts)}.",
        )
        require(
            not self.mesh.sequence or self.model.context % self.mesh.tensor == 0,
            f"mesh.sequence splits model.context {self.model.context} over mesh.tensor "
            f"{self.mesh.tensor}, which does not divide it. Use {self.mesh.tensor * 64}, or "
            "another mesh.tensor.",
        )
