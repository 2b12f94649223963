"""The tree of call sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import state
from lowprec_jax.recipes import FP8_DELAYED, Column, init_state


def _observation(amax):
    return jnp.zeros((3, 5)).at[:, Column.AMAX].set(amax).at[:, Column.SIZE].set(10)


def _tree():
    site = init_state(FP8_DELAYED)
    return {"b": {"q": site, "none": {}}, "a": [site, {"down": init_state(FP8_DELAYED, (2,))}]}


def test_sites__nested_tree__lists_paths_in_tree_order_and_skips_what_is_no_site():
    assert [path for path, _ in state.sites(_tree())] == ["a/0", "a/1/down", "b/q"]
    assert state.sites({}) == []


@pytest.mark.parametrize("thing", [{}, None, jnp.zeros(3), {"amax_history": jnp.zeros(3)}, [1]])
def test_is_site__anything_else__is_false(thing):
    assert not state.is_site(thing)
    assert state.is_site(init_state(FP8_DELAYED))


def test_map_sites__function__gets_sites_and_keeps_the_structure():
    marked = state.map_sites(lambda site: len(site), _tree())
    assert marked == {"b": {"q": 3, "none": {}}, "a": [3, {"down": 3}]}


def test_make_sinks__tree__adds_a_fresh_zero_ref_to_every_site_and_keeps_the_rest():
    tree = _tree()
    live = state.make_sinks(tree)
    sinks = [site["sink"] for _, site in state.sites(live)]
    assert [sink[...].shape for sink in sinks] == [(3, 5), (2, 3, 5), (3, 5)]
    assert len({id(sink) for sink in sinks}) == 3
    assert all((sink[...] == 0).all() for sink in sinks)
    assert live["a"][0]["amax_history"] is tree["a"][0]["amax_history"]
    assert "sink" not in tree["a"][0]


def test_make_sinks__calibrating__leaves_the_history_out():
    live = state.make_sinks(_tree(), calibrating=True)
    assert all("amax_history" not in site for _, site in state.sites(live))


def test_collect__observed_refs__merges_into_pending_of_their_own_site():
    tree = _tree()
    tree["b"]["q"] = tree["b"]["q"] | {"pending": _observation(5.0)}
    live = state.make_sinks(tree)
    live["b"]["q"]["sink"][...] = _observation(3.0)
    live["a"][1]["down"]["sink"][1] = _observation(7.0)
    new = state.collect(tree, live)
    np.testing.assert_array_equal(new["b"]["q"]["pending"][0], [5, 0, 0, 0, 20])
    np.testing.assert_array_equal(new["a"][1]["down"]["pending"][:, 0, 0], [0, 7])
    np.testing.assert_array_equal(new["a"][0]["pending"], 0)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    np.testing.assert_array_equal(tree["b"]["q"]["pending"], _observation(5.0))


def test_add_observations__one_a_site__in_tree_order():
    seen = [_observation(1.0), jnp.stack([_observation(2.0), _observation(3.0)]), _observation(4.0)]
    new = state.add_observations(_tree(), seen)
    amaxes = [site["pending"][..., 0, 0].tolist() for _, site in state.sites(new)]
    assert amaxes == [1, [2, 3], 4]


@pytest.mark.parametrize("tree", [{}, {"layer": {}}, []])
def test_sinks_and_advance__tree_without_sites__is_returned_as_it_is(tree):
    assert state.collect(tree, state.make_sinks(tree)) == tree
    assert state.advance(tree) == tree


def test_advance__tree__pushes_every_observed_site_and_no_other():
    tree = _tree()
    tree["b"]["q"] = tree["b"]["q"] | {"pending": _observation(5.0)}
    new = jax.jit(state.advance)(tree)
    assert float(new["b"]["q"]["amax_history"][0, 0]) == 5
    jax.tree.map(np.testing.assert_array_equal, new["a"], tree["a"])


def test_advance__when_is_false__changes_nothing():
    tree = {"q": init_state(FP8_DELAYED) | {"pending": _observation(5.0)}}
    new = jax.jit(state.advance)(tree, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, new, tree)


def test_advance__sites_of_equal_shapes__are_lowered_once():
    tree = {str(i): init_state(FP8_DELAYED) for i in range(4)}
    text = jax.jit(state.advance).lower(tree).as_text()
    assert text.count("func.func private @_advance") == 1
    assert text.count("call @_advance") == 4
