"""Probes: what they collect, and what happens where they would add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transforms.adapters import NN
from transforms.helpers import C, W, X, exact, start_site

import lowprec_jax as lp
from lowprec_jax import ops, state
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import FP8_DELAYED, Column, Record, Role, init_state

RECIPE = exact(FP8_DELAYED)
TREE = {"layer": start_site(RECIPE)}
AMAXES = np.array([np.abs(X).max(), np.abs(W[1]).max(), np.abs(C).max()])


def layer(w, live, x):
    return ops.dot_general(x, w, NN, recipe=RECIPE, state=live["layer"])


def loss_of(probes, times=1):
    def loss(w, probes):
        live = state.attach_probes(TREE, probes)
        return sum((layer(w, live, X) * C).sum() for _ in range(times))

    return jax.grad(loss, argnums=(0, 1))(jnp.asarray(W[1]), probes)


def pending(tree):
    return tree["layer"]["pending"]


def test_make_probes__copies__lead_the_axes_of_a_site():
    tree = {"a": init_state(RECIPE), "b": init_state(RECIPE, (2,)), "none": {}}
    probes = state.make_probes(tree, (4, 3))
    assert probes["a"].value.shape == (4, 3, 3, 5)
    assert probes["b"].value.shape == (4, 3, 2, 3, 5)
    assert probes["b"].uses.shape == (4, 3, 2)
    assert probes["none"] == {}
    assert state.make_probes(tree, 4)["a"].value.shape == (4, 3, 5)


@pytest.mark.parametrize("copies", [(), 1, (1, 1)])
def test_collect_probes__one_copy__is_what_a_ref_observes(copies):
    grads, seen = loss_of(state.make_probes(TREE, copies))
    found = pending(state.collect_probes(TREE, seen))
    np.testing.assert_array_equal(found[:, Column.AMAX], AMAXES)
    live = state.make_sinks(TREE)
    expected = jax.grad(lambda w: (layer(w, live, X) * C).sum())(jnp.asarray(W[1]))
    np.testing.assert_array_equal(found, pending(state.collect(TREE, live)))
    np.testing.assert_array_equal(grads, expected)


def test_collect_probes__mapped_over_parts_of_the_batch__takes_max_and_sum():
    def loss(w, probes, x, c):
        return (layer(w, state.attach_probes(TREE, probes), x) * c).sum()

    parts = [jnp.asarray(a).reshape(4, 4, -1) for a in (X, C)]
    grad = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0, 0, 0))
    seen = jax.jit(grad)(jnp.asarray(W[1]), state.make_probes(TREE, 4), *parts)
    found = pending(state.collect_probes(TREE, seen))
    np.testing.assert_array_equal(found[:, Column.AMAX], AMAXES)
    np.testing.assert_array_equal(found[:, Column.SIZE], [X.size, 4 * W[1].size, C.size])


def test_collect_probes__pending_before__is_kept():
    before = jnp.zeros((3, 5)).at[Role.LHS].set(jnp.array([99.0, 0, 0, 0, 7]))
    tree = {"layer": TREE["layer"] | {"pending": before}}
    found = pending(state.collect_probes(tree, loss_of(state.make_probes(TREE))[1]))
    assert found[Role.LHS].tolist() == [99.0, 0, 0, 0, X.size + 7]


def test_collect_probes__layer_that_did_not_run__keeps_its_state():
    tree = {**TREE, "idle": start_site(RECIPE)}
    seen = {**loss_of(state.make_probes(TREE))[1], "idle": state.make_probes(TREE)["layer"]}
    new = state.advance(state.collect_probes(tree, seen))
    jax.tree.map(np.testing.assert_array_equal, new["idle"], tree["idle"])


def test_collect_probes__used_twice__error_names_the_site_and_the_way_out():
    _, seen = loss_of(state.make_probes(TREE), times=2)
    with pytest.raises(UserError, match=r"'layer' was used 2 times.*copies=uses"):
        state.collect_probes(TREE, seen)


def test_collect_probes__used_twice_under_jit__the_amax_is_dropped_and_counted():
    @jax.jit
    def step(probes):
        return state.advance(state.collect_probes(TREE, loss_of(probes, times=2)[1]))

    site = step(state.make_probes(TREE))["layer"]
    np.testing.assert_array_equal(site["observed"][:, Record.DROPPED], 1)
    np.testing.assert_array_equal(site["amax_history"], TREE["layer"]["amax_history"])


def test_attach_probes__several_copies_where_one_is_meant__error_says_how_to_split_them():
    with pytest.raises(UserError, match=r"copies \(4,\).*P\(axis\).*in_axes 0.*index them"):
        loss_of(state.make_probes(TREE, 4))


def test_attach_probes__calibrating__computes_in_high_precision_and_observes():
    x = jnp.asarray(X) * 1.03125  # not on the grid of e4m3

    def loss(w, probes):
        live = state.attach_probes(TREE, probes, calibrating=True)
        return (layer(w, live, x) * C).sum()

    w = jnp.asarray(W[1])
    value, seen = jax.value_and_grad(loss, argnums=1)(w, state.make_probes(TREE))
    np.testing.assert_array_equal(value, ((x @ w) * C).sum())
    found = pending(state.collect_probes(TREE, seen))
    assert found[Role.LHS, Column.AMAX] == jnp.abs(x).max()


def test_nnx_probing__stack_under_vmap_calibrating__every_expert_observes_its_own():
    @nnx.vmap
    def create(rngs):
        return nnx.Linear(4, 4, use_bias=False, rngs=rngs)

    model = lp.nnx.quantize(create(nnx.Rngs(0).split(2)), "fp8_delayed")
    x = jnp.array([1.03125, 4.0])[:, None, None] * jnp.ones((2, 3, 4))  # 1.03125: not in e4m3

    def loss(model, probes, x):
        with lp.nnx.probing(model, probes, calibrating=True):
            return nnx.vmap(lambda m, x: m(x))(model, x).sum()

    grad = nnx.value_and_grad(loss, argnums=(0, 1))
    value, (_, seen) = grad(model, lp.nnx.make_probes(model), x)
    np.testing.assert_allclose(value, np.einsum("ebi,eio->", x, model.kernel[...]), rtol=1e-5)
    lp.nnx.collect_probes(model, seen, advance=False)
    (site,) = lp.nnx.scaling_state(model).values()
    assert site["pending"][:, Role.LHS, Column.AMAX].tolist() == [1.03125, 4]
    assert not site["amax_history"].any()
    lp.nnx.collect_probes(model, seen)
    (site,) = lp.nnx.scaling_state(model).values()
    assert site["amax_history"][:, Role.LHS, 0].tolist() == [1.03125, 4]
