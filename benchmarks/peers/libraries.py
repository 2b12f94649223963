"""What differs between Flax's FP8 op and this library in a training loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops
from flax.training.train_state import TrainState

import lowprec_jax as lp

STATE = lp.linen.OVERWRITE_WITH_GRADIENT


class Flax:
    """Flax's op: the next state arrives as the gradient of its collection."""

    dot_general_cls = nn.Fp8DotGeneral
    cond = staticmethod(nn.cond)
    value_and_grad = staticmethod(jax.value_and_grad)

    @staticmethod
    def accumulate(loss: Callable, parts: int) -> Callable:
        """The usual loop over micro-batches: the gradient tree is averaged."""

        def wrapped(variables, x):
            def body(total, part):
                out = jax.value_and_grad(loss)(variables, part)
                return jax.tree.map(jnp.add, total, out), None

            zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), variables))
            total, _ = jax.lax.scan(body, zeros, x.reshape(parts, -1, x.shape[-1]))
            return jax.tree.map(lambda g: g / parts, total)

        return wrapped

    @staticmethod
    def multi_step(loss: Callable, state: TrainState, x: jax.Array) -> TrainState:
        _, grads = jax.value_and_grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads)

    @staticmethod
    def calibrate(loss: Callable, variables: Any, *args: Any) -> Any:
        return variables  # Flax has none: scales start at 1

    @staticmethod
    def restore(model: nn.Module, params: Any, x: jax.Array) -> Any:
        # Remedy: initialise the model and put the parameters in the place of its own.
        return {"params": params}

    @staticmethod
    def history(variables: Any, layer: str) -> jax.Array:
        """Amax history of a layer's input, newest first."""
        return _only(variables[STATE][layer])["input_amax_history"]

    @staticmethod
    def amax_in_use(before: Any, after: Any, layer: str) -> jax.Array:
        """The amax that the input of the step between was scaled with."""
        return _only(after[STATE][layer])["input_scale"][0] * 448.0

    @staticmethod
    def codes(x: jax.Array, scale: jax.Array) -> jax.Array:
        # Remedy: dtype=float32 in the layer, which makes everything else f32 too.
        return fp8_ops.quantize(x, jnp.float8_e4m3fn, scale, x.dtype)

    @staticmethod
    def quantized(features: int) -> tuple[nn.Module, nn.Module]:
        """A model, and the same model in FP8."""
        return (
            nn.Dense(features, use_bias=False),
            nn.Dense(features, use_bias=False, dot_general_cls=nn.Fp8DotGeneral),
        )

    @staticmethod
    def gradient_tree(x: jax.Array) -> tuple[Any, Any]:
        """All that a step differentiates, and the gradients of the parameters in it."""
        # Remedy: clip grads["params"] only, or in the optimizer of a TrainState, which sees no more
        model = nn.Dense(32, dot_general_cls=nn.Fp8DotGeneral)
        variables = init(model, x)
        grads = jax.jit(jax.grad(lambda v: mean_square(model.apply(v, x))))(variables)
        return grads, grads["params"]


class Ours:
    """This library's Linen adapter; arguments and results are those of `Flax`."""

    dot_general_cls = lp.linen.dot_general_cls("fp8_delayed")
    cond = staticmethod(lp.linen.cond)
    value_and_grad = staticmethod(lp.linen.value_and_grad)
    accumulate = staticmethod(lp.linen.accumulate)

    @staticmethod
    def calibrate(loss: Callable, variables: Any, *args: Any) -> Any:
        return jax.jit(functools.partial(lp.linen.calibrate, loss))(variables, *args)

    @staticmethod
    def multi_step(loss: Callable, state: TrainState, x: jax.Array) -> TrainState:
        _, grads = lp.linen.value_and_grad(loss, advance=False)(state.params, x)
        state = state.apply_gradients(grads=grads)
        done = state.tx.has_updated(state.opt_state)
        return state.replace(params=lp.linen.advance(state.params, when=done))

    @staticmethod
    def restore(model: nn.Module, params: Any, x: jax.Array) -> Any:
        return lp.linen.init_scaling(model, {"params": params}, x)

    @staticmethod
    def history(variables: Any, layer: str) -> jax.Array:
        return _only(variables[STATE][layer])["scaling"]["amax_history"][lp.recipes.Role.LHS]

    @staticmethod
    def amax_in_use(before: Any, after: Any, layer: str) -> jax.Array:
        return Ours.history(before, layer).max()

    @staticmethod
    def codes(x: jax.Array, scale: jax.Array) -> jax.Array:
        return lp.numerics.quantize(x, "e4m3fn", scale).data

    @staticmethod
    def quantized(features: int) -> tuple[nn.Module, nn.Module]:
        plain = nn.Dense(features, use_bias=False)
        return plain, lp.linen.quantize(plain, "fp8_current")

    @staticmethod
    def gradient_tree(x: jax.Array) -> tuple[Any, Any]:
        # NNX, whose gradients are parameters only. In Linen our state travels in the same place as
        # Flax's, and is to be kept out of a norm in the same way: grads["params"].
        model = nnx.Linear(32, 32, rngs=nnx.Rngs(1))
        lp.nnx.quantize(model, "fp8_delayed")
        _, grads = nnx.jit(lp.nnx.value_and_grad(lambda m, x: mean_square(m(x))))(model, x)
        return grads, nnx.filter_state(grads, nnx.Param)


Library = type[Flax] | type[Ours]


def _only(site: Any) -> Any:
    """The state of the one op of a layer."""
    (state,) = site.values()
    return state


def mean_square(y: jax.Array) -> jax.Array:
    return jnp.square(y).mean()


def init(model: nn.Module, *inputs: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(0), *inputs)
