"""Models, data and expectations of the NNX tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.recipes import Column

BATCH, WIDTH, HIDDEN, CLASSES = 16, 12, 20, 7
# Row i is i + 1 times as large, in C backwards: every part of a batch has amaxes of its own.
ROWS = jnp.arange(1.0, BATCH + 1)[:, None]
X = jax.random.normal(jax.random.key(0), (BATCH, WIDTH)) * ROWS
C = jax.random.normal(jax.random.key(1), (BATCH, HIDDEN)) * ROWS[::-1]
LABELS = jax.random.randint(jax.random.key(2), (BATCH,), 0, CLASSES)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Classifier(nnx.Module):
    """BatchNorm and Dropout in front of the matmuls: their state does not depend on the recipe."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.mlp = Mlp(rngs)

    def __call__(self, x):
        return self.mlp(self.dropout(self.norm(x)))


class Pair(nnx.Module):
    """Two layers that both read the input, so that every amax of both is known exactly."""

    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)


def linear(recipe="fp8_delayed", seed=0):
    return lp.nnx.Linear(WIDTH, HIDDEN, use_bias=False, recipe=recipe, rngs=nnx.Rngs(seed))


def stack(layers, recipe="fp8_delayed"):
    """Linear layers stacked by `nnx.vmap`, then quantized."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)

    return lp.nnx.quantize(create(nnx.Rngs(3)), recipe)


def linear_loss(model, x, c):
    """The amax of the output gradient is that of `c`."""
    return (model(x) * c).sum()


def pair_loss(model, x, c):
    return (model.first(x) * c).sum() + (model.second(2 * x) * (3 * c)).sum()


def cross_entropy(model, x, labels):
    """Sum over the batch; the caller's loss is divided by a constant."""
    log_p = jax.nn.log_softmax(model(x))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).sum() / BATCH


def amaxes(*arrays):
    """The expectation, by NumPy."""
    return np.array([np.abs(np.asarray(a)).max() for a in arrays], np.float32)


def kernel_of(layer):
    return np.asarray(layer.kernel[...])


def newest(model):
    """The amaxes [..., 3] pushed last, by path of the layer."""
    return _by_layer(model, lambda state: state["amax_history"][..., 0])


def pending(model):
    """The amaxes [..., 3] observed since the last advance, by path of the layer."""
    return _by_layer(model, lambda state: state["pending"][..., Column.AMAX])


def _by_layer(model, read):
    states = lp.nnx.scaling_state(model)
    return {path.rpartition("/")[0]: np.asarray(read(state)) for path, state in states.items()}


def arrays(node):
    """All arrays of a node, random keys as numbers, for comparisons."""
    leaves = jax.tree.leaves(nnx.state(node))
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [
        np.asarray(jax.random.key_data(x) if k else x) for x, k in zip(leaves, is_key, strict=True)
    ]


def assert_same(a, b):
    """Two pytrees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# A scan over a stack, and two steps of a loss.

LAYERS = 3
C_STACK = jnp.stack([C, 5 * C, 3 * C])


def layer_of_scan(x, layer):
    return 2 * x, layer(x)


def scan(layers, x, body=layer_of_scan):
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, layers)[1]


def scan_of_remat(layers, x):
    return scan(layers, x, nnx.remat(layer_of_scan))


def lax_scan_of_checkpoint(layers, x):
    graphdef, state = nnx.split(layers)
    body = jax.checkpoint(lambda x, s: layer_of_scan(x, nnx.merge(graphdef, s)))
    return jax.lax.scan(body, x, state)[1]


def two_steps(model, loss, *args, **options):
    step = nnx.jit(lp.nnx.value_and_grad(loss, **options))
    return [step(model, f * args[0], *args[1:]) for f in (1.0, 2.0)], arrays(model)
