"""Accumulation with few bits: against integer arithmetic, mmaemu, and published magnitudes."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops
from lowprec_jax.errors import UserError
from lowprec_jax.numerics import E2M1, E4M3FN, INT8
from lowprec_jax.ops import accumulation  # registers the backends

DTYPES = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LOWEST_EXPONENT = {"e4m3fn": -6, "e5m2": -14}
PAIRS = [("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn")]
NT = (((1,), (1,)), ((), ()))


def finite_codes(shape, fmt, seed=0):
    """Codes of every finite number of a format, equally often."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).view(DTYPES[fmt])
    return np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros((), codes.dtype))


def multiply(a, b, backend):
    return np.asarray(jax.jit(lambda a, b: ops.dot(a, b, NT, backend=backend))(a, b))


def _log2(x) -> int:
    return math.frexp(x)[1] - 1


def oracle_dot(a, b, formats, interval):
    """One element, in Python integers and powers of two: exact, so in any order."""
    low = [LOWEST_EXPONENT[fmt] for fmt in formats]
    a, b = (np.float64(x).tolist() for x in (a, b))
    total = np.float32(0)
    for start in range(0, len(a), interval):
        end = min(start + interval, len(a))
        register = 0.0
        for i in range(start, end, 32):
            pairs = [
                (x, y) for x, y in zip(a[i : min(i + 32, end)], b[i:end], strict=False) if x * y
            ]
            exponents = [max(_log2(x), low[0]) + max(_log2(y), low[1]) for x, y in pairs]
            exponents += [_log2(register)] if register else []
            if not exponents:
                continue
            unit = 2.0 ** (max(exponents) - 13)
            units = sum(math.trunc(x * y / unit) for x, y in pairs) + math.trunc(register / unit)
            step = max(units and _log2(units) - 13, 0)
            register = math.trunc(units / 2**step) * 2**step * unit
        total += np.float32(register)
    return total


def oracle(a, b, formats, interval):
    return np.array([[oracle_dot(row, column, formats, interval) for column in b] for row in a])


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize(("backend", "interval"), [("truncated", 10**9), ("promoted", 128)])
def test_accumulation__all_finite_codes__equal_integer_arithmetic(
    backend, interval, length, formats
):
    a, b = finite_codes((5, length), formats[0]), finite_codes((7, length), formats[1], seed=1)
    expected = oracle(a, b, formats, interval)
    np.testing.assert_array_equal(multiply(a, b, backend), expected)


def test_accumulation__subnormals__are_aligned_as_the_smallest_normals():
    codes = np.random.default_rng(0).integers(0, 8, (5, 64), dtype=np.uint8)
    a, b = codes.view(DTYPES["e4m3fn"]), finite_codes((7, 64), "e4m3fn")
    expected = oracle(a, b, ("e4m3fn", "e4m3fn"), 64)
    np.testing.assert_array_equal(multiply(a, b, "truncated"), expected)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("backend", "fast"), [("truncated", True), ("promoted", False)])
def test_accumulation__hopper_model_of_mmaemu__same_bits(backend, fast, formats):
    torch = pytest.importorskip("torch")
    pytest.importorskip("mmaemu")
    from mmaemu.model.chain import chain_gemm
    from mmaemu.model.plan import execute_plan, make_plan
    from mmaemu.model.presets import get_preset

    names = [fmt.removesuffix("fn") for fmt in formats]
    of = {"fmt_a": names[0], "fmt_b": names[1]}

    def chain(a, b):
        return chain_gemm(a, b, **of, preset=get_preset("hopper"))

    rng = np.random.default_rng(2)
    a, b = (rng.uniform(size=(9, 1000)).astype(DTYPES[fmt]) for fmt in formats)
    codes = [torch.from_numpy(x.view(np.uint8)) for x in (a, b)]
    plan = make_plan(1000, fast=fast, preset="hopper")
    expected = execute_plan(plan, *codes, **of, chain_fn=chain).numpy()
    np.testing.assert_array_equal(multiply(a, b, backend), expected)


# Median relative errors, lowest and highest: half and twice what mmaemu's model of an H100 gives.
@pytest.mark.parametrize(
    ("backend", "draw", "low", "high"),
    [
        ("truncated", "uniform", 3.3e-2, 1.3e-1),
        ("promoted", "uniform", 2.5e-4, 1e-3),
        ("truncated", "normal", 4.5e-4, 1.8e-3),
        ("promoted", "normal", 6.5e-5, 2.6e-4),
    ],
)
def test_accumulation__4096_products__errors_of_the_published_size(backend, draw, low, high):
    rng = np.random.default_rng(0)
    a, b = (getattr(rng, draw)(size=(24, 4096)).astype(DTYPES["e4m3fn"]) for _ in range(2))
    exact = np.float64(a) @ np.float64(b).T
    assert low < np.median(np.abs(multiply(a, b, backend) / exact - 1)) < high


@pytest.mark.parametrize("backend", ["truncated", "promoted"])
def test_accumulation__sums_that_fit_in_13_bits__are_exact_in_all_three_gemms(backend):
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.integers(-2, 3, (2, 3, 4, 6)), jnp.float32)
    rhs = jnp.asarray(rng.integers(-2, 3, (6, 3, 5)), jnp.float32)
    dims = (((3,), (0,)), ((1,), (1,)))  # batched, two free axes on the left

    def run(backend, recipe):
        def loss(lhs, rhs):
            out = ops.dot_general(lhs, rhs, dims, recipe=recipe, backend=backend)
            return out.sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(lhs, rhs)
        return out, grads

    # Scales of 1, and small integers: nothing is rounded anywhere.
    actual, expected = run(backend, "fp8_static"), run(None, "none")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_accumulation__backend_of_dot_general__reaches_the_backward_pass():
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2048, 2)), jnp.float32)
    w = jnp.ones((2, 3), jnp.float32)

    def weight_gradient(backend):
        def loss(w):
            dims = (((1,), (0,)), ((), ()))
            return ops.dot_general(x, w, dims, recipe="fp8_static", backend=backend).sum()

        return np.asarray(jax.jit(jax.grad(loss))(w))

    lost = 1 - weight_gradient("truncated") / weight_gradient(None)
    assert (lost > 1e-2).all()  # a sum of 2048 positive products, always truncated downwards


def test_accumulation__nan__stays_in_its_row():
    a, b = finite_codes((3, 40), "e4m3fn"), finite_codes((4, 40), "e4m3fn", seed=1)
    a[1, 7] = np.nan
    out = multiply(a, b, "truncated")
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(np.isnan(out), [[False] * 4, [True] * 4, [False] * 4])


@pytest.mark.parametrize("shape", [(3, 0), (0, 5)])
def test_accumulation__empty_operand__zeros_or_nothing(shape):
    a, b = np.zeros(shape, DTYPES["e4m3fn"]), np.ones((2, shape[1]), DTYPES["e4m3fn"])
    np.testing.assert_array_equal(multiply(a, b, "promoted"), np.zeros((shape[0], 2), np.float32))


def test_accumulation__int8__accumulates_exactly():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(100, 128, (2, 512), dtype=np.int8) for _ in range(2))
    out = ops.dot(a, b, NT, formats=(INT8, INT8), backend="truncated")
    np.testing.assert_array_equal(out, np.int32(a) @ np.int32(b).T)


def test_accumulation__4_bit_floats_in_bytes__are_decoded():
    a = jnp.asarray([[1, 2, 7]], jnp.uint8)  # codes of 0.5, 1 and 6 (OCP MX 1.0, section 5.3.3)
    out = ops.dot(a, a, NT, formats=(E2M1, E2M1), backend="truncated")
    assert out.tolist() == [[0.25 + 1 + 36]]


def test_accumulation__inside_shard_map__each_device_its_rows():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    a, b = finite_codes((4, 64), "e4m3fn"), finite_codes((3, 64), "e4m3fn", seed=1)

    def local(a, b):
        return ops.dot(a, b, NT, backend="promoted")

    parts = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(parts)(a, b), multiply(a, b, "promoted"))


def test_accumulation__out_sharding__is_refused():
    a = jnp.ones((2, 32), E4M3FN.dtype)
    with pytest.raises(UserError, match=r"out_sharding is P\(\).*backend=None"):
        accumulation.truncated(a, a, NT, formats=(E4M3FN, E4M3FN), out_sharding=P())
