"""Flax's documented NNX training loop, and what adopting FP8 changes in it.

The task: predict a byte of Python source from the 24 before it. The data is the standard library of
the interpreter. `train_stock` is the loop as in Flax's guides, with BatchNorm, Dropout,
`nnx.Optimizer` and `nnx.MultiMetric`. `train_fp8_delayed` differs in two lines, marked # 1 and # 2;
`train_fp8_current`, whose recipe keeps no state, in one.

Run: python examples/nnx_two_lines.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lowprec_jax as lp

CONTEXT = 24


class Model(nnx.Module):
    """Bytes int32[batch, CONTEXT] to logits f32[batch, 256]."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 16, rngs=rngs)
        self.linear1 = nnx.Linear(16 * CONTEXT, 256, rngs=rngs)
        self.norm = nnx.BatchNorm(256, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.linear2 = nnx.Linear(256, 192, rngs=rngs)
        self.head = nnx.Linear(192, 256, rngs=rngs)

    def __call__(self, tokens):  # noqa: D102
        x = self.embed(tokens).reshape(len(tokens), -1)
        x = self.dropout(nnx.relu(self.norm(self.linear1(x))))
        return self.head(nnx.relu(self.linear2(x)))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    labels = batch["labels"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def train_stock(batches, held_out):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, batch):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, batch):
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])

    return run(model, optimizer, metrics, train_step, eval_step, batches, held_out)


def train_fp8_delayed(batches, held_out):
    model = lp.nnx.quantize(Model(nnx.Rngs(0)), "fp8_delayed")  # 1
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, batch):
        grad_fn = lp.nnx.value_and_grad(loss_fn, has_aux=True)  # 2
        (loss, logits), grads = grad_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, batch):
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])

    return run(model, optimizer, metrics, train_step, eval_step, batches, held_out)


def train_fp8_current(batches, held_out):
    model = lp.nnx.quantize(Model(nnx.Rngs(0)), "fp8_current")  # 1
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, batch):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, batch):
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["labels"])

    return run(model, optimizer, metrics, train_step, eval_step, batches, held_out)


def run(model, optimizer, metrics, train_step, eval_step, batches, held_out):
    """Trains; returns (loss, accuracy) of the parts of the run, those on held-out files last."""
    rows = []
    model.train()
    for step, batch in enumerate(batches, start=1):
        train_step(model, optimizer, metrics, batch)
        if step % (len(batches) // 4) == 0:
            rows.append(read(metrics))
    model.eval()
    eval_step(model, metrics, held_out)
    return [*rows, read(metrics)]


def read(metrics):
    values = metrics.compute()
    metrics.reset()
    return float(values["loss"]), float(values["accuracy"])


def make_batches(steps, size=128, seed=0):
    """Batches of the training files, and a large one of files that are not trained on."""
    corpus = lp.data.load_corpus("stdlib")

    def batch(text, size, step):
        tokens = np.frombuffer(text.encode(), np.uint8)
        inputs, targets = lp.data.Batches(tokens, size, CONTEXT, seed).batch(step)
        return {"tokens": jnp.asarray(inputs), "labels": jnp.asarray(targets[:, -1])}

    train = [batch(corpus.train, size, step) for step in range(steps)]
    return train, batch(corpus.validation, 2048, steps)


def main(steps=160):
    data = make_batches(steps)
    results = {f.__name__: f(*data) for f in (train_stock, train_fp8_delayed, train_fp8_current)}
    parts = [f"steps {i}-{i + steps // 4 - 1}" for i in range(0, steps, steps // 4)]
    print(f"{'loss (accuracy)':18}", *(f"{part:>16}" for part in [*parts, "held-out files"]))
    for name, rows in results.items():
        print(f"{name:18}", *(f"{f'{loss:.4f} ({acc:.3f})':>16}" for loss, acc in rows))
    return results


if __name__ == "__main__":
    main()
