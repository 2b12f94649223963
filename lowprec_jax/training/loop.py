"""One training run from config to summary."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lowprec_jax import data
from lowprec_jax import state as scaling_of
from lowprec_jax.config_text import dump_config
from lowprec_jax.errors import UserError
from lowprec_jax.models import generate
from lowprec_jax.ops import GemmCount, count_gemms
from lowprec_jax.recipes import get_recipe
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.evaluate import build_evaluation
from lowprec_jax.training.metrics import MetricsLog, ProgressLine, StepReader
from lowprec_jax.training.network import Network, build_network, operand_names
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.processes import Processes, start_processes
from lowprec_jax.training.run_directory import RunDirectory, environment
from lowprec_jax.training.signals import StopRequest
from lowprec_jax.training.step import (
    TrainState,
    build_calibration,
    build_step,
    init_state,
)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a model and writes a run directory.

    Args:
      config: the run.

    Returns:
      The summary that is also written to ``summary.json``; after a SIGTERM or Ctrl-C, which end
      the run with a checkpoint, ``{"steps": ..., "stopped_by": ...}``.

    Raises:
      UserError: bad input; nothing of an earlier run is touched.
      FloatingPointError: loss or gradients stayed non-finite.
    """
    with start_processes(config.distributed) as processes:
        return _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    """The run as one of its processes sees it; the first one writes and talks."""
    console = Console(quiet=not processes.is_first)
    corpus = data.load_corpus(
        config.data.source, validation_fraction=config.data.validation_fraction
    )
    tokenizer = data.build_tokenizer(
        config.data.tokenizer, corpus, vocab_size=config.data.vocab_size
    )
    batches = data.Batches(
        tokenizer.encode(corpus.train),
        batch_size=config.batch_size,
        context=config.model.context,
        seed=config.seed,
    )
    inputs, targets = data.validation_windows(
        tokenizer.encode(corpus.validation), config.model.context
    )
    windows = (inputs[: config.eval_windows], targets[: config.eval_windows])
    network = build_network(config, tokenizer.vocab_size)
    if config.sample_tokens:
        tokenizer.encode(config.sample_prompt)  # a prompt it cannot encode is bad input now
    run = RunDirectory(config.run_path, resume=config.resume, writes=processes.is_first)
    with (
        StopRequest() as stop,
        Checkpoints(run.checkpoints, config.keep_checkpoints) as checkpoints,
    ):
        loop = _Loop(config, console, network, batches, run, checkpoints, stop)
        loop.evaluate = build_evaluation(network, windows, config.batch_size)
        state = loop.prepare()
        # Only now: what may still be refused leaves the files of an earlier run as they are.
        run.write_text("config.yaml", dump_config(config))
        run.write_json("environment.json", environment())
        run.write_json("data_card.json", corpus.card)
        if processes.is_first:
            data.save_tokenizer(tokenizer, run.path / "tokenizer.json")
        state, summary = loop.run(state)
    if "stopped_by" in summary:
        console.print(_stopped(summary, run), soft_wrap=True)
        return summary
    sample = _sample(config, network, state, tokenizer) if config.sample_tokens else ""
    if processes.is_first:
        _finish(config, console, run, summary, sample)
    return summary


class _Loop:
    """The steps of a run. Metrics are read one step late, so that the device never waits."""

    evaluate: Callable[[TrainState], float]

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        network: Network,
        batches: data.Batches,
        run: RunDirectory,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ):
        self.config, self.console = config, console
        self.network, self.batches = network, batches
        self.run_directory, self.checkpoints, self.stop = run, checkpoints, stop
        self.tx = build_optimizer(config)
        # Emulated devices deadlock at random if the steps of several devices pile up.
        self.waits_each_step = config.mesh.size > 1 and jax.devices()[0].platform == "cpu"
        self.names: list[str] = []
        self.validation_losses: list[float] = []
        self.start_time = time.perf_counter()

    def prepare(self) -> TrainState:
        """The state to start from and the compiled step; refuses what cannot be trained."""
        state = self._initial_state()
        if int(state.step) >= self.config.steps:
            raise UserError(
                f"The run in {self.run_directory.path} has completed {int(state.step)} of "
                f"{self.config.steps} steps. Give --steps more than {int(state.step)} to train on."
            )
        self.names = operand_names(state.scaling)
        self.compiled, self.gemms, self.compile_seconds = self._compile(state)
        return state

    def run(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Runs the remaining steps; returns the final state and the summary.

        A signal ends it after the step in progress, with a checkpoint and a summary that says so.
        """
        config, directory = self.config, self.run_directory
        first = int(state.step)
        if self.stop.agreed(0):
            return state, self._stop(state, first)
        if config.resume and directory.writes:
            directory.drop_metrics_after(first)
            self.validation_losses = directory.validation_losses()
        line = ProgressLine(
            self.console, first, config.steps, live=config.progress, every=config.log_every
        )
        board = directory.path / "tensorboard"
        log = MetricsLog(directory.metrics, board, writes=directory.writes)
        with contextlib.closing(log), line:
            reader = StepReader(
                self.names, log, line, tokens=config.batch_size * config.model.context
            )
            for step in range(first + 1, config.steps + 1):
                state, metrics = self.compiled(state, self._batch(step))
                reader.next(step, metrics)
                at_end = step == config.steps
                evaluates = at_end or _due(step, config.eval_every)
                saves = at_end or _due(step, config.checkpoint_every)
                if evaluates or saves or self.waits_each_step:
                    reader.finish()
                if evaluates:
                    self._evaluate(step, state, log, line)
                if saves:
                    self.checkpoints.save(state)
                if evaluates or saves:
                    reader.restart_clock()
                if not at_end and self.stop.agreed(step):
                    reader.finish()
                    return state, self._stop(state, step)
        return state, self._summary(reader)

    def _initial_state(self) -> TrainState:
        """A calibrated fresh state, or the newest checkpoint."""
        key = jax.random.key(self.config.seed)
        reduce = self.config.mesh.reduce
        state = init_state(self.network, self.tx, key, reduce=reduce)
        if self.config.resume:
            state = self.checkpoints.restore_latest(state)
            self.console.print(f"Resuming after step {int(state.step)}.")
            return state
        if scaling_of.sites(state.scaling):
            state, _ = build_calibration(self.network, state)(state, self._batch(1))
        return state

    def _evaluate(self, step: int, state: TrainState, log: MetricsLog, line: ProgressLine) -> None:
        loss = self.evaluate(state)
        self.validation_losses.append(loss)
        log.write({"step": step, "validation_loss": loss})
        line.validation(loss)

    def _stop(self, state: TrainState, step: int) -> dict[str, Any]:
        if step > 0:
            self.checkpoints.save(state)
        return {"steps": step, "stopped_by": self.stop.name}

    def _summary(self, reader: StepReader) -> dict[str, Any]:
        typical = float(np.median(reader.seconds))
        return {
            "steps": self.config.steps,
            "validation_loss": self.validation_losses[-1],
            "best_validation_loss": min(self.validation_losses),
            "recipe": self.config.precision.recipe,
            "gemms": self.gemms._asdict(),
            "compile_seconds": self.compile_seconds,
            "median_step_seconds": typical,
            "tokens_per_second": reader.tokens / typical,
            "total_seconds": time.perf_counter() - self.start_time,
        }

    def _batch(self, step: int):
        def load(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            return self.batches.batch(step - 1, rows)

        return self.network.layout.load_batch(load, self.config.batch_size)

    def _compile(self, state: TrainState):
        """Compiles the step, and says what its matmuls are before anything is trained."""
        config = self.config
        begin = time.perf_counter()
        step = build_step(self.network, self.tx, state, micro_batches=config.optim.accumulate)
        lowered = step.lower(state, self._batch(1))
        gemms = count_gemms(lowered)
        _require_fp8(config, gemms)
        compiled = lowered.compile()
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        self.console.print(
            f"{config.name}: {parameters:,} parameters, recipe {config.precision.recipe}, "
            f"{config.mesh.size} x {jax.devices()[0].device_kind}. FP8 matmuls in the lowered "
            f"step: {gemms.native} native, {gemms.emulated} exact upcasts, of {gemms.total}.",
            soft_wrap=True,
        )
        return compiled, gemms, time.perf_counter() - begin


def _require_fp8(config: TrainConfig, gemms: GemmCount) -> None:
    """A run that asks for FP8 and gets none must not pass for one."""
    precision = config.precision
    names = (precision.recipe, *(rule.recipe for rule in precision.rules))
    asked = [name for name in names if get_recipe(name).quantizes]
    if asked and not gemms.native + gemms.emulated:
        raise UserError(
            f"Recipe {asked[0]!r} was asked for, but none of the {gemms.total} matmuls of the "
            "lowered step multiplies FP8 values. Check precision.rules."
        )


def _stopped(summary: dict[str, Any], run: RunDirectory) -> str:
    """What to tell somebody whose run a signal has ended."""
    if not summary["steps"]:
        return f"Stopped by {summary['stopped_by']} before the first step; nothing was trained."
    return (
        f"Stopped by {summary['stopped_by']} after step {summary['steps']}; its checkpoint is in "
        f"{run.checkpoints}. --resume True goes on."
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _sample(config: TrainConfig, network: Network, state: TrainState, tokenizer) -> str:
    """Text that the trained model, whole on one device, writes."""
    trained = network.layout.on_one_device((state.params, state.scaling))
    prompt = tokenizer.encode(config.sample_prompt)
    key = jax.random.fold_in(jax.random.key(config.seed), config.steps)
    model = network.merge(*trained)
    ids = generate(model, prompt, config.sample_tokens, config.model.context, key)
    return tokenizer.decode(ids)


def _finish(config: TrainConfig, console: Console, run: RunDirectory, summary, sample: str) -> None:
    """Writes plots, sample and summary, and tells where they are."""
    run.write_json("summary.json", summary)
    if sample:
        run.write_text("samples.txt", sample)
        console.print(f"\nSample:\n{sample}\n", markup=False, highlight=False)
    if config.plots:
        _plot(config, console, run)
    console.print(
        f"Validation loss {summary['validation_loss']:.4f} nats per token after "
        f"{summary['steps']} steps, {summary['total_seconds']:.0f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s. Everything is in {run.path}/.",
        soft_wrap=True,
    )


def _plot(config: TrainConfig, console: Console, run: RunDirectory) -> None:
    try:
        from lowprec_jax.training.plots import plot_health, plot_loss

        records = run.read_metrics()
        title = f"{config.name} ({config.precision.recipe})"
        plot_loss(records, run.path / "loss.png", title)
        if any("saturated" in record for record in records):
            plot_health(records, run.path / "health.png", title)
    except ImportError:
        console.print("No plots: matplotlib is not installed (pip install 'lowprec-jax[train]').")
