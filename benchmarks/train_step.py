"""The whole training step of named configs: time, compilation, matmuls, memory.

    python -m benchmarks.train_step
    python -m benchmarks.train_step quickstart "quickstart --model.remat full" --model.width 256

A case is a config and its overrides in one word; overrides that stand by themselves go to all
cases. The first case is what the ratios are to. The step is the one that ``train.py`` runs:
gradients, finiteness guard, AdamW, advance of the scales, health report; its tokens are random.

Cases take turns; times are medians, ratios the medians of the rounds. "temp MiB" is what XLA
allocates beside arguments and results. On a CPU with AVX512-BF16 expect quickstart (FP8) at 0.8 to
1.0 of quickstart_fp32, with a little less temporary memory, and bf16 above 1.

Runs in a subprocess with glibc's thresholds raised; ``--allocator default`` leaves them alone.
Writes a JSON file with times, machine, versions and date.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import (
    ALLOCATORS,
    describe_allocator,
    describe_machine,
    use_allocator,
    write_json,
)
from lowprec_jax.cli.config_file import config_to_dict, load_config, resolve_config_path
from lowprec_jax.cli.environment import prepare_environment
from lowprec_jax.errors import UserError
from lowprec_jax.training.config import TrainConfig

DEFAULT_CASES = (
    "quickstart_fp32",
    "quickstart",
    "quickstart_bf16",
    "quickstart --precision.recipe fp8_current",
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parse(words)
    code = use_allocator(options.allocator, "benchmarks.train_step", words)
    if code is not None:
        return code
    try:
        configs = {case: _load(case, overrides) for case in options.cases}
    except UserError as error:
        print(f"train_step: error: {error}", file=sys.stderr)
        return 2
    prepare_environment(max(configs.values(), key=lambda config: config.mesh.size))
    from benchmarks.timing import format_table  # starts JAX

    rows, times = _measure(configs, options)
    print(
        f"\nallocator: {describe_allocator()}; overrides of all: {shlex.join(overrides) or 'none'}"
    )
    print(format_table(rows))
    record = {
        "machine": describe_machine(),
        "rows": rows,
        "seconds": times,
        "configs": {case: config_to_dict(config) for case, config in configs.items()},
    }
    write_json(Path(options.json), record)
    print(f"\nWritten to {options.json}.")
    return 0


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides of all cases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of every case")
    parser.add_argument("--inner", type=int, default=3, help="steps of a turn")
    parser.add_argument("--vocab-size", type=int, default=256, help="tokens of the model")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="raised")
    parser.add_argument("--json", default="runs/benchmarks/train_step.json")
    options, rest = parser.parse_known_args(words)
    first = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    options.cases = rest[:first] or list(DEFAULT_CASES)
    return options, rest[first:]


def _load(case: str, overrides: Sequence[str]) -> TrainConfig:
    name, *own = shlex.split(case)
    return load_config(TrainConfig, resolve_config_path(name), [*own, *overrides])


def _measure(configs: dict[str, TrainConfig], options: argparse.Namespace):
    """A row of the table and the seconds of all rounds, for every case."""
    from benchmarks.timing import interleave, median_ms, median_ratio

    steppers = {}
    for case, config in configs.items():
        print(f"compiling {case}", flush=True)
        steppers[case] = Stepper(config, options.vocab_size)
    times = interleave(steppers, options.rounds, options.inner)
    reference = times[next(iter(configs))]
    rows = [
        {
            "case": case,
            "ms": median_ms(times[case]),
            "x first": median_ratio(times[case], reference),
            **stepper.about,
            "loss": stepper.loss(),
        }
        for case, stepper in steppers.items()
    ]
    return rows, times


class Stepper:
    """A compiled training step and the state that it is called on, again and again.

    Args:
      config: the run; its data is not read.
      vocab_size: tokens of the model.
    """

    about: dict[str, Any]

    def __init__(self, config: TrainConfig, vocab_size: int):
        import jax

        from lowprec_jax import ops, state
        from lowprec_jax.training.network import build_network
        from lowprec_jax.training.optimizer import build_optimizer
        from lowprec_jax.training.step import build_calibration, build_step, init_state

        network, tx = build_network(config, vocab_size), build_optimizer(config)
        key, layout = jax.random.key(config.seed), network.layout
        self._batch = layout.put_batch(_tokens(config, vocab_size))
        self._state = init_state(network, tx, key, reduce=config.mesh.reduce)
        if state.sites(self._state.scaling):
            self._state, _ = build_calibration(network, self._state)(self._state, self._batch)
        step = build_step(network, tx, self._state, micro_batches=config.optim.accumulate)
        start = time.perf_counter()
        lowered = step.lower(self._state, self._batch)
        traced = time.perf_counter()
        self._step = lowered.compile()
        compiled = time.perf_counter()
        gemms, memory = ops.count_gemms(lowered), self._step.memory_analysis()
        self.about = {
            "trace s": traced - start,
            "compile s": compiled - traced,
            "f8 GEMMs": gemms.native,
            "exact upcasts": gemms.emulated,
            "other GEMMs": gemms.other,
            "temp MiB": memory.temp_size_in_bytes / 2**20 if memory else None,
        }
        self._fenced = layout.mesh.size > 1  # emulated devices deadlock if steps pile up
        jax.block_until_ready(self())

    def __call__(self) -> Any:
        """One step."""
        import jax

        self._state, self._metrics = self._step(self._state, self._batch)
        if self._fenced:
            jax.block_until_ready(self._metrics)
        return self._state

    def loss(self) -> float:
        """Loss of the last step."""
        return float(self._metrics.loss)


def _tokens(config: TrainConfig, vocab_size: int):
    """Random inputs and targets, int32 [batch, context]."""
    import numpy as np

    generator = np.random.default_rng(config.seed)
    shape = (2, config.batch_size, config.model.context)
    inputs, targets = generator.integers(0, vocab_size, shape, dtype=np.int32)
    return inputs, targets


if __name__ == "__main__":
    sys.exit(main())
