"""What is compiled for one precision: the step, its calibration, the evaluation.

A run has one of these for each precision it trains in (see `lowprec_jax.training.phases`). Public
names: `Programs`, `ProgramTable`, `build_programs`.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from lowprec_jax.errors import UserError
from lowprec_jax.ops import GemmCount, count_gemms, is_study
from lowprec_jax.recipes import get_recipe
from lowprec_jax.training.config import PrecisionConfig, TrainConfig
from lowprec_jax.training.efficiency import ideal_seconds, step_flops
from lowprec_jax.training.evaluate import build_evaluation
from lowprec_jax.training.network import (
    Network,
    build_network,
    operand_names,
    precision_rules,
    transformer_config,
)
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.phases import precision_at
from lowprec_jax.training.shadow import Comparison, build_shadow
from lowprec_jax.training.step import (
    Batch,
    StepMetrics,
    TrainState,
    abstract_state,
    build_calibration,
    build_step,
    init_state,
)

__all__ = ["ProgramTable", "Programs", "build_programs"]

Windows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """A network and what runs on it.

    Attributes:
      precision: what it was built for.
      network: the network.
      like: a state of it, abstract, with shardings.
      init: ``() -> state``, not calibrated.
      calibrate: ``(state, batch) -> state``; donates the state.
      step: ``(state, batch) -> (state, metrics)``, compiled; donates the state.
      evaluate: see `build_evaluation`.
      names: of the operands in health reports, see `operand_names`.
      gemms: matrix products of the lowered step.
      shadow: see `build_shadow`; None where it is not asked for or nothing is quantized.
      ideal_seconds: of a step, for the MFU, see `ideal_seconds`.
      compile_seconds: tracing and compiling the step.
    """

    precision: PrecisionConfig
    network: Network
    like: TrainState
    init: Callable[[], TrainState]
    calibrate: Callable[[TrainState, Batch], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[..., float | None]
    names: list[str]
    gemms: GemmCount
    shadow: Callable[[Any, Any, Batch], Comparison] | None
    ideal_seconds: float | None
    compile_seconds: float


class ProgramTable:
    """The programs of a run, each precision compiled once, when it is first needed.

    Args:
      config: the run.
      vocab_size: tokens of the tokenizer.
      windows: inputs and targets of the evaluation, int32 [n, context].
    """

    def __init__(self, config: TrainConfig, vocab_size: int, windows: Windows):
        self._config, self._vocab_size, self._windows = config, vocab_size, windows
        self._known: dict[PrecisionConfig, Programs] = {}

    def at(self, completed: int, promoted: Collection[str] = ()) -> Programs:
        """The programs of the step after `completed` ones, see `precision_at`.

        Raises:
          UserError: see `build_programs`.
        """
        precision = precision_at(self._config, completed, promoted)
        if precision not in self._known:
            self._known[precision] = build_programs(
                self._config,
                precision,
                self._vocab_size,
                self._windows,
                must_quantize=not promoted,
            )
        return self._known[precision]

    @property
    def compile_seconds(self) -> float:
        """Tracing and compiling all steps so far."""
        return sum(programs.compile_seconds for programs in self._known.values())


def build_programs(
    config: TrainConfig,
    precision: PrecisionConfig,
    vocab_size: int,
    windows: Windows,
    *,
    must_quantize: bool = True,
) -> Programs:
    """Builds the network of a precision and compiles its step.

    Args:
      config: the run.
      precision: the precision, without phases.
      vocab_size: tokens of the tokenizer.
      windows: inputs and targets of the evaluation, int32 [n, context].
      must_quantize: refuse a precision that names FP8 where no product is in it.

    Raises:
      UserError: see `build_network`; or FP8 was asked for, and no product is in it.
    """
    config = dataclasses.replace(config, precision=precision)
    network = build_network(config, vocab_size)
    tx = build_optimizer(config)
    options: Any = {"reduce": config.mesh.reduce, "ema": config.optim.ema_decay > 0}
    like = abstract_state(network, tx, **options)
    shape = (config.batch_size, config.model.context)
    batch = network.layout.load_batch(
        lambda rows: (np.zeros(shape, np.int32)[rows],) * 2, config.batch_size
    )
    begin = time.perf_counter()
    step = build_step(
        network,
        tx,
        like,
        micro_batches=config.optim.accumulate,
        ema_decay=config.optim.ema_decay,
    )
    lowered = step.lower(like, batch)
    gemms = count_gemms(lowered)
    if must_quantize:
        _require_low_precision(precision, gemms)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    calibration = build_calibration(network, like)
    return Programs(
        precision=precision,
        network=network,
        like=like,
        init=lambda: init_state(network, tx, jax.random.key(config.seed), **options),
        calibrate=lambda state, batch: calibration(state, batch)[0],
        step=compiled,
        evaluate=build_evaluation(network, windows, config.batch_size),
        names=operand_names(like.scaling),
        gemms=gemms,
        shadow=_build_shadow(config, network, vocab_size),
        ideal_seconds=_ideal_seconds(config, vocab_size),
        compile_seconds=seconds,
    )


def _build_shadow(config: TrainConfig, network: Network, vocab_size: int):
    if not network.recipes or not config.health.sqnr_every:
        return None
    high = dataclasses.replace(config.precision, recipe="none", rules=())
    shadow = build_network(dataclasses.replace(config, precision=high), vocab_size)
    return build_shadow(network, shadow, micro_batches=config.optim.accumulate)


def _ideal_seconds(config: TrainConfig, vocab_size: int) -> float | None:
    flops = step_flops(
        transformer_config(config.model, vocab_size),
        config.batch_size,
        precision_rules(config.precision),
    )
    return ideal_seconds(flops, jax.devices()[0].device_kind, config.mesh.size)


def _require_low_precision(precision: PrecisionConfig, gemms: GemmCount) -> None:
    """A run that asks for low precision and gets none must not pass for one.

    Weight-only recipes multiply in high precision; backends of studies have loops of their own.
    """
    if is_study(precision.backend):
        return
    names = (precision.recipe, *(rule.recipe for rule in precision.rules))
    asked = [name for name in names if get_recipe(name).multiplies_codes]
    if asked and not gemms.native + gemms.emulated:
        raise UserError(
            f"Recipe {asked[0]!r} was asked for, but none of the {gemms.total} matmuls of the "
            "lowered step multiplies low-precision values. Check precision.rules."
        )
