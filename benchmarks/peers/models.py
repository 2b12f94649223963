"""Data, small models and the training step of the scenarios."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks.peers.libraries import STATE, Library, init


def ramp(rows: int = 64) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (rows, 32)) * jnp.arange(1.0, rows + 1)[:, None]


def weights(x: Any, features: int = 32) -> jax.Array:
    """The output gradient of the losses that are sums: N(0, 1)."""
    return jax.random.normal(jax.random.key(2), (len(x), features))


def sum_of_outputs(model: nn.Module, features: int = 32) -> Callable:
    return lambda v, x: (model.apply(v, x).astype(jnp.float32) * weights(x, features)).sum()


def amax(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max())


def relative_error(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def dense(lib: Library, features: int = 32, **options: Any) -> nn.Dense:
    return nn.Dense(features, dot_general_cls=lib.dot_general_cls, name="layer", **options)


class Chain(nn.Module):
    """One layer, used "once", "twice" in a row, or for every part of the input ("over time")."""

    lib: Library
    mode: str = "once"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.mode != "over time":
            layer = dense(self.lib)
            return layer(layer(x)) if self.mode == "twice" else layer(x)

        # A recurrent net: one set of parameters, so one state, for all times.
        def body(layer, carry, part):
            return carry, layer(part)

        scan = nn.scan(
            body, variable_broadcast=["params", STATE], split_rngs={"params": False}, length=4
        )
        _, out = scan(dense(self.lib), (), x.reshape(4, -1, x.shape[-1]))
        return out.reshape(x.shape)


class TwoHeads(nn.Module):
    lib: Library

    def setup(self):
        self.first = nn.Dense(32, dot_general_cls=self.lib.dot_general_cls)
        self.second = nn.Dense(32, dot_general_cls=self.lib.dot_general_cls)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.first(x), self.second(x)


class Branch(nn.Module):
    lib: Library

    def setup(self):
        self.layer = nn.Dense(32, dot_general_cls=self.lib.dot_general_cls)

    def __call__(self, x: jax.Array, run: jax.Array) -> jax.Array:
        if self.is_initializing():
            return self.layer(x)
        return self.lib.cond(run, lambda m, x: m.layer(x), lambda m, x: x, self, x)


def train_state(model: nn.Module, *inputs: Any, tx: Any = None) -> TrainState:
    variables = init(model, *inputs)
    return TrainState.create(apply_fn=model.apply, params=variables, tx=tx or optax.sgd(0.0))


def train_step(lib: Library, loss: Callable, *, parts: int = 1) -> Callable:
    """One step of the loop that both document; Flax's `TrainState` keeps the state."""
    differentiate = lib.value_and_grad(loss) if parts == 1 else lib.accumulate(loss, parts)

    @jax.jit
    def step(state, *args):
        _, grads = differentiate(state.params, *args)
        return state.apply_gradients(grads=grads)

    return step
