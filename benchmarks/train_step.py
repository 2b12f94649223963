"""The whole training step of named configs: time, compilation, matmuls, memory.

    python -m benchmarks.train_step
    python -m benchmarks.train_step quickstart "quickstart --model.remat full" --model.width 256

A case is a config and its overrides in one word; overrides that stand by themselves go to all
cases. The first case is what the ratios are to. The step is the one that ``train.py`` runs:
gradients, finiteness guard, AdamW, advance of the scales, health report; its tokens are random.
``--peers`` adds the model of the first case with other libraries' matmuls in its layers, in a step
of loss, gradients and AdamW alone.

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
from typing import Any

from benchmarks.machine import use_allocator
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
    from benchmarks.timing import report  # starts JAX

    rows, times = _measure(configs, options)
    report(
        options.json,
        [{"group": options.group, **row} for row in rows],
        {options.group: times},
        overrides=overrides,
        configs={case: config_to_dict(config) for case, config in configs.items()},
    )
    return 0


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides of all cases."""
    from benchmarks.peers.linen import PEERS
    from benchmarks.timing import section_parser

    parser = section_parser("train_step", __doc__)
    parser.add_argument("--inner", type=int, default=3, help="steps of a turn")
    parser.add_argument("--vocab-size", type=int, default=256, help="tokens of the model")
    parser.add_argument("--group", default="given", help="name of the table")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="in the first model")
    options, rest = parser.parse_known_args(words)
    first = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    options.cases = rest[:first] or list(DEFAULT_CASES)
    return options, rest[first:]


def _load(case: str, overrides: Sequence[str]) -> TrainConfig:
    name, *own = shlex.split(case)
    return load_config(TrainConfig, resolve_config_path(name), [*own, *overrides])


def _measure(configs: dict[str, TrainConfig], options: argparse.Namespace):
    """A row of the table and the seconds of all rounds, for every case."""
    import jax

    from benchmarks.peers.linen import available
    from benchmarks.peers.training import build_peer
    from benchmarks.timing import interleave, median_ms, median_ratio

    vocab, model = options.vocab_size, next(iter(configs.values()))
    steppers = {}
    for case, config in configs.items():
        print(f"compiling {case}", flush=True)
        steppers[case] = Stepper(*_build(config, vocab), fenced=config.mesh.size > 1)
    for peer in filter(available, options.peers):
        print(f"compiling {peer}", flush=True)
        batch = jax.device_put(_tokens(model, vocab))
        steppers[peer] = Stepper(*build_peer(model, vocab, peer), batch, fenced=False)
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


def _build(config: TrainConfig, vocab_size: int) -> tuple[Any, Any, Any]:
    """The step that ``train.py`` runs, a calibrated state, and a batch."""
    import jax

    from lowprec_jax import state as scaling_of
    from lowprec_jax.training.network import build_network
    from lowprec_jax.training.optimizer import build_optimizer
    from lowprec_jax.training.step import build_calibration, build_step, init_state

    network, tx = build_network(config, vocab_size), build_optimizer(config)
    state = init_state(network, tx, jax.random.key(config.seed), reduce=config.mesh.reduce)
    batch = network.layout.put_batch(_tokens(config, vocab_size))
    if scaling_of.sites(state.scaling):
        state, _ = build_calibration(network, state)(state, batch)
    step = build_step(network, tx, state, micro_batches=config.optim.accumulate)
    return step, state, batch


class Stepper:
    """A compiled training step and the state that it is called on, again and again.

    Args:
      step: jitted ``(state, batch) -> (state, metrics or loss)``.
      state: its first state, which is donated.
      batch: inputs and targets.
      fenced: wait for every step: emulated devices deadlock if steps pile up.
    """

    about: dict[str, Any]

    def __init__(self, step: Any, state: Any, batch: Any, *, fenced: bool):
        import jax

        from lowprec_jax import ops

        self._state, self._batch, self._fenced = state, batch, fenced
        start = time.perf_counter()
        lowered = step.lower(state, batch)
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
        return float(getattr(self._metrics, "loss", self._metrics))


def _tokens(config: TrainConfig, vocab_size: int):
    """Random inputs and targets, int32 [batch, context]."""
    import numpy as np

    generator = np.random.default_rng(config.seed)
    shape = (2, config.batch_size, config.model.context)
    inputs, targets = generator.integers(0, vocab_size, shape, dtype=np.int32)
    return inputs, targets


if __name__ == "__main__":
    sys.exit(main())
