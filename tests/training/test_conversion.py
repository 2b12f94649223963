"""From a stored state to the one that is needed: by hand-made leaves, without a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.training.conversion import plan_conversion
from lowprec_jax.training.state_leaves import Leaves

SITE = "scaling/blocks/mlp/down/dot_general/scaling"


def scaling(window: int | None, *, layers: int = 2) -> dict[str, jax.Array]:
    """State of a scanned site whose numbers are all different; None: without a history."""
    rng = np.random.default_rng(window or 0)
    shapes = {"pending": (3, 5), "observed": (3, 7)}
    if window is not None:
        shapes["amax_history"] = (3, window)
    return {
        f"{SITE}/{field}": jnp.asarray(rng.uniform(1, 2, (layers, *shape)), jnp.float32)
        for field, shape in shapes.items()
    }


def weights(dtype=jnp.float32, *, masters: bool = False) -> dict[str, jax.Array]:
    values = jnp.asarray(np.random.default_rng(7).normal(size=(4, 3)), jnp.float32)
    moment = {"opt_state/inner/0/mu/w" if masters else "opt_state/0/mu/w": 2 * values}
    master = {"opt_state/master/w": values} if masters else {}
    return {"params/w": values.astype(dtype), **moment, **master, "step": jnp.int32(5)}


def converted(stored: Leaves, like: Leaves):
    conversion = plan_conversion(stored, like)
    return conversion, conversion.make({name: stored[name] for name in conversion.needs})


def test_conversion__nothing_differs__gives_the_same_arrays_without_a_word():
    stored = weights() | scaling(16)
    conversion, made = converted(stored, stored)
    assert made.keys() == stored.keys()
    assert all(np.array_equal(made[name], stored[name]) for name in stored)
    assert conversion.messages == []
    assert not conversion.uncalibrated


@pytest.mark.parametrize("window", [4, 16, 40])
def test_conversion__another_history_length__keeps_the_newest(window):
    stored, like = scaling(16), scaling(window)
    conversion, made = converted(stored, like)
    old, new = stored[f"{SITE}/amax_history"], made[f"{SITE}/amax_history"]
    kept = min(window, 16)
    np.testing.assert_array_equal(new[..., :kept], old[..., :kept])
    assert not new[..., kept:].any()
    assert conversion.messages == ([] if window == 16 else [_history(window)])
    assert not conversion.uncalibrated


def _history(window: int) -> str:
    return f"Amax histories go from 16 to {window} steps."


def test_conversion__recipe_without_history_before__starts_with_the_last_amax():
    stored = scaling(None)
    _, made = converted(stored, scaling(8))
    history = made[f"{SITE}/amax_history"]
    np.testing.assert_array_equal(history[..., 0], stored[f"{SITE}/observed"][..., 0])
    assert not history[..., 1:].any()


def test_conversion__no_state_before__is_empty_and_to_be_calibrated():
    conversion, made = converted(weights(), weights() | scaling(16))
    assert conversion.uncalibrated
    assert not made[f"{SITE}/amax_history"].any()
    assert conversion.messages == [
        "blocks/mlp/down had no scaling state: calibrated before the next step."
    ]


def test_conversion__no_state_needed__drops_it_and_says_so():
    conversion, made = converted(weights() | scaling(16), weights())
    assert made.keys() == weights().keys()
    assert conversion.messages == ["blocks/mlp/down keep no scaling state any more: dropped."]


def test_conversion__f32_to_bf16__parameters_become_masters():
    stored, like = weights(), weights(jnp.bfloat16, masters=True)
    conversion, made = converted(stored, like)
    np.testing.assert_array_equal(made["opt_state/master/w"], stored["params/w"])
    np.testing.assert_array_equal(made["params/w"], stored["params/w"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(made["opt_state/inner/0/mu/w"], stored["opt_state/0/mu/w"])
    assert "Parameters go from float32 to bfloat16" in conversion.messages[0]


def test_conversion__bf16_to_f32__masters_become_parameters():
    stored, like = weights(jnp.bfloat16, masters=True), weights()
    _, made = converted(stored, like)
    np.testing.assert_array_equal(made["params/w"], stored["opt_state/master/w"])
    np.testing.assert_array_equal(made["opt_state/0/mu/w"], stored["opt_state/inner/0/mu/w"])


def test_conversion__average_from_weights__is_a_copy_that_can_be_donated_beside_them():
    like = weights() | {"ema/w": weights()["params/w"]}
    stored = weights()
    _, made = converted(stored, like)
    np.testing.assert_array_equal(made["ema/w"], stored["params/w"])
    step = jax.jit(lambda a, b: (a + 1, b + 1), donate_argnums=(0, 1))
    jax.block_until_ready(step(made["ema/w"], made["params/w"]))


@pytest.mark.parametrize(
    ("stored", "like", "message"),
    [
        (weights(), weights() | {"params/v": jnp.ones(2)}, r"params/v is missing there"),
        (weights() | {"params/v": jnp.ones(2)}, weights(), r"it has params/v, float32\[2\]"),
        (
            weights(),
            weights() | {"params/w": jnp.ones((4, 4))},
            r"params/w is float32\[4, 3\] there and float32\[4, 4\] here",
        ),
        (weights() | {"opt_state/1/nu/w": jnp.ones(2)}, weights(), "it has opt_state/1/nu/w"),
        (weights(), weights() | {"opt_state/1/nu/w": jnp.ones(2)}, "opt_state/1/nu/w is missing"),
        (
            scaling(16, layers=2),
            scaling(16, layers=3),
            r"pending is float32\[2, 3, 5\] there",
        ),
    ],
    ids=["new", "gone", "shape", "optimizer_gone", "optimizer_new", "stack"],
)
def test_conversion__another_model_or_optimizer__is_refused(stored, like, message):
    with pytest.raises(UserError, match=message):
        plan_conversion(stored, like)
