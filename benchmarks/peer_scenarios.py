"""Where FP8 training breaks in other JAX libraries, and the same scenarios here.

    python -m benchmarks.peer_scenarios [NAME ...]

Each scenario is an ordinary Linen training loop with one feature that real projects have: a layer
used twice, micro-batches, `shard_map`, one Inf. The code is the same for Flax's own op
(`flax.linen.Fp8DotGeneral` in its documented loop, state in ``_overwrite_with_gradient``) and for
this library; `Library` holds what differs. A scenario measures one number, and what is right is
known without either library. Where a user of Flax has a remedy, a comment says which. Qwix and AQT
are added where they are installed and have what the scenario is about; neither has delayed scaling.

Runs on 8 emulated CPU devices. Exit code 1: this library is wrong somewhere.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType

from benchmarks.machine import describe_machine
from benchmarks.peers.libraries import Flax, Library, Ours
from benchmarks.peers.models import amax, ramp
from benchmarks.peers.others import aqt_model, qwix_models, sharded_gradient, square_gradient
from benchmarks.peers.runs import (
    DEVICES,
    after_plain,
    after_quantized,
    amax_after_step,
    bf16_codes,
    branch_not_taken,
    called_twice,
    cold_start,
    evaluated_first,
    float16_outputs,
    idle_head_amax,
    idle_head_output,
    mesh_amax,
    norm_ratio,
    pmap_amax,
    restored_output,
    shard_map_amax,
    shard_map_gradient,
    slots_per_step,
    square_batch,
    steps_without_new_scale,
    tiny_amax,
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A number to measure, and the interval in which it is right.

    Attributes:
      what: what happens, and what is measured.
      run: ``run(library) -> float`` for `Flax` and `Ours`.
      low: smallest right value.
      high: largest.
      others: runs without an argument, by the package that they need.
    """

    what: str
    run: Callable[[Library], float]
    low: float
    high: float
    others: dict[str, Callable[[], float]] = dataclasses.field(default_factory=dict)

    @property
    def right(self) -> str:
        """The interval in words."""
        if self.low > 0 and self.high / self.low < 1.001:
            return f"{(self.low + self.high) / 2:.6g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} .. {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one library did: a number, or the exception as text."""

    value: float | str
    right: bool

    @property
    def failed(self) -> bool:
        """Whether it raised."""
        return isinstance(self.value, str)

    def __str__(self) -> str:
        text = self.value.split(":")[0] if isinstance(self.value, str) else f"{self.value:.6g}"
        return f"{text} {'ok' if self.right else 'WRONG'}"


def _exactly(value: float) -> tuple[float, float]:
    """An amax: nothing rounds but its f32 mean over devices."""
    return value * (1 - 1e-6), value * (1 + 1e-6)


# FP8 products of N(0, 1): 2.6 % per rounding in e4m3, 5.2 % in e5m2. Not below 0.5 %: it is FP8.
FORWARD = (0.005, 0.05)
GRADIENT = (0.005, 0.07)


@functools.cache
def scenarios() -> dict[str, Scenario]:
    """All scenarios by name. (A function: the right values need JAX's random numbers.)"""
    whole = _exactly(amax(ramp()))
    return {
        **_state_scenarios(whole),
        **_device_scenarios(whole),
        **_number_scenarios(),
        **_model_scenarios(whole),
    }


def _state_scenarios(whole: tuple[float, float]) -> dict[str, Scenario]:
    first = _exactly(amax(jax.random.normal(jax.random.key(0), (16, 32))))
    over_time = functools.partial(amax_after_step, mode="over time")
    accumulated = functools.partial(amax_after_step, parts=4)
    relu = functools.partial(idle_head_output, relu=True)
    return {
        "twice": Scenario("a layer called twice: amax", called_twice, *first),
        "scan": Scenario("nn.scan, state broadcast: amax", over_time, *whole),
        "accumulate": Scenario("mean of 4 micro-batches: amax", accumulated, *whole),
        "multi_steps": Scenario("optax.MultiSteps(4): history slots a step", slots_per_step, 1, 1),
        "idle_amax": Scenario("layer not on the loss path: amax kept", idle_head_amax, *whole),
        "idle_output": Scenario("  its next output: error", idle_head_output, *FORWARD),
        "idle_relu": Scenario("  the same behind a ReLU: error", relu, *FORWARD),
        "cond": Scenario("branch of nn.cond not taken: amax kept", branch_not_taken, *whole),
    }


def _device_scenarios(whole: tuple[float, float]) -> dict[str, Scenario]:
    auto, explicit = (
        functools.partial(mesh_amax, kind=kind) for kind in (AxisType.Auto, AxisType.Explicit)
    )
    others = {
        "qwix": lambda: sharded_gradient(qwix_models(32)[1]),
        "aqt": lambda: sharded_gradient(aqt_model()),
    }
    return {
        "shard_map_amax": Scenario("shard_map, default checks: amax", shard_map_amax, *whole),
        "shard_map_gradient": Scenario(
            "  its kernel gradient: error", shard_map_gradient, *GRADIENT, others
        ),
        "pmap": Scenario("pmap, pmean of gradients: amax", pmap_amax, *whole),
        "auto_mesh": Scenario("jit, batch sharded, Auto axes: amax", auto, *whole),
        "explicit_mesh": Scenario("jit, batch sharded, Explicit axes: amax", explicit, *whole),
    }


def _number_scenarios() -> dict[str, Scenario]:
    return {
        "inf": Scenario("one Inf: steps without a new scale", steps_without_new_scale, 0, 1),
        "tiny": Scenario("tiny amax behind a ReLU: NaN outputs", tiny_amax, 0, 0),
        "float16": Scenario("compute in float16: Inf outputs", float16_outputs, 0, 0),
        "cold_start": Scenario("loss x 1e-4, step 0: gradient error", cold_start, *GRADIENT),
        "bf16_codes": Scenario("compute in bfloat16: % wrong codes", bf16_codes, 0, 0),
        "clip": Scenario("norm of gradient tree / of parameters", norm_ratio, 1, 1),
    }


def _model_scenarios(whole: tuple[float, float]) -> dict[str, Scenario]:
    square = {"qwix": lambda: square_gradient(qwix_models(32)[1])}
    return {
        "restore": Scenario("parameters without state: output error", restored_output, *FORWARD),
        "trace_plain_first": Scenario(
            "jitted plain, then FP8: FP8 error",
            lambda lib: after_plain(lib.quantized),
            *FORWARD,
            {"qwix": lambda: after_plain(qwix_models)},
        ),
        "trace_quantized_first": Scenario(
            "jitted FP8, then plain: plain error",
            lambda lib: after_quantized(lib.quantized),
            *(0, 1e-6),
            {"qwix": lambda: after_quantized(qwix_models)},
        ),
        "trace_evaluated": Scenario("jitted in eval, then in loss: amax", evaluated_first, *whole),
        "square": Scenario(
            "batch of the kernel's shape: gradient error", square_batch, *GRADIENT, square
        ),
    }


def measure(scenario: Scenario, run: Callable[[], float]) -> Finding:
    """Runs one side of a scenario; an exception is a finding too."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            value = run()
    except Exception as error:
        return Finding(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", False)
    return Finding(value, scenario.low <= value <= scenario.high)


def compare(scenario: Scenario) -> dict[str, Finding]:
    """What every library does: Flax, this one, and those of the others that are installed."""
    runs = {
        "Flax": functools.partial(scenario.run, Flax),
        "here": functools.partial(scenario.run, Ours),
        **{name: f for name, f in scenario.others.items() if importlib.util.find_spec(name)},
    }
    return {name: measure(scenario, run) for name, run in runs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_scenarios")
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios; default: all")
    names = parser.parse_args(argv).names
    os.environ.setdefault("PJRT_NPROC", "32")  # threads for the collectives of emulated devices
    jax.config.update("jax_num_cpu_devices", DEVICES)
    unknown = sorted(set(names) - set(scenarios()))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(scenarios())}")

    machine = describe_machine()
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    print(f"{machine['processor']}, {machine['date_utc'][:10]}, {versions}\n")
    print(f"{'':42s}{'right':>16s}{'Flax fp8_ops':>30s}{'here':>20s}  others")
    failures, messages = 0, []
    for name in names or scenarios():
        scenario = scenarios()[name]
        found = compare(scenario)
        flax, ours, *_ = found.values()
        cells = "; ".join(f"{who} {finding}" for who, finding in list(found.items())[2:])
        print(f"{scenario.what:42s}{scenario.right:>16s}{flax!s:>30s}{ours!s:>20s}  {cells}")
        failures += not ours.right
        messages += [f"{name}, {who}: {f.value}" for who, f in found.items() if f.failed]
    print("", *messages, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
