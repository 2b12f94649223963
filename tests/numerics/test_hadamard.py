"""The Hadamard rotation against Kronecker products in f64, and what it is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.numerics import hadamard_rotate

# Transformer Engine, common/hadamard_transform: get_rht_matrix.
TE_SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]


def sylvester(block):
    """H of the order by Kronecker products, f64."""
    step = np.array([[1.0, 1.0], [1.0, -1.0]])
    return functools.reduce(np.kron, [step] * (block.bit_length() - 1), np.ones((1, 1)))


def matrix(block):
    return np.asarray(hadamard_rotate(jnp.eye(block), -1, block), np.float64)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_hadamard__block_of_16__is_that_of_transformer_engine():
    expected = np.diag(TE_SIGNS) @ sylvester(16) / 4

    np.testing.assert_array_equal(matrix(16), expected)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32, 64, 128])
def test_hadamard__other_blocks__are_sylvester_with_rudin_shapiro_signs(block):
    pairs = [bin(i & (i >> 1)).count("1") for i in range(block)]
    expected = np.diag((-1.0) ** np.array(pairs)) @ sylvester(block) / np.sqrt(block)

    np.testing.assert_array_equal(matrix(block), expected.astype(np.float32))


@pytest.mark.parametrize("block", [2, 8, 16, 32, 64, 128])
def test_hadamard__matrix__is_orthogonal(block):
    error = np.abs(matrix(block) @ matrix(block).T - np.eye(block)).max()

    assert error <= 2**-22  # two roundings of 1 / sqrt(block) to f32, summed exactly


def test_hadamard__grid_data__is_the_exact_product_in_each_tile():
    x = np.random.default_rng(0).integers(-8, 9, (3, 48)).astype(np.float32)

    rotated = jax.jit(hadamard_rotate)(jnp.asarray(x))

    expected = x.reshape(3, 3, 16).astype(np.float64) @ (np.diag(TE_SIGNS) @ sylvester(16) / 4)
    np.testing.assert_array_equal(rotated, expected.reshape(3, 48))


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_hadamard__axis__is_the_one_rotated(axis):
    x = normal((16, 32, 3))

    rotated = hadamard_rotate(jnp.asarray(x), axis)

    moved = jnp.moveaxis(jnp.asarray(x), axis, -1)
    # Two forms of one sum of 16 products.
    np.testing.assert_allclose(
        jnp.moveaxis(rotated, axis, -1), hadamard_rotate(moved), rtol=0, atol=16 * 2**-24 * 8
    )


@pytest.mark.parametrize("block", [16, 32])
def test_hadamard__both_operands__cancels_in_the_product(block):
    a, b = normal((8, 64), 1), normal((64, 8), 2)

    rotated = hadamard_rotate(jnp.asarray(a), 1, block) @ hadamard_rotate(jnp.asarray(b), 0, block)

    # Each product of 64 terms of order 1: 64 roundings of 2**-24 of a sum of order 8, and H's own.
    np.testing.assert_allclose(rotated, a.astype(np.float64) @ b, atol=64 * 8 * 2**-24)


def test_hadamard__one_outlier__is_spread_over_the_block():
    x = normal((256, 16)) * 0.1
    x[:, 3] += 100

    rotated = np.asarray(hadamard_rotate(jnp.asarray(x)))

    assert np.abs(x).max(1).min() > 90
    assert np.abs(rotated).max() < 30  # 100 / sqrt(16), and the noise


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
def test_hadamard__constant_block__is_not_gathered_in_one_element(block):
    rotated = np.asarray(hadamard_rotate(jnp.ones(block), 0, block))

    assert np.abs(rotated).max() <= 0.51 * np.sqrt(block)  # plain H: sqrt(block)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_hadamard__type__is_kept_and_rounded_once(dtype):
    x = jnp.asarray(normal((4, 16))).astype(dtype)

    rotated = hadamard_rotate(x)

    assert rotated.dtype == dtype
    np.testing.assert_array_equal(rotated, hadamard_rotate(x.astype(jnp.float32)).astype(dtype))


def test_hadamard__vmapped__rotates_each_row():
    x = jnp.asarray(normal((4, 32)))

    np.testing.assert_array_equal(jax.vmap(hadamard_rotate)(x), hadamard_rotate(x))


def test_hadamard__axis_not_a_multiple__says_to_pad():
    with pytest.raises(ValueError, match=r"length 24, not a multiple of block 16; pad it"):
        hadamard_rotate(jnp.zeros((24, 2)), 0)


@pytest.mark.parametrize("block", [0, 3, -2])
def test_hadamard__block_not_a_power_of_two__is_refused(block):
    with pytest.raises(ValueError, match=f"block is {block}; use a power of two"):
        hadamard_rotate(jnp.zeros(12), 0, block)
