"""examples/linen_train_state.py: it runs, it learns, and adoption costs the lines we say."""

import difflib
import importlib.util
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "examples" / "linen_train_state.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("linen_train_state", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("function", "count"), [("train_fp8_delayed", 4), ("train_fp8_current", 1)]
)
def test_example__lines_changed__are_as_many_as_promised(example, function, count):
    bodies = [
        inspect.getsource(getattr(example, name)).splitlines()[1:]
        for name in ("train_plain", function)
    ]
    lines = list(difflib.unified_diff(*bodies, lineterm="", n=0))
    added = [x for x in lines if x.startswith("+") and not x.startswith("+++")]
    removed = [x for x in lines if x.startswith("-") and not x.startswith("---")]
    assert len(added) == len(removed) == count
    assert [line.rsplit("# ")[-1] for line in added] == [str(i + 1) for i in range(count)]


def test_example__main__fp8_learns_as_the_plain_model_does(example, capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        runs = example.main(steps=60)
    plain = np.mean(runs["train_plain"][-10:])
    assert plain < 0.45 < np.mean(runs["train_plain"][:10])
    for name in ("train_fp8_delayed", "train_fp8_current"):
        assert abs(np.mean(runs[name][-10:]) - plain) < 0.03, name
        assert runs[name] != runs["train_plain"]
    assert "train_fp8_delayed" in capsys.readouterr().out
