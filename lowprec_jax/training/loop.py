"""One training run from config to report."""

from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from lowprec_jax import data
from lowprec_jax.config_text import config_to_dict, dump_config
from lowprec_jax.errors import TrainingFailedError, UserError
from lowprec_jax.models import generate
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.efficiency import Clock, peak_memory
from lowprec_jax.training.network import target_messages
from lowprec_jax.training.processes import Processes, start_processes
from lowprec_jax.training.profile_window import ProfileWindow
from lowprec_jax.training.programs import Programs, ProgramTable
from lowprec_jax.training.run_directory import RunDirectory, environment
from lowprec_jax.training.run_log import RunLog
from lowprec_jax.training.signals import StopRequest
from lowprec_jax.training.trainer import Trainer
from lowprec_jax.training.wandb_run import WandbRun, require_wandb
from lowprec_jax.training.watchdog import Watchdog

__all__ = ["train"]


class _Text(NamedTuple):
    """What a run learns from."""

    corpus: data.Corpus
    tokenizer: data.Tokenizer
    batches: data.Batches
    windows: tuple[np.ndarray, np.ndarray]


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a model and writes a run directory.

    Args:
      config: the run.

    Returns:
      The summary that is also written to ``summary.json``; after a SIGTERM or Ctrl-C, which end
      the run with a checkpoint, ``{"steps": ..., "stopped_by": ...}``.

    Raises:
      UserError: bad input, and nothing of an earlier run is touched; or a checkpoint could not be
        written.
      TrainingFailedError: it went wrong more often than the guard allows; the report is written.
    """
    with start_processes(config.distributed) as processes:
        return _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    """The run as one of its processes sees it; the first one writes and talks."""
    clock, console = Clock(), Console(quiet=not processes.is_first)
    require_wandb(config.wandb)
    text = _load_text(config)
    run = RunDirectory(config.run_path, resume=config.resume, writes=processes.is_first)
    table = ProgramTable(config, text.tokenizer.vocab_size, text.windows)
    with (
        StopRequest() as stop,
        Checkpoints(
            run.checkpoints,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            writes=processes.is_first,
        ) as checkpoints,
    ):
        trainer = Trainer(config, table, text.batches, checkpoints, stop, clock)
        events = trainer.resume() if config.resume else trainer.begin()
        if stop.agreed(0):
            return _stopped(console, stop.name, trainer.completed, run)
        # Only now: what may still be refused leaves the files of an earlier run as they are.
        run.make()
        _write_inputs(config, run, text)
        console.print(_headline(config, trainer.programs, trainer.state.params), soft_wrap=True)
        with (
            Watchdog(config.stall_timeout, run.path / "stacks.txt") as watchdog,
            _profile_window(config, run, trainer.completed) as profile,
            RunLog(
                config,
                run,
                console,
                clock,
                completed=trainer.completed,
                wandb=_wandb(config, run),
            ) as log,
        ):
            for kind, fields in events:
                log.event(trainer.completed, kind, _said(kind, fields), **fields)
            try:
                ended = trainer.run(log, watchdog, profile)
            except TrainingFailedError:
                _report(config, console, run)
                raise
    if ended not in ("completed", "stopped early"):
        return _stopped(console, ended, trainer.completed, run)
    summary = _summary(config, trainer, table, log, clock)
    sample = _sample(config, trainer, text.tokenizer) if config.sample_tokens else ""
    if processes.is_first:
        _finish(config, console, run, summary, sample)
    return summary


def _load_text(config: TrainConfig) -> _Text:
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
    windows = inputs[: config.eval_windows], targets[: config.eval_windows]
    if config.sample_tokens:
        tokenizer.encode(config.sample_prompt)  # a prompt it cannot encode is bad input now
    return _Text(corpus, tokenizer, batches, windows)


def _write_inputs(config: TrainConfig, run: RunDirectory, text: _Text) -> None:
    run.write_text("config.yaml", dump_config(config))
    run.write_json("environment.json", environment())
    run.write_json("data_card.json", text.corpus.card)
    if run.writes:
        data.save_tokenizer(text.tokenizer, run.path / "tokenizer.json")


def _wandb(config: TrainConfig, run: RunDirectory) -> WandbRun | None:
    if not (config.wandb and run.writes):
        return None
    values = config_to_dict(config)
    return WandbRun(config.wandb, name=config.name, folder=run.path, config=values)


def _profile_window(config: TrainConfig, run: RunDirectory, completed: int) -> ProfileWindow:
    """Of the first process, counted from where this start of the run begins."""
    steps = config.profile_steps if run.writes else 0
    return ProfileWindow(completed + config.profile_start, steps, run.path / "profile")


def _headline(config: TrainConfig, programs: Programs, params: Any) -> str:
    """What is trained, in which matmuls, before anything is."""
    parameters, gemms = sum(x.size for x in jax.tree.leaves(params)), programs.gemms
    headline = (
        f"{config.name}: {parameters:,} parameters, recipe {programs.precision.recipe}, "
        f"{config.mesh.size} x {jax.devices()[0].device_kind}. Low-precision matmuls in the "
        f"lowered step: {gemms.native} native, {gemms.emulated} exact upcasts, of {gemms.total}."
    )
    return "\n".join([headline, *target_messages(config)])


def _said(kind: str, fields: dict[str, Any]) -> str:
    """What a person should read of the events of a start."""
    said = {
        "bad_checkpoint": lambda: f"{fields['reason']} Using the one before.",
        "changed": lambda: f"Changed since the checkpoint: {'; '.join(fields['changes'])}.",
        "converted": lambda: f"Converted: {' '.join(fields['messages'])}",
    }
    return said[kind]() if kind in said else ""


def _stopped(console: Console, name: str, completed: int, run: RunDirectory) -> dict[str, Any]:
    """Tells somebody that a signal has ended the run, and returns its summary."""
    said = (
        f"Stopped by {name} after step {completed}; its checkpoint is in {run.checkpoints}. "
        "--resume True goes on."
        if completed
        else f"Stopped by {name} before the first step; nothing was trained."
    )
    console.print(said, soft_wrap=True)
    return {"steps": completed, "stopped_by": name}


def _summary(
    config: TrainConfig, trainer: Trainer, table: ProgramTable, log: RunLog, clock: Clock
) -> dict[str, Any]:
    reader, losses, seconds = log.reader, trainer.memory.validation_losses, clock.seconds()
    typical = float(np.median(reader.seconds))
    ideal = trainer.programs.ideal_seconds
    return {
        "steps": trainer.completed,
        "validation_loss": losses[-1],
        "best_validation_loss": min(losses),
        "recipe": trainer.programs.precision.recipe,
        "gemms": trainer.programs.gemms._asdict(),
        "median_step_seconds": typical,
        "tokens_per_second": reader.tokens / typical,
        "mfu": ideal / typical if ideal else None,
        "compile_seconds": table.compile_seconds,
        "total_seconds": sum(seconds.values()),
        "seconds": seconds,
        "goodput": clock.goodput,
        **peak_memory(),
    }


def _sample(config: TrainConfig, trainer: Trainer, tokenizer: data.Tokenizer) -> str:
    """Text that the trained model, whole on one device, writes."""
    network, state = trainer.programs.network, trainer.state
    trained = network.layout.on_one_device((state.weights, state.scaling))
    prompt = tokenizer.encode(config.sample_prompt)
    key = jax.random.fold_in(jax.random.key(config.seed), config.steps)
    model = network.merge(*trained)
    ids = generate(model, prompt, config.sample_tokens, config.model.context, key)
    return tokenizer.decode(ids)


def _finish(
    config: TrainConfig, console: Console, run: RunDirectory, summary: dict[str, Any], sample: str
) -> None:
    """Writes summary, sample and report, and tells where they are."""
    run.write_json("summary.json", summary)
    if sample:
        run.write_text("samples.txt", sample)
        console.print(f"\nSample:\n{sample}\n", markup=False, highlight=False)
    _report(config, console, run)
    console.print(
        f"Validation loss {summary['validation_loss']:.4f} nats per token after "
        f"{summary['steps']} steps, {summary['total_seconds']:.0f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s. Everything is in {run.path}/.",
        soft_wrap=True,
    )


def _report(config: TrainConfig, console: Console, run: RunDirectory) -> None:
    if not (config.plots and run.writes):
        return
    try:
        from lowprec_jax.training.report import write_report

        write_report(run.path)
    except (ImportError, UserError) as error:
        console.print(f"No report: {error}", markup=False)
