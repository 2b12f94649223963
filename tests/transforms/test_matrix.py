"""Recipes x front ends x transforms: values, gradients and state are what NumPy says, bit for bit.

Every recipe that is registered joins by itself. Recipes whose scales come from the same place are
one group; in CI a covering array runs every pair of group, front end and transform, and the recipes
of a group take turns: 94 tests, 92 s of CPU time. The whole product, for a nightly run::

    python -m pytest tests/transforms --full-matrix
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms.adapters import ADAPTERS
from transforms.helpers import (
    BATCH,
    DEVICES,
    STEPS,
    assert_state,
    batch,
    chain,
    experts,
    recipe_groups,
    state_kind,
)
from transforms.pairwise import all_pairs, covering_array, pairs_of

from lowprec_jax.errors import UserError

POLICIES = {
    "none": None,
    "named": jax.checkpoint_policies.save_only_these_names("quantized_lhs", "quantized_rhs"),
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


@functools.cache
def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


# How a step is run: run(step, carrier, x, c) -> (value, grads, carrier).


def donated(step):
    """Old state cannot be used again, every donated buffer is."""
    run = jax.jit(step, donate_argnums=0)

    def wrapped(carrier, x, c):
        carrier = jax.tree.map(jnp.copy, carrier)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = run(carrier, x, c)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carrier))
        return out

    return wrapped


def ahead_of_time(step, **options):
    programs = {}

    def wrapped(carrier, x, c):
        if not programs:
            programs["step"] = jax.jit(step, **options).lower(carrier, x, c).compile()
        return programs["step"](carrier, x, c)

    return wrapped


def ahead_of_time_donated(step):
    run = ahead_of_time(step, donate_argnums=0)
    return lambda carrier, x, c: run(jax.tree.map(jnp.copy, carrier), x, c)


def cross_lowered(step):
    """Lowers for machines that are not here; the values are those of the CPU."""
    run = jax.jit(step)

    def wrapped(carrier, x, c):
        text = run.trace(carrier, x, c).lower(lowering_platforms=("cuda", "tpu")).as_text()
        assert "stablehlo.dot_general" in text
        return run(carrier, x, c)

    return wrapped


def exported(step):
    """In memory: to write a file, JAX needs flatbuffers."""

    def wrapped(carrier, x, c):
        leaves, treedef = jax.tree.flatten((carrier, x, c))
        shapes = jax.eval_shape(step, carrier, x, c)
        flat = jax.jit(lambda *xs: jax.tree.leaves(step(*treedef.unflatten(xs))))
        out = jax.export.export(flat)(*leaves).call(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return wrapped


def sharded(kind):
    """Plain jit; the batch is split over a mesh."""

    def run(step):
        compiled = jax.jit(step)

        def wrapped(carrier, x, c):
            with jax.set_mesh(mesh(kind)):
                carrier = jax.device_put(carrier, NamedSharding(mesh(kind), P()))
                x, c = jax.device_put((x, c), NamedSharding(mesh(kind), P("data")))
                return jax.device_get(jax.block_until_ready(compiled(carrier, x, c)))

        return wrapped

    return run


def in_shard_map(step):
    """The whole step inside the user's region; the loss is summed there."""
    specs = (P(), P("data"), P("data"))
    region = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=P()))
    return lambda *args: jax.device_get(jax.block_until_ready(region(*args)))


def in_pmap(step):
    def summed(carrier, x, c):
        value, grads, carrier = step(carrier, x, c)
        return *jax.lax.psum((value, grads), "data"), carrier

    run = jax.pmap(summed, "data", in_axes=(None, 0, 0))

    def wrapped(carrier, x, c):
        x, c = (a.reshape(DEVICES, -1, a.shape[-1]) for a in (x, c))
        return jax.tree.map(lambda out: out[0], jax.block_until_ready(run(carrier, x, c)))

    return wrapped


def summed_over_examples(step):
    run = jax.jit(step)

    def wrapped(carrier, x, c):
        value, grads, carrier = run(carrier, x, c)
        assert value.shape == (BATCH,)
        return value.sum(), jax.tree.map(lambda g: g.sum(0), grads), carrier

    return wrapped


# What the step differentiates, inside: forward(adapter) -> forward(net, x).


def chained(*calls):
    return lambda adapter: functools.partial(adapter.chain, calls=calls)


def method(name, **options):
    return lambda adapter: functools.partial(getattr(adapter, name), **options)


def psum(value):
    return jax.lax.psum(value, "data")


def shard_map_in_loss(part):
    """The differentiated loss contains the shard_map; each device has its probes."""

    def region(net, probes, x, c):
        return psum(part(net, probes, x, c))

    specs = (P(), P("data"), P("data"), P("data"))
    return jax.shard_map(region, mesh=mesh(), in_specs=specs, out_specs=P())


TWO_LAYERS, TWO_LAYERS_ORACLE = chained(0, 1), chain((0, 1))


@dataclasses.dataclass(frozen=True)
class Transform:
    """One column of the matrix.

    Attributes:
      forward: the model, as the front end of an adapter writes it.
      run: how the step is compiled and called.
      oracle: what NumPy says of a step.
      stacked: the layers are one stack.
      step: arguments of the adapter's `step`.
      probing: (wrapper of the loss, copies); None: the layers observe into refs.
    """

    forward: Callable = TWO_LAYERS
    run: Callable = jax.jit
    oracle: Callable = TWO_LAYERS_ORACLE
    stacked: bool = False
    step: dict = dataclasses.field(default_factory=dict)
    probing: tuple | None = None


_POSITIVE = lambda x: x.max() > 0  # noqa: E731
_NEGATIVE = lambda x: x.max() < 0  # noqa: E731
_NO_WRAP = lambda part: part  # noqa: E731

TRANSFORMS = {
    "jit": Transform(),
    **{
        f"remat_{name}": Transform(forward=method("remat", policy=policy))
        for name, policy in POLICIES.items()
    },
    "scan": Transform(forward=method("scan"), stacked=True),
    "lax_scan": Transform(forward=method("lax_scan"), stacked=True),
    "scan_remat": Transform(forward=method("scan", remat=True), stacked=True),
    "scan_remat_accumulate": Transform(
        forward=method("scan", remat=True), stacked=True, step={"parts": 4}
    ),
    "reuse_under_scan": Transform(
        forward=method("scan", calls=2), stacked=True, oracle=chain((0, 0, 1, 1))
    ),
    "experts": Transform(forward=method("experts"), stacked=True, oracle=experts),
    "experts_probes": Transform(
        forward=method("experts"), stacked=True, oracle=experts, probing=(_NO_WRAP, ())
    ),
    "per_example": Transform(run=summed_over_examples, step={"per_example": True}),
    "vmap_in_loss": Transform(forward=method("vmapped")),
    "accumulate_2": Transform(step={"parts": 2}),
    "accumulate_4": Transform(step={"parts": 4}),
    "reuse_and_unused": Transform(forward=chained(0, 0), oracle=chain((0, 0))),
    "unused": Transform(forward=chained(0), oracle=chain((0,))),
    "cond_taken": Transform(forward=method("cond", taken=_POSITIVE)),
    "cond_not_taken": Transform(forward=method("cond", taken=_NEGATIVE), oracle=chain((0,))),
    "donated": Transform(run=donated),
    "ahead_of_time": Transform(run=ahead_of_time),
    "ahead_of_time_donated": Transform(run=ahead_of_time_donated),
    "cross_lowered": Transform(run=cross_lowered),
    "exported": Transform(run=exported),
    "jit_auto_mesh": Transform(run=sharded(AxisType.Auto)),
    "jit_explicit_mesh": Transform(run=sharded(AxisType.Explicit)),
    "pmap": Transform(run=in_pmap),
    "shard_map": Transform(run=in_shard_map, step={"reduce": psum}),
    "shard_map_accumulate": Transform(run=in_shard_map, step={"reduce": psum, "parts": 2}),
    "shard_map_in_loss": Transform(probing=(shard_map_in_loss, DEVICES)),
}

# Refused with the way out: (transform, front ends), for recipes that keep state.
REFUSED = {"vmap_in_loss": tuple(ADAPTERS), "experts": ("nnx",)}


def matrix(full):
    """Rows (recipe, front end, transform)."""
    groups = recipe_groups()
    if full:
        recipes = [recipe for group in groups for recipe in group]
        return list(itertools.product(recipes, ADAPTERS, TRANSFORMS))
    rows = covering_array([range(len(groups)), list(ADAPTERS), list(TRANSFORMS)])
    turns = [itertools.cycle(group) for group in groups]
    return [(next(turns[group]), front_end, name) for group, front_end, name in rows]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        rows = matrix(metafunc.config.getoption("--full-matrix", default=False))
        ids = ["-".join((recipe.name, *rest)) for recipe, *rest in rows]
        metafunc.parametrize("cell", rows, ids=ids)


def run_steps(adapter, transform):
    """The outcome of the last step, and what NumPy says of each."""
    forward = transform.forward(adapter)
    carrier = adapter.start(transform.stacked)
    if transform.probing is None:
        step = adapter.step(forward, **transform.step)
    else:
        step = adapter.probing_step(forward, *transform.probing)
    run, expected = transform.run(step), []
    for i in range(STEPS):
        x, c = batch(i)
        value, grads, carrier = run(carrier, x, c)
        expected.append(transform.oracle(np.asarray(x), np.asarray(c)))
    return value, adapter.read_grads(grads), carrier, expected


def test_transform__recipe_and_front_end__is_bitwise_what_numpy_says(cell):
    recipe, front_end, name = cell
    adapter = ADAPTERS[front_end](recipe)
    if recipe.stateful and front_end in REFUSED.get(name, ()):
        with pytest.raises(UserError, match=r"under vmap.*per_example.*probing"):
            run_steps(adapter, TRANSFORMS[name])
        return
    value, grads, carrier, expected = run_steps(adapter, TRANSFORMS[name])
    np.testing.assert_array_equal(value, expected[-1].value)
    np.testing.assert_array_equal(grads, expected[-1].grads)
    if recipe.stateful:
        assert_state(jax.device_get(adapter.read(carrier)), recipe, expected)


def test_matrix__covering_array__has_every_pair_and_every_recipe():
    rows = matrix(full=False)
    kinds = [(state_kind(recipe), front_end, name) for recipe, front_end, name in rows]
    groups = [state_kind(group[0]) for group in recipe_groups()]
    found = set().union(*map(pairs_of, kinds))
    assert found == all_pairs([groups, list(ADAPTERS), list(TRANSFORMS)])
    assert {r.name for r, _, _ in rows} == {r.name for group in recipe_groups() for r in group}
    assert len(rows) < len(matrix(full=True))
