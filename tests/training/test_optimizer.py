"""Optimizers and schedules of the config, against NumPy."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.training.optimizer import build_optimizer, learning_rate
from lowprec_jax.training.step import build_step
from training.helpers import batch_of, compiled, network_of, start, tiny_config

PARAMS = {
    "blocks": {
        "mlp": {
            "gate_up": {"kernel": (2, 8, 2, 12)},
            "down": {"kernel": (2, 12, 8)},
        },
        "mlp_norm": {"scale": (2, 8)},
    },
    "embedding": {"embedding": (29, 8)},
}


def arrays(seed: int):
    leaves, treedef = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    generator = np.random.default_rng(seed)
    return treedef.unflatten([generator.normal(size=s).astype(np.float32) for s in leaves])


def second_update(name: str, **optim):
    """Gradients, parameters and the updates of the second of two steps, at rate 0.1 * 1."""
    options = {"weight_decay": 0.25, "clip_norm": 1e9, "learning_rate": 0.1, **optim}
    options |= {"optimizer": name, "schedule": "constant", "warmup_steps": 0}
    tx = build_optimizer(tiny_config(optim=options))
    params, grads = arrays(0), [arrays(1), arrays(2)]
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for grad in grads:
            updates, state = jax.jit(tx.update)(grad, state, params)
    return grads, params, jax.device_get(updates)


def decay(path, param):
    return 0 if "norm" in jax.tree_util.keystr(path) else 0.25 * param


def assert_updates(updates, params, grads, expected):
    def check(path, update, param, first, second):
        wanted = -0.1 * (expected(first.astype(np.float64), second) + decay(path, param))
        np.testing.assert_allclose(update, wanted, rtol=2e-5, atol=2e-7)

    jax.tree_util.tree_map_with_path(check, updates, params, *grads)


def test_lion__second_update__is_the_sign_of_the_interpolated_average():
    grads, params, updates = second_update("lion", b1=0.9, b2=0.5)
    assert_updates(updates, params, grads, lambda g, h: np.sign(0.9 * (0.5 * g) + 0.1 * h))


def test_sgd__second_update__has_nesterov_momentum():
    grads, params, updates = second_update("sgd", b1=0.9)
    assert_updates(updates, params, grads, lambda g, h: h + 0.9 * (h + 0.9 * g))


def test_adafactor__second_update__is_normalised_by_the_decayed_square():
    """Below 128 features the second moment is not factored; its decay at step t is 1 - t**-0.8."""
    grads, params, updates = second_update("adafactor")

    def expected(g, h):
        beta = 1 - 2.0**-0.8
        u = h / np.sqrt(beta * (g**2 + 1e-30) + (1 - beta) * (h**2 + 1e-30))
        return u / max(1, np.sqrt((u**2).mean()))

    assert_updates(updates, params, grads, expected)


def test_muon__matrices_of_the_blocks__get_nearly_orthogonal_updates_of_adams_size():
    updates = second_update("muon", weight_decay=0.0)[2]
    gate_up = updates["blocks"]["mlp"]["gate_up"]["kernel"]
    matrices = [gate_up[layer, :, half] for layer in range(2) for half in range(2)]
    matrices += list(updates["blocks"]["mlp"]["down"]["kernel"])
    for matrix in matrices:
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * np.sqrt(12))
        # Five Newton-Schulz iterations bring singular values to 0.7 to 1.2, small ones less so.
        assert 0.4 < singular.min() <= singular.max() < 1.3


def test_muon__embedding_and_norms__get_adam_with_nesterov_momentum():
    grads, _, updates = second_update("muon", weight_decay=0.0, b1=0.9, b2=0.99)
    for name in (("embedding", "embedding"), ("blocks", "mlp_norm", "scale")):
        g, h = (functools.reduce(operator.getitem, name, x).astype(np.float64) for x in grads)
        average = 0.9 * 0.1 * g + 0.1 * h
        ahead = 0.9 * average / (1 - 0.9**3) + 0.1 * h / (1 - 0.9**2)
        square = (0.99 * 0.01 * g**2 + 0.01 * h**2) / (1 - 0.99**2)
        wanted = -0.1 * ahead / (np.sqrt(square) + 1e-8)
        got = functools.reduce(operator.getitem, name, updates)
        np.testing.assert_allclose(got, wanted, rtol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_base_width__model_four_times_as_wide__halves_the_rate_of_hidden_matrices(name):
    """Exactly, the decay with it; embedding and norms keep theirs."""
    plain, scaled = second_update(name)[2], second_update(name, base_width=8)[2]
    for layer in ("gate_up", "down"):
        matrix = plain["blocks"]["mlp"][layer]["kernel"]
        np.testing.assert_array_equal(scaled["blocks"]["mlp"][layer]["kernel"], 0.5 * matrix)
    for names in (("embedding", "embedding"), ("blocks", "mlp_norm", "scale")):
        got, wanted = (functools.reduce(operator.getitem, names, x) for x in (scaled, plain))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", lambda t: 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t / 90))),
        ("linear", lambda t: 1 - 0.9 * t / 90),
        ("wsd", lambda t: 1 - 0.9 * max(t - 70, 0) / 20),
        ("constant", lambda t: 1.0),
    ],
)
def test_learning_rate__schedule__warms_up_and_follows_its_formula(schedule, expected):
    optim = {"schedule": schedule, "warmup_steps": 10, "learning_rate": 2.0, "final_fraction": 0.1}
    rate = learning_rate(tiny_config(steps=100, optim=optim))
    for step in range(10):
        assert float(rate(step)) == pytest.approx(2.0 * step / 10, rel=1e-5, abs=1e-7)
    for step in range(10, 101):
        assert float(rate(step)) == pytest.approx(2.0 * expected(step - 10), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "rate", "mesh"),
    [
        ("lion", 1e-3, {}),
        ("sgd", 0.3, {}),
        ("adafactor", 1e-2, {"data": 2, "fsdp": 2}),
        ("muon", 1e-2, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(
            *("muon", 1e-2, {"data": 2, "fsdp": 2, "strategy": "explicit"}),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_step__optimizer__learns_a_batch(name, rate, mesh):
    optim = {"optimizer": name, "learning_rate": rate, "schedule": "wsd"}
    config = tiny_config(recipe="none", optim=optim, mesh=mesh)
    state = start(config)
    batch = network_of(config).layout.put_batch(batch_of(config, 1))
    step = compiled(build_step(network_of(config), build_optimizer(config), state), state, batch)
    losses = []
    for _ in range(20):
        state, metrics = jax.block_until_ready(step(state, batch))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.1
    assert jnp.isfinite(metrics.grad_norm)
