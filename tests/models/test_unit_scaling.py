"""Unit-scaled models: sizes at initialization, NumPy float64 oracle, gradients, FP8 without scales.

Sizes are measured where they matter: at the operands and results of every hidden product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models.test_transformer import (
    assert_close,
    attention64,
    compiled,
    logits_of,
    mlp64,
    norm64,
)
from training.helpers import batch_of, network_of, start, tiny_config
from training.helpers import compiled as compiled_step

from lowprec_jax import recipes
from lowprec_jax.models import Transformer, TransformerConfig, next_token_loss
from lowprec_jax.models.unit_scaling import UnitScaledLinear, residual_sum
from lowprec_jax.nnx import quantize, value_and_grad
from lowprec_jax.nnx.quantize import layers
from lowprec_jax.nnx.sites import iter_sites
from lowprec_jax.recipes import Role
from lowprec_jax.state import OperandColumn, operand_table
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import build_step

TOKENS = (4, 16)
CONFIG = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    width=64,
    mlp_width=96,
    scan_layers=False,
    parametrization="unit_scaled",
    loss_tokens=TOKENS[0] * TOKENS[1],
)


def make(**changes) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def ids(seed=0):
    return jax.random.randint(jax.random.key(seed), TOKENS, 0, CONFIG.vocab_size)


def mean_loss(model, tokens_BT):
    total, count = next_token_loss(model(tokens_BT), jnp.roll(tokens_BT, -1, axis=1))
    return total / count


def gradients(model, tokens_BT):
    graphdef, params = nnx.split(model)
    grads = compiled(jax.grad(lambda p: mean_loss(nnx.merge(graphdef, p), tokens_BT)))(params)
    return nnx.to_pure_dict(nnx.as_pure(grads))


def sizes(width: int, **changes) -> dict[str, dict[str, float]]:
    """Standard deviations at every hidden product: of its operands, result and output gradient."""
    model = make(width=width, mlp_width=3 * width // 2, **changes)
    hidden = {path: layer for path, layer in layers(model) if "blocks" in path}
    seen, shifts = {}, {}

    def record(path, layer):
        def product(lhs, rhs, dims, *_, **__):
            out = lax.dot_general(lhs, rhs, dims) + shifts[path]
            seen[path] = {"lhs": lhs, "rhs": rhs, "result": layer.multiplier * out}
            return out

        return product

    for path, layer in hidden.items():
        layer.dot_general = record(path, layer)

    def loss(zeros):
        shifts.update(zeros)
        return mean_loss(model, ids()), jax.tree.map(jnp.std, seen)

    zeros = {p: jnp.zeros((*TOKENS, *x.out_features), jnp.float32) for p, x in hidden.items()}
    grads, stds = compiled(jax.grad(loss, has_aux=True))(zeros)
    return {
        path: {name: float(x) for name, x in {**found, "grad": grads[path].std()}.items()}
        for path, found in stds.items()
    }


@pytest.mark.parametrize("width", [64, 512])
def test_unit_scaled__hidden_products_at_initialization__have_operands_near_one(width):
    """The operands of qkv and gate_up are the residual stream, before and after attention.

    Attention averages values over tokens, and silu(gate) * up has a deviation of 0.6: what `out`
    and `down` are given is smaller, and a norm follows them.
    """
    found = sizes(width)
    assert len(found) == 4 * CONFIG.num_layers
    for path, std in found.items():
        low = 0.5 if path.endswith(("out", "down")) else 0.9
        assert 0.95 < std["rhs"] < 1.05, path
        assert low < std["lhs"] < 1.1, path
        assert low < std["result"] < 1.1, path
        assert 0.5 < std["grad"] < 3, path


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "tied_head": False, "residual_tau": 0.3}])
def test_unit_scaled__numpy_float64_oracle__equal(changes):
    model = make(**changes)
    config, tokens = model.config, ids()
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    tau = 0.4 * 2 ** (np.log(4) / np.log(25)) if "residual_tau" not in changes else 0.3
    hidden, width = 1 / np.sqrt(config.mlp_width), config.width
    logits = []
    for sequence in np.asarray(tokens):
        x = p["embedding"]["embedding"][sequence]
        for i in range(config.num_layers):
            block = p["blocks"][i]
            qkv, out = (block["attention"][n]["kernel"] / np.sqrt(width) for n in ("qkv", "out"))
            heads = (config.num_heads, config.num_kv_heads, config.rope_base)
            branch = attention64(x, qkv, out, *heads)
            branch = norm64(branch, block["attention_norm"]["scale"])
            x = np.sqrt(1 - tau) * x + np.sqrt(tau) * branch
            first = block["mlp"]["up" if config.mlp == "gelu" else "gate_up"]["kernel"]
            down = block["mlp"]["down"]["kernel"] * hidden
            branch = mlp64(x, first / np.sqrt(width), down, config.mlp)
            branch = norm64(branch, block["mlp_norm"]["scale"])
            x = np.sqrt(1 - tau) * x + np.sqrt(tau) * branch
        x = norm64(x, p["final_norm"]["scale"])
        head = p["embedding"]["embedding"].T if config.tied_head else p["head"]["kernel"]
        logits.append(x @ head / width)
    assert_close([logits_of(model, tokens)], [np.stack(logits)], rel=2e-5)


def shapes(**changes):
    return jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(make(**changes))))
    )


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "tied_head": False, "scan_layers": True}])
def test_unit_scaled__parameters__have_the_names_and_shapes_of_the_standard_model(changes):
    assert shapes(**changes) == shapes(**changes, parametrization="standard")


def test_unit_scaled_linear__gradients__are_those_of_the_scaled_product():
    layer = UnitScaledLinear(6, (2, 3), multiplier=0.25, grad_scale=64.0, rngs=nnx.Rngs(0))
    x, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 6), (5, 2, 3)]))
    graphdef, params = nnx.split(layer)
    got = jax.grad(lambda p, x: (nnx.merge(graphdef, p)(x) * v).sum(), argnums=(0, 1))(params, x)
    x64, v64, w64 = (np.asarray(a, np.float64) for a in (x, v, layer.kernel[...]))
    wanted = [np.einsum("ti,tjo->ijo", x64, v64), np.einsum("tjo,ijo->ti", v64, w64)]
    assert_close([got[0]["kernel"][...], got[1]], [0.25 * w for w in wanted], rel=1e-6)


def test_unit_scaled__factor_of_the_gradients__does_not_change_them():
    """It is a power of two for sizes that are: it cancels bit for bit."""
    one, many = (gradients(make(loss_tokens=n, tied_head=False), ids()) for n in (1, 2**12))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_tau__by_depth__goes_through_the_values_of_the_paper():
    for depth, tau in ((4, 0.4), (100, 0.1), (20, 0.2)):
        assert dataclasses.replace(CONFIG, num_layers=depth).tau == pytest.approx(tau)
    assert dataclasses.replace(CONFIG, parametrization="standard").tau is None


def test_residual_sum__two_values__are_weighted_by_roots():
    got = residual_sum(jnp.float32(2), jnp.bfloat16(-1), 0.36)
    assert float(got) == pytest.approx(0.8 * 2 - 0.6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.1, float("nan")])
def test_config__tau_out_of_range__is_refused(tau):
    with pytest.raises(ValueError, match="residual_tau"):
        dataclasses.replace(CONFIG, residual_tau=tau)


def test_fp8_static__unit_scaled_model__loses_nearly_nothing():
    """Gradients 2**-14 as large, as those of a batch 2**14 times the size would be, are lost."""
    recipe = dataclasses.replace(recipes.get_recipe("fp8_static"), observe=True)
    model = quantize(make(scan_layers=True), recipe)
    graphdef, arrays = nnx.split(model)

    @compiled
    def observe(arrays, size):
        model = nnx.merge(graphdef, arrays)
        value_and_grad(lambda m: size * mean_loss(m, ids()))(model)
        tree = {path: site.get_scaling() for path, site in iter_sites(model)}
        return operand_table(tree, recipe)

    def lost(size):
        table = np.asarray(observe(arrays, size)).reshape(-1, len(Role), len(OperandColumn))
        return table[:, :, [OperandColumn.SATURATED, OperandColumn.UNDERFLOW]].mean(0)

    found, small = lost(1.0), lost(2.0**-14)
    assert (found[:, 0] == 0).all()
    assert (found[:, 1] < 0.01).all()
    assert small[Role.OUTPUT_GRAD, 1] > 0.1
    np.testing.assert_array_equal(small[: Role.OUTPUT_GRAD], found[: Role.OUTPUT_GRAD])


@functools.cache
def losses(recipe: str, **mesh: int) -> list[float]:
    """Losses of a tiny unit-scaled model that learns one batch in 12 steps."""
    config = tiny_config(
        recipe=recipe,
        model={"parametrization": "unit_scaled"},
        optim={"learning_rate": 0.05, "base_width": 64, "weight_decay": 0.0},
        mesh=mesh,
        steps=12,
    )
    state = start(config)
    batch = network_of(config).layout.put_batch(batch_of(config, 1))
    step = build_step(network_of(config), build_optimizer(config), state)
    step = compiled_step(step, state, batch)
    found = []
    for _ in range(config.steps):
        state, metrics = jax.block_until_ready(step(state, batch))
        found.append(float(metrics.loss))
    return found


def test_training__fp8_static__learns_as_high_precision_does():
    high, low = losses("none"), losses("fp8_static")
    assert high[-1] < high[0] - 0.6
    np.testing.assert_allclose(low, high, atol=0.1)


@pytest.mark.nightly
def test_training__mesh__has_the_losses_of_one_device():
    np.testing.assert_allclose(losses("none", fsdp=2, tensor=2), losses("none"), rtol=1e-4)
