"""What every registered recipe must do. Registering a recipe makes it run through here."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec_jax import ops, state
from lowprec_jax.numerics import sqnr_db
from lowprec_jax.recipes import (
    FP8_DELAYED,
    Role,
    get_recipe,
    init_state,
    recipes,
    register_recipe,
    registry,
)

DIMS = (((1,), (0,)), ((), ()))
DEPTH, ROWS, WIDTH, COLUMNS = 3, 16, 32, 24
every_recipe = pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.name)


def _arrays(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (ROWS, WIDTH), dtype)
    w = jax.random.normal(keys[1], (WIDTH, COLUMNS), dtype)
    return x, w, jax.random.normal(keys[2], (ROWS, COLUMNS), dtype)


def _loss(w, live, x, c, recipe, wrap=lambda f: f):
    def layer(w, x):
        return ops.dot_general(x, w, DIMS, recipe=recipe, state=live["layer"])

    return (wrap(layer)(w, x) * c).astype(jnp.float32).sum()


@functools.cache
def _step(recipe, wrap=lambda f: f):
    """``(w, state, x, c) -> ((value, dw), next state)``, compiled once for each recipe."""
    grad = state.value_and_grad(functools.partial(_loss, recipe=recipe, wrap=wrap))

    def step(w, tree, x, c):
        out, tree = grad(w, tree, x, c)
        return out, state.advance(tree)

    return jax.jit(step)


def _warm(recipe):
    """State after one step."""
    x, w, c = _arrays(1)
    return _step(recipe)(w, {"layer": init_state(recipe)}, x, c)[1]


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def check_static(recipe):
    traces = []

    @functools.partial(jax.jit, static_argnums=2)
    def product(x, w, recipe, site):
        traces.append(recipe)
        return ops.dot_general(x, w, DIMS, recipe=recipe, state=site)

    x, w, _ = _arrays()
    site = init_state(recipe)
    product(x, w, recipe, site)
    product(x, w, dataclasses.replace(recipe), site)
    assert len(traces) == 1
    assert hash(recipe) == hash(dataclasses.replace(recipe))


def check_accuracy(recipe):
    """After one step the product is that of a format with three mantissa bits, or better."""
    x, w, _ = _arrays(1)
    product = jax.jit(functools.partial(ops.dot_general, dimension_numbers=DIMS, recipe=recipe))
    out = product(x, w, state=_warm(recipe)["layer"])
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    bits = [f.bits for r in (Role.LHS, Role.RHS) if (f := recipe.formats_of(r)[0])]
    bound = 3 * min(bits, default=8)  # on average e4m3fn 28 dB, e2m1 16 dB, int4 17 dB
    assert float(sqnr_db(jnp.asarray(exact, jnp.float32), out)) > bound


def check_gradient(recipe):
    x, w, c = _arrays(1)
    tree = _warm(recipe)
    (_, dw), tree = _step(recipe)(w, tree, x, c)
    exact = np.asarray(x, np.float64).T @ np.asarray(c, np.float64)
    error = np.linalg.norm(dw - exact) / np.linalg.norm(exact)
    bits = min((f.bits for f in recipe.formats_of(Role.OUTPUT_GRAD) if f), default=8)
    # e5m2 output gradients lose 23.5 dB; stochastically rounded e2m1 ones 16 dB.
    assert error < 10 ** (-2.75 * bits / 20)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def check_remat(recipe):
    x, w, c = _arrays()
    tree = _warm(recipe)
    _assert_same(_step(recipe, jax.checkpoint)(w, tree, x, c), _step(recipe)(w, tree, x, c))


def check_scan(recipe):
    """A scan over stacked layers equals the loop, value, gradient and state."""
    x = _arrays()[0]
    ws = jax.random.normal(jax.random.key(7), (DEPTH, WIDTH, WIDTH)) / 8
    layer = functools.partial(ops.dot_general, dimension_numbers=DIMS, recipe=recipe)
    stacked = {"layers": init_state(recipe, (DEPTH,))}
    singles = {str(i): init_state(recipe) for i in range(DEPTH)}

    def scanned(ws, live, x):
        h, _ = lax.scan(lambda h, s: (layer(h, s[0], state=s[1]), None), x, (ws, live["layers"]))
        return (h**2).sum()

    def looped(ws, live, x):
        for i in range(DEPTH):
            x = layer(x, ws[i], state=live[str(i)])
        return (x**2).sum()

    (_, d_scan), scan_state = jax.jit(state.value_and_grad(scanned))(ws, stacked, x)
    (_, d_loop), loop_state = jax.jit(state.value_and_grad(looped))(ws, singles, x)
    # Codes are the same (scale 1 or the tensor's own); the f32 sums may be ordered differently.
    np.testing.assert_allclose(d_scan, d_loop, rtol=1e-5, atol=1e-5 * float(jnp.abs(d_loop).max()))
    rows = [loop_state[str(i)] for i in range(DEPTH)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scan_state["layers"], stacked
    )


def check_vmap(recipe):
    """Without a sink, mapping over examples is a loop over examples."""
    xs = jax.random.normal(jax.random.key(5), (4, ROWS, WIDTH))
    w, site = _arrays()[1], _warm(recipe)["layer"]
    product = functools.partial(ops.dot_general, dimension_numbers=DIMS, recipe=recipe, state=site)
    mapped = jax.jit(jax.vmap(product, in_axes=(0, None)))(xs, w)
    one = jax.jit(product)
    # Summation order only: eps * sqrt(K) with a wide berth.
    np.testing.assert_allclose(mapped, jnp.stack([one(x, w) for x in xs]), rtol=1e-5, atol=1e-5)


def check_abstract(recipe):
    """Shapes are known without computing, also those of a step."""
    tree = jax.eval_shape(lambda: {"layer": init_state(recipe)})
    x, w, c = jax.eval_shape(_arrays)
    (value, dw), new = jax.eval_shape(_step(recipe), w, tree, x, c)
    assert (value.shape, dw.shape) == ((), w.shape)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(
        lambda s: (s.shape, s.dtype), tree
    )


def check_round_trip(recipe):
    """State survives Flax's serialization and a plain dict of NumPy arrays bit for bit."""
    x, w, c = _arrays()
    tree = _warm(recipe)
    fresh = {"layer": init_state(recipe)}
    plain = jax.tree.map(np.array, tree)
    through_bytes = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(tree))
    through_dict = flax.serialization.from_state_dict(fresh, flax.serialization.to_state_dict(tree))
    expected = _step(recipe)(w, tree, x, c)
    for restored in (plain, through_bytes, through_dict):
        _assert_same(restored, plain)
        _assert_same(_step(recipe)(w, restored, x, c), expected)


def check_dtypes(recipe):
    """Results and gradients have the type of the operands, state stays f32."""
    tree = {"layer": init_state(recipe)}

    def product(operands, live):
        return ops.dot_general(*operands, DIMS, recipe=recipe, state=live["layer"])

    grad = state.value_and_grad(lambda p, live, c: (product(p, live) * c).astype(jnp.float32).sum())
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, w, c = jax.eval_shape(functools.partial(_arrays, dtype=dtype))
        assert jax.eval_shape(product, (x, w), tree).dtype == dtype
        (_, grads), new = jax.eval_shape(grad, (x, w), tree, c)
        assert [g.dtype for g in grads] == [dtype, dtype]
        assert {leaf.dtype for leaf in jax.tree.leaves(new)} <= {jnp.dtype(jnp.float32)}


CHECKS = [
    check_static,
    check_accuracy,
    check_gradient,
    check_remat,
    check_scan,
    check_vmap,
    check_abstract,
    check_round_trip,
    check_dtypes,
]


@every_recipe
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_recipe__registered__conforms(recipe, check):
    check(recipe)


@pytest.mark.parametrize("check", [check_gradient, check_abstract, check_round_trip])
def test_recipe__registered_by_a_user__joins_without_edits(monkeypatch, check):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    mine = dataclasses.replace(FP8_DELAYED, name="mine", history_length=5, margin=1)
    register_recipe(mine)
    assert recipes()[-1] == mine
    check(get_recipe("mine"))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
def test_none__any_operands__is_lax_dot_general_bit_for_bit(dtype):
    x, w, c = _arrays(dtype=dtype)
    ours, pull = jax.vjp(lambda x, w: ops.dot_general(x, w, DIMS, recipe="none"), x, w)
    plain, plain_pull = jax.vjp(lambda x, w: lax.dot_general(x, w, DIMS), x, w)
    _assert_same((ours, *pull(c)), (plain, *plain_pull(c)))


def test_none__precision_and_preferred_type__are_passed_on():
    x, w, _ = _arrays(dtype=jnp.bfloat16)
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    ours = jax.make_jaxpr(lambda x, w: ops.dot_general(x, w, DIMS, recipe="none", **options))(x, w)
    plain = jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, DIMS, **options))(x, w)
    assert str(ours) == str(plain)
