"""The Python of docs/transforms.md runs as it is printed."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

DOC = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", DOC, flags=re.DOTALL))


def test_docs__every_block__is_found():
    assert len(BLOCKS) == DOC.count("```python")


@pytest.mark.parametrize("title", BLOCKS)
def test_docs__block__runs(title):
    names = {}
    exec(compile(BLOCKS[title], f"docs/transforms.md {title}", "exec"), names)
    if "scaling" in names:
        history = names["scaling"]["up"]["amax_history"][:, 0]
        assert history[:2].tolist() == [1.0, float(jnp.abs(names["w"]).max())]
        assert history[2] > 0
