"""One training step: its arithmetic, the guard, and how often scaling state advances."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowprec_jax.models import Transformer
from lowprec_jax.optim import read_masters
from lowprec_jax.recipes import Column, Record, Role
from lowprec_jax.state import OperandColumn, sites
from lowprec_jax.training.network import transformer_config
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import build_step
from training.helpers import (
    VOCAB,
    assert_same_bits,
    assert_same_scaling,
    batch_of,
    by_path,
    compiled,
    copy,
    network_of,
    start,
    tiny_config,
)

FP8, NONE = tiny_config(), tiny_config(recipe="none", optim={"clip_norm": 0.5})


def step_of(config, state, batch, tx=None, micro_batches=1):
    tx = tx or build_optimizer(config)
    step = build_step(network_of(config), tx, state, micro_batches=micro_batches)
    return compiled(step, state, batch)


# One step of recipe none against NumPy's AdamW on JAX's gradients of the plain model.


def plain_loss_and_grad(config):
    """Initial parameters and the gradient of the mean loss, without any part of the program."""
    model = Transformer(
        transformer_config(config.model, VOCAB), rngs=nnx.Rngs(jax.random.key(config.seed))
    )
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def value_and_grad(pure, inputs, targets):
        def loss(pure):
            state = nnx.clone(params)
            nnx.replace_by_pure_dict(state, pure)
            logits = nnx.merge(graphdef, state)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        return jax.value_and_grad(loss)(pure)

    return nnx.to_pure_dict(params), value_and_grad


def numpy_learning_rate(config, updates: int) -> float:
    optim, warmup = config.optim, config.optim.warmup_steps
    if updates < warmup:
        return optim.learning_rate * updates / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (updates - warmup) / (config.steps - warmup)))
    return optim.learning_rate * ((1 - optim.final_fraction) * cosine + optim.final_fraction)


def numpy_adamw(config, params, grads, memory, updates: int):
    """One step of AdamW with clipping in float64 on dicts by path; changes `memory`."""
    optim = config.optim
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    new = {}
    for path, p in params.items():
        g = grads[path].astype(np.float64) * min(1, optim.clip_norm / norm)
        m, v = memory.get(path, (0, 0))
        m, v = optim.b1 * m + (1 - optim.b1) * g, optim.b2 * v + (1 - optim.b2) * g**2
        memory[path] = m, v
        update = m / (1 - optim.b1 ** (updates + 1))
        update = update / (np.sqrt(v / (1 - optim.b2 ** (updates + 1))) + 1e-8)
        decay = 0 if "norm" in path else optim.weight_decay
        new[path] = p - numpy_learning_rate(config, updates) * (update + decay * p)
    return new, norm


def test_step__recipe_none__is_numpy_adamw_on_jax_gradients():
    state, (pure, value_and_grad) = start(NONE), plain_loss_and_grad(NONE)
    step = step_of(NONE, state, batch_of(NONE, 1))
    for path, value in by_path(pure).items():  # not bit for bit: made outside of jit
        np.testing.assert_allclose(by_path(state.params)[path], value, rtol=1e-6)
    treedef, params, memory = jax.tree.structure(pure), by_path(state.params), {}
    for number in range(1, 5):
        batch = batch_of(NONE, number)
        state, metrics = step(state, batch)
        pure = treedef.unflatten([jnp.asarray(p, jnp.float32) for p in params.values()])
        loss, grads = value_and_grad(pure, *batch)
        params, norm = numpy_adamw(NONE, params, by_path(grads), memory, number - 1)
        # f32 in another order of operations, at losses of 3 and weights of 0.01 to 1.
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
        for path, value in by_path(state.params).items():
            np.testing.assert_allclose(value, params[path], rtol=1e-5, atol=2e-6, err_msg=path)
    assert int(state.step) == 4
    assert metrics.operands is None


# Micro-batches.


@functools.cache
def gradients(micro_batches: int):
    """Loss and gradients of recipe none: plain SGD, so large that the parameters vanish in it."""
    tx = optax.with_extra_args_support(optax.sgd(1e9))
    state, batch = start(NONE, tx), batch_of(NONE, 1)
    before = by_path(state.params)
    step = step_of(NONE, state, batch, tx, micro_batches)
    state, metrics = step(state, batch)
    after = by_path(state.params)
    return float(metrics.loss), {p: (before[p] - after[p]) / np.float32(1e9) for p in before}


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_step__micro_batches__give_the_gradients_of_the_batch(micro_batches):
    (loss, grads), (expected_loss, expected) = gradients(micro_batches), gradients(1)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for path, grad in grads.items():
        scale = np.abs(expected[path]).max()
        # One part in a million of the largest entry; single entries cancel to nearly zero.
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=1e-6 * scale, err_msg=path)


@functools.cache
def fp8_start():
    return start(FP8)


@functools.cache
def fp8_step(micro_batches: int = 1):
    return step_of(FP8, fp8_start(), batch_of(FP8, 1), micro_batches=micro_batches)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_step__fp8__advances_every_history_by_exactly_one(micro_batches):
    before = fp8_start()
    after, metrics = fp8_step(micro_batches)(copy(before), batch_of(FP8, 1))
    assert int(metrics.skipped) == 0
    assert len(sites(before.scaling)) == 4
    for (path, old), (_, new) in zip(sites(before.scaling), sites(after.scaling), strict=True):
        history = np.asarray(new["amax_history"])
        np.testing.assert_array_equal(history[..., 1:], old["amax_history"][..., :-1], err_msg=path)
        assert (history[..., 0] > 0).all(), path
        np.testing.assert_array_equal(history[..., 0], new["observed"][..., Column.AMAX])
        assert not np.asarray(new["pending"]).any(), path
        assert not np.asarray(new["observed"])[..., Record.DROPPED].any(), path


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_step__micro_batches__give_the_same_scaling_state(micro_batches):
    batch = batch_of(FP8, 1)
    expected, _ = fp8_step()(copy(fp8_start()), batch)
    actual, _ = fp8_step(micro_batches)(copy(fp8_start()), batch)
    assert_same_scaling(actual.scaling, expected.scaling, times_rhs=micro_batches)


# The guard.


def with_nan(state):
    params = jax.tree.map(jnp.copy, state.params)
    kernel = params["blocks"]["mlp"]["down"]["kernel"]
    params["blocks"]["mlp"]["down"]["kernel"] = kernel.at[1, 2, 3].set(jnp.nan)
    return state._replace(params=params)


def not_in_vocabulary(batch):
    inputs, targets = batch
    targets = targets.copy()
    targets[3, 5] = VOCAB  # its loss is NaN
    return inputs, targets


def nonfinite(metrics) -> float:
    return float(np.asarray(metrics.operands)[:, OperandColumn.NONFINITE].sum())


@pytest.mark.parametrize("broken", ["params", "batch"])
def test_step__not_finite__changes_neither_params_nor_optimizer(broken):
    state, batch = fp8_step()(copy(fp8_start()), batch_of(FP8, 1))[0], batch_of(FP8, 2)
    state = with_nan(state) if broken == "params" else state
    batch = not_in_vocabulary(batch) if broken == "batch" else batch
    before = jax.device_get(state)
    after, metrics = fp8_step()(copy(state), batch)
    assert int(metrics.skipped) == 1
    assert not math.isfinite(metrics.loss)
    assert (nonfinite(metrics) > 0) == (broken == "params")
    assert_same_bits(after.params, before.params)
    assert_same_bits(after.opt_state, before.opt_state)
    assert int(after.step) == int(before.step) + 1


@pytest.mark.parametrize("broken", ["params", "batch"])
def test_step__after_a_skipped_one__scales_move_on(broken):
    good = fp8_step()(copy(fp8_start()), batch_of(FP8, 1))[0]
    state = with_nan(good) if broken == "params" else good
    batch = batch_of(FP8, 2)
    skipped, _ = fp8_step()(copy(state), not_in_vocabulary(batch) if broken == "batch" else batch)
    for path, site in sites(skipped.scaling):
        assert np.isfinite(site["amax_history"]).all(), path
        dropped = np.asarray(site["observed"])[..., Role.OUTPUT_GRAD, Record.DROPPED]
        assert (dropped == (broken == "params")).all(), path  # a NaN loss has clean gradients
    histories = {p: np.asarray(s["amax_history"]) for p, s in sites(skipped.scaling)}
    repaired = skipped._replace(params=jax.tree.map(jnp.copy, good.params))
    after, metrics = fp8_step()(repaired, batch_of(FP8, 3))
    assert int(metrics.skipped) == 0
    assert nonfinite(metrics) == 0
    for path, site in sites(after.scaling):
        history = np.asarray(site["amax_history"])
        np.testing.assert_array_equal(history[..., 1:], histories[path][..., :-1], err_msg=path)
        assert (history[..., 0] != histories[path][..., 0]).any(), path


def test_step__its_state__is_donated():
    state = copy(fp8_start())
    leaves = jax.tree.leaves(state)
    fp8_step()(state, batch_of(FP8, 1))
    assert all(leaf.is_deleted() for leaf in leaves)


def test_step__bfloat16_params__are_the_rounded_masters_after_every_step():
    config = tiny_config(recipe="none", model={"param_dtype": "bfloat16"})
    state = start(config)
    step = step_of(config, state, batch_of(config, 1))
    for number in range(1, 5):
        state, metrics = step(state, batch_of(config, number))
        masters = read_masters(state.opt_state, state.params)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), masters, state.params)
        assert_same_bits(state.params, rounded)
    halves = [p for p in jax.tree.leaves(state.params) if p.dtype == jnp.bfloat16]
    assert len(halves) == 5  # embedding, qkv, out, gate_up, down; the norms are f32
    embedding = np.asarray(masters["embedding"]["embedding"])
    assert (embedding != np.asarray(state.params["embedding"]["embedding"], np.float32)).any()
    assert int(metrics.skipped) == 0
