"""``lowprec_jax plan``: which layers follow which recipe, and with ``--target`` what it is worth.

Public names: `run_plan`, `roofline_report`, `Options`, and its parts `run_of`, `state_on_mesh`,
`step_plans`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowprec_jax.errors import UserError
from lowprec_jax.training.config import MeshConfig, TrainConfig

if TYPE_CHECKING:  # imported where they are used, so that the help is quick
    from lowprec_jax.recipes import Recipe, Rule
    from lowprec_jax.roofline.gemm import Rates
    from lowprec_jax.roofline.step import StepPlan
    from lowprec_jax.roofline.transformer import Run

__all__ = ["Options", "roofline_report", "run_of", "run_plan", "state_on_mesh", "step_plans"]

_OPTIONS = {
    "config": "file or name of a config, default quickstart",
    "target": "chip of a roofline: h200, h100, b200, mi300x, mi355x, tpu-v5p, tpu-v6e, tpu-v7, "
    "trn2, trn3, cpu",
    "chips": "numbers of chips, such as 8,256,10000; the batch of a chip stays the same",
    "efficiency": "attained shares of the peaks of products and of memory, default 0.7,0.8",
    "link": "GB/s that a chip sends in one direction, in place of those of the target",
    "peak": "peak TFLOP/s in bf16, in place of that of the target; FP8 keeps its ratio",
    "bandwidth": "peak GB/s of the memory, in place of that of the target",
    "vocab": "tokens of the tokenizer, default 256",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a roofline; see ``lowprec_jax plan --help``."""

    target: str
    chips: tuple[int, ...] = ()
    efficiency: tuple[float, ...] = (0.7, 0.8)
    link: float | None = None
    peak: float | None = None
    bandwidth: float | None = None
    vocab: int = 256


def run_plan(name: str, words: Sequence[str]) -> None:
    """Runs ``lowprec_jax plan`` on a config and prints its tables.

    Args:
      name: name or file of the config.
      words: options of the roofline and overrides of the config.

    Raises:
      UserError: an unknown option or chip, or a mesh that the model does not allow.
    """
    from lowprec_jax.cli.config_file import load_config, resolve_config_path
    from lowprec_jax.training.network import plan_network

    options, overrides = _take_options(words)
    path, prog = resolve_config_path(name), "lowprec_jax plan"
    config = load_config(TrainConfig, path, overrides, prog=prog, extra_options=_OPTIONS)
    if options is None:
        print(plan_network(config))
        return
    print(roofline_report(config, options))


def _take_options(words: Sequence[str]) -> tuple[Options | None, list[str]]:
    """The options of the roofline, None without a target, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    readers = {
        "chips": _positive_integers,
        "efficiency": _shares,
        "link": _positive,
        "peak": _positive,
        "bandwidth": _positive,
        "vocab": lambda text: _positive_integers(text)[0],
    }
    parser.add_argument("--target")
    for option in readers:
        parser.add_argument(f"--{option}")
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"lowprec_jax plan: {error}. Give a value, as in --target h200.") from error
    values = {name: getattr(given, name) for name in readers if getattr(given, name) is not None}
    if given.target is None:
        if values:
            raise UserError(
                f"--{' and --'.join(values)}: options of the roofline, which needs a chip. Add "
                "--target h200, or another one."
            )
        return None, rest
    read: dict[str, Any] = {}
    for name, text in values.items():
        try:
            read[name] = readers[name](text)
        except ValueError as error:
            raise UserError(f"--{name} is {text!r}: {error}.") from None
    return Options(given.target, **read), rest


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise ValueError("give a positive number")
    return value


def _positive_integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("give positive integers, separated by commas")
    return tuple(map(int, parts))


def _shares(text: str) -> tuple[float, ...]:
    values = tuple(map(_positive, text.split(",")))
    if len(values) > 2 or max(values) > 1:
        raise ValueError("give one or two shares above 0, at most 1: of products, of memory")
    return (*values, Options.efficiency[1])[:2]


def roofline_report(config: TrainConfig, options: Options) -> str:
    """The tables of ``plan --target``.

    Args:
      config: the run.
      options: the chip and its numbers.

    Raises:
      UserError: an unknown chip, or numbers of chips that the mesh does not divide.
    """
    from lowprec_jax.roofline import report, transformer
    from lowprec_jax.training.network import plan_network, target_messages

    rates = _rates(options)
    config = _for_target(config, rates.chip.target)
    sizes = [_sized(config.mesh, n) for n in options.chips or (config.mesh.size,)]
    run = run_of(config, options.vocab)
    layers = transformer.layers_of(run, state_on_mesh(config, options.vocab, config.mesh).params)
    plans = list(step_plans(config, options.vocab, rates, run, sizes))
    blocks = [
        str(plan_network(config, options.vocab)),
        *target_messages(config),
        "",
        *report.assumptions(rates, run, config.model.compute_dtype),
        "",
        "Linear layers: one chip, one step, without recomputation.",
        report.layer_table(layers, rates),
        "",
        "Break-even: the fewest tokens of a micro-batch on a chip, and the smallest n of a layer "
        "n x n x n, for which the recipe beats bf16.",
        report.break_even_table(layers, rates),
    ]
    return "\n".join([*blocks, *report.step_tables(plans, rates)])


def _rates(options: Options) -> Rates:
    from lowprec_jax.roofline.chips import get_chip
    from lowprec_jax.roofline.gemm import Rates

    chip = get_chip(options.target)
    changes: dict[str, float] = {}
    if options.peak is not None:
        ratio = 1.0 if math.isnan(chip.bf16) else options.peak / chip.bf16
        changes = {name: ratio * getattr(chip, name) for name in ("fp8", "fp4", "int8")}
        changes["bf16"] = options.peak
    if options.bandwidth is not None:
        changes["bandwidth"] = options.bandwidth
    if options.link is not None:
        changes |= {"link": options.link, "network": options.link}
    return Rates(dataclasses.replace(chip, **changes), *options.efficiency)


def _for_target(config: TrainConfig, target: str | None) -> TrainConfig:
    if config.precision.target not in (None, target):
        raise UserError(
            f"precision.target is {config.precision.target!r}, but the roofline is for {target!r}. "
            "Leave precision.target out."
        )
    precision = dataclasses.replace(config.precision, target=target)
    return dataclasses.replace(config, precision=precision)


def _sized(mesh: MeshConfig, chips: int) -> MeshConfig:
    """The mesh for a number of chips: its data axis grows or shrinks."""
    others = mesh.fsdp * mesh.tensor
    if chips % others:
        near = max(1, round(chips / others)) * others
        raise UserError(
            f"--chips {chips} is not divisible by mesh.fsdp {mesh.fsdp} x mesh.tensor "
            f"{mesh.tensor} = {others}. Use {near} chips, or another mesh.fsdp."
        )
    return dataclasses.replace(mesh, data=chips // others)


def run_of(config: TrainConfig, vocab: int) -> Run:
    """What the roofline needs of a config.

    Args:
      config: the run.
      vocab: tokens of its tokenizer.
    """
    from lowprec_jax.roofline.communication import MeshShape
    from lowprec_jax.roofline.transformer import Run
    from lowprec_jax.training.network import precision_rules, transformer_config

    mesh, parts = config.mesh, config.optim.accumulate
    return Run(
        sizes=transformer_config(config.model, vocab),
        rules=precision_rules(config.precision),
        mesh=MeshShape(mesh.data, mesh.fsdp, mesh.tensor),
        windows=config.batch_size // (mesh.batch_parts * parts),
        micro_batches=parts,
        reduce=mesh.reduce,
        zero1=mesh.zero1,
        sequence=mesh.sequence,
    )


def state_on_mesh(config: TrainConfig, vocab: int, mesh: MeshConfig):
    """The abstract training state on a mesh that need not exist, with its shardings.

    Args:
      config: the run; its own mesh is not read.
      vocab: tokens of its tokenizer.
      mesh: the mesh.

    Raises:
      UserError: a mesh axis does not divide a dimension that it splits.
    """
    import jax
    from jax.sharding import AbstractMesh

    from lowprec_jax.models import partitioning
    from lowprec_jax.sharding import DATA_AXIS, FSDP_AXIS, TENSOR_AXIS, Layout
    from lowprec_jax.sharding.rules import partition_specs, split_further
    from lowprec_jax.training.network import build_network
    from lowprec_jax.training.optimizer import build_optimizer
    from lowprec_jax.training.step import abstract_state

    network = build_network(dataclasses.replace(config, mesh=MeshConfig()), vocab)
    tx = build_optimizer(config)
    options = {"reduce": mesh.reduce, "ema": config.optim.ema_decay > 0}
    devices: Any = AbstractMesh(
        (mesh.data, mesh.fsdp, mesh.tensor), (DATA_AXIS, FSDP_AXIS, TENSOR_AXIS)
    )
    params = abstract_state(network, tx, **options).params
    specs = optimizer = partition_specs(params, partitioning.TRANSFORMER, devices)
    if mesh.zero1:
        optimizer = jax.tree.map(
            lambda x, spec: split_further(spec, x.shape, DATA_AXIS, devices), params, specs
        )
    layout = Layout(devices, mesh.strategy, specs, optimizer)
    return abstract_state(dataclasses.replace(network, layout=layout), tx, **options)


def step_plans(
    config: TrainConfig, vocab: int, rates: Rates, run: Run, sizes: Sequence[MeshConfig]
):
    """A `StepPlan` for each mesh."""
    from lowprec_jax.roofline import transformer
    from lowprec_jax.roofline.communication import MeshShape
    from lowprec_jax.roofline.memory import part_bytes

    kept, unrolled = transformer.residuals_of(run), transformer.residuals_of(run, remat="none")
    for mesh in sizes:
        on = dataclasses.replace(run, mesh=MeshShape(mesh.data, mesh.fsdp, mesh.tensor))
        state = state_on_mesh(config, vocab, mesh)
        held = {name: part_bytes(tree) for name, tree in state._asdict().items()}
        yield _plan(config, rates, on, state.params, held, kept, unrolled)


def _plan(config, rates: Rates, run: Run, params, held: dict[str, int], kept, unrolled) -> StepPlan:
    from lowprec_jax.recipes import NONE
    from lowprec_jax.roofline import transformer
    from lowprec_jax.roofline.messages import messages_of
    from lowprec_jax.roofline.step import ChipWork, StepPlan, compute_time, step_time
    from lowprec_jax.training.efficiency import step_flops

    mesh, chip, windows = run.mesh, rates.chip, run.windows * run.micro_batches
    shared = mesh.tensor, mesh.fsdp * mesh.tensor
    high = dataclasses.replace(run, rules=tuple(_in_bf16(rule, NONE) for rule in run.rules))
    work = ChipWork(
        transformer.layers_of(run, params),
        transformer.attention_of(run, rates),
        unrolled.part(windows, *shared, sequence=run.sequence),
        3 * held["params"] + 2 * held["opt_state"] + 2 * held["ema"],
        run.sizes.remat == "full",
    )
    low = compute_time(work, rates)
    messages = [messages_of(r, params) for r in (run, high)]
    flops = step_flops(run.sizes, windows * mesh.data * mesh.fsdp, run.rules)
    ideal = flops.fp8 / chip.rate(8) + flops.other / chip.rate(16)
    return StepPlan(
        mesh.size,
        windows * mesh.data * mesh.fsdp * run.sizes.max_context,
        messages[0],
        low,
        step_time(low, messages[0], chip),
        step_time(compute_time(work, rates, high=True), messages[1], chip),
        ideal / mesh.size,
        transformer.memory_of(run, params, held, kept, unrolled),
    )


def _in_bf16(rule: Rule, none: Recipe) -> Rule:
    return dataclasses.replace(rule, recipe=none)
