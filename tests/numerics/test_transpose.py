"""Transposed codes against NumPy, at sizes that are moved in blocks and at others."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax.numerics import E4M3FN, ScaledArray
from lowprec_jax.numerics.transpose import transpose

BLOCKED = (2, 264, 129)  # 68,112 bytes; 264 is no multiple of 16


def _bytes(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2, 1), (1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("shape", [BLOCKED, (3, 5, 7), (0, 4, 2)])
def test_transpose__shapes_orders_types__is_numpys(shape, order, dtype):
    codes = _bytes(shape)
    moved = jax.jit(lambda x: transpose(x, order))(codes.view(dtype))
    assert moved.dtype == dtype
    np.testing.assert_array_equal(np.asarray(moved).view(np.uint8), codes.transpose(order))


def test_transpose__vmap__is_that_of_each():
    codes = _bytes((3, *BLOCKED[1:], 2))
    moved = jax.jit(jax.vmap(lambda x: transpose(x, (2, 1, 0))))(codes)
    np.testing.assert_array_equal(moved, codes.transpose(0, 3, 2, 1))


def test_transpose__inside_shard_map__is_that_of_each_shard():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    codes = _bytes((2, *BLOCKED))
    local = jax.shard_map(
        lambda x: transpose(x[0], (2, 0, 1))[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(jax.jit(local)(codes), codes.transpose(0, 3, 1, 2))


def test_transpose__large_on_the_cpu__is_moved_in_blocks():
    lowered = jax.jit(lambda x: transpose(x, (2, 0, 1))).trace(jnp.asarray(_bytes(BLOCKED)))
    on = {p: lowered.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert ["stablehlo.while" in on[p] for p in ("cpu", "cuda")] == [True, False]


def test_transpose__of_constant_f8_codes__is_right_after_decoding():
    """XLA:CPU folds ``f8.T`` of constants, seen as bytes in inner functions, wrongly."""
    codes = _bytes((16, 32)) & 0x7B

    def decoded(x):
        return jax.jit(lambda x: ScaledArray(x, jnp.float32(1), E4M3FN).dequantize())(x)

    def constant():
        f8 = lax.bitcast_convert_type(jnp.asarray(codes), E4M3FN.dtype)
        return decoded(transpose(f8, (1, 0)))

    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32).T
    np.testing.assert_array_equal(jax.jit(constant)(), expected)
