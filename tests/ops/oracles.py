"""Matrix products and gradients in NumPy float64, casts by `ml_dtypes`. Imports nothing of ours."""

import string

import ml_dtypes
import numpy as np

FORMAT_MAX = {"e4m3fn": 448.0, "e5m2": 57344.0}
_DTYPES = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def _labels(lhs_ndim, rhs_ndim, dimension_numbers):
    """Einsum labels of lhs, rhs and the product."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    names = iter(string.ascii_letters)
    lhs, rhs = [None] * lhs_ndim, [None] * rhs_ndim
    batch, contract = [], []
    for into, left, right in (
        (batch, lhs_batch, rhs_batch),
        (contract, lhs_contract, rhs_contract),
    ):
        for i, j in zip(left, right, strict=True):
            lhs[i] = rhs[j] = next(names)
            into.append(lhs[i])
    lhs = [name or next(names) for name in lhs]
    rhs = [name or next(names) for name in rhs]
    used = {*batch, *contract}
    free = [n for n in lhs if n not in used] + [n for n in rhs if n not in used]
    return "".join(lhs), "".join(rhs), "".join(batch + free)


def dot_general(lhs, rhs, dimension_numbers):
    """The product, float64, in the layout of `jax.lax.dot_general`."""
    left, right, out = _labels(np.ndim(lhs), np.ndim(rhs), dimension_numbers)
    return np.einsum(f"{left},{right}->{out}", np.float64(lhs), np.float64(rhs))


def gradients(lhs, rhs, grad, dimension_numbers):
    """Gradients of ``sum(grad * product)`` with respect to lhs and rhs, float64."""
    left, right, out = _labels(np.ndim(lhs), np.ndim(rhs), dimension_numbers)
    lhs, rhs, grad = np.float64(lhs), np.float64(rhs), np.float64(grad)
    return (
        np.einsum(f"{out},{right}->{left}", grad, rhs),
        np.einsum(f"{out},{left}->{right}", grad, lhs),
    )


def quantize(x, fmt, scale):
    """What the codes stand for, f32: multiplied with the reciprocal, clipped, rounded."""
    scaled = np.float32(x) * (np.float32(1) / np.float32(scale))
    clipped = np.clip(scaled, -FORMAT_MAX[fmt], FORMAT_MAX[fmt]).astype(np.float32)
    return clipped.astype(_DTYPES[fmt]).astype(np.float32)


def relative_error(actual, expected):
    """Frobenius norm of the difference, relative."""
    actual, expected = np.float64(actual), np.float64(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def sqnr_db(actual, expected):
    """Signal to quantization noise in dB."""
    return -20 * np.log10(relative_error(actual, expected))
