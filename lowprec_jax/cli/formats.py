"""``lowprec_jax formats``: the number formats, as a table.

Public name: `run_formats`.
"""

import argparse
import math
from collections.abc import Sequence

from lowprec_jax.errors import UserError

__all__ = ["run_formats"]

_MIN_WIDTH = 140


def run_formats(words: Sequence[str]) -> None:
    """Runs ``lowprec_jax formats WORDS`` and prints a row for each format.

    Raises:
      UserError: an unknown option or format.
    """
    parser = argparse.ArgumentParser(
        prog="lowprec_jax formats",
        usage="lowprec_jax formats [NAME ...]",
        description="Shows the number formats: range, precision, special values, and the chips "
        "whose matrix units take them. Every format runs everywhere, emulated where it has to be.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="e4m3fn, int8, float_e3m5, ...; all without any"
    )
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserError(
            f"lowprec_jax formats takes names of formats, given: {' '.join(unknown)}. Write: "
            "lowprec_jax formats e4m3fn int8."
        )

    from rich.console import Console

    table = _table(options.names)
    # Narrower, columns would lose their words; a pipe has no width of its own.
    Console(width=max(_MIN_WIDTH, Console().width)).print(table)


def _table(names: Sequence[str]):
    """One row for each named format, or for each registered one."""
    from rich import box
    from rich.table import Table

    from lowprec_jax.numerics import formats, get_format

    try:
        rows = [get_format(name) for name in names] or formats()
    except ValueError as error:
        raise UserError(str(error)) from error
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("format", no_wrap=True)
    table.add_column("bits", justify="right")
    table.add_column("layout", no_wrap=True)
    for title in ("max", "min\nnormal", "min sub-\nnormal", "epsilon"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("specials", no_wrap=True)
    table.add_column("native on")
    for fmt in rows:
        limits = (fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.epsilon)
        table.add_row(
            fmt.name,
            str(fmt.bits),
            fmt.layout,
            *(_number(limit) for limit in limits),
            fmt.specials,
            _chips(fmt),
        )
    return table


def _chips(fmt) -> str:
    """The chips whose matrix units take a format; all take one of the compute types."""
    from lowprec_jax.recipes import targets

    if not (fmt.element and fmt.is_low_precision):
        return "-"
    chips = [t.name for t in targets() if fmt.name in (*t.native, *t.mx, *t.nvfp4)]
    return ", ".join(chips) or "emulated only"


def _number(value: float) -> str:
    """A power of two as one, unless it is short in decimals."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5 and not 0 <= exponent - 1 <= 10:
        return f"2^{exponent - 1}"
    return f"{value:.6g}"
