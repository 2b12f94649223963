"""What a user writes inside `jax.shard_map`: tensor parallelism, a ring, dispatch to experts.

Once with `value_and_grad` inside the region (refs), once with the region inside the differentiated
loss (probes). Data are exact: gradients and amaxes are those of one device, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from transforms.adapters import NN
from transforms.helpers import exact, start_site

import lowprec_jax as lp
from lowprec_jax import ops, state
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT as OWG
from lowprec_jax.recipes import FP8_DELAYED, Column, Record

RECIPE = exact(FP8_DELAYED)
DEVICES, ROWS, WIDTH, HIDDEN = 4, 8, 8, 16
AXIS = "model"
MESH = jax.make_mesh(
    (DEVICES,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES]
)


def integers(seed, *shape):
    """Small integers with one larger one, which is on one device only."""
    rng = np.random.default_rng(seed)
    out = np.float32(rng.integers(-1, 2, shape))
    out.flat[rng.integers(out.size)] = 2.0 + seed % 3
    return jnp.asarray(out)


def sites(*names):
    return {name: start_site(RECIPE) for name in names}


def product(x, w, site):
    return ops.dot_general(x, w, NN, recipe=RECIPE, state=site)


def reference(loss, params, tree, *args):
    """One device, refs."""
    (value, grads), tree = jax.jit(state.value_and_grad(loss))(params, tree, *args)
    return value, grads, state.advance(tree)


def assert_step(actual, expected):
    """Values, gradients and amaxes are equal; replicated operands are counted more often."""
    value, grads, tree = jax.device_get(actual)
    expected_value, expected_grads, expected_tree = jax.device_get(expected)
    np.testing.assert_array_equal(value, expected_value)
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    for (name, site), (_, other) in zip(state.sites(tree), state.sites(expected_tree), strict=True):
        for key in ("amax_history", "pending"):
            np.testing.assert_array_equal(site[key], other[key], err_msg=f"{name} {key}")
        for column in (Column.AMAX, Record.AGE, Record.DROPPED):
            np.testing.assert_array_equal(
                site["observed"][:, column],
                other["observed"][:, column],
                err_msg=f"{name} {column}",
            )
        assert (site["observed"][:, Column.SIZE] >= other["observed"][:, Column.SIZE]).all()


def probing(region, in_specs, tree, params, *args, copies=DEVICES):
    """`region(params, live, *args)` in a shard_map inside the differentiated loss."""

    def part(params, probes, *args):
        return region(params, state.attach_probes(tree, probes), *args)

    specs = (in_specs[0], P(AXIS), *in_specs[1:])
    loss = jax.shard_map(part, mesh=MESH, in_specs=specs, out_specs=P())

    @jax.jit
    def step(params, *args):
        probes = state.make_probes(tree, copies)
        value, (grads, seen) = jax.value_and_grad(loss, argnums=(0, 1))(params, probes, *args)
        return value, grads, state.advance(state.collect_probes(tree, seen))

    return jax.block_until_ready(step(params, *args))


# Tensor parallelism: column-parallel, then row-parallel.

UP, DOWN = integers(0, WIDTH, HIDDEN), integers(1, HIDDEN, WIDTH)
X, C = integers(2, ROWS, WIDTH), integers(3, ROWS, WIDTH)
WEIGHTS = {"up": UP, "down": DOWN}
TP_SPECS = {"up": P(None, AXIS), "down": P(AXIS, None)}


def mlp(params, live, x, c):
    hidden = jax.nn.relu(product(x, params["up"], live["up"]))
    return product(hidden, params["down"], live["down"]), c


def mlp_loss(params, live, x, c):
    out, c = mlp(params, live, x, c)
    return (out * c).sum()


def tensor_parallel(params, live, x, c):
    out, c = mlp(params, live, x, c)
    return (lax.psum(out, AXIS) * c).sum()


@functools.cache
def tp_expected():
    return reference(mlp_loss, WEIGHTS, sites("up", "down"), X, C)


def test_tensor_parallel__shard_map_in_the_loss__is_bitwise_one_device():
    actual = probing(tensor_parallel, (TP_SPECS, P(), P()), sites("up", "down"), WEIGHTS, X, C)
    assert_step(actual, tp_expected())


def test_tensor_parallel__value_and_grad_in_the_region__is_bitwise_one_device():
    def step(params, tree, x, c):
        (value, grads), tree = state.value_and_grad(tensor_parallel)(params, tree, x, c)
        return value, grads, state.advance(tree)

    region = jax.shard_map(
        step, mesh=MESH, in_specs=(TP_SPECS, P(), P(), P()), out_specs=(P(), TP_SPECS, P())
    )
    actual = jax.block_until_ready(jax.jit(region)(WEIGHTS, sites("up", "down"), X, C))
    assert_step(actual, tp_expected())


class TestLinen:
    """Stock layers with a slice of the features each."""

    up = lp.linen.Dense(HIDDEN // DEVICES, use_bias=False, recipe=RECIPE)
    down = lp.linen.Dense(WIDTH, use_bias=False, recipe=RECIPE)
    specs = jax.tree.map(lambda spec: {"kernel": spec}, TP_SPECS)

    def region(self, variables, x, c):
        one = lambda name: {k: v[name] for k, v in variables.items()}  # noqa: E731
        hidden = jax.nn.relu(self.up.apply(one("up"), x))
        return (lax.psum(self.down.apply(one("down"), hidden), AXIS) * c).sum()

    def variables(self):
        site = {"DotGeneral_0": {"scaling": start_site(RECIPE)}}
        params = {name: {"kernel": w} for name, w in WEIGHTS.items()}
        return {"params": params, OWG: {"up": site, "down": site}}

    def check(self, value, grads, scaling):
        kernels = {name: g["kernel"] for name, g in grads.items()}
        scaling = {name: s["DotGeneral_0"]["scaling"] for name, s in scaling.items()}
        assert_step((value, kernels, scaling), tp_expected())

    def test_tensor_parallel__value_and_grad_in_the_region__is_bitwise_one_device(self):
        specs = {"params": self.specs, OWG: P()}
        region = jax.shard_map(
            lp.linen.value_and_grad(self.region),
            mesh=MESH,
            in_specs=(specs, P(), P()),
            out_specs=(P(), specs),
        )
        value, grads = jax.block_until_ready(jax.jit(region)(self.variables(), X, C))
        self.check(value, grads["params"], grads[OWG])

    def test_tensor_parallel__shard_map_in_the_loss__is_bitwise_one_device(self):
        variables = self.variables()
        actual = probing(
            lambda params, live, x, c: self.region({"params": params, OWG: live}, x, c),
            (self.specs, P(), P()),
            variables[OWG],
            variables["params"],
            X,
            C,
        )
        self.check(*actual)


class NnxMlp(nnx.Module):
    def __init__(self):
        for name, w in WEIGHTS.items():
            layer = lp.nnx.Linear(*w.shape, use_bias=False, recipe=RECIPE, rngs=nnx.Rngs(0))
            layer.kernel[...] = w
            layer.dot_general.set_scaling(start_site(RECIPE))
            setattr(self, name, layer)


def nnx_region(model, x, c):
    out = lax.psum(model.down(nnx.relu(model.up(x))), AXIS)
    return (out * c).sum()


def nnx_specs(arrays):
    """A spec for every array of a model: kernels split, scaling state replicated."""

    def spec(path, _):
        return next(
            (TP_SPECS[p.key] for p in path if "kernel" in str(path) and p.key in TP_SPECS), P()
        )

    return jax.tree_util.tree_map_with_path(spec, arrays)


def check_nnx(value, grads, model):
    kernels = {name: grads[name]["kernel"][...] for name in WEIGHTS}
    found = lp.nnx.scaling_state(model)
    tree = {name: found[f"{name}/dot_general"] for name in WEIGHTS}
    assert_step((value, kernels, tree), tp_expected())


def test_nnx_tensor_parallel__value_and_grad_in_the_region__is_bitwise_one_device():
    graphdef, arrays = nnx.split(NnxMlp())
    specs = nnx_specs(arrays)

    def step(arrays, x, c):
        model = nnx.merge(graphdef, arrays)
        value, grads = lp.nnx.value_and_grad(nnx_region)(model, x, c)
        return value, {name: grads[name]["kernel"][...] for name in WEIGHTS}, nnx.state(model)

    region = jax.shard_map(
        step, mesh=MESH, in_specs=(specs, P(), P()), out_specs=(P(), TP_SPECS, specs)
    )
    value, grads, arrays = jax.block_until_ready(jax.jit(region)(arrays, X, C))
    grads = {name: {"kernel": g} for name, g in grads.items()}
    check_nnx(value, grads, nnx.merge(graphdef, arrays))


def test_nnx_tensor_parallel__shard_map_in_the_loss__is_bitwise_one_device():
    def part(arrays, probes, x, c, graphdef):
        model = nnx.merge(graphdef, arrays)
        with lp.nnx.probing(model, probes):
            return nnx_region(model, x, c)

    def loss(model, probes, x, c):
        graphdef, arrays = nnx.split(model)
        region = jax.shard_map(
            functools.partial(part, graphdef=graphdef),
            mesh=MESH,
            in_specs=(nnx_specs(arrays), P(AXIS), P(), P()),
            out_specs=P(),
        )
        return region(arrays, probes, x, c)

    @nnx.jit
    def step(model, x, c):
        grad = nnx.value_and_grad(loss, argnums=(0, 1))
        value, (grads, seen) = grad(model, lp.nnx.make_probes(model, DEVICES), x, c)
        lp.nnx.collect_probes(model, seen)
        return value, grads

    model = NnxMlp()
    check_nnx(*jax.block_until_ready(step(model, X, C)), model)


# A ring: every device holds a block of rows and the block of a weight that travels.


def ring_loss(params, live, x, c):
    """Unsharded: out_i = sum over blocks j of relu(x_i @ w_j) * c_i."""
    blocks = params.reshape(DEVICES, WIDTH, -1)
    return sum((jax.nn.relu(product(x, w, live["hop"])) * c).sum() for w in blocks)


def ring_region(w, probes, x, c, tree, hops):
    def hop(carry, probe):
        w, total = carry
        live = state.attach_probes(tree, probe)
        total += (jax.nn.relu(product(x, w, live["hop"])) * c).sum()
        w = lax.ppermute(w, AXIS, [(i, (i + 1) % DEVICES) for i in range(DEVICES)])
        return (w, total), None

    w = w.reshape(WIDTH, -1)
    return lax.psum(hops(hop, (w, lax.pcast(jnp.float32(0), AXIS, to="varying")), probes), AXIS)


def scanned(hop, carry, probes):
    return lax.scan(hop, carry, jax.tree.map(lambda x: x[0], probes))[0][1]


def unrolled(hop, carry, probes):
    for i in range(DEVICES):
        carry, _ = hop(carry, jax.tree.map(lambda x, i=i: x[0, i], probes))
    return carry[1]


@pytest.mark.parametrize("hops", [scanned, unrolled])
def test_ring__one_probe_per_device_and_hop__is_bitwise_one_device(hops):
    w, c = integers(4, DEVICES * WIDTH, 6), integers(5, ROWS, 6)
    tree = sites("hop")
    region = functools.partial(ring_region, tree=tree, hops=hops)
    loss = jax.shard_map(region, mesh=MESH, in_specs=(P(AXIS),) * 4, out_specs=P())

    @jax.jit
    def step(w, x, c):
        probes = state.make_probes(tree, (DEVICES, DEVICES))
        value, (grads, seen) = jax.value_and_grad(loss, argnums=(0, 1))(w, probes, x, c)
        return value, grads, state.advance(state.collect_probes(tree, seen))

    actual = jax.block_until_ready(step(w, X, c))
    assert_step(actual, reference(ring_loss, w, tree, X, c))


# Experts: one on each device; rows travel to the expert and back.


def experts_loss(w, live, x, c):
    """Unsharded: block j of every device's rows goes to expert j."""
    parts = x.reshape(DEVICES, DEVICES, -1, WIDTH)
    outs = [
        jax.nn.relu(product(parts[:, j].reshape(-1, WIDTH), w[j], live["expert"]))
        for j in range(DEVICES)
    ]
    out = jnp.stack([o.reshape(DEVICES, -1, 6) for o in outs], 1)
    return (out.reshape(-1, 6) * c).sum()


def dispatch(w, live, x, c):
    there = lax.all_to_all(x, AXIS, 0, 0, tiled=True)
    out = jax.nn.relu(product(there, w[0], live["expert"]))
    back = lax.all_to_all(out, AXIS, 0, 0, tiled=True)
    return lax.psum((back * c).sum(), AXIS)


def test_expert_dispatch__all_to_all_in_the_loss__is_bitwise_one_device():
    w = integers(6, DEVICES, WIDTH, 6)
    x, c = integers(7, 4 * ROWS, WIDTH), integers(8, 4 * ROWS, 6)
    actual = probing(dispatch, (P(AXIS),) * 3, sites("expert"), w, x, c)
    assert_step(actual, reference(experts_loss, w, sites("expert"), x, c))


# Refused, with the way out.


def call(loss, *args):
    return jax.jit(state.value_and_grad(loss))(WEIGHTS, sites("up", "down"), *args)


def test_shard_map_in_the_loss__refs_closed_over__error_names_probes():
    def loss(params, live, x, c):
        region = jax.shard_map(
            lambda params, x, c: tensor_parallel(params, live, x, c),
            mesh=MESH,
            in_specs=(TP_SPECS, P(), P()),
            out_specs=P(),
        )
        return region(params, x, c)

    with pytest.raises(ValueError, match=r"make_probes\(tree, copies=devices\).*P\('model'\)"):
        call(loss, X, C)


def test_shard_map_in_the_loss__refs_as_sharded_arguments__error_names_probes():
    def loss(w, live, x):
        def region(w, ref, x):
            site = start_site(RECIPE) | {"sink": ops.IndexedSink(ref, jnp.int32(0))}
            return lax.psum(product(x, w, site).sum(), AXIS)

        ref = live["all"]["sink"]
        specs = (P(), P(AXIS), P(AXIS))
        return jax.shard_map(region, mesh=MESH, in_specs=specs, out_specs=P())(w, ref, x)

    tree = {"all": start_site(RECIPE, (DEVICES,))}
    with pytest.raises(UserError, match=r"takes no refs.*make_probes"):
        jax.jit(state.value_and_grad(loss))(UP, tree, X)


def test_shard_map_in_the_loss__one_probe_for_all_devices__error_asks_for_copies():
    tree = sites("up", "down")

    def loss(params, probes, x, c):
        live = state.attach_probes(tree, probes)
        region = jax.shard_map(
            tensor_parallel, mesh=MESH, in_specs=(TP_SPECS, P(), P(), P()), out_specs=P()
        )
        return region(params, live, x, c)

    with pytest.raises(ValueError, match=r"one copy for all devices.*copies=devices"):
        jax.eval_shape(jax.grad(loss, argnums=(0, 1)), WEIGHTS, state.make_probes(tree), X, C)
