"""The three GEMMs of the quantized `dot_general`: exact, bounded, and of the promised structure."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from recipes.oracles import DelayedScaling

from lowprec_jax import ops, state
from lowprec_jax.numerics import E4M3FN, E5M2, quantize
from lowprec_jax.recipes import FP8_CURRENT, FP8_DELAYED, Column, Gemm, Recipe, Role, init_state

from . import oracles

NN = (((1,), (0,)), ((), ()))
LAYOUTS = {
    "NN": ((16, 32), (32, 24), NN),
    "NT": ((16, 32), (24, 32), (((1,), (1,)), ((), ()))),
    "TN": ((32, 16), (32, 24), (((0,), (0,)), ((), ()))),
    "TT": ((32, 16), (24, 32), (((0,), (1,)), ((), ()))),
    "batch": ((5, 16, 32), (5, 32, 24), (((2,), (1,)), ((0,), (0,)))),
    "batch_in_the_middle": ((16, 32, 5), (32, 5, 24), (((1,), (0,)), ((2,), (1,)))),
    "two_batches_swapped": ((2, 5, 16, 32), (5, 32, 2, 24), (((3,), (1,)), ((0, 1), (2, 0)))),
    "two_contracted": ((16, 4, 8), (4, 8, 24), (((1, 2), (0, 1)), ((), ()))),
    "two_contracted_swapped": ((16, 4, 8), (8, 24, 4), (((1, 2), (2, 0)), ((), ()))),
    "two_contracted_listed_backwards": ((4, 16, 8), (24, 8, 4), (((2, 0), (1, 2)), ((), ()))),
    "three_contracted": ((2, 16, 3, 5), (5, 2, 24, 3), (((0, 2, 3), (1, 3, 0)), ((), ()))),
    "free_axes_on_both": ((3, 16, 32), (4, 32, 6), (((2,), (1,)), ((), ()))),
    "everything": ((2, 16, 4, 8), (8, 2, 24, 4), (((3, 2), (0, 3)), ((0,), (1,)))),
    "vector_matrix": ((32,), (32, 24), (((0,), (0,)), ((), ()))),
    "matrix_vector": ((16, 32), (32,), NN),
    "vectors": ((32,), (32,), (((0,), (0,)), ((), ()))),
    "outer": ((16,), (24,), (((), ()), ((), ()))),
    "batch_of_vectors": ((5, 32), (32, 5), (((1,), (0,)), ((0,), (1,)))),
    "elementwise": ((5,), (5,), (((), ()), ((0,), (0,)))),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def _compiled(recipe, dimension_numbers, **options):
    """``(lhs, rhs, grad) -> (product, dlhs, drhs)`` of a recipe without state."""

    def run(lhs, rhs, grad):
        f = functools.partial(
            ops.dot_general, dimension_numbers=dimension_numbers, recipe=recipe, **options
        )
        out, pull = jax.vjp(f, lhs, rhs)
        return out, *pull(grad)

    return jax.jit(run)


@functools.cache
def _product(recipe, dimension_numbers):
    return jax.jit(
        functools.partial(ops.dot_general, dimension_numbers=dimension_numbers, recipe=recipe)
    )


def _exact(lhs, rhs, grad, dimension_numbers):
    return (
        oracles.dot_general(lhs, rhs, dimension_numbers),
        *oracles.gradients(lhs, rhs, grad, dimension_numbers),
    )


def _on_grid(seed, shape, exponent):
    """Integers of at most 3 significant bits times a power of two, the largest 7.

    7 is the significand of the largest value of both formats (448, 57344), so current scaling takes
    a power of two and every value is on the grid.
    """
    x = np.random.default_rng(seed).integers(-7, 8, shape).astype(np.float32)
    x.reshape(-1)[-1] = -7
    return np.ldexp(x, exponent).astype(np.float32)


def _normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _matrices(seed=0, m=16, k=32, n=24):
    return _normal(seed, (m, k), (k, n), (m, n))


def _assert_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Exact tier.


@every_layout
def test_dot_general__operands_on_the_grid__three_gemms_equal_float64(layout):
    lhs_shape, rhs_shape, dims = LAYOUTS[layout]
    lhs, rhs = _on_grid(1, lhs_shape, 5), _on_grid(2, rhs_shape, -3)
    exact = oracles.dot_general(lhs, rhs, dims)
    grad = _on_grid(3, exact.shape, -20)
    actual = _compiled(FP8_CURRENT, dims)(lhs, rhs, grad)
    for ours, float64 in zip(actual, _exact(lhs, rhs, grad, dims), strict=True):
        assert ours.shape == float64.shape
        np.testing.assert_array_equal(ours, float64)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_dot_general__f8_native_and_upcast__are_bitwise_equal_on_cpu(scaling):
    recipe = dataclasses.replace(FP8_DELAYED, scaling=scaling)
    site = init_state(recipe)
    arrays = _matrices()
    if site:
        site["amax_history"] = site["amax_history"].at[:, 0].set(3.0)

    def run(backend):
        def loss(wx, live):
            out = ops.dot_general(*wx, NN, recipe=recipe, state=live, backend=backend)
            return (out * arrays[2]).sum(), out

        return jax.jit(state.value_and_grad(loss, has_aux=True))(arrays[:2], site)

    _assert_bits(run("native"), run("upcast"))
    _assert_bits(run(None), run("upcast"))


def test_dot_general__jit_and_eager__are_bitwise_equal():
    lhs, rhs, _ = (jnp.asarray(x) for x in _matrices())
    eager = ops.dot_general(lhs, rhs, NN, recipe="fp8_current")
    _assert_bits(_product(FP8_CURRENT, NN)(lhs, rhs), eager)


def test_dot_general__delayed_trajectory__equals_the_oracle_bit_for_bit():
    """Outer products (no sum to round): codes, scales and history of 12 steps, history 3."""
    recipe = dataclasses.replace(FP8_DELAYED, history_length=3, margin=1)
    formats = {Role.LHS: "e4m3fn", Role.RHS: "e4m3fn", Role.OUTPUT_GRAD: "e5m2"}
    expected = {r: DelayedScaling(f, 3, 1) for r, f in formats.items()}
    sizes = [0.2, 0.3, 30.0, 0.0, 0.5, np.inf, 0.7, 1e-40, 0.6, 0.6, np.nan, 4.0]

    def loss(rhs, live, lhs, grad):
        out = ops.dot_general(lhs, rhs, NN, recipe=recipe, state=live)
        return (out * grad).sum(), out

    step = jax.jit(state.value_and_grad(loss, has_aux=True))
    site = init_state(recipe)
    for seed, size in enumerate(sizes):
        lhs, rhs, grad = _matrices(seed, k=1)
        lhs[3, 0], grad[2, 5] = size, 1 / 512 * (seed + 1)
        ((_, out), _), site = step(rhs, site, lhs, grad)
        scale = {r: oracle.scale() for r, oracle in expected.items()}
        codes = [
            oracles.quantize(x, formats[r], scale[r]) for r, x in ((Role.LHS, lhs), (Role.RHS, rhs))
        ]
        np.testing.assert_array_equal(
            out, (codes[0] * codes[1]) * np.float32(scale[Role.LHS] * scale[Role.RHS])
        )
        site = state.advance(site)
        for role, x in ((Role.LHS, lhs), (Role.RHS, rhs), (Role.OUTPUT_GRAD, grad)):
            expected[role].push(np.abs(x).max())
            np.testing.assert_array_equal(site["amax_history"][role], expected[role].ring)


def test_dot_general__constant_inputs_for_a_window__delayed_equals_current_bitwise():
    recipe = dataclasses.replace(FP8_DELAYED, history_length=3)
    lhs, rhs, grad = _matrices()
    site = init_state(recipe)
    site["amax_history"] = site["amax_history"].at[:, 0].set(77.0)

    def loss(operands, live):
        out = ops.dot_general(*operands, NN, recipe=recipe, state=live)
        return (out * grad).sum(), out

    step = jax.jit(state.value_and_grad(loss, has_aux=True))
    current = _compiled(FP8_CURRENT, NN)(lhs, rhs, grad)
    for turned_over in (False, False, False, True):
        ((_, out), grads), site = step((lhs, rhs), site)
        assert all(map(np.array_equal, (out, *grads), current)) == turned_over
        site = state.advance(site)


# Bounded tier: relative Frobenius errors. Ceilings: errors measured by an independent reference
# (peers_te_flax_xla.md, 5(c) rows 3-6) plus a quarter.


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(
    ("formats", "ceiling"), [((E4M3FN, E4M3FN), 0.0062 * 1.25), ((E4M3FN, E5M2), 0.0098 * 1.25)]
)
def test_dot_general__uniform_64_32_64__error_is_that_of_the_formats(layout, formats, ceiling):
    dims, k = LAYOUTS[layout][2], 64
    rng = np.random.default_rng(0)
    lhs = (rng.uniform(size=(64, k)) / np.sqrt(k)).astype(np.float32)
    rhs = (rng.uniform(size=(k, 32)) / np.sqrt(k)).astype(np.float32)
    lhs, rhs = (lhs.T if layout[0] == "T" else lhs), (rhs.T if layout[1] == "T" else rhs)
    out = _product(Recipe(name="r", fwd=Gemm(*formats)), dims)(lhs, rhs)
    assert oracles.relative_error(out, oracles.dot_general(lhs, rhs, dims)) < ceiling


@pytest.mark.parametrize(
    ("m", "n", "k", "formats", "ceiling"),
    [
        (64, 128, 128, (E4M3FN, E4M3FN), 0.0045 * 1.25),
        (64, 128, 128, (E4M3FN, E5M2), 0.0070 * 1.25),
        (256, 256, 512, (E4M3FN, E4M3FN), 0.0027 * 1.25),
        (256, 256, 512, (E4M3FN, E5M2), 0.0041 * 1.25),
    ],
)
def test_dot_general__uniform_larger__error_shrinks_with_k(m, n, k, formats, ceiling):
    rng = np.random.default_rng(0)
    lhs = (rng.uniform(size=(m, k)) / np.sqrt(k)).astype(np.float32)
    rhs = (rng.uniform(size=(k, n)) / np.sqrt(k)).astype(np.float32)
    out = _product(Recipe(name="r", fwd=Gemm(*formats)), NN)(lhs, rhs)
    assert oracles.relative_error(out, np.float64(lhs) @ np.float64(rhs)) < ceiling


@pytest.mark.parametrize("k", [64, 128, 256, 512])
def test_dot_general__normal_operands__error_is_below_gate(k):
    lhs, rhs, _ = _matrices(k, 48, k, 80)
    out = _product(FP8_CURRENT, NN)(lhs, rhs)
    assert oracles.relative_error(out, np.float64(lhs) @ np.float64(rhs)) < 0.045


def test_dot_general__weighted_sum_loss__gradients_are_within_gate():
    lhs, rhs, grad = _matrices(4, 64, 128, 96)
    actual = _compiled(FP8_CURRENT, NN)(lhs, rhs, grad)
    errors = map(oracles.relative_error, actual, _exact(lhs, rhs, grad, NN))
    for error, gate in zip(errors, (0.045, 0.08, 0.08), strict=True):
        assert error < gate


@pytest.mark.parametrize("seed", range(8))
def test_dot_general__gaussian__sqnr_gates(seed):
    """Gates: 0.5 dB below what was measured (28.5 forward, 24.5 gradients); a bit costs 6 dB."""
    lhs, rhs, grad = _matrices(100 + seed, 128, 256, 192)
    actual = _compiled(FP8_CURRENT, NN)(lhs, rhs, grad)
    exact = _exact(lhs, rhs, grad, NN)
    for ours, float64, gate in zip(actual, exact, (28, 24, 24), strict=True):
        assert oracles.sqnr_db(ours, float64) >= gate


# Types and special values.


@pytest.mark.parametrize("recipe", [FP8_CURRENT, FP8_DELAYED], ids=lambda r: r.name)
def test_dot_general__f16_with_amax_173__has_no_infinity(recipe):
    """Codes multiply to 448**2 * K: scaled after the conversion to f16, 812 of 2048 were Inf."""
    x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.arange(1.0, 65)[:, None]
    x = x * (173.444 / jnp.abs(x).max())
    w = jax.random.normal(jax.random.key(1), (32, 32)) / 32**0.5
    site = init_state(recipe)
    if site:
        amaxes = jnp.stack([jnp.abs(x).max(), jnp.abs(w).max(), jnp.float32(1)])
        site["amax_history"] = site["amax_history"].at[:, 0].set(amaxes)
    out = ops.dot_general(
        x.astype(jnp.float16), w.astype(jnp.float16), NN, recipe=recipe, state=site
    )
    assert out.dtype == jnp.float16
    assert int(jnp.isinf(out).sum()) == 0
    assert oracles.relative_error(out, np.float64(x) @ np.float64(w)) < 0.045


@pytest.mark.parametrize("preferred", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_dot_general__mixed_operands__gradients_have_the_primals_dtypes(types, preferred):
    lhs, rhs, grad = map(jnp.asarray, _matrices())
    lhs, rhs = lhs.astype(types[0]), rhs.astype(types[1])
    f = functools.partial(
        ops.dot_general,
        dimension_numbers=NN,
        recipe="fp8_current",
        preferred_element_type=preferred,
    )
    out, pull = jax.eval_shape(functools.partial(jax.vjp, f), lhs, rhs)
    grads = jax.eval_shape(lambda a, b, g: jax.vjp(f, a, b)[1](g), lhs, rhs, grad.astype(preferred))
    del pull
    assert out.dtype == preferred
    assert [g.dtype.name for g in grads] == list(types)


def test_dot_general__mixed_operands_without_a_preferred_type__strict_promotion_refuses():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    with pytest.raises(jax.dtypes.TypePromotionError):
        ops.dot_general(lhs.astype(jnp.bfloat16), rhs, NN, recipe="fp8_current")


def test_dot_general__bf16_operands__quantized_in_f32():
    """The codes of bf16 data are those of the same data in f32 (3.7 % differ if rounded twice)."""
    lhs, rhs, _ = (jnp.asarray(x).astype(jnp.bfloat16) for x in _matrices())
    wide = _product(FP8_CURRENT, NN)(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
    narrow = ops.dot_general(lhs, rhs, NN, recipe="fp8_current", preferred_element_type=jnp.float32)
    _assert_bits(narrow, wide)


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_dot_general__one_nan__reaches_what_depends_on_it_and_nothing_else(operand):
    arrays = _matrices()
    arrays[operand][3, 5] = np.nan
    actual = _compiled(FP8_CURRENT, NN)(*arrays)
    for ours, float64 in zip(actual, _exact(*arrays, NN), strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(float64))


def test_dot_general__inf__saturates_and_stays_finite():
    lhs, rhs, _ = _matrices()
    lhs[3, 5] = -np.inf
    assert np.isfinite(_product(FP8_CURRENT, NN)(lhs, rhs)).all()


@pytest.mark.parametrize("amax", [1e-30, 1e-38, 1e-40, 0.0, 3e38])
def test_dot_general__extreme_amax__is_finite(amax):
    lhs, rhs, grad = _matrices()
    lhs = lhs / np.abs(lhs).max() * np.float32(amax)
    rhs, grad = rhs * 1e-3, grad * 1e-3
    assert all(np.isfinite(x).all() for x in _compiled(FP8_CURRENT, NN)(lhs, rhs, grad))


@pytest.mark.parametrize(("m", "k"), [(0, 32), (16, 0)])
def test_dot_general__empty_operand__three_gemms_have_the_shapes_of_lax(m, k):
    arrays = _matrices(0, m, k)
    actual = _compiled(FP8_CURRENT, NN)(*arrays)
    for ours, float64 in zip(actual, _exact(*arrays, NN), strict=True):
        np.testing.assert_array_equal(ours, float64)


# Residuals and remat.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_vjp__residuals__are_bytes_of_the_codes_only(dtype, scaling):
    recipe = dataclasses.replace(FP8_DELAYED, scaling=scaling)
    lhs, rhs, _ = (jnp.asarray(x).astype(dtype) for x in _matrices())
    probe = ops.Probe(jnp.zeros((3, 5)))
    site = {**init_state(recipe), "sink": probe}
    _, pull = jax.vjp(lambda a, b: ops.dot_general(a, b, NN, recipe=recipe, state=site), lhs, rhs)
    history = 3 * recipe.window
    kept = [x for x in jax.tree.leaves(pull) if x.size > history]  # no state, no scalars
    assert {x.dtype for x in kept} == {jnp.dtype(jnp.uint8)}
    assert sum(x.nbytes for x in kept) == lhs.size + rhs.size


def test_vjp__kept_lhs__is_transposed_for_wgrad():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    f = functools.partial(ops.dot_general, dimension_numbers=NN, recipe="fp8_current")
    shapes = {x.shape for x in jax.tree.leaves(jax.vjp(f, lhs, rhs)[1]) if x.size > 1}
    assert shapes == {(32, 16), (32, 24)}


NAMES = ("quantized_lhs", "quantized_rhs")
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "both_names": jax.checkpoint_policies.save_only_these_names(*NAMES),
    "lhs_name": jax.checkpoint_policies.save_only_these_names(NAMES[0]),
    "rhs_name": jax.checkpoint_policies.save_only_these_names(NAMES[1]),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint__any_policy__codes_of_448_survive_and_gradients_are_bitwise(policy):
    """JAX passes saved f8 values through reduce_precision, which makes NaN of codes of 256 up."""
    lhs, rhs, grad = _matrices()
    lhs[:2] = np.abs(lhs).max()  # several codes of 448

    def run(lhs, rhs, grad):
        f = functools.partial(ops.dot_general, dimension_numbers=NN, recipe="fp8_current")
        out, pull = jax.vjp(jax.checkpoint(f, policy=POLICIES[policy]), lhs, rhs)
        return out, *pull(grad)

    _assert_bits(jax.jit(run)(lhs, rhs, grad), _compiled(FP8_CURRENT, NN)(lhs, rhs, grad))


def test_checkpoint__names__save_one_byte_an_element(capsys):
    lhs, rhs, _ = _matrices()
    f = functools.partial(ops.dot_general, dimension_numbers=NN, recipe="fp8_current")
    jax.ad_checkpoint.print_saved_residuals(
        jax.checkpoint(f, policy=POLICIES["both_names"]), lhs, rhs
    )
    printed = capsys.readouterr().out
    assert "u8[32,16] named 'quantized_lhs'" in printed
    assert "u8[32,24] named 'quantized_rhs'" in printed
    assert "f8_" not in printed


# Structure of the traced and lowered program.


def _dots(platform, recipe=FP8_CURRENT):
    """(lhs type, rhs type, precision, result type) of every dot of a step, and the text."""
    arrays = _matrices()
    lowered = _compiled(recipe, NN).trace(*arrays).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    pattern = (
        r"dot_general .*?precision = \[(\w+), (\w+)\].*?"
        r"\(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"
    )
    return [(m[3], m[4], m[1], m[5]) for m in re.finditer(pattern, text)], text


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_lowering__accelerator__three_f8_dots_of_the_right_formats_and_precisions(platform):
    dots, text = _dots(platform)
    assert dots == [
        ("f8E4M3FN", "f8E4M3FN", "DEFAULT", "f32"),
        ("f8E5M2", "f8E4M3FN", "HIGHEST", "f32"),
        ("f8E4M3FN", "f8E5M2", "HIGHEST", "f32"),
    ]
    assert text.count("stablehlo.dot_general") == 3
    assert not re.search(r"stablehlo.convert .*xf8E\w+>", text)  # nothing converts codes


def test_lowering__cpu__three_bf16_dots_accumulated_in_f32():
    dots, text = _dots("cpu")
    assert dots == [("bf16", "bf16", "DEFAULT", "f32")] * 3
    assert text.count("stablehlo.dot_general") == 3


def test_lowering__calibration__has_no_f8():
    arrays = _matrices()

    def loss(operands, live):
        return (ops.dot_general(*operands, NN, recipe=FP8_DELAYED, state=live) * arrays[2]).sum()

    def run(operands):
        live = state.make_sinks(init_state(FP8_DELAYED), calibrating=True)
        return jax.grad(loss)(operands, live), live["sink"][...]

    text = jax.jit(run).trace(arrays[:2]).lower(lowering_platforms=("cuda",)).as_text()
    assert "f8E" not in text
    assert text.count("stablehlo.dot_general") == 2  # the value itself is not needed


def test_dot_general__unknown_backend__suggests():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    with pytest.raises(ValueError, match=r"Unknown backend 'nativ'.*native, upcast.*'native'"):
        ops.dot_general(lhs, rhs, NN, recipe="fp8_current", backend="nativ")


def test_dot_general__unknown_recipe__suggests():
    with pytest.raises(ValueError, match=r"'fp8_curent'.*'fp8_current'"):
        ops.dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), NN, recipe="fp8_curent")


# Pre-quantized operand, GEMMs in high precision, state.


def test_rhs_quantized__other_codes__value_and_dgrad_come_from_them():
    lhs, rhs, grad = _matrices()
    other = np.roll(rhs, 1)

    def run(lhs, rhs, grad, codes):
        f = lambda a, b: ops.dot_general(a, b, NN, recipe="fp8_current", rhs_quantized=codes)  # noqa: E731
        out, pull = jax.vjp(f, lhs, rhs)
        return out, *pull(grad)

    out, dlhs, drhs = jax.jit(run)(lhs, rhs, grad, quantize(jnp.asarray(other), E4M3FN))
    _assert_bits((out, dlhs, drhs), _compiled(FP8_CURRENT, NN)(lhs, other, grad))
    assert np.abs(drhs).max() > 0


def test_rhs_quantized__differentiated_through__gives_the_gradient_to_the_operand_only():
    lhs, rhs, grad = map(jnp.asarray, _matrices())

    def loss(rhs):
        codes = quantize(rhs, E4M3FN)
        out = ops.dot_general(lhs, rhs, NN, recipe="fp8_current", rhs_quantized=codes)
        return (out * grad).sum()

    _assert_bits(jax.jit(jax.grad(loss))(rhs), _compiled(FP8_CURRENT, NN)(lhs, rhs, grad)[2])


def test_rhs_quantized__other_format__is_refused():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    with pytest.raises(ValueError, match=r"rhs_quantized is e5m2.*multiplies e4m3fn"):
        ops.dot_general(lhs, rhs, NN, recipe="fp8_current", rhs_quantized=quantize(rhs, E5M2))


@pytest.mark.parametrize(("missing", "exact"), [("fwd", 0), ("dgrad", 1), ("wgrad", 2)])
def test_recipe__one_gemm_in_high_precision__exactly_that_one_is_the_float_product(missing, exact):
    """Integers of nine bits: exact in f32, never in FP8."""
    rng = np.random.default_rng(0)
    shapes = [(16, 32), (32, 24), (16, 24)]
    arrays = [rng.integers(-400, 401, s).astype(np.float32) for s in shapes]
    recipe = dataclasses.replace(FP8_CURRENT, **{missing: None})
    actual = _compiled(recipe, NN)(*arrays)
    expected = _exact(*arrays, NN)
    equal = [np.array_equal(a, b) for a, b in zip(actual, expected, strict=True)]
    assert equal == [i == exact for i in range(3)]
    assert all(oracles.relative_error(*pair) < 0.08 for pair in zip(actual, expected, strict=True))


def test_dot_general__calibrating__is_the_float_product_and_observes():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    live = state.make_sinks(init_state(FP8_DELAYED), calibrating=True)
    out = ops.dot_general(lhs, rhs, NN, recipe=FP8_DELAYED, state=live)
    _assert_bits(out, lax.dot_general(lhs, rhs, NN))
    amax = live["sink"][...][:, Column.AMAX]
    _assert_bits(amax, jnp.stack([jnp.abs(lhs).max(), jnp.abs(rhs).max(), jnp.float32(0)]))


def test_dot_general__delayed_without_state__names_the_remedy():
    lhs, rhs, _ = map(jnp.asarray, _matrices())
    with pytest.raises(ValueError, match=r"init_state\(recipe\).*'fp8_current' needs none"):
        ops.dot_general(lhs, rhs, NN, recipe="fp8_delayed")


@pytest.mark.parametrize("margin", [1, 3, 5])
def test_dot_general__margin__halves_the_largest_code_for_each(margin):
    """Powers of two commute with rounding to normal codes: on the grid nothing changes."""
    lhs, rhs = _on_grid(1, (16, 32), 0), _on_grid(2, (32, 24), 0)
    recipe = dataclasses.replace(FP8_CURRENT, margin=margin)
    _assert_bits(_product(recipe, NN)(lhs, rhs), np.float32(lhs @ rhs))
    kept = jax.vjp(lambda a: ops.dot_general(a, rhs, NN, recipe=recipe), jnp.asarray(lhs))[1]
    codes = [x for x in jax.tree.leaves(kept) if x.dtype == jnp.uint8]
    largest = max(float(jnp.abs(c.view(E4M3FN.dtype).astype(jnp.float32)).max()) for c in codes)
    assert largest == 448 / 2**margin


def test_observation__counts__are_saturated_underflow_nonfinite_and_size():
    site = init_state(FP8_DELAYED)
    site["amax_history"] = site["amax_history"].at[:, 0].set(jnp.array([448.0, 448.0, 57344.0]))
    lhs, rhs, grad = _matrices()
    lhs[:] = 1
    lhs[0, :7] = [465, -1e6, 464, 2**-10, 2**-11, 0, np.inf]  # scale 1: clipped 3, underflow 2
    grad[:] = 1
    grad[1, :3] = [61440, 2**-17, np.nan]

    def loss(rhs, live):
        return (ops.dot_general(lhs, rhs, NN, recipe=FP8_DELAYED, state=live) * grad).sum()

    seen = jax.jit(state.value_and_grad(loss))(rhs, site)[1]["pending"]
    np.testing.assert_array_equal(seen[Role.LHS], [np.inf, 3, 2, 1, lhs.size])
    np.testing.assert_array_equal(seen[Role.OUTPUT_GRAD], [np.nan, 1, 1, 1, grad.size])
    assert seen[Role.RHS, Column.SIZE] == rhs.size
