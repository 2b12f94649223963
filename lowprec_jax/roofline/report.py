"""Tables of a plan, as text.

Public names: `assumptions`, `layer_table`, `break_even_table`, `message_table`, `step_table`,
`memory_table`, `step_tables`.
"""

import math
from collections.abc import Iterable, Sequence

from lowprec_jax.recipes import NONE
from lowprec_jax.roofline.chips import Chip
from lowprec_jax.roofline.communication import Message, seconds
from lowprec_jax.roofline.gemm import Cost, Rates
from lowprec_jax.roofline.layer import (
    GEMMS,
    LayerWork,
    break_even_square,
    break_even_tokens,
    layer_cost,
    verdict,
)
from lowprec_jax.roofline.step import StepPlan
from lowprec_jax.roofline.transformer import Run

__all__ = [
    "assumptions",
    "break_even_table",
    "layer_table",
    "memory_table",
    "message_table",
    "step_table",
    "step_tables",
]


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows in columns, the first row the header.

    Args:
      rows: cells as text.
      left: leading columns that are aligned left, as is the last.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i < left or i == last else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, c) for i, c in enumerate(row)).rstrip() for row in rows)


def _number(x: float, digits: int = 1) -> str:
    """A number with thousands separated; "n/a" if it is not known."""
    return "n/a" if math.isnan(x) else f"{x:,.{digits}f}"


def _milliseconds(x: float) -> str:
    """Seconds as milliseconds."""
    return _number(1e3 * x, 3)


def layer_table(layers: Iterable[LayerWork], rates: Rates) -> str:
    """For each layer its GEMMs and casts on one chip, in bf16 and in its recipe, and a verdict."""
    head = "layer", "gemm", "calls", "M", "K", "N", "TFLOP", "bf16 GB", "GB", "FLOP/B", "bf16 ms"
    rows: list[tuple[str, ...]] = [(*head, "ms", "")]
    for work in layers:
        low, high = layer_cost(work, rates), layer_cost(work, rates, NONE)
        for name in GEMMS:
            sizes = map(str, work.shapes[name])
            rows.append(_layer_row("", name, work, sizes, high.gemms[name], low.gemms[name], ""))
        before, after = high.casts, low.casts
        rows.append(_layer_row("", "casts", work, ("", "", ""), before, after, ""))
        said = verdict(work, low.total, high.total, rates)
        name = f"{work.path} [{work.recipe.name}]"
        rows.append(_layer_row(name, "all", work, ("", "", ""), high.total, low.total, said))
    return _table(rows, left=2)


def _layer_row(
    name: str, gemm: str, work: LayerWork, sizes: Iterable[str], high: Cost, low: Cost, said: str
) -> tuple[str, ...]:
    work_ = (
        _number(high.flops / 1e12, 2),
        _number(high.bytes / 1e9, 2),
        _number(low.bytes / 1e9, 2),
    )
    intensity = _number(low.intensity, 0) if low.flops else ""
    times = _milliseconds(high.seconds), _milliseconds(low.seconds)
    return (name, gemm, str(work.calls), *sizes, *work_, intensity, *times, said)


def break_even_table(layers: Iterable[LayerWork], rates: Rates) -> str:
    """From which sizes on low precision pays."""
    rows: list[tuple[str, ...]] = [
        ("layer", "tokens", "break-even tokens", "break-even square", "")
    ]
    for work in layers:
        if work.recipe.quantizes:
            tokens, square = break_even_tokens(work, rates), break_even_square(work, rates)
            known = not math.isnan(layer_cost(work, rates).total.seconds)
            never = "never" if known else "n/a"
            found = [f"{x:,}" if x else never for x in (tokens, square)]
            rows.append((work.path, f"{work.shape.m:,}", *found, work.recipe.name))
    return _table(rows) if len(rows) > 1 else "No layer is quantized: there is no break-even."


def message_table(messages: Iterable[Message], rates: Rates) -> str:
    """What one chip sends in a step."""
    rows: list[tuple[str, ...]] = [
        ("message", "collective", "chips", "count", "payload GB", "wire GB", "ms", "")
    ]
    for m in messages:
        if m.group > 1 and m.payload:
            sizes = _number(m.payload / 1e9, 4), _number(m.wire / 1e9, 4)
            time = _milliseconds(seconds(m, rates.chip))
            shown = "beside products" if m.overlaps else "exposed"
            rows.append((m.what, m.kind, str(m.group), f"{m.count:g}", *sizes, time, shown))
    return _table(rows, left=2) if len(rows) > 1 else "Nothing is sent: one chip."


def step_table(plans: Sequence[StepPlan]) -> str:
    """Time of a step for each number of chips."""
    head = "chips", "layers", "attention", "kept", "optimizer", "exposed", "hidden", "step ms"
    rows: list[tuple[str, ...]] = [(*head, "serial ms", "bf16 step ms", "gain", "tokens/s", "MFU")]
    for plan in plans:
        low = plan.low
        parts = *plan.compute, low.exposed, low.hidden, low.total, low.serial, plan.high.total
        gain, mfu = plan.high.total / low.total, 100 * plan.ideal / low.total
        speed = _number(plan.tokens / low.total, 0)
        shown = f"{_number(gain, 2)}x", speed, f"{_number(mfu)}%"
        rows.append((f"{plan.chips:,}", *map(_milliseconds, parts), *shown))
    return _table(rows, left=0)


def memory_table(plans: Sequence[StepPlan], chip: Chip) -> str:
    """Memory of a chip for each number of chips, and whether it suffices."""
    rows: list[tuple[str, ...]] = [("chips", *plans[0].memory, "all", "")]
    for plan in plans:
        total = sum(plan.memory.values()) / 1e9
        parts = (_number(x / 1e9, 2) for x in plan.memory.values())
        rows.append((f"{plan.chips:,}", *parts, _number(total, 2), _fits(total, chip)))
    return _table(rows, left=0)


def _fits(total: float, chip: Chip) -> str:
    if math.isnan(chip.capacity):
        return ""
    if total <= chip.capacity:
        return f"fits {chip.capacity:g}"
    return f"does not fit {chip.capacity:g}: more mesh.fsdp, mesh.tensor, remat or smaller batches"


def assumptions(rates: Rates, run: Run, compute_dtype: str) -> list[str]:
    """What the other tables rest on."""
    chip = rates.chip
    figures = (chip.bf16, chip.fp8, chip.bandwidth, chip.capacity, chip.link, chip.network)
    bf16, fp8, memory, capacity, link, network = (
        "n/a" if math.isnan(x) else f"{x:g}" for x in figures
    )
    lines = [
        f"Target {chip.name}: {bf16} TFLOP/s bf16, {fp8} FP8, {memory} GB/s, {capacity} GB; links "
        f"{link} GB/s in a node of {chip.node}, {network} beyond.",
        f"Source: {chip.source}",
        f"Assumed: {rates.compute:.0%} of the peak of products is attained, {rates.memory:.0%} of "
        "that of memory.",
        f"Mesh data {run.mesh.data} x fsdp {run.mesh.fsdp} x tensor {run.mesh.tensor}; a chip has "
        f"{run.windows} windows of {run.sizes.max_context} tokens in each of {run.micro_batches} "
        f"micro-batches; remat {run.sizes.remat}.",
    ]
    if compute_dtype != "bfloat16":
        lines.append(
            f"model.compute_dtype is {compute_dtype}: times of what is not quantized "
            "are those of bfloat16, memory is that of the config."
        )
    return lines


def step_tables(plans: Sequence[StepPlan], rates: Rates) -> list[str]:
    """Messages on the first number of chips, time and memory on all."""
    return [
        "",
        f"Messages of a step on {plans[0].chips:,} chips.",
        message_table(plans[0].messages, rates),
        "",
        "Steps. Chips grow along data; the batch of a chip stays the same.",
        step_table(plans),
        "",
        "Memory of a chip, GB.",
        memory_table(plans, rates.chip),
    ]
