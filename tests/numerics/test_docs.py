"""The format table of docs/numerics.md against the registry and the published limits."""

from pathlib import Path

import numpy as np
import oracles
import pytest

from lowprec_jax import numerics

# Integers of other widths are alike and not in the table.
WIDTHS = {"int4", "int8", "int16"}
LISTED = [fmt for fmt in numerics.formats() if fmt.layout != "integer" or fmt.name in WIDTHS]
PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"


def _table():
    """Rows of the table under "Formats": column title to cell, by format name."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Formats\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def _number(text):
    base, _, exponent = text.partition("^")
    return float(base) ** int(exponent or 1)


def test_formats_table__rows__are_the_registry_in_its_order():
    assert list(_table()) == [fmt.name for fmt in LISTED]


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_formats_table__numbers__are_those_of_the_registry(fmt):
    row = _table()[fmt.name]
    limits = [_number(row[c]) for c in ("max", "min normal", "min subnormal", "epsilon")]

    assert row["dtype"] == fmt.dtype.name
    assert row["layout"] == fmt.layout
    expected = (fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.epsilon)
    np.testing.assert_array_equal(np.float32(limits), np.float32(expected))


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_formats_table__special_codes__are_the_published_ones(fmt):
    row, published = _table()[fmt.name], oracles.PUBLISHED_LIMITS[fmt.name]

    assert row["Inf"] == ("yes" if published.infinities else "no")
    assert int(row["NaN codes"]) == published.nans
    assert row["-0"] == ("yes" if "-0" in fmt.specials else "no")
