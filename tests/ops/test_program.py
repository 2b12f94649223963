"""Counting what a lowered program multiplies."""

import jax
import jax.numpy as jnp
import pytest

from lowprec_jax import ops
from lowprec_jax.ops import GemmCount, count_gemms

NN = (((1,), (0,)), ((), ()))
X, W = jnp.ones((16, 32)), jnp.ones((32, 32))


def fp8(x, w):
    return ops.dot_general(x, w, NN, recipe="fp8_current")


def lowered(f, *args, platform="cpu"):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", GemmCount(0, 1, 1)), ("cuda", GemmCount(1, 0, 1))]
)
def test_count_gemms__one_fp8_and_one_plain__counted_apart(platform, expected):
    program = lowered(lambda x, w: fp8(x, w) @ w, X, W, platform=platform)
    assert count_gemms(program) == expected


def test_count_gemms__gradient__three_per_layer():
    program = lowered(jax.grad(lambda x, w: (fp8(x, w) ** 2).sum(), (0, 1)), X, W)
    assert count_gemms(program) == GemmCount(0, 3, 0)


def test_count_gemms__scan__multiplied_by_its_length():
    def scanned(x, w):
        body = lambda x, _: (jax.lax.scan(lambda y, _: (fp8(y, w), None), x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(body, x, length=5)[0]

    assert count_gemms(lowered(scanned, X, W)) == GemmCount(0, 15, 0)


def test_count_gemms__function_called_twice__counted_twice():
    inner = jax.jit(fp8)
    assert count_gemms(lowered(lambda x, w: inner(inner(x, w), w), X, W)).emulated == 2


def test_count_gemms__quantize_dequantize_before_a_plain_matmul__is_not_fp8():
    def fake(x, w):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32) * 2 @ w

    assert count_gemms(lowered(fake, X, W)) == GemmCount(0, 0, 1)


def test_count_gemms__one_operand_upcast__is_not_fp8():
    def mixed(x, w):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32) @ w

    assert count_gemms(lowered(mixed, X, W)) == GemmCount(0, 0, 1)


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda a: a.astype(jnp.float8_e4m3fn), (1, 0, 0)),
        (lambda a: a.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16), (0, 1, 0)),
        (lambda a: a.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16) * 2, (0, 0, 1)),
        (lambda a: a, (0, 0, 1)),
    ],
    ids=["native", "upcast", "dequantized", "high"],
)
def test_count_gemms__convolution__is_counted_by_what_it_multiplies(convert, expected):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            convert(x), convert(w), (1,), "SAME", preferred_element_type=jnp.float32
        )

    program = lowered(convolve, jnp.ones((2, 3, 8)), jnp.ones((4, 3, 5)), platform="cuda")
    assert count_gemms(program) == GemmCount(*expected)


def grouped(x, w, recipe="fp8_current"):
    return ops.ragged_dot(x, w, jnp.array([5, 6, 4], jnp.int32), recipe=recipe)


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", GemmCount(0, 3, 0)), ("cuda", GemmCount(3, 0, 0))]
)
def test_count_gemms__gradient_of_a_grouped_matmul__three(platform, expected):
    gradient = jax.grad(lambda x, w: (grouped(x, w) ** 2).sum(), (0, 1))
    program = lowered(gradient, X, jnp.ones((3, 32, 32)), platform=platform)
    assert count_gemms(program) == expected


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_count_gemms__grouped_matmul_in_high_precision__is_other(platform):
    program = lowered(
        lambda x, w: grouped(x, w, "none"), X, jnp.ones((3, 32, 32)), platform=platform
    )
    assert count_gemms(program) == GemmCount(0, 0, 1)


@pytest.mark.parametrize(("fill", "expected"), [(0.0, (0, 1, 0)), (0.3, (0, 0, 1))])
def test_count_gemms__masked_codes__are_fp8_if_the_mask_puts_zeros(fill, expected):
    def masked(x, w):
        left, right = (a.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16) for a in (x, w))
        return jax.lax.select(x > 0.5, left, jnp.full_like(left, fill)) @ right

    assert count_gemms(lowered(masked, X, W)) == GemmCount(*expected)
