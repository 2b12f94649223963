"""The three convolutions of the quantized convolution: exact, as composed by hand, and observed."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops, state
from lowprec_jax.numerics import E4M3FN, Quantizer
from lowprec_jax.recipes import FP8_DELAYED, Column, Gemm, Recipe, get_recipe, init_state

SPECS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def _geometry(lhs, rhs, strides, padding, **options):
    options.setdefault("dimension_numbers", SPECS[len(strides)])
    return lhs, rhs, {"window_strides": strides, "padding": padding, **options}


# Sizes are odd and unequal, so that no two axes can be mixed up.
GEOMETRIES = {
    "1d": _geometry((3, 11, 6), (3, 6, 8), (1,), "SAME"),
    "1d_strided_dilated": _geometry((3, 11, 6), (3, 6, 8), (2,), "VALID", rhs_dilation=(2,)),
    "2d": _geometry((3, 7, 5, 6), (3, 2, 6, 8), (1, 1), "SAME"),
    "2d_strided": _geometry((3, 7, 5, 6), (3, 3, 6, 8), (2, 3), ((1, 0), (2, 1))),
    "2d_transposed": _geometry(
        (3, 4, 3, 6), (3, 2, 6, 8), (1, 1), ((1, 2), (0, 1)), lhs_dilation=(2, 3)
    ),
    "2d_groups": _geometry(
        (3, 7, 5, 6), (3, 2, 3, 8), (1, 2), "SAME", rhs_dilation=(2, 1), feature_group_count=2
    ),
    "2d_depthwise": _geometry((3, 7, 5, 6), (3, 3, 1, 12), (1, 1), "SAME", feature_group_count=6),
    "2d_batch_groups": _geometry((4, 7, 5, 6), (3, 2, 6, 8), (1, 1), "SAME", batch_group_count=2),
    "2d_channels_first": _geometry(
        (3, 6, 7, 5), (8, 6, 3, 2), (2, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    ),
    "3d": _geometry((2, 5, 3, 4, 6), (2, 3, 2, 6, 8), (2, 1, 1), "SAME"),
}
RECIPES = ("fp8_delayed", "fp8_rowwise", "fp8_block", "mxfp8", "int8", "nvfp4")


def _small_blocks(recipe):
    """The recipe with blocks of 4, so that tensors of a test have several and a cut one.

    Rounding is to nearest: what stochastic rounding does is tested by itself.
    """
    recipe = get_recipe(recipe)

    def small(q):
        sizes = {f: min(4, size) for f in ("contract", "free") if (size := getattr(q, f))}
        return q and dataclasses.replace(q, rounding="nearest", **sizes)

    gemms = {
        name: dataclasses.replace(gemm, left=small(gemm.left), right=small(gemm.right))
        for name in ("fwd", "dgrad", "wgrad")
        if (gemm := getattr(recipe, name))
    }
    return dataclasses.replace(recipe, **gemms)


def _normal(name, binades=0):
    """Operands, output gradient and options; magnitudes spread over twice so many binades."""
    *shapes, options = GEOMETRIES[name]
    out = jax.eval_shape(
        functools.partial(lax.conv_general_dilated, **options),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    )
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal(shape) * 2.0 ** rng.integers(-binades, binades + 1, shape)
        for shape in (*shapes, out.shape)
    )
    return *(jnp.asarray(a, jnp.float32) for a in arrays), options


def _three_products(convolve, x, w, c):
    out, pull = jax.vjp(convolve, x, w)
    return out, *pull(c)


def _jitted(convolve):
    return jax.jit(functools.partial(_three_products, convolve))


def _assert_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# The numbers.


@pytest.mark.parametrize("name", ["1d_strided_dilated", "2d_transposed", "2d_depthwise", "3d"])
def test_conv__operands_on_the_grid__three_products_equal_integer_arithmetic(name):
    """Small integers, scales that are powers of two: exact in any order of summation."""
    lhs, rhs, options = GEOMETRIES[name]
    rng = np.random.default_rng(1)
    stock = functools.partial(lax.conv_general_dilated, **options)
    recipe = dataclasses.replace(get_recipe("fp8_current"), scale_rounding="power_of_two")
    ours = functools.partial(ops.conv_general_dilated, **options, recipe=recipe)
    x, w = (jnp.asarray(rng.integers(-7, 8, shape), jnp.float32) for shape in (lhs, rhs))
    exact = stock(x.astype(jnp.int32), w.astype(jnp.int32))
    c = jnp.asarray(rng.integers(-3, 4, exact.shape), jnp.float32)
    out, *grads = _jitted(ours)(x, w, c)
    np.testing.assert_array_equal(out, exact)
    _assert_bits(grads, list(_three_products(stock, x, w, c)[1:]))


def _layouts(dimension_numbers):
    """``(contracted axes, free axes)`` of each operand in its first product, by the letters."""
    lhs, rhs, out = dimension_numbers

    def axes(spec, letters):
        spatial = [i for i, letter in enumerate(spec) if letter in "DHW"]
        return [i for a in letters for i in (spatial if a == "*" else [spec.index(a)])]

    letters = ((lhs, "C", "N*"), (rhs, "*I", "O"), (out, "C", "N*"))
    return [(axes(spec, first), axes(spec, second)) for spec, first, second in letters]


def _composed(recipe, stock, dimension_numbers, x, w, c):
    """Quantize, dequantize, convolve and differentiate, all in f32."""

    def dequantized(x, quantizer, layout):
        quantizer = dataclasses.replace(quantizer, hadamard=0)
        return quantizer(x, quantizer.tile(x.shape, *layout)).dequantize()

    x_axes, w_axes, c_axes = _layouts(dimension_numbers)
    fwd, dgrad, wgrad = recipe.fwd, recipe.dgrad, recipe.wgrad
    out = stock(dequantized(x, fwd.left, x_axes), dequantized(w, fwd.right, w_axes))
    rhs, lhs = dequantized(w, dgrad.right, w_axes[::-1]), dequantized(x, wgrad.left, x_axes[::-1])
    (dx,) = jax.vjp(lambda x: stock(x, rhs), x)[1](dequantized(c, dgrad.left, c_axes))
    (dw,) = jax.vjp(lambda w: stock(lhs, w), w)[1](dequantized(c, wgrad.right, c_axes[::-1]))
    return out, dx, dw


# Every geometry, and every recipe twice; what NVFP4 compiles is long.
CASES = [(name, RECIPES[i % 5]) for i, name in enumerate(GEOMETRIES)] + [("1d", "nvfp4")]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_conv__every_granularity__equals_quantize_dequantize_convolve(name, recipe):
    """Measured: bit for bit, or 2.3e-7 of the largest entry where the scale of a tensor multiplies
    the result. Other layouts of the scales change what rounds and what underflows."""
    x, w, c, options = _normal(name, binades=6)
    recipe = dataclasses.replace(_small_blocks(recipe), scaling="current")
    stock = functools.partial(lax.conv_general_dilated, **options, precision="highest")
    ours = functools.partial(ops.conv_general_dilated, **options, recipe=recipe)

    @jax.jit
    def run(x, w, c):
        composed = _composed(recipe, stock, options["dimension_numbers"], x, w, c)
        return _three_products(ours, x, w, c), composed

    for actual, expected in zip(*run(x, w, c), strict=True):
        largest = float(jnp.abs(expected).max())
        assert largest > 0
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("fp8_current", "bf16"), ("mxfp8", "bf16"), ("fp8_rowwise", "f32")]
)
def test_conv__forward__multiplies_in_bf16_where_that_is_exact(recipe, dtype):
    x, w, _, options = _normal("2d")
    f = functools.partial(ops.conv_general_dilated, **options, recipe=recipe)
    lines = jax.jit(f).lower(x, w).as_text().splitlines()
    (line,) = [line for line in lines if "stablehlo.convolution" in line]
    assert re.search(rf"x{dtype}>, tensor<\S+x{dtype}>\) -> tensor<\S+xf32>", line)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv__all_three_products__are_counted_as_upcast_codes(name):
    x, w, c, options = _normal(name)
    f = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_current")
    assert ops.count_gemms(_jitted(f).lower(x, w, c)) == (0, 3, 0)


@pytest.mark.parametrize("backend", ["native", "upcast", "block_scaled"])
def test_conv__backend_that_platforms_choose_among__is_the_same_program(backend):
    x, w, c, options = _normal("1d")
    recipe = get_recipe("fp8_current")
    default, chosen = (
        _jitted(functools.partial(ops.conv_general_dilated, **options, recipe=r)).lower(x, w, c)
        for r in (recipe, dataclasses.replace(recipe, backend=backend))
    )
    assert chosen.as_text() == default.as_text()


def test_conv__rotation__is_left_out():
    x, w, c, options = _normal("2d")
    side = Quantizer(E4M3FN, free=1)
    recipe = Recipe(name="plain", wgrad=Gemm(side, side))
    turned = dataclasses.replace(side, hadamard=16)
    rotated = Recipe(name="rotated", wgrad=Gemm(turned, turned))
    results = [
        _jitted(functools.partial(ops.conv_general_dilated, **options, recipe=r))(x, w, c)
        for r in (recipe, rotated)
    ]
    _assert_bits(*results)


def test_conv__recipe_none__is_the_stock_convolution_bitwise():
    x, w, c, options = _normal("2d_groups")
    ours = functools.partial(ops.conv_general_dilated, **options, recipe="none")
    stock = functools.partial(lax.conv_general_dilated, **options)
    _assert_bits(_jitted(ours)(x, w, c), _jitted(stock)(x, w, c))


def test_conv__bf16_operands__give_bf16_results_and_gradients():
    x, w, c, options = _normal("2d")
    f = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_current")
    x, w, c = (a.astype(jnp.bfloat16) for a in (x, w, c))
    assert {a.dtype for a in _jitted(f)(x, w, c)} == {jnp.dtype(jnp.bfloat16)}
    wide = functools.partial(f, preferred_element_type=jnp.float32)
    assert jax.eval_shape(wide, x, w).dtype == jnp.float32


def test_conv__gemms_left_in_high_precision__are_exact():
    x, w, c, options = _normal("2d_strided")
    f = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_rowwise_hp_wgrad")
    stock = functools.partial(lax.conv_general_dilated, **options)
    (out, dx, dw), expected = (_jitted(g)(x, w, c) for g in (f, stock))
    np.testing.assert_array_equal(dw, expected[2])
    assert not np.array_equal(dx, expected[1])
    assert not np.array_equal(out, expected[0])


@pytest.mark.parametrize("recipe", ["fp8_current", "mxfp8"])
def test_conv__empty_batch__gives_an_empty_result_and_zero_gradients(recipe):
    x, w, c, options = _normal("2d")
    f = functools.partial(ops.conv_general_dilated, **options, recipe=_small_blocks(recipe))
    out, dx, dw = _jitted(f)(x[:0], w, c[:0])
    assert (out.shape, dx.shape) == (c[:0].shape, x[:0].shape)
    np.testing.assert_array_equal(dw, jnp.zeros_like(w))


# State, randomness, transformations.


def _loss(params, live, x, c, options, recipe, wrap=lambda f: f):
    f = functools.partial(ops.conv_general_dilated, **options, recipe=recipe, state=live["site"])
    return (wrap(f)(x, params) * c).sum()


def _step(options, recipe, **kwargs):
    loss = functools.partial(_loss, options=options, recipe=get_recipe(recipe), **kwargs)

    def step(w, tree, x, c):
        (_, dw), tree = state.value_and_grad(loss)(w, tree, x, c)
        return dw, state.advance(tree)

    return jax.jit(step)


def test_conv__delayed__observes_all_and_quantizes_with_scales_of_earlier_steps():
    x, w, c, options = _normal("2d_strided")
    step, tree = _step(options, "fp8_delayed"), {"site": init_state(FP8_DELAYED)}
    _, tree = step(w, tree, x, c)
    amaxes = jnp.stack([jnp.abs(a).max() for a in (x, w, c)])
    np.testing.assert_array_equal(tree["site"]["amax_history"][:, 0], amaxes)
    dw, _ = step(w, tree, x, c)
    current = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_current")
    np.testing.assert_array_equal(dw, _jitted(current)(x, w, c)[2])
    _, tree = step(w, tree, 2 * x, c)
    saturated = tree["site"]["observed"][:, Column.SATURATED]
    assert saturated[0] > 0
    np.testing.assert_array_equal(saturated[1:], 0)


def test_conv__stochastic_gradients__repeat_for_a_step_and_change_with_the_next():
    x, w, c, options = _normal("2d")
    recipe = get_recipe("mxfp4")
    step, tree = _step(options, recipe), {"site": init_state(recipe)}
    first, after = step(w, tree, x, c)
    again, _ = step(w, tree, x, c)
    other, _ = step(w, after, x, c)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_conv__remat__is_bitwise_the_same():
    x, w, c, options = _normal("2d")
    tree = {"site": init_state(get_recipe("fp8_delayed"))}
    _assert_bits(
        _step(options, "fp8_delayed", wrap=jax.checkpoint)(w, tree, x, c),
        _step(options, "fp8_delayed")(w, tree, x, c),
    )


def test_conv__residuals__are_one_byte_per_element():
    x, w, _, options = _normal("2d")
    f = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_current")
    kept = jax.tree.leaves(jax.vjp(f, x, w)[1])
    assert sorted(a.nbytes for a in kept if a.size > 8) == sorted([x.size, w.size])


def test_conv__data_parallel_shard_map__has_the_scales_of_the_whole_batch():
    """The amax of one part is a quarter of the other's: its own scale would change its codes."""
    x, w, c, options = _normal("2d_batch_groups")
    options = {**options, "batch_group_count": 1}
    rows = jnp.asarray([1.0, 1.0, 3.0, 3.0])[:, None, None, None]
    x, c = x * rows, jnp.concatenate([c, 3 * c])
    f = functools.partial(ops.conv_general_dilated, **options, recipe="fp8_current")
    run = functools.partial(_three_products, f)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = (P("data"), P(), P("data"))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data"), P()))
    actual, expected = jax.block_until_ready(jax.jit(sharded)(x, w, c)), jax.jit(run)(x, w, c)
    for a, b in zip(actual, expected, strict=True):  # an order of sums apart
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


# Errors.


def test_conv__integers__raises_with_the_types():
    x, w, _, options = _normal("2d")
    with pytest.raises(TypeError, match=r"'fp8_current' multiplies floats; given int32 x float32"):
        ops.conv_general_dilated(x.astype(jnp.int32), w, **options, recipe="fp8_current")


@pytest.mark.parametrize(
    ("backend", "message"),
    [("truncated", "'truncated' of recipe 'fp8_current' has no conv"), ("nativ", "mean 'native'")],
)
def test_conv__backend_of_matmuls_only_or_unknown__is_refused(backend, message):
    x, w, _, options = _normal("2d")
    recipe = dataclasses.replace(get_recipe("fp8_current"), backend=backend)
    with pytest.raises(ValueError, match=message):
        ops.conv_general_dilated(x, w, **options, recipe=recipe)


def test_conv__recipe_none_with_a_study_backend__is_the_stock_convolution():
    """As the layers that a study leaves in high precision."""
    x, w, _, options = _normal("2d")
    recipe = dataclasses.replace(get_recipe("none"), backend="truncated")
    out = ops.conv_general_dilated(x, w, **options, recipe=recipe)
    np.testing.assert_array_equal(out, lax.conv_general_dilated(x, w, **options))


def test_conv__delayed_without_state__raises():
    x, w, _, options = _normal("2d")
    with pytest.raises(ValueError, match=r"conv_general_dilated: recipe 'fp8_delayed' takes"):
        ops.conv_general_dilated(x, w, **options, recipe="fp8_delayed")


def test_conv__differentiated_on_a_split_explicit_mesh__raises_what_to_do():
    x, w, _, options = _normal("2d_batch_groups")
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data"))
        x = jax.device_put(x, split)
        f = functools.partial(
            ops.conv_general_dilated,
            **{**options, "batch_group_count": 1},
            recipe="fp8_current",
            out_sharding=split,
        )
        assert f(x, w).shape == (4, 7, 5, 8)
        with pytest.raises(ValueError, match=r"explicit axes.*AxisType.Auto"):
            jax.vjp(f, x, w)
