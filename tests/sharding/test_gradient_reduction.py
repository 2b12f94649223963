"""The FP8 sum of gradients on 8 emulated devices, against NumPy with `ml_dtypes`."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax import compat
from lowprec_jax.ops import collectives, stablehlo_collectives
from lowprec_jax.sharding import fp8_all_reduce, init_reduction
from lowprec_jax.sharding.gradient_reduction import next_mu

N = 8
E4M3 = ml_dtypes.float8_e4m3fn
MODES = ("f32", "fp8")
F32 = np.float32


def mesh(shape=(N,), names=("d",)):
    axis_types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices()[:N])


def own(grads):
    """What one device has of arrays whose first axis is the devices."""
    return jax.tree.map(lambda x: x[0], grads)


@functools.cache
def reduction(accumulate):
    """``(grads [N, ...], state) -> (sums, state)``, the default checks of `shard_map` on."""
    f = lambda grads, state: fp8_all_reduce(own(grads), state, "d", accumulate=accumulate)  # noqa: E731
    return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P()))


def reduce(grads, state=None, accumulate="f32"):
    state = init_reduction(grads) if state is None else state
    return jax.tree.map(np.asarray, reduction(accumulate)(grads, state))


def mixed():
    """Leaves of very different magnitude and size: odd, below the device count, a scalar."""
    rng = np.random.default_rng(0)
    shapes = {
        "large": ((40, 50), 1e2),
        "small": ((333,), 1e-8),
        "three": ((3,), 1.0),
        "one": ((), 3),
    }
    return {
        name: (rng.standard_normal((N, *shape)) * size).astype(F32)
        for name, (shape, size) in shapes.items()
    }


def codes_of(x, scale):
    return np.clip(x * (F32(1) / scale), -448, 448).astype(E4M3)


def ring_sum(codes):
    """Codes [N, ...] added in FP8, saturating: the values after every addition, f32 [N, ...]."""
    partial = [codes[0].astype(F32)]
    for row in codes[1:]:
        total = partial[-1] + row.astype(F32)
        partial.append(np.clip(total, -448, 448).astype(E4M3).astype(F32))
    return np.stack(partial)


def oracle(x, mu, accumulate):
    """The sum of one leaf f32[N, ...] and its fraction of values at the maximum."""
    per_448 = F32(1) / F32(448)
    scale = np.abs(x).max() / mu * per_448
    codes = codes_of(x, scale)
    if accumulate == "fp8":
        partial = ring_sum(codes)
        return partial[-1] * scale, np.mean((np.abs(partial) == 448).any(axis=0))
    total = codes.astype(F32).sum(axis=0) * scale
    slices = np.pad(total.reshape(-1), (0, -total.size % (N * 128))).reshape(N, -1)
    amax = np.abs(slices).max(axis=1, keepdims=True)
    scales = np.where(amax > 0, amax * per_448, F32(1))
    sums = codes_of(slices, scales).astype(F32) * scales
    fraction = np.mean(np.abs(codes.astype(F32)) == 448)
    return sums.reshape(-1)[: total.size].reshape(total.shape), fraction


@pytest.mark.parametrize("mu", [1.0, 0.3])
@pytest.mark.parametrize("accumulate", MODES)
def test_fp8_all_reduce__mixed_tree__is_bit_for_bit_the_numpy_model(accumulate, mu):
    grads = mixed()
    state = {**init_reduction(grads), "mu": jnp.full(len(grads), mu, jnp.float32)}
    sums, after = reduce(grads, state, accumulate)
    # The state is in the order of the leaves: sorted keys.
    for name, mu_after, seen in zip(sorted(grads), after["mu"], after["saturated"], strict=True):
        expected, fraction = oracle(grads[name], F32(mu), accumulate)
        np.testing.assert_array_equal(sums[name], expected)
        assert sums[name].dtype == F32
        # XLA divides by a constant with its reciprocal: two roundings.
        assert seen == pytest.approx(fraction, rel=2**-22)
        grown = min(F32(mu) * F32(2 ** (1 / 1000)), F32(1))
        assert mu_after == (F32(mu) / 2 if fraction > 1e-5 else grown)


def test_fp8_all_reduce__against_float64__within_the_rounding_bound():
    grads = mixed()
    sums, _ = reduce(grads)
    relative = {}
    for name, x in grads.items():
        exact = x.astype(np.float64).sum(axis=0)
        # Half a step: 2**-4 of a normal number, 2**-10 scales of a subnormal one; once for every
        # device, once for the sum, whose slices have an amax of at most N times that of one device.
        scale = np.abs(x).max() / 448
        before = np.abs(x).astype(np.float64).sum(axis=0) * 2**-4 + N * scale * 2**-10
        after = (np.abs(exact) + before) * 2**-4 + N * scale * 2**-10
        assert (np.abs(sums[name] - exact) <= (before + after) * (1 + 1e-6)).all()
        relative[name] = np.linalg.norm(sums[name] - exact) / np.linalg.norm(exact)
    # Measured: 0.037 for normal gradients. Errors of the devices are independent: about
    # 2**-4 / sqrt(3) / 2 each way, before and after the sum.
    assert max(relative["large"], relative["small"]) < 0.04


def test_next_mu__scripted_saturation__follows_the_controller():
    rng = np.random.default_rng(1)
    script = rng.choice([0.0, 0.9e-5, 1.1e-5, 0.5], size=(2500, 3), p=[0.6, 0.398, 0.001, 0.001])
    script = script.astype(F32)
    mu, expected = np.ones(3, F32), np.ones(3, F32)
    step = jax.jit(next_mu)
    for saturated in script:
        mu = np.asarray(step(mu, saturated))
        halved, grown = expected / F32(2), expected * F32(2 ** (1 / 1000))
        expected = np.where(saturated > F32(1e-5), halved, np.minimum(grown, F32(1)))
        np.testing.assert_array_equal(mu, expected)
    assert (script > 1e-5).sum(axis=0).min() >= 2


def test_next_mu__a_thousand_clean_steps__doubles():
    mu = jnp.float32(0.25)
    for _ in range(1000):
        mu = next_mu(mu, jnp.float32(0))
    # The factor is rounded to f32 once: 2**-24 relative, a thousand times, and each product.
    np.testing.assert_allclose(mu, 0.5, rtol=2 * 1000 * 2**-24)


def settled(grads, accumulate):
    state = init_reduction(grads)
    seen = []
    for _ in range(8):
        sums, state = reduce(grads, state, accumulate)
        seen.append(state["saturated"])
    return sums, state, np.stack(seen)


def sqnr_db(sums, x):
    exact = x.astype(np.float64).sum(axis=0)
    return 10 * np.log10((exact**2).sum() / ((sums - exact) ** 2).sum())


@pytest.mark.parametrize("accumulate", MODES)
def test_fp8_all_reduce__settled_mu__beats_pre_and_post_scaling_with_a_fixed_scale(accumulate):
    # One magnitude per leaf, in and out of the range of e4m3 (2**-9 to 448).
    rng = np.random.default_rng(2)
    grads = {
        f"{size:g}": (rng.standard_normal((N, 2000)) * size).astype(F32)
        for size in (1e-8, 1e-3, 1e2, 1e3)
    }
    sums, state, seen = settled(grads, accumulate)
    assert (seen[0] > 1e-5).all()
    assert (seen[-4:] == 0).all()  # no overflow any more
    assert ((state["mu"] > 1 / N / 2) & (state["mu"] < 1)).all()
    one = F32(1)
    auto = {name: sqnr_db(sums[name], x) for name, x in grads.items()}
    pre = {n: sqnr_db(ring_sum(codes_of(x / F32(N), one))[-1] * N, x) for n, x in grads.items()}
    post = {n: sqnr_db(ring_sum(codes_of(x, one))[-1], x) for n, x in grads.items()}
    assert min(auto.values()) > 23  # measured: 23.5 dB in fp8, 28.5 dB in f32
    # A fixed scale loses the smallest leaf as a whole (0 dB) and clips the largest; where a leaf
    # happens to fit it, both round alike, and a shift of the grid is worth 0.2 dB.
    assert max(min(pre.values()), min(post.values())) == 0
    assert all(auto[name] >= max(pre[name], post[name]) - 0.25 for name in grads)
    assert np.mean([*auto.values()]) >= max(np.mean([*f.values()]) for f in (pre, post)) + 5


def test_fp8_all_reduce__sum_in_fp8__settles_between_overflow_and_underflow():
    # With shared scales too: mu = 1 clips the sums, mu = 1/N gives range away for nothing.
    rng = np.random.default_rng(3)
    same_sign = np.abs(rng.standard_normal((N, 2000))).astype(F32)
    wide = (rng.standard_normal((N, 2000)) * np.exp(3 * rng.standard_normal((N, 2000)))).astype(F32)
    grads = {"same_sign": same_sign, "wide": wide}
    auto, _, _ = settled(grads, "fp8")

    def fixed(mu):
        return reduce(grads, {**init_reduction(grads), "mu": jnp.full(2, mu, jnp.float32)}, "fp8")[
            0
        ]

    assert sqnr_db(auto["same_sign"], same_sign) > sqnr_db(fixed(1.0)["same_sign"], same_sign) + 10
    assert (auto["wide"] == 0).sum() < 0.7 * (fixed(1 / N)["wide"] == 0).sum()


def test_fp8_all_reduce__on_the_wire__is_one_byte_per_element_in_two_messages():
    grads = {name: jnp.zeros((N, 64, 128)) for name in "abcd"}
    state = init_reduction(grads)
    plain = jax.shard_map(
        lambda g: lax.psum(own(g), "d"), mesh=mesh(), in_specs=P("d"), out_specs=P()
    )
    reference = collectives(jax.jit(plain).lower(grads).compile())
    for accumulate in MODES:
        program = reduction(accumulate).lower(grads, state)
        for found in (stablehlo_collectives(program), collectives(program.compile())):
            assert sorted((c.kind, c.dtype, c.executed) for c in found) == [
                ("all-gather", "u8", 1),
                ("all-reduce", "f32", 1),
                ("all-to-all", "u8", 1),
            ]
            (amaxes,) = (c for c in found if c.kind == "all-reduce")
            assert amaxes.payload_bytes == 4 * 4
            wire = sum(c.wire_bytes for c in found)
            # 2 (n-1)/n a byte for each element; behind the codes of a device 8 bytes for each leaf.
            expected = 2 * 7 / 8 * 4 * 8192 + 7 / 8 * N * 4 * 8 + 2 * 7 / 8 * 16
            assert wire == expected
            assert wire <= 0.27 * sum(c.wire_bytes for c in reference)


@pytest.mark.parametrize("accumulate", MODES)
def test_fp8_all_reduce__every_device__has_the_same_bits(accumulate):
    grads = mixed()

    def f(grads, state):
        out = fp8_all_reduce(own(grads), state, "d", accumulate=accumulate)
        assert {compat.varying_axes(x) for x in jax.tree.leaves(out)} == {frozenset()}
        return jax.tree.map(lambda x: compat.to_varying(x, "d")[None], out)

    mapped = jax.shard_map(f, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P("d"))
    for x in jax.tree.leaves(jax.jit(mapped)(grads, init_reduction(grads))):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))


@pytest.mark.parametrize("accumulate", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fp8_all_reduce__not_finite_on_one_device__is_seen_and_does_not_poison(accumulate, bad):
    clean = {"a": mixed()["large"], "b": mixed()["small"]}
    state = {**init_reduction(clean), "mu": jnp.full(2, 0.3, jnp.float32)}
    broken = {**clean, "a": clean["a"].copy()}
    broken["a"][3, 7, 11] = bad
    sums, after = reduce(broken, state, accumulate)
    assert np.isnan(sums["a"]).all()
    assert after["mu"][0] == F32(0.3)
    expected, _ = reduce(clean, state, accumulate)
    np.testing.assert_array_equal(sums["b"], expected["b"])
    again, _ = reduce(clean, after, accumulate)
    np.testing.assert_array_equal(again["a"], expected["a"])


def test_fp8_all_reduce__sum_beyond_f32__is_not_finite():
    grads = {"a": np.full((N, 4), 3e38, F32)}
    sums, _ = reduce(grads)
    assert not np.isfinite(sums["a"]).any()


@pytest.mark.parametrize("accumulate", MODES)
def test_fp8_all_reduce__zeros_and_empty__give_zeros_and_keep_mu(accumulate):
    grads = {"zeros": np.zeros((N, 5), F32), "empty": np.zeros((N, 0, 3), F32)}
    state = {**init_reduction(grads), "mu": jnp.full(2, 0.3, jnp.float32)}
    sums, after = reduce(grads, state, accumulate)
    assert {k: v.shape for k, v in sums.items()} == {"zeros": (5,), "empty": (0, 3)}
    assert (sums["zeros"] == 0).all()
    assert (after["mu"] == F32(0.3)).all()
    assert (after["saturated"] == 0).all()


def test_fp8_all_reduce__only_empty_leaves__stay_empty():
    sums, after = reduce([np.zeros((N, 0), F32), np.zeros((N, 3, 0), F32)])
    assert [x.shape for x in sums] == [(0,), (3, 0)]
    assert (after["mu"] == 1).all()


def test_fp8_all_reduce__sparse_leaf__never_loses_its_largest_values():
    # Less than 0.001 % of the values are not zero: no step ever looks saturated.
    x = np.zeros((N, 200_000), F32)
    x[2, 77] = 1.0
    state = init_reduction({"x": x})
    for _ in range(3):
        sums, state = reduce({"x": x}, state)
    assert state["mu"] == 1
    assert sums["x"][77] == pytest.approx(1, rel=1e-6)


def test_fp8_all_reduce__one_axis_of_two_and_both__match_psum():
    grads = np.arange(N, dtype=F32).reshape(2, 4, 1) * np.ones((1, 1, 12), F32)
    over = mesh((2, 4), ("a", "b"))

    def run(axes, out):
        f = lambda g, s: fp8_all_reduce({"w": g[0, 0]}, s, axes)[0]["w"]  # noqa: E731
        mapped = jax.shard_map(f, mesh=over, in_specs=(P("a", "b"), P()), out_specs=out)
        return jax.jit(mapped)(grads, init_reduction({"w": 0}))

    # Small integers: what is rounded is the scale, 2**-24 relative, and 28 = 1.75 * 2**4 is a code.
    np.testing.assert_allclose(run(("a", "b"), P()), np.full(12, 28.0), rtol=1e-6)
    per_row = run("b", P("a")).reshape(2, 12)
    np.testing.assert_allclose(per_row, [[6.0] * 12, [22.0] * 12], rtol=2**-4)


def test_fp8_all_reduce__bf16_and_replicated_leaves__are_f32_sums_as_of_psum():
    def f(state):
        grads = [jnp.ones((9,), jnp.bfloat16), jnp.full((), 2.0)]
        return fp8_all_reduce(grads, state, ("d",))[0]

    mapped = jax.shard_map(f, mesh=mesh(), in_specs=P(), out_specs=P())
    ones, twos = jax.jit(mapped)(init_reduction([0, 0]))
    assert (ones.dtype, twos.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(ones, np.full(9, 8.0), rtol=1e-6)
    np.testing.assert_allclose(twos, 16.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("grads", "leaves", "accumulate", "error", "match"),
    [
        ([jnp.ones(3)], 1, "bf16", ValueError, r"accumulate='bf16'; choose 'f32' or 'fp8'"),
        ([jnp.ones(3, jnp.int32)], 1, "f32", TypeError, r"type int32; .*jax\.lax\.psum"),
        ([jnp.ones(3)], 2, "f32", ValueError, r"state is of 2 leaves, grads has 1\. .*init_red"),
    ],
)
def test_fp8_all_reduce__bad_input__is_refused(grads, leaves, accumulate, error, match):
    with pytest.raises(error, match=match):
        fp8_all_reduce(grads, init_reduction([0] * leaves), "d", accumulate=accumulate)


def test_fp8_all_reduce__no_leaves__is_nothing():
    assert fp8_all_reduce({}, init_reduction({}), "d")[0] == {}
