"""The grouped quantized matmul: every group is a matmul of its own, with scales of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax import ops, state
from lowprec_jax.numerics import E4M3FN, E5M2, Quantizer
from lowprec_jax.recipes import (
    FP8_CURRENT,
    FP8_DELAYED,
    Column,
    Gemm,
    Role,
    get_recipe,
    init_state,
)

from . import oracles

M, K, N = 24, 32, 20
NN = (((1,), (0,)), ((), ()))
EXACT = dataclasses.replace(FP8_DELAYED, scale_rounding="power_of_two")
SIZES = {
    "all_used": (5, 7, 4, 8),
    "empty_at_start": (0, 9, 7, 8),
    "empty_in_the_middle": (9, 0, 0, 15),
    "empty_at_end": (12, 5, 7, 0),
    "all_in_one": (0, 0, 24, 0),
    "unused_rows": (5, 0, 4, 8),
    "nothing_used": (0, 0, 0, 0),
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@functools.cache
def _step(recipe, **options):
    """``((lhs, rhs), site, sizes, grad) -> ((out, (dlhs, drhs)), site)``, observed."""

    def loss(operands, live, sizes, grad):
        out = ops.ragged_dot(*operands, sizes, recipe=recipe, state=live, **options)
        # Not grad * out: NaN in unused rows of grad must not reach the value.
        return (jnp.where(grad == 0, 0, out) * grad).sum(), out

    grad_of = state.value_and_grad(loss, has_aux=True)

    def step(operands, site, sizes, grad):
        ((_, out), grads), site = grad_of(operands, site, sizes, grad)
        return (out, grads), site

    return jax.jit(step)


@functools.cache
def _dense_step(recipe):
    """The same of `ops.dot_general`."""

    def loss(operands, live, grad):
        out = ops.dot_general(*operands, NN, recipe=recipe, state=live)
        return (out * grad).sum(), out

    grad_of = state.value_and_grad(loss, has_aux=True)

    def step(operands, site, grad):
        ((_, out), grads), site = grad_of(operands, site, grad)
        return (out, grads), site

    return jax.jit(step)


def _normal(seed=0, groups=4, m=M):
    """Operands and output gradient; every group has a range of its own."""
    rng = np.random.default_rng(seed)
    lhs, rhs, grad = (
        rng.standard_normal(s).astype(np.float32) for s in ((m, K), (groups, K, N), (m, N))
    )
    return lhs, rhs * np.float32(3.0) ** np.arange(groups, dtype=np.float32)[:, None, None], grad


def _grid(seed=0, groups=4):
    """Small integers: with power-of-two scales nothing rounds, so no order of summation shows."""
    rng = np.random.default_rng(seed)
    shapes = (M, K), (groups, K, N), (M, N)
    return [rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes]


def _site(recipe, groups=4, amax=6.0):
    site = init_state(recipe, (groups,))
    if "amax_history" in site:
        each = amax * np.arange(1, groups + 1, dtype=np.float32)[:, None] * np.ones(3, np.float32)
        site["amax_history"] = site["amax_history"].at[..., 0].set(each)
    return site


def _slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Every group by itself is the dense op.


@every_size
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_ragged_dot__each_group__is_the_dense_op_bit_for_bit(sizes, scaling):
    _assert_groups_are_dense(dataclasses.replace(EXACT, scaling=scaling, observe=True), sizes)


def test_ragged_dot__delayed_with_other_formats_in_each_gemm__is_the_dense_op_bit_for_bit():
    """Whose scales `test_recipe_gemms` compares with NumPy."""
    recipe = dataclasses.replace(
        EXACT,
        fwd=Gemm(E4M3FN, Quantizer(E4M3FN, scale="one")),
        dgrad=Gemm(E5M2, Quantizer(E4M3FN, margin=1)),
        wgrad=Gemm(Quantizer(E5M2, margin=2), E4M3FN),
    )
    _assert_groups_are_dense(recipe, SIZES["empty_in_the_middle"])


def _assert_groups_are_dense(recipe, sizes):
    lhs, rhs, grad = _grid()
    site = _site(recipe)
    (out, (dlhs, drhs)), after = _step(recipe)((lhs, rhs), site, jnp.int32(sizes), grad)
    for group, rows in enumerate(_slices(sizes)):
        own = jax.tree.map(lambda x, g=group: x[g], site)
        if sizes[group] == 0:
            _same(jax.tree.map(lambda x, g=group: x[g], after), own)
            assert not drhs[group].any()
            continue
        operands = lhs[rows], rhs[group]
        dense, dense_after = _dense_step(recipe)(operands, own, grad[rows])
        _same((out[rows], (dlhs[rows], drhs[group])), dense)
        _same(jax.tree.map(lambda x, g=group: x[g], after), dense_after)
    assert not out[sum(sizes) :].any()
    assert not dlhs[sum(sizes) :].any()


@pytest.mark.parametrize("recipe", [FP8_DELAYED, FP8_CURRENT], ids=lambda r: r.name)
def test_ragged_dot__normal_data__equals_the_dequantized_composition_in_float64(recipe):
    sizes = (5, 0, 7, 9)
    lhs, rhs, grad = _normal()
    site = _site(recipe)
    (out, (dlhs, drhs)), _ = _step(recipe)((lhs, rhs), site, jnp.int32(sizes), grad)
    for group, rows in enumerate(_slices(sizes)):
        if sizes[group] == 0:
            continue
        arrays = {Role.LHS: lhs[rows], Role.RHS: rhs[group], Role.OUTPUT_GRAD: grad[rows]}
        q = {}
        for role, x in arrays.items():
            fmt = "e5m2" if role == Role.OUTPUT_GRAD else "e4m3fn"
            amax = np.abs(x).max() if not recipe.delayed else np.float32(6.0 * (group + 1))
            scale = np.float32(amax * (np.float32(1) / np.float32(oracles.FORMAT_MAX[fmt])))
            q[role] = np.float64(oracles.quantize(x, fmt, scale)) * np.float64(scale)
        left, right, g = q[Role.LHS], q[Role.RHS], q[Role.OUTPUT_GRAD]
        # f32 sums of at most 32 products and three roundings of scales.
        for ours, exact in (
            (out[rows], left @ right),
            (dlhs[rows], g @ right.T),
            (drhs[group], left.T @ g),
        ):
            assert oracles.relative_error(ours, exact) < 1e-6


def test_ragged_dot__normal_data__error_is_that_of_the_formats():
    """Four-bit significands of two operands: 2**-4 each at most, sqrt(2/3) of it in the mean."""
    sizes = (5, 6, 7, 6)
    lhs, rhs, grad = _normal()
    (out, grads), _ = _step(FP8_CURRENT)(
        (lhs, rhs), init_state(FP8_CURRENT), jnp.int32(sizes), grad
    )
    ids = np.repeat(np.arange(4), sizes)
    exact = np.einsum("mk,mkn->mn", np.float64(lhs), np.float64(rhs)[ids])
    assert 0.01 < oracles.relative_error(out, exact) < 2**-4 * np.sqrt(2 / 3)
    exact = np.einsum("mn,mkn->mk", np.float64(grad), np.float64(rhs)[ids])
    assert 0.01 < oracles.relative_error(grads[0], exact) < 2**-3 * np.sqrt(2 / 3)


# Unused rows and broken groups.


@pytest.mark.parametrize("recipe", ["none", "fp8_current", "fp8_delayed"])
def test_ragged_dot__garbage_in_unused_rows__is_neither_computed_nor_observed(recipe):
    sizes = jnp.int32((5, 0, 4, 8))
    lhs, rhs, grad = _normal()
    bad_lhs, bad_grad = lhs.copy(), grad.copy()
    bad_lhs[17:], bad_grad[17:] = np.nan, np.inf
    recipe = get_recipe(recipe)
    step = _step(recipe)
    good = step((lhs, rhs), _site(recipe), sizes, grad)
    assert np.isfinite(good[0][0]).all()
    _same(step((bad_lhs, rhs), _site(recipe), sizes, bad_grad), good)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_ragged_dot__bad_value_in_one_group__the_others_are_untouched(bad):
    recipe = dataclasses.replace(FP8_DELAYED, scaling="current", observe=True)
    sizes, broken = (5, 7, 4, 8), 1
    lhs, rhs, grad = _normal()
    clean = _step(recipe)((lhs, rhs), _site(recipe), jnp.int32(sizes), grad)
    lhs = lhs.copy()
    lhs[6, 3] = bad
    (out, (dlhs, drhs)), site = _step(recipe)((lhs, rhs), _site(recipe), jnp.int32(sizes), grad)
    (clean_out, (clean_dlhs, clean_drhs)), clean_site = clean
    other_rows = np.r_[0:5, 12:24]
    others = [0, 2, 3]
    _same((out[other_rows], dlhs), (clean_out[other_rows], clean_dlhs))
    _same(drhs[np.array(others)], clean_drhs[np.array(others)])
    _same(site["pending"][np.array(others)], clean_site["pending"][np.array(others)])
    seen = site["pending"][broken, Role.LHS]
    np.testing.assert_array_equal(seen[Column.AMAX], np.float32(bad))
    assert seen[Column.NONFINITE] == 1


def test_ragged_dot__counts__are_those_of_each_group():
    sizes = (5, 0, 7, 9)
    lhs, rhs, grad = _normal()
    site = _site(FP8_DELAYED, amax=0.5)
    _, after = _step(FP8_DELAYED)((lhs, rhs), site, jnp.int32(sizes), grad)
    for group, rows in enumerate(_slices(sizes)):
        for role, x in (
            (Role.LHS, lhs[rows]),
            (Role.RHS, rhs[group]),
            (Role.OUTPUT_GRAD, grad[rows]),
        ):
            if sizes[group] == 0:
                assert not after["pending"][group].any()
                continue
            fmt = "e5m2" if role == Role.OUTPUT_GRAD else "e4m3fn"
            scale = np.float32(0.5 * (group + 1)) * (
                np.float32(1) / np.float32(oracles.FORMAT_MAX[fmt])
            )
            scaled = np.abs(x) * (np.float32(1) / np.float32(scale))
            codes = oracles.quantize(x, fmt, scale)
            # Half a step above the largest value: 464 rounds down, 61440 would round up.
            clipped = (scaled > 464).sum() if fmt == "e4m3fn" else (scaled >= 61440).sum()
            expected = np.abs(x).max(), clipped, ((codes == 0) & (x != 0)).sum(), 0, x.size
            np.testing.assert_array_equal(after["pending"][group, role], np.float32(expected))


def test_ragged_dot__no_rows__gives_no_rows_and_no_gradient():
    lhs, rhs, grad = _normal(m=0)
    site = _site(FP8_DELAYED)
    (out, (dlhs, drhs)), after = _step(FP8_DELAYED)((lhs, rhs), site, jnp.zeros(4, jnp.int32), grad)
    assert (out.shape, dlhs.shape) == ((0, N), (0, K))
    assert not drhs.any()
    _same(after, site)


# Sinks, state, transforms.


def test_ragged_dot__idle_group__keeps_its_state_and_computes_when_it_is_used():
    lhs, rhs, grad = _normal()
    step = _step(FP8_DELAYED)
    site = init_state(FP8_DELAYED, (4,))
    (_, _), site = step((lhs, rhs), site, jnp.int32((6, 6, 6, 6)), grad)
    site = state.advance(site)
    before = jax.tree.map(lambda x: x[2], site)
    for _ in range(50):
        _, site = step((lhs, rhs), site, jnp.int32((8, 8, 0, 8)), grad)
        site = state.advance(site)
    _same(jax.tree.map(lambda x: x[2], site), before)
    (out, grads), site = step((lhs, rhs), site, jnp.int32((0, 0, 24, 0)), grad)
    lhs64, rhs64 = np.float64(lhs), np.float64(rhs[2])
    assert oracles.relative_error(out, lhs64 @ rhs64) < 2**-4 * np.sqrt(2 / 3)
    assert oracles.relative_error(grads[1][2], lhs64.T @ np.float64(grad)) < 2**-3 * np.sqrt(2 / 3)


def test_ragged_dot__calibrating__observes_each_group_in_high_precision():
    sizes = (5, 0, 7, 12)
    lhs, rhs, grad = _normal()

    def loss(operands, live):
        return (
            ops.ragged_dot(*operands, jnp.int32(sizes), recipe=FP8_DELAYED, state=live) * grad
        ).sum()

    site = state.calibrate(loss, (lhs, rhs), init_state(FP8_DELAYED, (4,)))
    for group, rows in enumerate(_slices(sizes)):
        expected = [np.abs(x).max() for x in (lhs[rows], rhs[group], grad[rows]) if sizes[group]]
        np.testing.assert_array_equal(site["amax_history"][group, :, 0], expected or [0, 0, 0])


@pytest.mark.parametrize("remat", [False, True])
def test_ragged_dot__scan_over_layers_with_an_indexed_sink__each_layer_observes_its_own(remat):
    sizes = jnp.int32((5, 0, 7, 12))
    lhs, rhs, grad = _normal()
    site = _site(FP8_DELAYED)

    def run(rhs):
        ref = jax.new_ref(jnp.zeros((2 * 4, 3, 5)))

        def loss(rhs):
            def body(scale, layer):
                sink = ops.IndexedSink(ref, layer * 4 + jnp.arange(4, dtype=jnp.int32))
                live = {**site, "sink": sink}
                out = ops.ragged_dot(scale * lhs, rhs, sizes, recipe=FP8_DELAYED, state=live)
                return 2 * scale, (out * grad).sum()

            wrapped = jax.checkpoint(body) if remat else body
            return jax.lax.scan(wrapped, jnp.float32(1), jnp.arange(2))[1].sum()

        return jax.grad(loss)(rhs), ref[...]

    _, seen = jax.jit(run)(rhs)
    amax = seen[..., Column.AMAX].reshape(2, 4, 3)
    for group, rows in enumerate(_slices(sizes)):
        if sizes[group] == 0:
            assert not amax[:, group].any()
            continue
        first = [np.abs(x).max() for x in (lhs[rows], rhs[group], grad[rows])]
        np.testing.assert_array_equal(amax[:, group], [first, [2 * first[0], *first[1:]]])


def test_ragged_dot__remat__is_bitwise_the_plain_call():
    arrays, sizes, site = _normal(), jnp.int32((5, 0, 7, 12)), _site(FP8_DELAYED)

    def loss(operands, live):
        f = lambda a, b: ops.ragged_dot(a, b, sizes, recipe=FP8_DELAYED, state=live)  # noqa: E731
        out = jax.checkpoint(f)(*operands)
        return (out * arrays[2]).sum(), out

    ((_, out), grads), after = jax.jit(state.value_and_grad(loss, has_aux=True))(arrays[:2], site)
    expected, expected_after = _step(FP8_DELAYED)(arrays[:2], site, sizes, arrays[2])
    _same((out, grads), expected)
    _same(after["pending"][..., 0], expected_after["pending"][..., 0])


def test_ragged_dot__probe__its_gradient_is_the_observation():
    lhs, rhs, grad = _normal()
    sizes, site = jnp.int32((5, 0, 7, 12)), _site(FP8_DELAYED)

    def loss(probe):
        live = {**site, "sink": probe}
        return (ops.ragged_dot(lhs, rhs, sizes, recipe=FP8_DELAYED, state=live) * grad).sum()

    probe = ops.Probe(jnp.zeros((4, 3, 5)), jnp.zeros(4))
    seen, uses = jax.tree.leaves(jax.jit(jax.grad(loss))(probe))
    _same(uses, jnp.ones(4))
    _, after = _step(FP8_DELAYED)((lhs, rhs), site, sizes, grad)
    _same(seen, after["pending"])
    assert not np.signbit(seen).any()


def test_ragged_dot__groups_split_over_a_mesh__is_bitwise_that_of_one_device():
    """Each device has its groups' rows, in front of rows that are not its own."""
    sizes = np.int32((5, 0, 7, 12))
    lhs, rhs, grad = _grid()
    site = _site(EXACT)
    expected, expected_after = _step(EXACT)((lhs, rhs), site, jnp.int32(sizes), grad)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = P("expert")

    @jax.jit
    @jax.shard_map(
        mesh=mesh, in_specs=(P(), split, split, split, P()), out_specs=(P(), split, split)
    )
    def run(lhs, rhs, site, sizes, grad):
        start = jnp.where(jax.lax.axis_index("expert") == 0, 0, 5)

        def loss(operands, live):
            lhs, rhs = operands
            mine = jnp.roll(lhs, -start, axis=0)
            out = ops.ragged_dot(mine, rhs, sizes, recipe=EXACT, state=live)
            out = jnp.roll(out, start, axis=0)
            return jax.lax.psum((out * grad).sum(), "expert"), jax.lax.psum(out, "expert")

        ((_, out), (dlhs, drhs)), site = state.value_and_grad(loss, has_aux=True)((lhs, rhs), site)
        return (out, dlhs), drhs, site

    (out, dlhs), drhs, after = jax.block_until_ready(run(lhs, rhs, site, sizes, grad))
    _same((out, (dlhs, drhs)), expected)
    _same(after, expected_after)


# Lowering.


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_ragged_dot__lowered_for_an_accelerator__multiplies_f8_in_three_grouped_matmuls(platform):
    lhs, rhs, grad = _normal()
    step = jax.jit(lambda *args: _step(FP8_CURRENT)(*args))
    traced = step.trace((lhs, rhs), {}, jnp.int32((5, 0, 7, 12)), grad)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = [
        tuple(t.split("x")[-1] for t in line.split(") -> ")[0].split("tensor<")[1:3])
        for line in text.splitlines()
        if "chlo.ragged_dot" in line
    ]
    assert found == [
        ("f8E4M3FN>, ", "f8E4M3FN>, "),
        ("f8E5M2>, ", "f8E4M3FN>, "),
        ("f8E4M3FN>, ", "f8E5M2>, "),
    ]


def test_ragged_dot__native_and_upcast__are_bitwise_equal_on_cpu():
    lhs, rhs, grad = _normal()
    args = (lhs, rhs), _site(FP8_DELAYED), jnp.int32((5, 0, 7, 12)), grad
    _same(_step(FP8_DELAYED, backend="native")(*args), _step(FP8_DELAYED, backend="upcast")(*args))
    _same(_step(FP8_DELAYED)(*args), _step(FP8_DELAYED, backend="upcast")(*args))


def test_ragged_dot__kept_for_the_backward_pass__codes_as_bytes():
    lhs, rhs, _ = _normal()
    sizes = jnp.int32((5, 0, 7, 12))
    f = lambda *xs: ops.ragged_dot(*xs, sizes, recipe="fp8_current")  # noqa: E731
    _, pull = jax.vjp(f, jnp.asarray(lhs), jnp.asarray(rhs))
    kept = {(x.shape, x.dtype.name) for x in jax.tree.leaves(pull) if getattr(x, "size", 0) > 100}
    assert kept == {((K, M), "uint8"), ((4, K, N), "uint8")}


def test_ragged_dot__bf16_operands__result_is_converted_once_from_f32():
    lhs, rhs, _ = (jnp.asarray(x, jnp.bfloat16) for x in _normal())
    sizes = jnp.int32((5, 0, 7, 12))
    f = functools.partial(ops.ragged_dot, lhs, rhs, sizes, recipe="fp8_current")
    wide = f(preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    _same(f(), wide.astype(jnp.bfloat16))


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lhs": jnp.ones((M, K + 1))}, ValueError, "do not fit"),
        ({"rhs": jnp.ones((K, N))}, ValueError, "do not fit"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, ValueError, "do not fit"),
        ({"group_sizes": jnp.ones(4)}, TypeError, "pass int32"),
        ({"lhs": jnp.ones((M, K), jnp.int8)}, TypeError, "multiplies floats"),
        ({"backend": "upcst"}, ValueError, "upcast"),
        ({"state": None}, ValueError, r"init_state\(recipe, \(4,\)\)"),
        ({"state": init_state(FP8_DELAYED)}, ValueError, r"init_state\(recipe, \(4,\)\)"),
        ({"state": {"sink": jnp.zeros((4, 3, 5))}}, TypeError, "A sink must be"),
    ],
)
def test_ragged_dot__bad_arguments__are_refused(change, error, message):
    arguments = {
        "lhs": jnp.ones((M, K)),
        "rhs": jnp.ones((4, K, N)),
        "group_sizes": jnp.ones(4, jnp.int32),
        "state": init_state(FP8_DELAYED, (4,)),
        "recipe": "fp8_delayed",
    }
    with pytest.raises(error, match=message):
        ops.ragged_dot(**(arguments | change))


def test_ragged_dot__differentiated_without_a_sink__is_refused():
    lhs, rhs, _ = _normal()

    def loss(rhs):
        site = init_state(FP8_DELAYED, (4,))
        return ops.ragged_dot(
            lhs, rhs, jnp.ones(4, jnp.int32), recipe="fp8_delayed", state=site
        ).sum()

    with pytest.raises(ValueError, match="differentiated without a sink"):
        jax.grad(loss)(rhs)
