"""How well a run uses its machine: MFU with two peaks, goodput, peak memory.

**MFU** (model FLOPs utilization; Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B) is here
the time that the matrix products of the model would take at the peak of the devices, over the time
that a step takes. A program that mixes FP8 and BF16 has two peaks, and each product is held to its
own:

    ideal seconds = (fp8 FLOPs / fp8 peak + other FLOPs / bf16 peak) / devices
    MFU = ideal seconds / measured seconds

- FLOPs are those of the *model*: forward and backward products of the layers, the attention and the
  head, two for each multiply-add. What is recomputed (remat), quantization, softmax, norms and the
  optimizer are not counted, so that they lower the MFU.
- Attention counts the pairs of positions that a causal model needs, T (T + 1) / 2 for T tokens.
  This implementation computes all T x T of them; PaLM counts all too.
- Peaks are those of dense products, as data sheets state them. What is not FP8 is held to the BF16
  peak, float32 too. Without FP8 units the FP8 peak is that of BF16.
- Consequence: turning FP8 on lowers the MFU of a run that gets less than the full factor from it.

**Goodput** is the part of the wall time in which steps were computed that the run kept.

Public names: `StepFlops`, `step_flops`, `Peaks`, `peaks_of`, `ideal_seconds`, `Clock`,
`peak_memory`.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import jax

from lowprec_jax.models import TransformerConfig
from lowprec_jax.recipes import Recipe, Rules, assign
from lowprec_jax.roofline.chips import chip_of_device

__all__ = [
    "Clock",
    "Peaks",
    "StepFlops",
    "ideal_seconds",
    "peak_memory",
    "peaks_of",
    "step_flops",
]


class StepFlops(NamedTuple):
    """Floating-point operations of the model's matrix products in a training step.

    Attributes:
      fp8: of products with operands in low precision.
      other: of all the rest.
    """

    fp8: int
    other: int


def step_flops(model: TransformerConfig, batch_size: int, rules: Rules) -> StepFlops:
    """Counts a training step of a `Transformer`.

    Args:
      model: its sizes; a window has `max_context` tokens.
      batch_size: windows of a step, over all devices and micro-batches.
      rules: which layers follow which recipe, as in `lowprec_jax.nnx.quantize`. A GEMM that the
        recipe leaves in high precision counts as that.

    Raises:
      UserError: a rule matches no layer.
    """
    work = _layer_flops(model, batch_size)
    pairs = batch_size * model.max_context * (model.max_context + 1) // 2
    # Scores and values of every query head.
    attention = model.num_layers * 2 * 2 * pairs * model.num_heads * model.head_dim
    total = 3 * (sum(work.values()) + attention)
    if model.tied_head:  # the table of the embedding, which no rule reaches
        total += 3 * _linear_flops(model, batch_size, model.width, model.vocab_size)
    fp8 = sum(work[a.path] * _low_precision_gemms(a.recipe) for a in assign(work, rules))
    return StepFlops(fp8, total - fp8)


def _layer_flops(model: TransformerConfig, batch_size: int) -> dict[str, int]:
    """FLOPs of one GEMM of each layer by its path; the three of a training step cost the same."""
    hidden = model.mlp_width
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    first = ("mlp/gate_up", 2 * hidden) if model.mlp == "swiglu" else ("mlp/up", hidden)
    block = {
        "attention/qkv": (model.width, qkv),
        "attention/out": (model.width, model.width),
        first[0]: (model.width, first[1]),
        "mlp/down": (hidden, model.width),
    }
    blocks = [f"blocks/{i}" for i in range(model.num_layers)]
    calls = 1
    if model.scan_layers:
        blocks, calls = ["blocks"], model.num_layers
    work = {
        f"{path}/{name}": calls * _linear_flops(model, batch_size, *sizes)
        for path in blocks
        for name, sizes in block.items()
    }
    if not model.tied_head:
        work["head"] = _linear_flops(model, batch_size, model.width, model.vocab_size)
    return work


def _linear_flops(model: TransformerConfig, batch_size: int, inputs: int, outputs: int) -> int:
    return 2 * batch_size * model.max_context * inputs * outputs


def _low_precision_gemms(recipe: Recipe) -> int:
    gemms = filter(None, (recipe.fwd, recipe.dgrad, recipe.wgrad))
    return sum(gemm.left is not None and gemm.right is not None for gemm in gemms)


class Peaks(NamedTuple):
    """Peak speed of dense matrix products of one JAX device, FLOP/s."""

    bf16: float
    fp8: float


def peaks_of(device_kind: str) -> Peaks | None:
    """Peak speeds of a kind of device, None where they are not known, as on a CPU.

    A device is a chip, but half of one in TPU7x.
    """
    chip = chip_of_device(device_kind)
    return chip and Peaks(*(1e12 * rate / chip.devices for rate in (chip.bf16, chip.fp8)))


def ideal_seconds(flops: StepFlops, device_kind: str, devices: int) -> float | None:
    """The shortest time of a step: MFU is this over the time that it took.

    Args:
      flops: of the whole step.
      device_kind: `jax.Device.device_kind`.
      devices: number of devices that share the step.

    Returns:
      Seconds; None, for an MFU of "n/a", where the peaks are not known.
    """
    peaks = peaks_of(device_kind)
    if peaks is None:
        return None
    return (flops.fp8 / peaks.fp8 + flops.other / peaks.bf16) / devices


Activity = Literal["compile", "data", "step", "evaluation", "checkpoint", "other", "lost"]


class Clock:
    """Where the wall time of a process goes: each moment belongs to one activity.

    What is measured inside of another activity is taken out of that, so that all add up to the time
    since the clock was made.

    Args:
      activity: what time belongs to that no `measure` claims.
      now: seconds of a clock that never goes back.
    """

    def __init__(
        self, activity: Activity = "other", *, now: Callable[[], float] = time.perf_counter
    ):
        self._now = now
        self._seconds: dict[Activity, float] = dict.fromkeys(get_args(Activity), 0.0)
        self._current: Activity = activity
        self._since = now()

    @contextlib.contextmanager
    def measure(self, activity: Activity) -> Iterator[None]:
        """Counts the time of a ``with`` block as that of an activity."""
        outer = self._switch(activity)
        try:
            yield
        finally:
            self._switch(outer)

    def lose(self, seconds: float) -> None:
        """Counts time of "step" as "lost": the update was skipped, or the step rolled back."""
        self._seconds["step"] -= seconds
        self._seconds["lost"] += seconds

    def seconds(self) -> dict[Activity, float]:
        """Seconds of each activity so far."""
        self._switch(self._current)
        return dict(self._seconds)

    @property
    def goodput(self) -> float:
        """Part of the time that was spent on steps that brought the run further."""
        seconds = self.seconds()
        return seconds["step"] / sum(seconds.values())

    def _switch(self, activity: Activity) -> Activity:
        now, before = self._now(), self._current
        self._seconds[before] += now - self._since
        self._since, self._current = now, activity
        return before


def peak_memory() -> dict[str, int]:
    """The most memory that was in use so far, bytes.

    Returns:
      ``{"peak_device_bytes": ...}`` of the fullest device of this process; where devices do not
      tell, as CPUs, ``{"peak_process_bytes": ...}``, the resident memory of the process; empty
      where the system does not tell either.
    """
    known = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in known if "peak_bytes_in_use" in stats]
    if peaks:
        return {"peak_device_bytes": max(peaks)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
