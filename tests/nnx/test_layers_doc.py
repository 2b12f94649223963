"""The code and the figures of docs/layers.md."""

import re
from pathlib import Path

import lowprec_jax as lp

DOC = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)


def test_layers_doc__code__runs_in_order():
    scope: dict = {}
    for block in BLOCKS:
        exec(block, scope)
    assert len(BLOCKS) == 3


def test_layers_doc__table__names_what_is_there():
    rows = re.findall(r"^\| [^|]+\| `(\w+)`(?:, `(\w+)`)? \| `(\w+)`(?:, `(\w+)`)? \|", DOC, re.M)
    assert len(rows) == 10
    for row in rows:
        assert all(hasattr(lp.nnx, name) for name in row[:2] if name)
        assert all(hasattr(lp.linen, name) for name in row[2:] if name)
