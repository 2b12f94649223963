"""The typed config of a training run: what each option is, its default, and its checks.

Imports no JAX and no Flax, so that the help is quick. Public names: `TrainConfig` and its sections
`ModelConfig`, `DataConfig`, `PrecisionConfig` with `RuleConfig` and `PhaseConfig`, `OptimConfig`,
`MeshConfig`, `DistributedConfig`, `GuardConfig`, `HealthConfig`.
"""

import dataclasses
import re

from lowprec_jax.training.config_checks import (
    multiples,
    require,
    require_at_least,
    require_between,
)
from lowprec_jax.training.data_config import DataConfig
from lowprec_jax.training.guard_config import GuardConfig, HealthConfig
from lowprec_jax.training.mesh_config import MeshConfig
from lowprec_jax.training.model_config import ModelConfig
from lowprec_jax.training.optim_config import OptimConfig
from lowprec_jax.training.precision_config import PhaseConfig, PrecisionConfig, RuleConfig
from lowprec_jax.training.process_settings import DistributedConfig

__all__ = [
    "DataConfig",
    "DistributedConfig",
    "GuardConfig",
    "HealthConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PhaseConfig",
    "PrecisionConfig",
    "RuleConfig",
    "TrainConfig",
]

_LONGEST_WAIT = 1e9  # seconds; Python's clocks overflow at nine times that


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
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """What happens when a step goes wrong."""
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    """Reports on every quantized operand, and alarms."""
    eval_every: int = 250
    """Steps between evaluations; 0: only after the last step."""
    eval_windows: int | None = None
    """Validation windows of an evaluation; None: the whole validation split."""
    early_stopping: int = 0
    """Evaluations in a row without a new best loss before the run ends early; 0: never."""
    log_every: int = 10
    """Steps between lines of the log."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: int = 2
    """Checkpoints that stay besides the best; older ones are deleted."""
    keep_best: bool = True
    """Save at each new best validation loss, and keep that checkpoint."""
    run_dir: str = "runs/{name}"
    """Directory of the run; {name} stands for its name."""
    resume: bool = False
    """Continue from the newest good checkpoint in the run directory."""
    allow_changes: bool = False
    """Resume although options that decide the result differ from those of the checkpoint."""
    stall_timeout: float = 1800.0
    """Seconds without progress after which the run dumps its stacks and exits; 0: never."""
    sample_tokens: int = 400
    """Tokens of the sample that the trained model writes; 0: no sample."""
    sample_prompt: str = "\n"
    """Text the sample continues."""
    plots: bool = True
    """Write report.html and the curves as PNG files at the end."""
    profile_start: int = 0
    """Steps after the start, or after a resume, before a profile is recorded."""
    profile_steps: int = 0
    """Steps that are profiled, for TensorBoard or Perfetto; 0: none."""
    wandb: str = ""
    """Project for Weights & Biases, if it is installed; empty: not used."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep_checkpoints"):
            require_at_least(name, getattr(self, name), 1)
        for name in (
            "eval_every",
            "checkpoint_every",
            "sample_tokens",
            "early_stopping",
            "profile_start",
            "profile_steps",
        ):
            require_at_least(name, getattr(self, name), 0)
        require_between("stall_timeout", self.stall_timeout, 0, _LONGEST_WAIT)
        if self.eval_windows is not None:
            require_at_least("eval_windows", self.eval_windows, 1)
        require_between("seed", self.seed, 0, 2**32)
        require(
            re.fullmatch(r"[\w-][\w.-]*", self.name) is not None and len(self.name.encode()) < 200,
            f"name {self.name!r} is not a file name; allowed: letters, digits, '_', '-', '.', in "
            f"less than 200 bytes.",
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
        self._check_health()

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
        begins = [phase.begin(self.steps) for phase in self.precision.phases]
        require(
            begins == sorted(set(begins)) and all(0 < begin < self.steps for begin in begins),
            f"precision.phases begin after steps {begins}; they must rise, from 1 or more to less "
            f"than steps {self.steps}.",
        )

    def _check_health(self) -> None:
        history, age = self.precision.history_length, self.health.scale_age
        require(
            age > history,
            f"health.scale_age {age} is not above precision.history_length {history}, the age that "
            f"the scale of a healthy run reaches. Use {history + 1} or more.",
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
