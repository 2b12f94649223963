"""einsum against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import ops

from . import oracles

SUBSCRIPTS = {
    "mk,kn->mn": ((6, 8), (8, 5)),
    "km,nk->nm": ((8, 6), (5, 8)),
    "btd,df->btf": ((2, 3, 8), (8, 5)),
    "btd,fd->fbt": ((2, 3, 8), (5, 8)),
    "bqhd,bkhd->bhqk": ((2, 3, 4, 8), (2, 5, 4, 8)),
    "bhqk,bkhd->bqhd": ((2, 4, 3, 5), (2, 5, 4, 8)),
    "ecd,edf->ecf": ((3, 4, 8), (3, 8, 5)),
    "bthd,hdf->btf": ((2, 3, 4, 8), (4, 8, 5)),
    "...d,df->...f": ((2, 3, 8), (8, 5)),
    "...d,df->f...": ((2, 3, 8), (8, 5)),
    "...ij,...jk->...ik": ((2, 3, 4, 8), (2, 3, 8, 5)),
    "i...,j...->ij...": ((4, 2, 3), (5, 2, 3)),
    "...ij,jk->...ik": ((4, 8), (8, 5)),
    "a...d,...df->a...f": ((6, 2, 3, 8), (3, 8, 5)),
    "ij,jk": ((4, 8), (8, 5)),
    "kj,ji": ((4, 8), (8, 5)),
    "...ij,jk": ((2, 4, 8), (8, 5)),
    "i,i": ((8,), (8,)),
    "i,j->ji": ((4,), (5,)),
    "i,i->i": ((8,), (8,)),
    "ijx,jk->ik": ((4, 8, 3), (8, 5)),
    "ij,jkx->ik": ((4, 8), (8, 5, 3)),
    "ijx,yjk->ki": ((4, 8, 3), (2, 8, 5)),
    "ij,jk->k": ((4, 8), (8, 5)),
    "ij,jk->": ((4, 8), (8, 5)),
    "ij , jk -> ki": ((4, 8), (8, 5)),
}
every = pytest.mark.parametrize("subscripts", SUBSCRIPTS)


def _operands(subscripts):
    """Small integers whose largest is 7: exact in f32, and on the grid of FP8 (see the GEMMs)."""
    rng = np.random.default_rng(len(subscripts))
    arrays = [rng.integers(-3, 4, s).astype(np.float32) for s in SUBSCRIPTS[subscripts]]
    for array in arrays:
        array.reshape(-1)[1] = 7
    return arrays


@functools.cache
def _einsum(subscripts, recipe):
    return jax.jit(functools.partial(ops.einsum, subscripts, recipe=recipe))


@every
def test_einsum__none__equals_numpy_exactly(subscripts):
    lhs, rhs = _operands(subscripts)
    out = _einsum(subscripts, "none")(lhs, rhs)
    expected = np.einsum(subscripts.replace(" ", ""), np.float64(lhs), np.float64(rhs))
    assert out.shape == expected.shape
    np.testing.assert_array_equal(out, expected)


# Where a label is summed before the product, the operand leaves the grid.
SUMMED_FIRST = {"ijx,jk->ik", "ij,jkx->ik", "ijx,yjk->ki", "ij,jk->k", "ij,jk->"}


@pytest.mark.parametrize("subscripts", [s for s in SUBSCRIPTS if s not in SUMMED_FIRST])
def test_einsum__fp8_on_the_grid__equals_numpy_exactly(subscripts):
    lhs, rhs = _operands(subscripts)
    expected = np.einsum(subscripts.replace(" ", ""), np.float64(lhs), np.float64(rhs))
    np.testing.assert_array_equal(_einsum(subscripts, "fp8_current")(lhs, rhs), expected)


@pytest.mark.parametrize("subscripts", ["btd,fd->fbt", "bqhd,bkhd->bhqk", "ijx,yjk->ki"])
def test_einsum__fp8_gradients__equal_numpy_on_the_grid_or_are_within_gate(subscripts):
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.standard_normal(s).astype(np.float32) for s in SUBSCRIPTS[subscripts])
    terms, out = subscripts.split("->")
    left, right = terms.split(",")
    grad = rng.standard_normal(np.einsum(subscripts, lhs, rhs).shape).astype(np.float32)

    def run(lhs, rhs, grad):
        product, pull = jax.vjp(
            functools.partial(ops.einsum, subscripts, recipe="fp8_current"), lhs, rhs
        )
        return product, *pull(grad)

    # A summed label has the same gradient everywhere: ones of its size in the oracle.
    unused = {c: n for t, a in ((left, lhs), (right, rhs)) for c, n in zip(t, a.shape, strict=True)}
    ones = {c: np.ones(n) for c, n in unused.items() if c in "xy"}
    extra = lambda term: [c for c in term if c in ones]  # noqa: E731
    expected = (
        np.einsum(subscripts, np.float64(lhs), np.float64(rhs)),
        np.einsum(
            ",".join([out, right, *extra(left)]) + f"->{left}",
            grad,
            rhs,
            *map(ones.get, extra(left)),
        ),
        np.einsum(
            ",".join([out, left, *extra(right)]) + f"->{right}",
            grad,
            lhs,
            *map(ones.get, extra(right)),
        ),
    )
    for ours, float64, gate in zip(
        jax.jit(run)(lhs, rhs, grad), expected, (0.06, 0.1, 0.1), strict=True
    ):
        assert ours.shape == float64.shape
        # Gates of the GEMMs and a third more: with K of 8 the spread over draws is wider.
        assert oracles.relative_error(ours, float64) < gate


@pytest.mark.parametrize(
    ("subscripts", "shapes", "message"),
    [
        ("ij->ij", [(2, 3), (3, 4)], "has 1 operands; two are supported"),
        ("ij,jk,kl->il", [(2, 3), (3, 4)], "has 3 operands"),
        ("ii,ij->j", [(3, 3), (3, 4)], "repeats a label within one operand"),
        ("ij,jk->il", [(2, 3), (3, 4)], "has one that no operand has"),
        ("ij,jk->ii", [(2, 3), (3, 4)], "repeats a label"),
        ("ijk,jk->i", [(2, 3), (3, 4)], "names 3 axes of an operand that has 2"),
        (
            "ij,jk->ik",
            [(2, 3), (5, 4)],
            r"axis 'j' has size 3 in lhs \(2, 3\) and 5 in rhs \(5, 4\)",
        ),
        ("...ijk,jk->...i", [(2, 3), (3, 4)], "names 3 axes of an operand that has 2"),
    ],
)
def test_einsum__wrong_subscripts__say_what_is_wrong(subscripts, shapes, message):
    with pytest.raises(ValueError, match=message):
        ops.einsum(subscripts, *map(jnp.ones, shapes), recipe="none")


def test_einsum__output_type__follows_preferred_element_type():
    lhs, rhs = (jnp.ones(s, jnp.bfloat16) for s in [(4, 8), (8, 5)])
    for recipe in ("none", "fp8_current"):
        out = ops.einsum("ij,jk->ki", lhs, rhs, recipe=recipe, preferred_element_type=jnp.float32)
        assert out.dtype == jnp.float32
