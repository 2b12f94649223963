"""Scaling state and gradients on every layout, bit for bit those of one device.

A ReLU MLP on data where nothing rounds: small integers, power-of-two scales, a sum as the loss.
That nothing rounds is tested too: FP8 gives the bits of recipe "none". Layouts are {1, 2, 4, 8}
devices x strategies x {replicated, fsdp, tensor, both}; by default every pair of the factors for
the two recipes that differ in how state travels, and one layout for every other recipe; with
``--full-matrix`` all of them (2 to 4 s each). Four-bit floats cannot hold the integers of the data;
tests/transforms has them.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transforms.pairwise import cover

from lowprec_jax import sharding
from lowprec_jax.nnx import quantize
from lowprec_jax.recipes import Column, Role, get_recipe, recipes
from lowprec_jax.sharding import ShardingRule
from lowprec_jax.state import sites
from lowprec_jax.training.mesh_config import MeshConfig
from lowprec_jax.training.network import lay_out
from lowprec_jax.training.step import TrainState, build_calibration, build_gradients

WIDTH, HIDDEN, BATCH, STEPS = 16, 32, 32, 3
RULES = (
    ShardingRule("up/kernel", ("fsdp", "tensor")),
    ShardingRule("down/kernel", ("tensor", "fsdp")),
    ShardingRule("shift", ("fsdp",)),
)
STRATEGIES = ("shard_map", "jit", "explicit", "pmap")
LAYOUTS = {
    "replicated": lambda n: {"data": n},
    "fsdp": lambda n: {"data": 2 if n == 8 else 1, "fsdp": n // 2 if n == 8 else n},
    "tensor": lambda n: {"tensor": n},
    "fsdp x tensor": lambda n: {"fsdp": n // 2, "tensor": 2},
    "data x fsdp x tensor": lambda n: {"data": n // 4, "fsdp": 2, "tensor": 2},
}
RECIPES = ("fp8_delayed", "fp8_current")


def holds_the_data(recipe):
    """Whether activations and gradients up to 8 are exact."""
    formats = {*recipe.formats_of(Role.LHS), *recipe.formats_of(Role.OUTPUT_GRAD)} - {None}
    return recipe.quantizes and all(fmt.bits == 8 for fmt in formats)


OTHERS = tuple(r.name for r in recipes() if holds_the_data(r) and r.name not in RECIPES)


def exists(devices: int, strategy: str, layout: str) -> bool:
    """Whether a strategy has a layout, and it is not another one with fewer axes."""
    mesh = LAYOUTS[layout](devices)
    others = {name: size for name, size in mesh.items() if name != "data"}
    if strategy == "pmap":
        return layout == "replicated"
    return min(mesh.values()) >= 1 and (layout == "replicated" or min(others.values()) > 1)


CASES = [
    (devices, strategy, layout, recipe)
    for devices in (1, 2, 4, 8)
    for strategy in STRATEGIES
    for layout in LAYOUTS
    for recipe in (*RECIPES, *OTHERS)
    if exists(devices, strategy, layout)
]


def small_matrix():
    """Every pair for two recipes, and a layout on 8 devices for each other one, in turn."""
    layouts = itertools.cycle(
        [case[:3] for case in CASES if case[0] == 8 and case[3] == "fp8_delayed"]
    )
    others = [(*layout, recipe) for recipe, layout in zip(OTHERS, layouts, strict=False)]
    return [*cover([case for case in CASES if case[3] in RECIPES]), *others]


class Mlp(nnx.Module):
    """Two layers used with a ReLU between, and a parameter that no layer gathers."""

    def __init__(self, key: jax.Array):
        del key  # the same integers everywhere
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
        self.shift = nnx.Param(jnp.asarray(np.arange(WIDTH) % 2, jnp.float32))
        # Few entries of +-1 in each row and column: sums stay below 8, which e5m2 holds.
        self.up.kernel[...] = sparse_signs(WIDTH, HIDDEN, seed=1)
        self.down.kernel[...] = sparse_signs(HIDDEN, WIDTH, seed=2)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x + self.shift[...])))


def sparse_signs(rows: int, columns: int, seed: int):
    generator = np.random.default_rng(seed)
    matrix = np.zeros((rows, columns), np.float32)
    for shift in (0, 5):
        where = (np.arange(max(rows, columns)) + shift) % min(rows, columns)
        wide = np.arange(max(rows, columns))
        index = (where, wide) if rows < columns else (wide, where)
        matrix[index] = generator.choice([-1.0, 1.0], max(rows, columns))
    return jnp.asarray(matrix)


def loss(model, x, c):
    return (model(x) * c).sum()


def batch_of(step: int):
    """Inputs, and weights of the sum; all are counted, and their number is 2**9.

    One row has the largest of both: amaxes that are averaged, or those of another device, differ.
    """
    generator = np.random.default_rng(step)
    x = generator.integers(0, 2, (BATCH, WIDTH)).astype(np.float32)
    c = np.ones((BATCH, WIDTH), np.float32)
    row = 5 * step + 3
    x[row], c[row] = generator.integers(2, 4, WIDTH), 2
    return x, c


def run(mesh: MeshConfig, recipe: str):
    """Gradients of three steps, and the scaling state after them."""
    rule = dataclasses.replace(get_recipe(recipe), scale_rounding="power_of_two", observe=True)
    rule = get_recipe("none") if recipe == "none" else rule
    network = lay_out(lambda key: quantize(Mlp(key), rule), loss, mesh, RULES)
    layout = network.layout
    state = layout.init(
        lambda: TrainState(*network.init(jax.random.key(0)), {}, {}, {}, jnp.int32(0))
    )
    if sites(state.scaling):
        state, _ = build_calibration(network, state)(state, layout.put_batch(batch_of(0)))
    step = layout.jit(build_gradients(network))
    found = []
    for number in range(STEPS):
        others = (state.scaling, state.reduction)
        value, grads, (scaling, _) = step(state.params, others, layout.put_batch(batch_of(number)))
        state = state._replace(scaling=jax.block_until_ready(scaling))
        found.append(jax.device_get((value, grads)))
    return found, jax.device_get(state.scaling), state


@functools.cache
def single(recipe: str):
    return run(MeshConfig(), recipe)[:2]


def amaxes(scaling):
    """The state without counts: replicated kernels are counted on every device."""
    return {
        path: {
            name: value[..., Column.AMAX] if name in ("observed", "pending") else value
            for name, value in site.items()
        }
        for path, site in sites(scaling)
    }


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full-matrix")
    cases = CASES if full else small_matrix()
    metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def test_gradients__every_layout__are_those_of_one_device_bit_for_bit(case):
    devices, strategy, layout, recipe = case
    mesh = MeshConfig(strategy=strategy, **LAYOUTS[layout](devices))
    found, scaling, _ = run(mesh, recipe)
    expected, expected_scaling = single(recipe)
    assert_same_bits(found, expected)
    assert_same_bits(amaxes(scaling), amaxes(expected_scaling))


@pytest.mark.parametrize(
    "recipe", [*RECIPES, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)]
)
def test_gradients__on_the_grid__nothing_rounds(recipe):
    """Else equality would be luck; and a gradient of zeros would be equal too."""
    found, scaling = single(recipe)
    assert_same_bits(found, single("none")[0])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    for _, site in sites(scaling):
        assert (site["observed"][..., Column.AMAX] > 0).all()


def test_layout__kernels_and_scales__are_split_as_the_rules_say():
    _, _, state = run(MeshConfig(data=2, fsdp=2, tensor=2), "fp8_delayed")
    up = state.params["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (WIDTH // 2, HIDDEN // 2)
    assert sharding.batch_size_of(up.sharding.mesh) == 4
