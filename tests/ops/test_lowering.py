"""What a training step multiplies on each platform, from the lowered program; no device needed."""

import re

import jax
import jax.numpy as jnp
import pytest

from lowprec_jax import ops
from lowprec_jax.recipes import get_recipe, init_state, recipes, translate
from lowprec_jax.state import value_and_grad

PLATFORMS = ("cuda", "rocm", "tpu")
DIMS = (((1,), (0,)), ((), ()))
E4M3, E5M2, BF16, F32, I8 = "f8E4M3FN", "f8E5M2", "bf16", "f32", "i8"
HYBRID = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)]
# Operand types of forward, dgrad and wgrad; block-scaled recipes for a chip that is not known.
EXPECTED = {
    "none": [(F32, F32)] * 3,
    "fp8_current": HYBRID,
    "fp8_delayed": HYBRID,
    "fp8_delayed_hp_forward": [(F32, F32), *HYBRID[1:]],
    "fp8_static": HYBRID,
    "fp8_rowwise": [(E4M3, E4M3)] * 3,
    "fp8_rowwise_hp_wgrad": [(E4M3, E4M3), (E4M3, E4M3), (F32, F32)],
    "fp8_block": [(E4M3, E4M3)] * 3,
    "int8": [(I8, I8)] * 3,
    "int4_weights": [(F32, F32)] * 3,
    "nf4_weights": [(F32, F32)] * 3,
    "mxfp8": [(BF16, BF16)] * 3,
    "mxfp4": [(BF16, BF16)] * 3,
    "nvfp4": [(BF16, BF16)] * 3,
}


def lowered_step(recipe, platform):
    """The text of one layer's forward and backward pass."""
    tree = {"layer": init_state(recipe)}

    def loss(params, live):
        x, w = params
        out = ops.dot_general(x, w, DIMS, recipe=recipe, state=live["layer"])
        return (out**2).sum()

    params = jnp.ones((384, 256)), jnp.ones((256, 128))
    return (
        jax.jit(value_and_grad(loss))
        .trace(params, tree)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


def operand_types(text):
    """Of every dot_general but those of rotations, by a 16 x 16 or 32 x 32 matrix."""
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            left, right = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)", line).groups()
            if not any(x.startswith(("16x16x", "32x32x")) for x in (left, right)):
                found.append((left.rsplit("x", 1)[1], right.rsplit("x", 1)[1]))
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.name)
def test_lowering__every_recipe_and_platform__multiplies_the_expected_types(recipe, platform):
    found = operand_types(lowered_step(recipe, platform))
    assert sorted(found) == sorted(EXPECTED[recipe.name])
    assert (E5M2, E5M2) not in found


@pytest.mark.parametrize(
    ("name", "element", "scale"),
    [
        ("mxfp8", E4M3, "f8E8M0FNU"),
        ("mxfp4", "f4E2M1FN", "f8E8M0FNU"),
        ("nvfp4", "f4E2M1FN", "f8E4M3FN"),
    ],
)
def test_lowering__blocks_on_a_chip_that_multiplies_them__are_scaled_dots(name, element, scale):
    recipe, _ = translate(get_recipe(name), "nvidia-blackwell")
    text = lowered_step(recipe, "cuda")
    composites = [line for line in text.splitlines() if '"xla.scaled_dot"' in line]
    assert len(composites) == 3
    for line in composites:
        types = re.findall(r"tensor<[^>]*x(\w+)>", line.split(" : (")[1])
        assert types == [element, element, scale, scale, "f32"]


def test_lowering__blocks_on_hopper__are_dequantized():
    recipe, messages = translate(get_recipe("mxfp8"), "nvidia-hopper")
    assert any("dequantized to bf16 first" in message for message in messages)
    assert operand_types(lowered_step(recipe, "cuda")) == [(BF16, BF16)] * 3
