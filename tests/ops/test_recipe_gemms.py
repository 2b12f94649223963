"""The three GEMMs of every kind of recipe against an explicit composition in NumPy, tile by tile.

The oracle states for each recipe which elements share a scale, walks over these tiles one by one,
quantizes them with `ml_dtypes` and plain NumPy, and multiplies in f64.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec_jax import ops, state
from lowprec_jax.numerics import E4M3FN as E4M3_FORMAT
from lowprec_jax.numerics import E5M2 as E5M2_FORMAT
from lowprec_jax.numerics import Quantizer, get_format
from lowprec_jax.recipes import Gemm, Recipe, get_recipe, init_state

# lhs [b, t, k] x rhs [k, h, n]: no axis is a multiple of a block.
B, T, K, H, N = 2, 20, 136, 2, 132
DIMS = (((2,), (0,)), ((), ()))
FULL = 10**9


def f8(dtype, limit):
    def cast(x):
        return np.clip(np.float32(x), -limit, limit).astype(dtype).astype(np.float64)

    return cast


E4M3 = f8(ml_dtypes.float8_e4m3fn, 448)
E5M2 = f8(ml_dtypes.float8_e5m2, 57344)
E2M1 = f8(ml_dtypes.float4_e2m1fn, 6)


def integer(limit):
    return lambda x: np.clip(np.rint(np.float32(x)), -limit, limit).astype(np.float64)


def power_of_two_up(x):
    mantissa, exponent = math.frexp(float(x))
    return 2.0 ** (exponent - (mantissa == 0.5))


def float_scale(limit):
    factor = np.float32(1) / np.float32(limit)
    return lambda amax: float(np.float32(amax) * factor)


def rceil(limit):
    return lambda amax: power_of_two_up(np.float32(amax) / np.float32(limit))


def even(limit_exponent, mantissa_bits):
    """Of amax rounded to the mantissa of the element (halves up, by carry)."""

    def scale(amax):
        mantissa, exponent = math.frexp(float(amax))
        rounded = math.floor(mantissa * 2 ** (mantissa_bits + 1) + 0.5) / 2 ** (mantissa_bits + 1)
        return 2.0 ** (exponent - 1 + (rounded >= 1) - limit_exponent)

    return scale


def tiled(x, tile, cast, scale_of):
    """`x` after quantizing it tile by tile, f64."""
    out = np.zeros(x.shape)
    starts = [range(0, n, t) for n, t in zip(x.shape, tile, strict=True)]
    for corner in itertools.product(*starts):
        part = tuple(slice(i, i + t) for i, t in zip(corner, tile, strict=True))
        amax = np.abs(x[part]).max()
        scale = np.float32(scale_of(amax))
        out[part] = cast(x[part] * (np.float32(1) / scale)) * np.float64(scale)
    return out


def nvfp4(x, tile):
    whole = np.float32(np.float32(np.abs(x).max()) / np.float32(448 * 6))

    def scale_of(amax):
        return E4M3(np.float32(np.float32(np.float32(amax) / np.float32(6)) / whole))

    out = np.zeros(x.shape)
    starts = [range(0, n, t) for n, t in zip(x.shape, tile, strict=True)]
    for corner in itertools.product(*starts):
        part = tuple(slice(i, i + t) for i, t in zip(corner, tile, strict=True))
        scale = np.float32(scale_of(np.abs(x[part]).max()))
        factor = np.float32(np.float32(np.float32(1) / whole) / scale)
        out[part] = E2M1(x[part] * factor) * np.float64(scale) * np.float64(whole)
    return out


def same(kind):
    """One way to quantize for all: kind(x, tile)."""
    return {"x": kind, "w": kind, "g": kind}


def by(cast, scale_of):
    return lambda x, tile: tiled(x, tile, cast, scale_of)


ROW = {
    # Elements of a tile, by operand and GEMM: x [B, T, K], w [K, H, N], g [B, T, H, N].
    "x_fwd": (1, 1, FULL),
    "w_fwd": (FULL, 1, 1),
    "g_dgrad": (1, 1, FULL, FULL),
    "w_dgrad": (1, FULL, FULL),
    "x_wgrad": (FULL, FULL, 1),
    "g_wgrad": (FULL, FULL, 1, 1),
}
TENSOR = {name: (FULL,) * len(tile) for name, tile in ROW.items()}


def blocks(size, square):
    free = size if square else 1
    return {
        "x_fwd": (1, 1, size),
        "w_fwd": (size, 1, free),
        "g_dgrad": (1, 1, 1, size),
        "w_dgrad": (free, 1, size),
        "x_wgrad": (1, size, 1),
        "g_wgrad": (1, size, 1, 1),
    }


E4M3_FLOAT = by(E4M3, float_scale(448))
CASES = {
    "fp8_current": (TENSOR, {**same(E4M3_FLOAT), "g": by(E5M2, float_scale(57344))}),
    "fp8_static": (TENSOR, {**same(by(E4M3, lambda _: 1)), "g": by(E5M2, lambda _: 1)}),
    "fp8_rowwise": (ROW, same(E4M3_FLOAT)),
    "fp8_block": (blocks(128, square=True), same(E4M3_FLOAT)),
    "int8": (ROW, same(by(integer(127), float_scale(127.5)))),
    "mxfp8": (blocks(32, square=False), same(by(E4M3, rceil(448)))),
    "mxfp4": (
        blocks(32, square=False),
        {**same(by(E2M1, even(2, 1))), "g": by(E2M1, rceil(6))},
    ),
    "nvfp4": (blocks(16, square=True), same(nvfp4)),
}


def deterministic(recipe):
    """Without rotations and random rounding, which the oracle of a product does not know."""

    def plain(gemm):
        return gemm and Gemm(
            *(
                side and dataclasses.replace(side, hadamard=0, rounding="nearest")
                for side in (gemm.left, gemm.right)
            )
        )

    return dataclasses.replace(
        recipe, fwd=plain(recipe.fwd), dgrad=plain(recipe.dgrad), wgrad=plain(recipe.wgrad)
    )


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, K)) * np.exp2(rng.integers(-3, 4, (B, T, 1)))
    w = rng.standard_normal((K, H, N)) * np.exp2(rng.integers(-3, 4, (1, H, N)))
    g = rng.standard_normal((B, T, H, N))
    return tuple(np.float32(a) for a in (x, w, g))


def run(recipe, x, w, g, **options):
    @jax.jit
    def all_three(x, w, g):
        out, vjp = jax.vjp(lambda x, w: ops.dot_general(x, w, DIMS, recipe=recipe, **options), x, w)
        return out, *vjp(g)

    return all_three(x, w, g)


def assert_close(ours, oracle, tolerance=2e-6):
    """Relative to the norm: f32 sums of a few hundred products."""
    error = np.linalg.norm(np.float64(ours) - oracle) / np.linalg.norm(oracle)
    assert error < tolerance, error


@pytest.mark.parametrize("name", CASES)
def test_dot_general__recipe__is_the_composition_tile_by_tile(name):
    tiles, kinds = CASES[name]
    x, w, g = data()

    def quantized(operand, array, gemm):
        return kinds[operand](array, tiles[f"{operand}_{gemm}"])

    out, dx, dw = run(deterministic(get_recipe(name)), x, w, g)
    x_fwd, w_fwd = quantized("x", x, "fwd"), quantized("w", w, "fwd")
    assert_close(out, np.einsum("btk,khn->bthn", x_fwd, w_fwd))
    g_dgrad, w_dgrad = quantized("g", g, "dgrad"), quantized("w", w, "dgrad")
    assert_close(dx, np.einsum("bthn,khn->btk", g_dgrad, w_dgrad))
    x_wgrad, g_wgrad = quantized("x", x, "wgrad"), quantized("g", g, "wgrad")
    assert_close(dw, np.einsum("btk,bthn->khn", x_wgrad, g_wgrad))


def test_dot_general__rowwise_hp_wgrad__leaves_the_weight_gradient_alone():
    x, w, g = data()
    _, _, dw = run(get_recipe("fp8_rowwise_hp_wgrad"), x, w, g)
    assert_close(dw, np.einsum("btk,bthn->khn", np.float64(x), np.float64(g)))


def test_dot_general__weights_and_activations_of_few_bits__have_straight_through_gradients():
    """The backward GEMMs multiply the codes of the forward GEMM and gradients as they are."""
    x, w, g = data()
    out, dx, dw = run(get_recipe("w4a6"), x, w, g)
    x_q = tiled(x, ROW["x_fwd"], integer(31), float_scale(31.5))
    w_q = tiled(w, ROW["w_fwd"], integer(7), float_scale(7.5))
    assert_close(out, np.einsum("btk,khn->bthn", x_q, w_q))
    assert_close(dx, np.einsum("bthn,khn->btk", np.float64(g), w_q))
    assert_close(dw, np.einsum("btk,bthn->khn", x_q, np.float64(g)))


def test_dot_general__weights_only__keeps_activations_and_their_gradient_path_high():
    x, w, g = data()
    out, dx, dw = run(get_recipe("int4_weights"), x, w, g)
    w_q = tiled(w, (128, 1, 1), integer(7), float_scale(7.5))
    assert_close(out, np.einsum("btk,khn->bthn", np.float64(x), w_q))
    assert_close(dx, np.einsum("bthn,khn->btk", np.float64(g), w_q))
    assert_close(dw, np.einsum("btk,bthn->khn", np.float64(x), np.float64(g)))


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_dot_general__block_scaled_matmul__is_the_dequantized_one(name):
    """XLA decomposes its block-scaled matmul on CPU; all axes are multiples of the block here."""
    x, w, g = (a[..., :128] for a in data())
    x, w, g = x[:, :16], w[:128], g[:, :16]
    x, g = np.tile(x, (1, 8, 1)), np.tile(g, (1, 8, 1, 1))
    recipe = deterministic(get_recipe(name))
    native = run(recipe, x, w, g, backend="block_scaled")
    upcast = run(recipe, x, w, g, backend="upcast")
    for ours, oracle in zip(native, upcast, strict=True):
        assert_close(ours, np.float64(oracle))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_dot_general__rotated_weight_gradient__cancels_the_rotation(name):
    """In a format that is as good as exact, the rotated product is the product."""
    x, w, g = data()
    recipe = deterministic(get_recipe(name))
    fine = dataclasses.replace(
        recipe.wgrad.left,
        format=get_format("int16"),
        scale="float",
        hadamard=recipe.wgrad.left.contract,
    )
    rotated = dataclasses.replace(recipe, wgrad=Gemm(fine, fine))
    _, _, dw = run(rotated, x, w, g)
    assert_close(dw, np.einsum("btk,bthn->khn", np.float64(x), np.float64(g)), 1e-3)


def test_dot_general__stochastic_recipe__needs_a_counter_and_moves_with_it():
    x, w, g = data()
    recipe = get_recipe("nvfp4")
    with pytest.raises(ValueError, match="rounds gradients stochastically, from a step counter"):
        run(recipe, x, w, g)

    @jax.jit
    def drawn(counter, seed):
        site = {**init_state(recipe), "counter": counter, "seed": seed}
        out, vjp = jax.vjp(lambda x: ops.dot_general(x, w, DIMS, recipe=recipe, state=site), x)
        return out, *vjp(jnp.asarray(g))

    draws = [(0, 0), (0, 0), (1, 0), (0, 1)]
    first, again, *moved = (drawn(jnp.float32(a), jnp.uint32(b)) for a, b in draws)
    np.testing.assert_array_equal(first[1], again[1])
    for other in moved:
        np.testing.assert_array_equal(first[0], other[0])  # nothing random in the forward pass
        assert (np.asarray(first[1]) != np.asarray(other[1])).mean() > 0.5


def test_dot_general__stochastic_gradients__have_the_mean_of_the_exact_ones():
    """|mean - exact| falls with the number of draws; nearest rounding keeps its bias."""
    x, w, g = data()
    recipe = get_recipe("mxfp4")
    exact_w = tiled(w, blocks(32, square=False)["w_dgrad"], E2M1, even(2, 1))
    exact = np.einsum("bthn,khn->btk", np.float64(g), exact_w)

    @jax.jit
    def gradient(counter):
        site = {**init_state(recipe), "counter": counter}
        _, vjp = jax.vjp(lambda x: ops.dot_general(x, w, DIMS, recipe=recipe, state=site), x)
        return vjp(jnp.asarray(g))[0]

    draws = np.stack([np.float64(gradient(jnp.float32(i))) for i in range(64)])
    error = np.linalg.norm(draws.mean(0) - exact) / np.linalg.norm(exact)
    single = np.linalg.norm(draws[0] - exact) / np.linalg.norm(exact)
    assert error < 1.2 * single / np.sqrt(64)
    nearest = np.float64(run(deterministic(recipe), x, w, g)[1])
    assert np.linalg.norm(nearest - exact) / np.linalg.norm(exact) > 3 * error


def test_dot_general__one_scale_and_blocks__leaves_the_scale_of_the_tensor_exact():
    tensor, block = Quantizer(E4M3_FORMAT), Quantizer(E4M3_FORMAT, 32, 1, "rceil")
    x, w, g = data()
    out, _, _ = run(Recipe(name="mixed", fwd=Gemm(tensor, block)), x, w, g)
    x_q, w_q = E4M3_FLOAT(x, TENSOR["x_fwd"]), by(E4M3, rceil(448))(w, (32, 1, 1))
    assert_close(out, np.einsum("btk,khn->bthn", x_q, w_q))


def test_dot_general__delayed_with_other_formats_in_each_gemm__scales_each_for_its_own():
    recipe = Recipe(
        name="mixed",
        fwd=Gemm(E4M3_FORMAT, Quantizer(E4M3_FORMAT, scale="one")),
        dgrad=Gemm(E5M2_FORMAT, Quantizer(E4M3_FORMAT, margin=1)),
        wgrad=Gemm(E5M2_FORMAT, Quantizer(E4M3_FORMAT, scale="power_of_two")),
        scaling="delayed",
    )
    x, w, g = data()
    amax = [np.abs(a).max() for a in (x, w, g)]
    site = init_state(recipe)
    site["amax_history"] = site["amax_history"].at[:, 2].set(jnp.asarray(amax))

    @jax.jit
    def all_three(x, w, g):
        live = state.make_sinks(site)
        product = functools.partial(ops.dot_general, recipe=recipe, state=live)
        out, vjp = jax.vjp(lambda x, w: product(x, w, DIMS), x, w)
        return out, *vjp(g)

    out, dx, dw = all_three(x, w, g)

    def whole(a, cast, scale_of):
        return tiled(a, (FULL,) * a.ndim, cast, scale_of)

    w_fwd = whole(w, E4M3, lambda _: 1)
    w_dgrad = whole(w, E4M3, lambda amax: 2 * float_scale(448)(amax))
    g_wgrad = whole(g, E4M3, lambda amax: power_of_two_up(float_scale(448)(amax)))
    x_fwd, x_wgrad = whole(x, E4M3, float_scale(448)), whole(x, E5M2, float_scale(57344))
    g_dgrad = whole(g, E5M2, float_scale(57344))
    assert_close(out, np.einsum("btk,khn->bthn", x_fwd, w_fwd))
    assert_close(dx, np.einsum("bthn,khn->btk", g_dgrad, w_dgrad))
    assert_close(dw, np.einsum("btk,bthn->khn", x_wgrad, g_wgrad))


def test_dot_general__zero_size_operands__give_empty_or_zero_results():
    for name in ("fp8_current", "fp8_rowwise", "nvfp4"):
        recipe = deterministic(get_recipe(name))
        out, dx, dw = run(
            recipe,
            np.zeros((B, 0, K), "f4"),
            np.ones((K, H, N), "f4"),
            np.zeros((B, 0, H, N), "f4"),
        )
        assert out.shape == (B, 0, H, N)
        assert dx.shape == (B, 0, K)
        np.testing.assert_array_equal(dw, 0)
