"""The scenarios: each runs a training loop and returns one number."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.peers.libraries import STATE, Library, init, mean_square
from benchmarks.peers.models import (
    Branch,
    Chain,
    TwoHeads,
    amax,
    dense,
    ramp,
    relative_error,
    sum_of_outputs,
    train_state,
    train_step,
    weights,
)

DEVICES = 8


# Scaling state.


def amax_after_step(lib: Library, *, mode: str = "once", parts: int = 1, x: Any = None) -> float:
    # Remedy in Flax for reuse, scans and micro-batches: cast the whole collection to
    # `fp8_ops.fm32` once, inside jit and outside model and loop; then JAX takes the maximum.
    x = ramp() if x is None else x
    model = Chain(lib, mode)
    state = train_step(lib, sum_of_outputs(model), parts=parts)(train_state(model, x), x)
    return float(lib.history(state.params, "layer")[0])


def called_twice(lib: Library) -> float:
    # The second input, the first output, has a smaller amax.
    return amax_after_step(lib, mode="twice", x=jax.random.normal(jax.random.key(0), (16, 32)))


def slots_per_step(lib: Library) -> float:
    # Remedy in Flax: none in a stock TrainState; fm32 and an accumulation of one's own.
    x = ramp().reshape(4, 16, 32)
    model = Chain(lib)
    state = train_state(model, x[0], tx=optax.MultiSteps(optax.sgd(0.0), 4))
    step = jax.jit(functools.partial(lib.multi_step, sum_of_outputs(model)))
    for part in x:
        state = step(state, part)
    return float((lib.history(state.params, "layer") > 0).sum())


@functools.cache
def _idle_head(lib: Library) -> tuple[Any, nn.Module]:
    """Trains both heads, then one, as with alternating tasks."""
    model = TwoHeads(lib)

    def loss(v, x, both):
        first, second = model.apply(v, x)
        return first.sum() + second.sum() if both else first.sum()

    state = train_state(model, ramp())
    for both in (True, False):
        state = train_step(lib, functools.partial(loss, both=both))(state, ramp())
    return state.params, model


def idle_head_amax(lib: Library) -> float:
    # Remedy in Flax: after the step, put the old state back where the new one is zero. The fm32
    # cast does not help.
    variables, _ = _idle_head(lib)
    return float(lib.history(variables, "second")[0])


def idle_head_output(lib: Library, relu: bool = False) -> float:
    variables, model = _idle_head(lib)
    x = nn.relu(ramp()) if relu else ramp()
    _, second = jax.jit(model.apply)(variables, x)
    kernel = np.asarray(variables["params"]["second"]["kernel"], np.float64)
    return relative_error(second, np.asarray(x, np.float64) @ kernel)


def branch_not_taken(lib: Library) -> float:
    model = Branch(lib)
    step = train_step(lib, lambda v, x, run: model.apply(v, x, run).sum())
    state = train_state(model, ramp(), jnp.bool_(True))
    for run in (True, False):
        state = step(state, ramp(), jnp.bool_(run))
    return float(lib.history(state.params, "layer")[0])


# Devices.


def data_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,), devices=jax.devices()[:DEVICES])


@functools.cache
def _sharded_step(lib: Library) -> tuple[Any, jax.Array]:
    """State after a step under `jax.shard_map` with its default checks, and the kernel gradient."""
    model, x = Chain(lib), ramp()
    loss = lambda v, x, c: (model.apply(v, x) * c).sum()  # noqa: E731
    variables = lib.calibrate(loss, init(model, x), x, weights(x))
    # Parameters are replicated: JAX sums their gradients over the devices.
    region = jax.shard_map(
        lambda v, x, c: lib.value_and_grad(loss)(v, x, c)[1],
        mesh=data_mesh(AxisType.Auto),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    grads = jax.block_until_ready(jax.jit(region)(variables, x, weights(x)))
    return grads, grads["params"]["layer"]["kernel"]


def shard_map_amax(lib: Library) -> float:
    # Remedy in Flax: pcast all variables to varying, then psum the gradients and pmax the state.
    return float(lib.history(_sharded_step(lib)[0], "layer")[0])


def shard_map_gradient(lib: Library) -> float:
    x = np.asarray(ramp(), np.float64)
    return relative_error(_sharded_step(lib)[1], x.T @ np.asarray(weights(x)))


def pmap_amax(lib: Library) -> float:
    # Remedy in Flax: pmean of grads["params"] only, pmax of the state.
    model, x = Chain(lib), ramp()
    loss = lambda v, x: model.apply(v, x).sum()  # noqa: E731

    def step(variables, x):
        _, grads = lib.value_and_grad(loss)(variables, x)
        return jax.lax.pmean(grads, "data")  # as in Flax's ImageNet example

    run = jax.pmap(step, "data", in_axes=(None, 0), devices=jax.devices()[:DEVICES])
    grads = run(init(model, x), x.reshape(DEVICES, -1, 32))
    grads = jax.tree.map(lambda g: np.asarray(g)[0], jax.block_until_ready(grads))
    return float(lib.history(grads, "layer")[0])


def mesh_amax(lib: Library, kind: AxisType) -> float:
    # Remedy in Flax for explicit axes: a mesh with Auto axes.
    model, mesh = Chain(lib), data_mesh(kind)
    state = train_state(model, ramp())
    with jax.set_mesh(mesh):
        x = jax.device_put(ramp(), NamedSharding(mesh, P("data")))
        state = jax.device_put(state, NamedSharding(mesh, P()))
        step = train_step(lib, lambda v, x: model.apply(v, x).sum())
        state = jax.block_until_ready(step(state, x))
    return float(np.asarray(lib.history(state.params, "layer"))[0])


# Numbers.


def steps_without_new_scale(lib: Library, steps: int = 1100) -> float:
    # Remedy in Flax: a shorter amax_history_length freezes the scale for fewer steps.
    model = Chain(lib)
    loss = lambda v, x: model.apply(v, x).sum()  # noqa: E731
    growing = 99.0 * (1 + jnp.arange(steps) / steps)
    size = growing.at[1].set(jnp.inf)

    def body(variables, size):
        # The update of the parameters is skipped, as by `optax.apply_if_finite`.
        _, grads = lib.value_and_grad(loss)(variables, jnp.ones((2, 32)).at[0, 0].set(size))
        following = {**variables, STATE: grads[STATE]}
        return following, lib.amax_in_use(variables, following, "layer")

    variables = init(model, jnp.ones((2, 32)))
    _, used = jax.jit(lambda v: jax.lax.scan(body, v, size))(variables)
    return float((np.diff(np.asarray(used)[1:]) == 0).sum())


def tiny_amax(lib: Library) -> float:
    # Remedy in Flax: none but to keep such tensors out of it.
    x = nn.relu(ramp() * 1e-20) * 4e-19
    model = dense(lib)
    step, state = train_step(lib, sum_of_outputs(model)), train_state(model, x)
    for _ in range(2):
        state = step(state, x)
    return float(jnp.isnan(jax.jit(model.apply)(state.params, x)).sum())


def float16_outputs(lib: Library) -> float:
    # Remedy in Flax: bfloat16.
    model, x = dense(lib, dtype=jnp.float16), ramp()
    step, state = train_step(lib, sum_of_outputs(model)), train_state(model, x)
    state = step(state, x)
    return float(jnp.isinf(jax.jit(model.apply)(state.params, x)).sum())


def cold_start(lib: Library) -> float:
    # Remedy in Flax: some steps whose updates are thrown away, or a scaled-up loss.
    model, x = dense(lib), ramp()
    loss = lambda v, x: 1e-4 * mean_square(model.apply(v, x))  # noqa: E731
    variables = lib.calibrate(loss, init(model, x), x)
    _, grads = jax.jit(lib.value_and_grad(loss))(variables, x)
    x, kernel = (np.asarray(a, np.float64) for a in (x, variables["params"]["kernel"]))
    output_grad = 2e-4 * (x @ kernel) / (len(x) * kernel.shape[1])
    return relative_error(grads["params"]["kernel"], x.T @ output_grad)


def bf16_codes(lib: Library) -> float:
    x = jax.random.normal(jax.random.key(0), (256, 256)).astype(jnp.bfloat16)
    scale = np.float32(amax(x) / 448)
    want = (np.asarray(x, np.float64) / scale).astype(ml_dtypes.float8_e4m3fn)
    got = np.asarray(jax.jit(lib.codes)(x, jnp.asarray(scale)))
    return 100 * float((got.view(np.uint8) != want.view(np.uint8)).mean())


def norm_ratio(lib: Library) -> float:
    whole, params = lib.gradient_tree(ramp())
    return float(optax.tree.norm(whole) / optax.tree.norm(params))


# Around the model.


def restored_output(lib: Library) -> float:
    model, x = dense(lib), ramp()
    params = init(nn.Dense(32), x)["params"]  # trained in BF16 elsewhere
    variables = lib.restore(model, params, x)  # logs the layers that got a new state
    variables = lib.calibrate(sum_of_outputs(model), variables, x)
    want = jax.jit(nn.Dense(32).apply)({"params": params}, x)
    return relative_error(jax.jit(model.apply)(variables, x), want)


def _forward(models: Callable, x: jax.Array, features: int) -> tuple[Callable, Callable]:
    """One jitted function for both models: what it traced for one must not serve the other."""
    plain, quantized = models(features)
    kernel = jax.random.normal(jax.random.key(1), (x.shape[-1], features))
    run = jax.jit(lambda model, v: model.apply(v, x), static_argnums=0)

    def error(model: nn.Module) -> float:
        state = {} if model is plain else init(model, x)
        out = run(model, {**state, "params": {"kernel": kernel}})
        return relative_error(out, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64))

    return functools.partial(error, plain), functools.partial(error, quantized)


def after_plain(models: Callable) -> float:
    """Error of a quantized model whose plain twin was traced before; f32 would be 1e-7."""
    plain, quantized = _forward(models, jax.random.normal(jax.random.key(0), (16, 32)), 24)
    plain()
    return quantized()


def after_quantized(models: Callable) -> float:
    """Error of a plain model whose quantized twin was traced before."""
    # Shapes of its own: JAX keeps what `after_plain` traced.
    plain, quantized = _forward(models, jax.random.normal(jax.random.key(0), (16, 40)), 48)
    quantized()
    return plain()


def evaluated_first(lib: Library) -> float:
    """Amax of a step whose loss calls a jitted function that an evaluation has traced."""
    model, x = Chain(lib), ramp()
    forward = jax.jit(model.apply)
    variables = init(model, x)
    forward(variables, x)
    _, grads = jax.jit(lib.value_and_grad(lambda v, x: forward(v, x).sum()))(variables, x)
    return float(lib.history(grads, "layer")[0])


def square_batch(lib: Library) -> float:
    """A batch of the shape of the kernel."""
    x = jax.random.normal(jax.random.key(0), (32, 32))
    model = dense(lib)
    variables = lib.calibrate(sum_of_outputs(model), init(model, x), x)
    _, grads = jax.jit(lib.value_and_grad(sum_of_outputs(model)))(variables, x)
    want = np.asarray(x, np.float64).T @ np.asarray(weights(x))
    return relative_error(grads["params"]["kernel"], want)
