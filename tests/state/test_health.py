"""Health figures, from observations written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import state
from lowprec_jax.recipes import FP8_DELAYED, init_state
from lowprec_jax.state import Health, health

#                amax, saturated, underflow, nonfinite, size
QUIET = [[1.0, 0, 0, 0, 100], [1.0, 0, 0, 0, 50], [1.0, 0, 0, 0, 25]]
NOISY = [[9.0, 10, 5, 0, 100], [1.0, 0, 2, 0, 50], [np.inf, 3, 5, 1, 25]]


def _site(observed, age=(0, 0, 0)):
    return init_state(FP8_DELAYED) | {
        "observed": jnp.array(observed, jnp.float32),
        "age": jnp.array(age, jnp.float32),
    }


def test_health__two_sites__fractions_are_of_all_elements():
    report = health({"a": _site(QUIET, (0, 7, 1)), "b": _site(NOISY, (2, 3, 0))})
    assert report.saturated == pytest.approx(13 / 350)
    assert report.underflow == pytest.approx(12 / 350)
    assert (report.nonfinite, report.scale_age) == (1.0, 7.0)
    assert report.worst == "b output_grad"  # 8 of 25, more than 15 of 100


def test_health__stack__names_the_layer():
    site = init_state(FP8_DELAYED, (2,)) | {"observed": jnp.array([QUIET, NOISY], jnp.float32)}
    report = health({"blocks": {"up": site}})
    assert report.worst == "blocks/up[1] output_grad"
    assert report.saturated == pytest.approx(13 / 350)


@pytest.mark.parametrize("tree", [{}, {"layer": {}}])
def test_health__no_sites__is_zero_and_names_nothing(tree):
    assert health(tree) == Health(0.0, 0.0, 0.0, 0.0, "")


def test_health__nothing_observed_yet__is_zero_and_finite():
    assert health({"a": init_state(FP8_DELAYED)})[:4] == (0.0, 0.0, 0.0, 0.0)


def test_health__values_before_advance__are_not_counted():
    pending = init_state(FP8_DELAYED) | {"pending": jnp.array(NOISY, jnp.float32)}
    assert health({"a": pending}).saturated == 0
    assert health(state.advance({"a": pending})).saturated == pytest.approx(13 / 175)
