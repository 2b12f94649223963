"""The CNN example reaches its accuracy with FP8 convolutions."""

import importlib.util
from pathlib import Path

import jax
import pytest

PATH = Path(__file__).parents[2] / "examples" / "digits_cnn.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("digits_cnn", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_cnn__split__is_disjoint_and_has_every_digit(example):
    (images, labels), (test_images, test_labels) = example.load()
    assert (len(images), len(test_images)) == (1437, 360)
    assert set(labels) == set(test_labels) == set(range(10))
    seen = {image.tobytes() for image in images}
    assert not any(image.tobytes() in seen for image in test_images)


def test_digits_cnn__fp8_delayed__reaches_98_percent(example):
    # Stock optax.adamw does not run under the strict promotion of our tests.
    with jax.numpy_dtype_promotion("standard"):
        assert example.train("fp8_delayed", epochs=10) >= 0.98
