"""LoRA on a base of few bits: what is stored, what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.ops.lora import read_kernel, store_kernel, stored_bytes, weight_quantizer

from .helpers import assert_same

KERNEL = jax.random.normal(jax.random.key(0), (128, 32)) / 8
X = jax.random.normal(jax.random.key(1), (16, 128))
# Recipe -> bytes per parameter of this kernel.
STORED = {
    "nf4_weights": 0.5 + 4 / 64,
    "w3": 0.5 + 4 / 128,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 256 + 4 / KERNEL.size,
    "mxfp8": 1 + 1 / 32,
    "fp8_delayed": 1 + 4 / KERNEL.size,
}
# QLoRA, appendix E.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def linear():
    layer = nnx.Linear(128, 32, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = KERNEL, jnp.arange(32.0)
    return layer


def adapted(**options):
    return lp.nnx.LoRALinear.from_linear(linear(), 4, rngs=nnx.Rngs(1), **options)


@pytest.mark.parametrize("recipe", STORED)
def test_store_kernel__read_again__is_what_the_recipe_multiplies_bitwise(recipe):
    quantizer = weight_quantizer(recipe)
    tile = quantizer.tile(KERNEL.shape, (0,), (1,))

    @jax.jit
    def run(kernel):
        stored = store_kernel(kernel, recipe)
        found = read_kernel(stored, recipe, kernel.shape)
        return stored, found, quantizer(kernel, tile).dequantize()

    stored, found, expected = run(KERNEL)
    assert_same(found, expected)
    assert stored_bytes(stored) / KERNEL.size == STORED[recipe]
    assert {x.dtype.name for x in stored.values()} <= {"uint8", "float32"}


def test_store_kernel__nf4__is_the_nearest_of_the_table_in_blocks_of_64_inputs():
    found = read_kernel(store_kernel(KERNEL, "nf4_weights"), "nf4_weights", KERNEL.shape)
    blocks = np.asarray(KERNEL, np.float64).reshape(2, 64, 32)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = NF4[np.abs((blocks / scale)[..., None] - NF4).argmin(-1)] * scale
    np.testing.assert_allclose(found, nearest.reshape(KERNEL.shape), rtol=1e-6)


def test_store_kernel__odd_inputs__are_padded():
    kernel = KERNEL[:7]
    found = read_kernel(store_kernel(kernel, "w4"), "w4", kernel.shape)
    assert found.shape == kernel.shape
    assert np.abs(found - kernel).max() <= np.abs(kernel).max() / 15 * (1 + 1e-6)


def test_lora_linear__fresh__is_the_dequantized_base_and_the_base_is_no_parameter():
    layer = adapted()
    base = read_kernel(store_kernel(KERNEL, "nf4_weights"), "nf4_weights", KERNEL.shape)
    assert_same(layer.kernel(), base)
    np.testing.assert_allclose(layer(X), X @ base + jnp.arange(32.0), rtol=1e-5, atol=1e-5)
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {"lora_a", "lora_b"}
    assert len(jax.tree.leaves(nnx.state(layer, lp.nnx.Frozen))) == 3


def test_lora_linear__trained__lowers_the_loss_and_leaves_the_base_bit_for_bit():
    layer = adapted(alpha=8)
    before = nnx.to_pure_dict(nnx.state(layer, lp.nnx.Frozen))
    target = X @ (KERNEL + jnp.outer(jnp.sin(jnp.arange(128.0)), jnp.ones(32)) / 8)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return jnp.square(layer(X) - jnp.arange(32.0) - target).mean()

        value, grads = lp.nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    losses = [step(layer, optimizer) for _ in range(60)]
    assert losses[-1] < losses[0] / 10
    assert_same(nnx.to_pure_dict(nnx.state(layer, lp.nnx.Frozen)), before)
    np.testing.assert_allclose(layer(X), X @ layer.kernel() + jnp.arange(32.0), atol=1e-4)


def test_lora_linear__backward_pass__goes_through_the_base_and_keeps_no_kernel():
    layer = adapted()
    out, vjp = jax.vjp(layer, X)
    np.testing.assert_allclose(vjp(out)[0], out @ layer.kernel().T, rtol=1e-4, atol=1e-4)
    kept = [x for x in jax.tree.leaves(vjp) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert kept
    assert max(x.size for x in kept) < KERNEL.size


class Adapted(nnx.Module):
    """Two adapted layers, one without a bias, on a trained stock one."""

    def __init__(self, seed: int, recipe: str):
        rngs = nnx.Rngs(seed)
        options = {"rank": 4, "recipe": recipe, "rngs": rngs}
        self.first = nnx.Linear(128, 32, rngs=rngs)
        self.up = lp.nnx.LoRALinear(32, 64, **options)
        self.down = lp.nnx.LoRALinear.from_linear(nnx.Linear(64, 8, rngs=rngs), **options)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(nnx.relu(self.first(x)))))


@nnx.jit
def adapt(model, optimizer, x):
    def loss(model):
        return jnp.square(model(x) - 1).mean()

    adapters = nnx.DiffState(0, nnx.LoRAParam)
    value, grads = lp.nnx.value_and_grad(loss, argnums=adapters)(model)
    optimizer.update(model, grads)
    return value


def optimizer_of(model):
    return nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.LoRAParam)


@pytest.mark.parametrize("recipe", ["nf4_weights", "nvfp4"])
def test_lora_linear__orbax_round_trip__goes_on_bit_for_bit(tmp_path, recipe):
    model = Adapted(0, recipe)
    optimizer = optimizer_of(model)
    adapt(model, optimizer, X)
    saved = nnx.state((model, optimizer))
    assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()

        def fresh():
            model = Adapted(1, recipe)
            return model, optimizer_of(model)

        graphdef, target = nnx.split(nnx.eval_shape(fresh))
        restored = checkpointer.restore(tmp_path / "state", target)
    other, its_optimizer = nnx.merge(graphdef, restored)
    assert_same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))
    dtypes = lambda m: [x.dtype for x in jax.tree.leaves(nnx.state(m))]  # noqa: E731
    assert dtypes(other) == dtypes(model)
    assert adapt(other, its_optimizer, 2 * X) == adapt(model, optimizer, 2 * X)
    assert_same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))


def test_lora_linear__adapters_alone_saved__fit_on_a_base_quantized_anew(tmp_path):
    """What a fine-tuning ships: parameters of the adapters, without the base."""
    model = Adapted(0, "nf4_weights")
    adapt(model, optimizer_of(model), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", nnx.state(model, nnx.LoRAParam))
        checkpointer.wait_until_finished()
        other = Adapted(0, "nf4_weights")
        fresh = nnx.state(other, nnx.LoRAParam)
        nnx.update(other, checkpointer.restore(tmp_path / "adapters", fresh))
    assert len(jax.tree.leaves(fresh)) == 4
    assert_same(other(X), model(X))
    assert not np.array_equal(Adapted(0, "nf4_weights")(X), model(X))


def test_lora_linear__recipe_of_activations_only__is_refused():
    with pytest.raises(UserError, match="'a8' does not say how a kernel is stored"):
        adapted(recipe="a8")
