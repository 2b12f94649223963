import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from lowprec_jax.optim import Assign, MasterWeightsState, master_weights, read_masters

HALVES = [jnp.bfloat16, jnp.float16]
EVERY = [*HALVES, jnp.float32]


def bits(x):
    """Bit pattern with every NaN made one, so that -0 and +0 differ and NaNs agree."""
    x = np.asarray(x)
    x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_params_are_cast_masters(params, state):
    masters = read_masters(state, params)
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masters), strict=True):
        np.testing.assert_array_equal(bits(p), bits(np.asarray(m).astype(p.dtype)))


def make_params(dtype=jnp.bfloat16):
    w = np.random.default_rng(0).normal(size=(5, 3))
    return {"w": jnp.asarray(w, dtype), "scale": jnp.ones(3, jnp.float32)}


def loss(params, x):
    y = x.astype(params["w"].dtype) @ params["w"]
    return (jnp.square(y.astype(jnp.float32) - 1.0) * params["scale"]).mean()


def train(tx, params, steps=6, jit=True):
    """Runs `steps` steps, checking the promise after each; returns the final pair."""

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.normal(jax.random.key(i), (4, 5)))
        assert_params_are_cast_masters(params, state)
    return params, state


def oracle_sgd(dtype, steps, learning_rate, jit):
    """The same training in f32, gradients taken at the cast parameters."""
    params = make_params(dtype)
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    for i in range(steps):
        x = jax.random.normal(jax.random.key(i), (4, 5))
        grads = (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(params, x)
        masters = jax.tree.map(
            lambda m, g: m - np.float32(learning_rate) * g.astype(jnp.float32), masters, grads
        )
        params = jax.tree.map(lambda m, p: m.astype(p.dtype), masters, params)
    return masters


def random_values(rng, n, dtype):
    """Every magnitude of `dtype` with random mantissas and signs, zeros of both signs."""
    code = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    x = rng.integers(0, np.iinfo(code).max, n, endpoint=True, dtype=code).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.where(np.isfinite(x), x, np.array(-0.0, dtype))


def random_steps(rng, params):
    """f32 updates: any size, or relative 2**-12..1/2 of the parameter, its negation, zero."""
    p = params.astype(np.float32)
    anything = random_values(rng, p.size, np.float32)
    relative = p * np.exp2(rng.uniform(-12, -1, p.size)).astype(np.float32)
    with np.errstate(over="ignore"):
        beyond = -p * np.float32(1 + 2.0**-20)
    kinds = [anything, relative, -relative, -p, np.zeros_like(p), beyond]
    return np.choose(rng.integers(0, len(kinds), p.size), kinds)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", EVERY, ids=lambda d: jnp.dtype(d).name)
def test_params__random_updates_of_all_sizes__are_cast_master_bit_for_bit(dtype, jit):
    rng = np.random.default_rng(1)
    params = random_values(rng, 2_000_000, dtype)
    grads = random_steps(rng, params)
    tx = master_weights(optax.identity())  # the step is the gradient

    def step(p, g):
        updates, state = tx.update(g, tx.init(p), p)
        new = optax.apply_updates(p, updates)
        return new, read_masters(state, new)

    new, master = (jax.jit(step) if jit else step)(jnp.asarray(params), jnp.asarray(grads))
    with np.errstate(over="ignore"):
        cast = np.asarray(master).astype(dtype)
        old = params.astype(np.float32)
        expected = np.where(grads == 0, old, old + grads)
    np.testing.assert_array_equal(bits(new), bits(cast))
    # XLA flushes subnormal f32 sums; everything else is added as NumPy adds.
    parts = np.abs([old, grads, expected])
    normal = np.all((parts == 0) | (parts >= np.finfo(np.float32).tiny), axis=0)
    np.testing.assert_array_equal(
        bits(master)[normal & (old != 0)], bits(expected)[normal & (old != 0)]
    )
    assert normal.mean() > 0.9


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: jnp.dtype(d).name)
def test_params__special_values__are_kept_including_sign_of_zero(dtype):
    tx = master_weights(optax.identity())
    params = jnp.asarray([-0.0, 0.0, -0.0, 1.0, -1.0, 1.0, 3.0], dtype)
    grads = jnp.asarray([-0.0, -0.0, 0.0, -1.0, 2e38, np.nan, -np.inf], jnp.float32)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    big = np.float32(2e38).astype(ml_dtypes.bfloat16) if dtype == jnp.bfloat16 else np.inf
    expected = np.array([-0.0, 0.0, -0.0, 0.0, big, np.nan, -np.inf]).astype(dtype)
    np.testing.assert_array_equal(bits(new), bits(expected))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_master_weights__1000_updates_of_1e_4_on_bf16_one__survive(sign, grad_dtype):
    tx = master_weights(optax.sgd(1e-4))
    params = jnp.ones((), jnp.bfloat16)
    state = tx.init(params)
    grad = jnp.full((), sign, grad_dtype)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(1000):
        params, state = step(params, state)
        assert_params_are_cast_masters(params, state)
    # Each addition near 1 rounds by at most 2**-24, and f32(1e-4) is off by less.
    assert abs(float(state.master) - (1.0 - 0.1 * sign)) < 1000 * 2.0**-24
    plain = params = jnp.ones((), jnp.bfloat16)
    for _ in range(3):
        plain = plain - jnp.asarray(1e-4, jnp.bfloat16)
    assert plain == params  # without masters every such update is lost


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", EVERY, ids=lambda d: jnp.dtype(d).name)
def test_master_weights__sgd__follows_f32_training_on_cast_params(dtype, jit):
    params, state = train(master_weights(optax.sgd(0.1)), make_params(dtype), jit=jit)
    for got, want in zip(
        jax.tree.leaves(read_masters(state, params)),
        jax.tree.leaves(oracle_sgd(dtype, 6, 0.1, jit)),
        strict=True,
    ):
        assert got.dtype == jnp.float32
        # One f32 rounding per step from fused multiply-add; half-precision gradients equal.
        np.testing.assert_allclose(got, want, rtol=6 * 2.0**-23)


def test_master_weights__f32_params__store_nothing_and_update_as_inner():
    params = make_params(jnp.float32)
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    wrapped, plain = master_weights(optax.sgd(0.1)), optax.sgd(0.1)
    updates, state = wrapped.update(grads, wrapped.init(params), params)
    assert jax.tree.leaves(state.master) == []
    expected, _ = plain.update(grads, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_master_weights__inner__sees_f32_gradients_and_f32_masters():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append((updates, params, value))
        return updates, state

    tx = master_weights(optax.GradientTransformationExtraArgs(lambda p: (), update))
    params = {"w": jnp.ones(3, jnp.float16), "n": jnp.arange(2)}
    state = tx.init(params)
    grads = {"w": jnp.ones(3, jnp.float16), "n": np.zeros(2, jax.dtypes.float0)}
    updates, state = tx.update(grads, state, params, value=7)
    tx.update(grads, state, optax.apply_updates(params, updates), value=7)
    grads_seen, params_seen, value = seen[1]
    assert value == 7
    assert [g.dtype for g in jax.tree.leaves(grads_seen)] == [jnp.float32]
    np.testing.assert_array_equal(params_seen["w"], np.full(3, 2.0, np.float32))


def test_master_weights__non_float_leaves_and_none__pass_through_untouched():
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(2), "m": jnp.array(True), "x": None}
    tx = master_weights(optax.adamw(0.1))
    grads = {**params, "n": np.zeros(2, jax.dtypes.float0), "m": np.zeros((), jax.dtypes.float0)}
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates({**params, "m": params["n"]}, {**updates, "m": updates["n"]})
    np.testing.assert_array_equal(new["n"], params["n"])
    assert new["n"].dtype == params["n"].dtype
    assert new["x"] is None
    assert float(new["w"][0]) < 1.0


@pytest.mark.parametrize("inside", [True, False], ids=["wraps_chain", "last_in_chain"])
def test_master_weights__chain_with_clipping__equals_clipped_sgd(inside):
    clip = optax.clip_by_global_norm(0.01)
    if inside:
        tx = master_weights(optax.chain(clip, optax.sgd(1.0)))
    else:
        tx = optax.chain(clip, master_weights(optax.sgd(1.0)))
    before = read_masters(tx.init(make_params(jnp.float16)), make_params(jnp.float16))
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies an f32 norm into float16
        params, state = train(tx, make_params(jnp.float16), steps=1)
    moved = optax.tree.sub(read_masters(state, params), before)
    # Clipping before the wrapper rounds in float16; inside it, only the f32 sum rounds.
    assert abs(float(optax.tree.norm(moved)) - 0.01) < (1e-5 if not inside else 1e-6)


@pytest.mark.parametrize("inside", [True, False], ids=["wraps_multi_steps", "in_multi_steps"])
@pytest.mark.parametrize("skip", [None, optax.transforms.skip_not_finite], ids=["all", "skip"])
def test_master_weights__multi_steps__updates_every_third_step_only(inside, skip):
    if inside:
        multi = optax.MultiSteps(optax.sgd(0.1), 3, should_skip_update_fn=skip)
        tx = master_weights(multi.gradient_transformation())
    else:
        multi = optax.MultiSteps(master_weights(optax.sgd(0.1)), 3, should_skip_update_fn=skip)
        tx = multi.gradient_transformation()
    params = {"w": jnp.asarray([1.0, -0.0, 3e-6], jnp.bfloat16)}
    state = tx.init(params)
    grads = [np.array([g, 0.0, g], np.float32) for g in (1.0, 2.0, 6.0)] * 2
    if skip:
        grads.insert(1, np.full(3, np.nan, np.float32))  # rejected: as if it never came
    history = []
    # Optax's MultiSteps multiplies a bool by an array, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        for g in grads:
            updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            assert_params_are_cast_masters(params, state)
            history.append(bits(params["w"]).tolist())
    emits = [2, 5] if skip is None else [3, 6]
    changed = [i for i in range(1, len(history)) if history[i] != history[i - 1]]
    assert changed == emits
    assert history[0] == bits(jnp.asarray([1.0, -0.0, 3e-6], jnp.bfloat16)).tolist()
    np.testing.assert_allclose(read_masters(state)["w"][0], 1.0 - 2 * 0.3, rtol=1e-6)


@pytest.mark.parametrize("inside", [True, False], ids=["wraps_inject", "in_inject"])
def test_master_weights__inject_hyperparams__schedule_is_followed(inside):
    schedule = optax.linear_schedule(0.5, 0.0, 2)
    with jax.numpy_dtype_promotion("standard"):  # inject_hyperparams itself needs it
        if inside:
            tx = master_weights(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
        else:
            make = optax.inject_hyperparams(lambda rate: master_weights(optax.sgd(rate)))
            tx = make(rate=schedule)
        params = {"w": jnp.ones((2,), jnp.bfloat16)}
        state = tx.init(params)
        for expected in (0.5, 0.25, 0.25):
            grads = {"w": jnp.ones((2,), jnp.float32)}
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert_params_are_cast_masters(params, state)
            np.testing.assert_array_equal(params["w"].astype(jnp.float32), expected)


def test_master_weights__weight_decay_mask_and_schedule__reach_the_inner():
    mask = {"w": True, "scale": False}
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    params = make_params()
    tx = master_weights(optax.adamw(schedule, weight_decay=0.5, mask=mask), jnp.bfloat16)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["scale"], params["scale"])
    expected = np.asarray(params["w"], np.float32) * np.float32(0.95)
    np.testing.assert_allclose(read_masters(state)["w"], expected, rtol=1e-6)


def test_master_weights__inside_masked__trains_the_masked_part_only():
    params = make_params()
    tx = optax.masked(master_weights(optax.sgd(1.0)), {"w": True, "scale": False})
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _state = tx.update(grads, tx.init(params), params)
    updates["scale"] = jnp.zeros_like(params["scale"])  # masked passes the gradient on
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(
        new["w"], (params["w"].astype(jnp.float32) - 1).astype(jnp.bfloat16)
    )


def test_master_weights__apply_if_finite_inside__skips_without_a_trace():
    tx = master_weights(optax.apply_if_finite(optax.adam(0.1), 5))
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.full_like(p, np.nan), params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _state = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), new, params)


def test_master_weights__scan_and_where_guard__keeps_skipped_steps():
    tx = master_weights(optax.sgd(0.1))
    params = {"w": jnp.asarray([1.0, -0.0], jnp.bfloat16)}

    def step(carry, ok):
        params, state = carry
        updates, new_state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
        updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), updates)
        state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new_state, state)
        return (optax.apply_updates(params, updates), state), params["w"]

    carry = (params, tx.init(params))
    (params, state), seen = jax.lax.scan(step, carry, jnp.array([False, True, False, True]))
    assert_params_are_cast_masters(params, state)
    np.testing.assert_array_equal(bits(seen[0]), bits(seen[1]))
    np.testing.assert_array_equal(bits(seen[2]), bits(seen[3]))
    np.testing.assert_allclose(state.master["w"], [0.8, -0.2], rtol=1e-6)


def test_master_weights__vmapped_update__applies_outside_the_vmap():
    tx = master_weights(optax.sgd(0.5))
    params = jnp.ones((3, 2), jnp.bfloat16)
    states = jax.vmap(tx.init)(params)
    updates, _ = jax.vmap(tx.update)(jnp.ones((3, 2), jnp.bfloat16), states, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), np.full((3, 2), 0.5))


def test_master_weights__nnx_optimizer__keeps_the_promise_and_learns():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 3, param_dtype=jnp.bfloat16, rngs=rngs)
            self.norm = nnx.RMSNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x).astype(jnp.float32))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, master_weights(optax.adamw(1e-3)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(lambda m: jnp.square(m(x) - 1.0).mean())(model)
        optimizer.update(model, grads)
        return value

    x = jax.random.normal(jax.random.key(0), (4, 5), jnp.bfloat16)
    losses = []
    for _ in range(30):
        losses.append(float(step(model, optimizer, x)))
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        assert_params_are_cast_masters(params, nnx.as_pure(optimizer.opt_state))
    assert model.linear.kernel[...].dtype == jnp.bfloat16
    assert losses[-1] < losses[0]
    masters = read_masters(nnx.as_pure(optimizer.opt_state))
    assert np.any(masters["linear"]["kernel"] != params["linear"]["kernel"].astype(jnp.float32))


def test_assign__numpy_param__is_replaced():
    new = np.zeros(2, np.float32) + Assign(jnp.ones(2), jnp.array(True))
    np.testing.assert_array_equal(new, [1.0, 1.0])


def test_master_weights__update_without_params__raises():
    tx = master_weights(optax.sgd(0.1))
    state = tx.init(make_params())
    with pytest.raises(ValueError, match=r"no params.*tx\.update\(grads, state, params\)"):
        tx.update(make_params(), state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.float8_e4m3fn])
def test_master_weights__param_dtype_without_masters__raises(dtype):
    with pytest.raises(TypeError, match=f"param_dtype is {jnp.dtype(dtype)}.*bfloat16"):
        master_weights(optax.sgd(0.1), dtype)


@pytest.mark.parametrize(("given", "param_dtype"), [("float16", "bfloat16"), ("float8_e5m2", None)])
def test_init__param_of_other_dtype__raises_and_names_it(given, param_dtype):
    tx = master_weights(optax.sgd(0.1), param_dtype)
    with pytest.raises(TypeError, match=rf"\['w'\] is {given}.*float32, bfloat16"):
        tx.init({"w": jnp.ones(2, given)})


def test_read_masters__nested_state__is_found_and_ambiguity_raises():
    params = make_params()
    state = master_weights(optax.sgd(0.1)).init(params)
    assert read_masters((optax.EmptyState(), {"a": state}))["w"].dtype == jnp.float32
    assert isinstance(state, MasterWeightsState)
    np.testing.assert_array_equal(read_masters(state, params)["scale"], params["scale"])
    with pytest.raises(ValueError, match="found 2"):
        read_masters((state, state))
    with pytest.raises(ValueError, match="found 0"):
        read_masters(optax.sgd(0.1).init(params))
