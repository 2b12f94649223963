"""The NNX example runs, differs from the stock loop in as many lines as it says, and learns."""

import difflib
import importlib.util
import inspect
from pathlib import Path

import jax
import pytest

PATH = Path(__file__).parents[2] / "examples" / "nnx_two_lines.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("nnx_two_lines", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(example):
    # Stock optax.adamw and nnx.metrics do not run under the strict promotion of our tests.
    with jax.numpy_dtype_promotion("standard"):
        return example.main(steps=80)


def _changed_lines(before, after):
    """Lines removed and added between two functions, without the line of their names."""
    sources = [inspect.getsource(f).splitlines()[1:] for f in (before, after)]
    diff = list(difflib.unified_diff(*sources, n=0, lineterm=""))[2:]
    return [[line[1:] for line in diff if line[0] == sign] for sign in "-+"]


@pytest.mark.parametrize(("name", "lines"), [("train_fp8_delayed", 2), ("train_fp8_current", 1)])
def test_nnx_two_lines__adopting_a_recipe__changes_the_marked_lines_only(example, name, lines):
    removed, added = _changed_lines(example.train_stock, getattr(example, name))
    assert len(removed) == len(added) == lines
    assert [line.rpartition("# ")[2] for line in added] == [str(i + 1) for i in range(lines)]
    marked = [
        line for line in inspect.getsource(getattr(example, name)).splitlines() if "# " in line
    ]
    assert marked == added


@pytest.mark.parametrize("name", ["train_fp8_delayed", "train_fp8_current"])
def test_nnx_two_lines__fp8__learns_as_stock(results, name):
    """Loss on held-out files after 80 steps; measured: 0.19 % and 0.27 % from stock, 0.18 % in any
    part of the run; the gate is four times that."""
    stock, fp8 = results["train_stock"], results[name]
    assert stock[-1][0] < 0.9 * stock[0][0]
    assert fp8 != stock
    for (loss, _), (expected, _) in zip(fp8, stock, strict=True):
        assert loss == pytest.approx(expected, rel=0.01)
    assert fp8[-1][1] == pytest.approx(stock[-1][1], abs=0.02)
