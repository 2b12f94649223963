"""An existing Flax Linen project with a stock `TrainState`, and what adopting FP8 changes in it.

The task: is a window of 64 bytes Python code or English prose? Both come with the interpreter.
`train_plain` is the project as it was. `train_fp8_delayed` differs in four lines, marked # 1
to # 4; `train_fp8_current`, whose recipe keeps no state, in one.

Run: python examples/linen_train_state.py
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import lowprec_jax as lp

WINDOW = 64


class Classifier(nn.Module):
    """Bytes int32[batch, WINDOW] to logits f32[batch, 2]."""

    @nn.compact
    def __call__(self, tokens):  # noqa: D102
        x = nn.Embed(256, 16)(tokens).reshape(len(tokens), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(2, name="head")(x)


def train_plain(batches):
    model = Classifier()
    variables = model.init(jax.random.key(0), batches[0][0])
    params = variables["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3))

    @jax.jit
    def step(state, tokens, labels):
        def loss(params):
            logits = state.apply_fn({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for tokens, labels in batches:
        state, value = step(state, tokens, labels)
        losses.append(float(value))
    return losses


def train_fp8_delayed(batches):
    model = lp.linen.quantize(Classifier(), "fp8_delayed")  # 1
    variables = model.init(jax.random.key(0), batches[0][0])
    params = variables  # 2
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3))

    @jax.jit
    def step(state, tokens, labels):
        def loss(params):
            logits = state.apply_fn(params, tokens)  # 3
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = lp.linen.value_and_grad(loss)(state.params)  # 4
        return state.apply_gradients(grads=grads), value

    losses = []
    for tokens, labels in batches:
        state, value = step(state, tokens, labels)
        losses.append(float(value))
    return losses


def train_fp8_current(batches):
    model = lp.linen.quantize(Classifier(), "fp8_current")  # 1
    variables = model.init(jax.random.key(0), batches[0][0])
    params = variables["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3))

    @jax.jit
    def step(state, tokens, labels):
        def loss(params):
            logits = state.apply_fn({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for tokens, labels in batches:
        state, value = step(state, tokens, labels)
        losses.append(float(value))
    return losses


def make_batches(steps, size=128, seed=0):
    """(tokens int32[size, WINDOW], labels int32[size]) per step; label 1 is code."""
    prose = "".join(pydoc_data.topics.topics.values()).encode()
    texts = [
        np.frombuffer(text, np.uint8) for text in (prose, Path(argparse.__file__).read_bytes())
    ]
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(steps):
        labels = rng.integers(0, 2, size)
        starts = (rng.random(size) * [len(texts[k]) - WINDOW for k in labels]).astype(int)
        tokens = [texts[k][i : i + WINDOW] for k, i in zip(labels, starts, strict=True)]
        batches.append((jnp.asarray(np.stack(tokens), jnp.int32), jnp.asarray(labels, jnp.int32)))
    return batches


def main(steps=100):
    batches = make_batches(steps)
    runs = {f.__name__: f(batches) for f in (train_plain, train_fp8_delayed, train_fp8_current)}
    print("mean loss of", *(f"steps {i}-{i + steps // 5 - 1}" for i in range(0, steps, steps // 5)))
    for name, losses in runs.items():
        means = np.mean(np.reshape(losses, (5, -1)), axis=1)
        print(f"{name:18}", *(f"{mean:.4f}" for mean in means))
    return runs


if __name__ == "__main__":
    main()
