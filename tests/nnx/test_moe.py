"""The mixture of experts: routing, scaling state of each expert, experts split over a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.ops.moe import MoEOutput, load_balance_loss
from lowprec_jax.recipes import FP8_DELAYED

from .helpers import assert_same

EXPERTS, FEATURES, HIDDEN, TOKENS, TOP_K, DEVICES = 8, 16, 12, 32, 2, 4
EXACT = dataclasses.replace(FP8_DELAYED, scale_rounding="power_of_two")
IDLE = 5


def moe(recipe="none", **options):
    return lp.nnx.MoE(FEATURES, HIDDEN, EXPERTS, recipe=recipe, rngs=nnx.Rngs(0), **options)


def normal_batch(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return [jax.random.normal(key, (TOKENS, FEATURES)) for key in keys]


def exact_moe(**options):
    """Small integers, ReLU: nothing rounds but the casts, so no order of summation shows."""
    layer = moe(EXACT, activation=jax.nn.relu, **options)
    rng = np.random.default_rng(0)
    layer.router[...] = 8.0 * jnp.eye(FEATURES, EXPERTS)
    for kernel in (layer.gate_up, layer.down):
        kernel[...] = jnp.asarray(rng.integers(-2, 3, kernel.shape), jnp.float32)
    return layer


def exact_batch(seed=0, experts=tuple(set(range(EXPERTS)) - {IDLE})):
    """Tokens that choose two experts, weighted 1/2 each, by their first entries."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (TOKENS, FEATURES)).astype(np.float32)
    x[:, :EXPERTS] = 0
    for token in x:
        token[rng.choice(experts, TOP_K, replace=False)] = 4
    return jnp.asarray(x), jnp.asarray(rng.integers(-2, 3, x.shape), jnp.float32)


@nnx.jit
def apply(layer, x):
    return layer(x)


def loss(layer, x, c):
    """Reads the outputs; the load-balance loss has a test of its own."""
    found = layer(x)
    return (found.out * c).sum(), found


# Against a plain composition.


def reference(router, gate_up, down, x):
    """Every expert on every token, float64, weighted; and the load-balance loss and the counts."""
    logits = x @ router
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :TOP_K]
    weights = np.zeros_like(odds)
    np.put_along_axis(weights, chosen, np.take_along_axis(odds, chosen, -1), -1)
    weights /= weights.sum(-1, keepdims=True)
    gate, up = np.einsum("td,edgf->getf", x, gate_up)
    hidden = gate / (1 + np.exp(-gate)) * up
    out = np.einsum("te,etf,efd->td", weights, hidden, down)
    counts = np.bincount(chosen.ravel(), minlength=EXPERTS)
    probabilities = (odds / odds.sum(-1, keepdims=True)).mean(0)
    return out, EXPERTS * np.sum(counts / counts.sum() * probabilities), counts


def parameters(layer):
    return [np.float64(p[...]) for p in (layer.router, layer.gate_up, layer.down)]


def test_moe__recipe_none__equals_every_expert_on_every_token_in_float64():
    layer, (x, _) = moe(), normal_batch()
    found = apply(layer, x.reshape(4, 8, FEATURES))
    out, aux_loss, counts = reference(*parameters(layer), np.float64(x))
    assert found.out.shape == (4, 8, FEATURES)
    np.testing.assert_allclose(found.out.reshape(x.shape), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.aux_loss, aux_loss, rtol=1e-6)
    np.testing.assert_array_equal(found.tokens_per_expert, counts)


def test_moe__recipe_none__gradients_are_those_of_finite_differences_in_float64():
    layer, (x, c) = moe(), normal_batch()

    def objective(layer, x):
        found = layer(x)
        return (found.out * c).sum() + 5 * found.aux_loss

    grads = nnx.jit(nnx.grad(objective, argnums=(0, 1)))(layer, x)
    arrays = [*parameters(layer), np.float64(x)]
    ours = [grads[0]["router"][...], grads[0]["gate_up"][...], grads[0]["down"][...], grads[1]]
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(ours):
        direction = rng.standard_normal(arrays[i].shape)

        def along(step, i=i, direction=direction):
            moved = [a + step * direction if j == i else a for j, a in enumerate(arrays)]
            out, aux_loss, _ = reference(*moved)
            return (out * np.float64(c)).sum() + 5 * aux_loss

        exact = (along(1e-6) - along(-1e-6)) / 2e-6
        np.testing.assert_allclose((np.float64(gradient) * direction).sum(), exact, rtol=1e-5)


def test_moe__fp8__is_near_the_high_precision_block():
    x, _ = normal_batch()
    exact, found = apply(moe(), x).out, apply(moe("fp8_current"), x).out
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # Two matmuls and a product of two rounded factors: four errors of at most 2**-4.
    assert 1e-3 < error < 4 * 2**-4


@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_moe__all_tokens_to_the_same_experts__nothing_is_dropped(top_k):
    layer = exact_moe(top_k=top_k)
    x, _ = exact_batch(experts=(3, 6))
    found = apply(layer, x)
    expected = np.zeros(EXPERTS, np.int32)
    expected[[3, 6][:top_k]] = TOKENS
    np.testing.assert_array_equal(found.tokens_per_expert, expected)
    outputs = []
    for expert in (3, 6)[:top_k]:
        gate, up = np.einsum("td,dgf->gtf", x, layer.gate_up[...][expert])
        outputs.append((np.maximum(gate, 0) * up) @ layer.down[...][expert])
    exact = np.mean(outputs, axis=0)
    # Two operands of the second matmul are rounded, by 2**-4 at most; the first is exact.
    assert np.linalg.norm(found.out - exact) < 2 * 2**-4 * np.linalg.norm(exact)


def test_load_balance_loss__uniform_and_collapsed__one_and_number_of_experts():
    assert load_balance_loss(jnp.full(4, 6), jnp.full(4, 0.25)) == 1
    assert load_balance_loss(jnp.int32([24, 0, 0, 0]), jnp.float32([1, 0, 0, 0])) == 4
    assert load_balance_loss(jnp.zeros(4, jnp.int32), jnp.full(4, 0.25)) == 0


def test_moe__bf16__computes_in_bf16_and_routes_in_f32():
    layer, (x, _) = moe("fp8_current", dtype=jnp.bfloat16), normal_batch()
    found = layer(x)
    assert found.out.dtype == jnp.bfloat16
    assert found.aux_loss.dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda x: nnx.clone(layer)(x).out)(x))
    assert f"f32[{TOKENS},{EXPERTS}] = dot_general" in text


# Scaling state.


def test_value_and_grad__idle_expert__keeps_its_state_for_50_steps_and_is_then_usable():
    layer = exact_moe()
    step = nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True))
    step(layer, *exact_batch(experts=(IDLE, 2)))
    before = jax.tree.map(lambda s: s[IDLE], lp.nnx.scaling_state(layer))
    assert all((site["amax_history"].max(-1) > 0).all() for site in before.values())
    for seed in range(50):
        step(layer, *exact_batch(seed))
    after = lp.nnx.scaling_state(layer)
    assert_same(jax.tree.map(lambda s: s[IDLE], after), before)
    ages = [site["observed"][..., lp.recipes.Record.AGE] for site in after.values()]
    assert all((age[0] < 50).all() for age in ages)
    (_, found), grads = step(layer, *exact_batch(experts=(IDLE, 2)))
    assert np.isfinite(found.out).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    high = exact_moe()
    high.gate_up_dot, high.down_dot = moe().gate_up_dot, moe().down_dot
    exact = apply(high, exact_batch(experts=(IDLE, 2))[0]).out
    # The inputs are on the grid; the hidden values and their kernel are rounded once.
    assert np.linalg.norm(found.out - exact) < 2**-4 * np.linalg.norm(exact)


def test_calibrate__every_expert_that_is_used__gets_scales():
    layer = exact_moe()
    lp.nnx.calibrate(loss, layer, *exact_batch())
    for site in lp.nnx.scaling_state(layer).values():
        known = (np.asarray(site["amax_history"]).max(-1) > 0).all(-1)
        np.testing.assert_array_equal(known, np.arange(EXPERTS) != IDLE)


def test_evaluation__changes_no_state():
    layer = exact_moe()
    before = lp.nnx.scaling_state(layer)
    apply(layer, exact_batch()[0])
    assert_same(lp.nnx.scaling_state(layer), before)


def test_health__worst_operand__names_the_expert():
    layer = exact_moe()
    x, c = exact_batch(experts=(2, 3))
    layer.down[...] = layer.down[...].at[3].set(1e6)
    nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True))(layer, x, c)
    assert lp.nnx.health(layer).worst == "down_dot[3] rhs"


def test_value_and_grad__scan_over_layers__every_expert_of_every_layer_has_its_state():
    graphdef, state = nnx.split(exact_moe())
    stack = nnx.merge(graphdef, jax.tree.map(lambda array: jnp.stack([array, array]), state))
    x, c = exact_batch()

    def scanned(stack, x, c):
        body = nnx.remat(lambda x, layer: (2 * x, layer(x).out))
        return (
            nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, stack)[1] * c
        ).sum()

    nnx.jit(lp.nnx.value_and_grad(scanned))(stack, x, c)
    step = nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True))
    for layer, scale in enumerate((1.0, 2.0)):
        alone = exact_moe()
        step(alone, scale * x, c)
        for path, site in lp.nnx.scaling_state(alone).items():
            found = lp.nnx.scaling_state(stack)[path]["amax_history"][layer]
            np.testing.assert_array_equal(found, site["amax_history"])


# Experts split over a mesh.


def specs(tree):
    """The router is replicated; every other array has its experts in front."""
    return jax.tree.map_with_path(
        lambda path, _: P() if path[0].key == "router" else P("expert"), tree
    )


def mesh():
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)


def sharded_step(layer):
    """``(state, x, c) -> ((value, outputs), gradients of parameters and x), state``."""
    graphdef, state = nnx.split(layer)
    parameter_specs = specs(nnx.state(layer, nnx.Param))
    outputs = MoEOutput(P("expert"), P(), P())

    def local_loss(layer, x, c):
        value, found = loss(layer, x, c)
        return jax.lax.psum(value, "expert"), found

    @jax.jit
    @jax.shard_map(
        mesh=mesh(),
        in_specs=(specs(state), P("expert"), P("expert")),
        out_specs=(((P(), outputs), (parameter_specs, P("expert"))), specs(state)),
    )
    def step(state, x, c):
        layer = nnx.merge(graphdef, state)
        grad = lp.nnx.value_and_grad(local_loss, has_aux=True, argnums=(0, 1))
        return grad(layer, x, c), nnx.state(layer)

    return step, state


def both_layouts(make, batches):
    """Outputs and final scaling state of the unsharded and of the sharded layer."""
    alone, split = make(), make(expert_axis="expert")
    step = nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True, argnums=(0, 1)))
    sharded, state = sharded_step(split)
    outs = []
    for batch in batches:
        ours, state = jax.block_until_ready(sharded(state, *batch))
        outs.append((step(alone, *batch), ours))
    nnx.update(split, state)
    return outs, lp.nnx.scaling_state(alone), lp.nnx.scaling_state(split)


def test_shard_map__experts_split__exact_data_is_bitwise_that_of_one_device():
    outs, expected_state, state = both_layouts(exact_moe, [exact_batch(s) for s in (0, 1)])
    for expected, found in outs:
        # The probabilities of the load-balance loss are no grid numbers.
        (_, one), (_, split) = expected[0], found[0]
        np.testing.assert_allclose(split.aux_loss, one.aux_loss, rtol=1e-6)
        values = [(out[0][0], out[0][1]._replace(aux_loss=0), out[1]) for out in (found, expected)]
        assert_same(*values)
    assert_same(state, expected_state)
    assert all((site["amax_history"] > 0).any() for site in state.values())


def test_shard_map__experts_split_in_high_precision__equals_one_device():
    outs, _, _ = both_layouts(moe, [normal_batch()])
    for expected, found in zip(*map(jax.tree.leaves, outs[0]), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_shard_map__load_balance_loss__has_the_gradient_of_one_device():
    layer, (x, _) = moe(), normal_batch()
    expected = nnx.jit(nnx.grad(lambda layer, x: layer(x).aux_loss))(layer, x)["router"][...]
    graphdef, state = nnx.split(moe(expert_axis="expert"))

    @jax.jit
    @jax.shard_map(mesh=mesh(), in_specs=(specs(state), P("expert")), out_specs=P())
    def gradient(state, x):
        layer = nnx.merge(graphdef, state)
        return nnx.grad(lambda layer: layer(x).aux_loss)(layer)["router"][...]

    found = jax.block_until_ready(gradient(state, x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_nnx_jit__experts_sharded_by_the_compiler__exact_data_is_bitwise_that_of_one_device():
    alone, split, batch = exact_moe(), exact_moe(), exact_batch()
    place = mesh()
    state = nnx.state(split)
    shardings = jax.tree.map(lambda spec: NamedSharding(place, spec), specs(state))
    nnx.update(split, jax.device_put(state, shardings))
    sharded_batch = jax.device_put(batch, NamedSharding(place, P("expert")))
    step = nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True))
    ((value, found), grads) = jax.block_until_ready(step(split, *sharded_batch))
    ((expected_value, expected), expected_grads) = step(alone, *batch)
    assert_same(
        (value, found._replace(aux_loss=0), grads),
        (expected_value, expected._replace(aux_loss=0), expected_grads),
    )
    assert_same(lp.nnx.scaling_state(split), lp.nnx.scaling_state(alone))


# Errors.


@pytest.mark.parametrize("top_k", [0, EXPERTS + 1])
def test_moe__top_k_out_of_range__is_refused(top_k):
    with pytest.raises(UserError, match="top_k"):
        moe(top_k=top_k)(normal_batch()[0])


def test_moe__experts_not_split_inside_shard_map__is_refused():
    graphdef, state = nnx.split(moe(expert_axis="expert"))

    @jax.shard_map(mesh=mesh(), in_specs=(P(), P("expert")), out_specs=P("expert"))
    def run(state, x):
        return nnx.merge(graphdef, state)(x).out

    with pytest.raises(UserError, match="Split all expert arrays"):
        run(state, normal_batch()[0])
