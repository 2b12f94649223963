"""Two 4-bit codes in a byte: every pair, every axis, and the types that hold 4-bit codes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

from lowprec_jax.numerics import pack_4bit, unpack_4bit

EVERY_PAIR = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).astype(np.uint8)


def test_pack_4bit__every_pair__has_the_even_element_in_the_low_nibble():
    packed = pack_4bit(jnp.asarray(EVERY_PAIR))

    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed[..., 0], EVERY_PAIR[..., 0] + 16 * EVERY_PAIR[..., 1])


def test_pack_4bit__every_pair__equals_torchao():
    torch, kernels = oracles.torchao("prototype.mx_formats.kernels")

    packed = pack_4bit(jnp.asarray(EVERY_PAIR))

    expected = kernels.pack_uint4(torch.from_numpy(EVERY_PAIR.copy())).numpy()
    np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_unpack_4bit__packed_along_any_axis__gives_the_codes_back(axis):
    codes = np.random.default_rng(0).integers(0, 16, (4, 6, 8), np.uint8)

    packed = jax.jit(pack_4bit, static_argnums=1)(jnp.asarray(codes), axis)

    expected = np.moveaxis(codes, axis, 0)
    np.testing.assert_array_equal(np.moveaxis(packed, axis, 0), expected[::2] + 16 * expected[1::2])
    np.testing.assert_array_equal(unpack_4bit(packed, axis=axis), codes)


def test_unpack_4bit__signed__equals_int4_of_ml_dtypes():
    values = np.arange(-8, 8, dtype=np.int8)

    packed = pack_4bit(jnp.asarray(values))
    unpacked = unpack_4bit(packed, signed=True)

    nibbles = values.astype(ml_dtypes.int4).view(np.uint8) & 0xF
    np.testing.assert_array_equal(packed, nibbles[::2] + 16 * nibbles[1::2])
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, values)


def test_pack_4bit__vmapped__packs_each_row():
    codes = np.random.default_rng(1).integers(0, 16, (3, 8), np.uint8)

    rows = jax.vmap(pack_4bit)(jnp.asarray(codes))

    np.testing.assert_array_equal(rows, pack_4bit(jnp.asarray(codes)))
    np.testing.assert_array_equal(jax.vmap(unpack_4bit)(rows), codes)


def test_pack_4bit__odd_axis__says_to_pad():
    with pytest.raises(ValueError, match=r"axis 0 of \(3, 2\) has odd length 3; pad it"):
        pack_4bit(jnp.zeros((3, 2), jnp.uint8), axis=0)


@pytest.mark.parametrize("function", [pack_4bit, unpack_4bit])
def test_packing__codes_of_another_type__are_refused(function):
    with pytest.raises(TypeError, match=r"got float32; pass uint8"):
        function(jnp.zeros(2))
