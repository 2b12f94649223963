"""Qwix and AQT, which keep no state: the scenarios that are about something else."""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.peers.libraries import init
from benchmarks.peers.models import ramp, relative_error, sum_of_outputs, weights
from benchmarks.peers.runs import data_mesh


class Project(nn.Module):
    """A layer as people write it. (Qwix intercepts `@`; here and in Flax one names the layer.)"""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        return x @ self.param("kernel", nn.initializers.lecun_normal(), shape)


def qwix_models(features: int) -> tuple[nn.Module, nn.Module]:
    qwix = importlib.import_module("qwix")
    fp8 = jnp.float8_e4m3fn
    rule = qwix.QtRule(weight_qtype=fp8, act_qtype=fp8, bwd_qtype=jnp.float8_e5m2)
    model = Project(features)
    return model, qwix.quantize_model(model, qwix.QtProvider([rule]))


def aqt_model() -> nn.Module:
    config = importlib.import_module("aqt.jax.v2.config")
    flax = importlib.import_module("aqt.jax.v2.flax.aqt_flax")
    return nn.Dense(
        32, dot_general_cls=functools.partial(flax.AqtDotGeneral, config.config_fwd_fp8())
    )


def sharded_gradient(model: nn.Module) -> float:
    x, rngs = ramp(), {"params": jax.random.key(0)}  # AQT asks for one
    variables = init(model, x)
    region = jax.shard_map(
        jax.grad(lambda v, x, c: (model.apply(v, x, rngs=rngs) * c).sum()),
        mesh=data_mesh(AxisType.Auto),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    grads = jax.block_until_ready(jax.jit(region)(variables, x, weights(x)))
    want = np.asarray(x, np.float64).T @ np.asarray(weights(x))
    return relative_error(grads["params"]["kernel"], want)


def square_gradient(model: nn.Module) -> float:
    x = jax.random.normal(jax.random.key(0), (32, 32))
    variables = init(model, x)
    grads = jax.grad(sum_of_outputs(model))(variables, x)
    want = np.asarray(x, np.float64).T @ np.asarray(weights(x))
    return relative_error(grads["params"]["kernel"], want)
