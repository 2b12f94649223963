"""What the design promises of scaling state, with exact expectations, through Linen transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowprec_jax as lp
from linen.helpers import newest_amax, pending_amax, scaling_of, sum_of_squares
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT, Dense

RECIPE = "fp8_delayed"
BY_LAYER = {"params": 0, OVERWRITE_WITH_GRADIENT: 0}


class Mlp(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(Dense) if self.remat else Dense
        x = nn.relu(dense(16, recipe=RECIPE, name="up")(x))
        return dense(6, recipe=RECIPE, name="down")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(Dense(x.shape[-1], recipe=RECIPE, name="dense")(x)), x


class Stack(nn.Module):
    """Three blocks; returns the inputs of the blocks as well."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        kept = {"variable_axes": BY_LAYER}
        if self.shared:
            kept = {"variable_axes": {"params": 0}, "variable_broadcast": OVERWRITE_WITH_GRADIENT}
        blocks = nn.scan(nn.remat(Block), split_rngs={"params": True}, length=3, **kept)
        return blocks(name="blocks")(x, None)


class Experts(nn.Module):
    mapped: bool = True

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, OVERWRITE_WITH_GRADIENT: 0 if self.mapped else None}
        experts = nn.vmap(Dense, variable_axes=axes, split_rngs={"params": True})
        return experts(5, recipe=RECIPE, name="experts")(x.reshape(4, 4, -1))


class Shared(nn.Module):
    """One layer, called three times on inputs of different range."""

    @nn.compact
    def __call__(self, x):
        dense = Dense(4, recipe=RECIPE, name="dense")
        return dense(x) + dense(3 * x) + dense(2 * x)


def make(model, x, seed=0):
    return model.init(jax.random.key(seed), x)


def step(loss, **kwargs):
    return jax.jit(lp.linen.value_and_grad(loss, **kwargs))


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def amaxes(*operands):
    return jnp.stack([jnp.abs(operand).max() for operand in operands])


def test_value_and_grad__one_dense__state_is_the_amax_of_each_operand(x):
    model = Dense(7, recipe=RECIPE)
    variables = make(model, x)
    value, grads = step(sum_of_squares(model))(variables, x)
    out = jax.jit(model.apply)(variables, x)
    (amax,) = newest_amax(grads).values()
    assert_trees_equal(amax, amaxes(x, variables["params"]["kernel"], 2 * out))
    np.testing.assert_allclose(value, jnp.square(out).sum(), rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


def test_value_and_grad__has_aux__returns_aux(x):
    model = Dense(7, recipe=RECIPE)
    variables = make(model, x)

    def loss(v, x):
        return (model.apply(v, x).sum(), {"rows": len(x)})

    (_, aux), grads = step(loss, has_aux=True)(variables, x)
    assert aux == {"rows": 16}
    assert grads.keys() == variables.keys()


def test_value_and_grad__frozen_dict__structure_is_kept(x):
    model = Mlp()
    variables = freeze(make(model, x))
    _, grads = step(sum_of_squares(model))(variables, x)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


def test_value_and_grad__no_scaling_state__is_jax_value_and_grad(x):
    model = nn.Dense(7)
    variables = make(model, x)
    loss = sum_of_squares(model)
    assert_trees_equal(
        lp.linen.value_and_grad(loss)(variables, x), jax.value_and_grad(loss)(variables, x)
    )


def test_value_and_grad__batch_stats_among_variables__error_names_them(x):
    model = Dense(7, recipe=RECIPE)
    variables = {**make(model, x), "batch_stats": {"mean": jnp.zeros(3)}}
    with pytest.raises(UserError, match="batch_stats"):
        lp.linen.value_and_grad(sum_of_squares(model))(variables, x)


def test_value_and_grad__advance_false__only_pending_changes(x):
    model = Dense(7, recipe=RECIPE)
    variables = make(model, x)
    loss = sum_of_squares(model)
    _, grads = step(loss, advance=False)(variables, x)
    (before,), (after,) = scaling_of(variables).values(), scaling_of(grads).values()
    assert_trees_equal({**after, "pending": before["pending"]}, before)
    _, advanced = step(loss)(variables, x)
    assert_trees_equal(lp.linen.advance(grads), advanced)


def test_value_and_grad__remat__state_is_that_without_remat(x):
    plain, remat = Mlp(), Mlp(remat=True)
    variables = make(plain, x)
    assert_trees_equal(make(remat, x), variables)
    results = [step(sum_of_squares(model))(variables, x) for model in (plain, remat)]
    assert_trees_equal(*results)


def test_value_and_grad__scan_over_layers__each_layer_has_its_own_amax(x):
    model = Stack()
    variables = make(model, x)
    _, grads = step(lambda v, x: jnp.square(model.apply(v, x)[0]).sum())(variables, x)
    seen = newest_amax(grads)["blocks/dense"]
    _, inputs = jax.jit(model.apply)(variables, x)
    kernels = variables["params"]["blocks"]["dense"]["kernel"]
    assert_trees_equal(seen[:, 0], jnp.abs(inputs).max((1, 2)))
    assert_trees_equal(seen[:, 1], jnp.abs(kernels).max((1, 2)))
    assert (seen[:, 2] > 0).all()
    assert len(set(seen[:, 2].tolist())) == 3


def test_value_and_grad__scan_with_shared_state__takes_the_max(x):
    mapped, shared = Stack(), Stack(shared=True)

    def loss(model):
        return lambda v, x: jnp.square(model.apply(v, x)[0]).sum()

    seen = []
    for model in (mapped, shared):
        _, grads = step(loss(model))(make(model, x), x)
        seen.append(newest_amax(grads)["blocks/dense"])
    assert_trees_equal(seen[1], seen[0].max(0))


def test_value_and_grad__vmap_over_experts__each_expert_has_its_own_amax(x):
    model = Experts()
    variables = make(model, x)
    _, grads = step(sum_of_squares(model))(variables, x)
    seen = newest_amax(grads)["experts"]
    out = model.apply(variables, x)
    kernels = variables["params"]["experts"]["kernel"]
    expected = [
        amaxes(*operands) for operands in zip(x.reshape(4, 4, -1), kernels, 2 * out, strict=True)
    ]
    assert_trees_equal(seen, jnp.stack(expected))


def test_value_and_grad__vmap_with_unmapped_state__error_says_how_to_map_it(x):
    model = Experts(mapped=False)
    with pytest.raises(UserError, match="variable_axes"):
        step(sum_of_squares(model))(make(model, x), x)


def test_value_and_grad__module_called_three_times__takes_the_max(x):
    model = Shared()
    variables = make(model, x)
    _, grads = step(sum_of_squares(model))(variables, x)
    kernel, out = variables["params"]["dense"]["kernel"], model.apply(variables, x)
    assert_trees_equal(newest_amax(grads)["dense"], amaxes(3 * x, kernel, 2 * out))


def test_value_and_grad__layer_off_the_loss_path__operands_observed_output_grad_kept(x):
    class Unused(nn.Module):
        @nn.compact
        def __call__(self, x):
            Dense(3, recipe=RECIPE, name="unused")(x)
            return Dense(4, recipe=RECIPE, name="used")(x)

    model = Unused()
    variables = make(model, x)
    filled = jax.tree.map(lambda leaf: leaf + 3, variables[OVERWRITE_WITH_GRADIENT]["unused"])
    filled["DotGeneral_0"]["scaling"]["pending"] *= 0
    variables[OVERWRITE_WITH_GRADIENT]["unused"] = filled
    _, grads = step(sum_of_squares(model))(variables, x)
    after = grads[OVERWRITE_WITH_GRADIENT]["unused"]["DotGeneral_0"]["scaling"]
    before = filled["DotGeneral_0"]["scaling"]
    assert_trees_equal(*({k: v[2] for k, v in scaling.items()} for scaling in (after, before)))
    kernel = variables["params"]["unused"]["kernel"]
    assert_trees_equal(after["amax_history"][:2, 0], amaxes(x, kernel))
    assert (newest_amax(grads)["used"] > 0).all()


def test_value_and_grad__frozen_trunk__its_operands_are_observed(x):
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Dense(8, recipe=RECIPE, name="trunk")(x)
            return Dense(4, recipe=RECIPE, name="top")(x)

    model = Frozen()
    variables = make(model, x)

    def loss(variables, x):
        trunk = jax.lax.stop_gradient(variables["params"]["trunk"])
        params = {**variables["params"], "trunk": trunk}
        return jnp.square(model.apply({**variables, "params": params}, x)).sum()

    _, grads = step(loss)(variables, x)
    kernel = variables["params"]["trunk"]["kernel"]
    assert_trees_equal(newest_amax(grads)["trunk"][:2], amaxes(x, kernel))
    assert not jnp.any(grads["params"]["trunk"]["kernel"])


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_accumulate__any_number_of_parts__amaxes_are_those_of_the_batch(x, parts):
    model = Dense(7, recipe=RECIPE)
    variables = make(model, x)
    loss = sum_of_squares(model)
    value, grads = jax.jit(lp.linen.accumulate(loss, parts))(variables, x)
    expected, whole = step(loss)(variables, x)
    assert_trees_equal(newest_amax(grads), newest_amax(whole))
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # order of summation


def test_value_and_grad__batch_sharded_under_jit__state_is_that_of_one_device(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model = Mlp()
    variables = make(model, x)
    _, expected = step(sum_of_squares(model))(variables, x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    _, got = step(sum_of_squares(model))(variables, sharded)
    assert_trees_equal(newest_amax(got)["up"], newest_amax(expected)["up"])


def test_value_and_grad__inside_shard_map__state_is_that_of_one_device(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model = Dense(7, recipe=RECIPE)
    variables = make(model, x)

    def local(v, x):
        return jax.lax.psum(jnp.square(model.apply(v, x)).sum(), "data")

    region = jax.shard_map(
        lp.linen.value_and_grad(local), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    _, got = jax.jit(region)(variables, x)
    _, expected = step(sum_of_squares(model))(variables, x)
    ((got_site,), (site,)) = scaling_of(got).values(), scaling_of(expected).values()
    assert_trees_equal(got_site["amax_history"], site["amax_history"])
    # Every device counts its copy of the kernel; the batch is counted once.
    copies = jnp.array([1.0, 8.0, 1.0])[:, None]
    assert_trees_equal(got_site["observed"][:, 1:5], copies * site["observed"][:, 1:5])
    assert_trees_equal(got_site["observed"][:, 5:], site["observed"][:, 5:])
    # The devices' partial sums are added in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
        got["params"],
        expected["params"],
    )


def test_value_and_grad__shard_map_inside_the_loss__error_says_what_to_do(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model = Dense(7, recipe=RECIPE)

    def local(v, x):
        return jax.lax.psum(jnp.square(model.apply(v, x)).sum(), "data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="outside the shard_map"):
        step(loss)(make(model, x), x)


def test_calibrate__one_batch__amaxes_of_the_high_precision_model(x):
    model = Mlp()
    variables = make(model, x)
    got = jax.jit(lambda v, x: lp.linen.calibrate(sum_of_squares(model), v, x))(variables, x)
    p = variables["params"]
    hidden = jax.nn.relu(nn.Dense(16).apply({"params": p["up"]}, x))
    out = nn.Dense(6).apply({"params": p["down"]}, hidden)
    expected = amaxes(hidden, p["down"]["kernel"], 2 * out)
    np.testing.assert_allclose(newest_amax(got)["down"], expected, rtol=1e-6)
    assert newest_amax(got)["up"][0] == jnp.abs(x).max()
    assert_trees_equal(got["params"], p)


def test_calibrate__forward_only_through_scan__observes_operands(x):
    model = Stack()
    variables = lp.linen.calibrate(model.apply, make(model, x), x, gradient=False)
    seen = newest_amax(variables)["blocks/dense"]
    assert (seen[:, :2] > 0).all()
    assert not jnp.any(seen[:, 2])


class TestTrainState:
    """The stock class, unmodified."""

    def make_state(self, x, tx):
        return TrainState.create(apply_fn=Mlp().apply, params=make(Mlp(), x), tx=tx)

    def loss(self, variables, x):
        return jnp.square(Mlp().apply(variables, x)).sum()

    def test_apply_gradients__adamw_and_clip__history_is_pushed_once_a_step(self, x):
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
            tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
            state = self.make_state(x, tx)

            @jax.jit
            def train_step(state, x):
                value, grads = lp.linen.value_and_grad(self.loss)(state.params, x)
                return state.apply_gradients(grads=grads), value

            kernels, values = [], []
            for _ in range(4):
                kernels.append(jnp.abs(state.params["params"]["up"]["kernel"]).max())
                state, value = train_step(state, x)
                values.append(value)
        history = scaling_of(state.params)["up"]["amax_history"]
        assert_trees_equal(history[1, :4], jnp.stack(kernels[::-1]))
        assert not jnp.any(history[:, 4:])
        assert values[-1] < values[0]

    def test_opt_state__adamw__holds_parameters_only(self, x):
        state = self.make_state(x, optax.adamw(1e-2))
        paths = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        assert not any("scaling" in jax.tree_util.keystr(path) for path, _ in paths)
        mu = state.opt_state[0].mu
        assert jax.tree.structure(mu) == jax.tree.structure(state.params["params"])

    def test_multi_steps__advance_when_updated__one_push_per_optimizer_step(self, x):
        tx = optax.MultiSteps(optax.sgd(1e-4), every_k_schedule=2)
        state = self.make_state(x, tx)

        @jax.jit
        def train_step(state, x):
            _, grads = lp.linen.value_and_grad(self.loss, advance=False)(state.params, x)
            state = state.apply_gradients(grads=grads)
            when = tx.has_updated(state.opt_state)
            return state.replace(params=lp.linen.advance(state.params, when=when))

        with jax.numpy_dtype_promotion("standard"):
            for i in range(4):
                state = train_step(state, x[4 * i : 4 * i + 4])
        history = scaling_of(state.params)["up"]["amax_history"]
        assert_trees_equal(history[0, :3], jnp.stack([*amaxes(x[8:], x[:8]), jnp.float32(0)]))
        assert not jnp.any(pending_amax(state.params)["up"])

    def test_donated_state__three_steps__equals_without_donation(self, x):
        def train_step(state, x):
            _, grads = lp.linen.value_and_grad(self.loss)(state.params, x)
            return state.apply_gradients(grads=grads)

        results = []
        for donate in ((), (0,)):
            state = self.make_state(x, optax.sgd(1e-4))
            state = jax.tree.map(jnp.array, state)
            for _ in range(3):
                state = jax.jit(train_step, donate_argnums=donate)(state, x)
            results.append(state.params)
        assert_trees_equal(*results)


def test_jit__three_steps__traced_once(x):
    model, traces = Mlp(), []

    def loss(variables, x):
        traces.append(None)
        return sum_of_squares(model)(variables, x)

    variables, run = make(model, x), step(loss)
    for _ in range(3):
        _, grads = run(variables, x)
        variables = {**grads, "params": variables["params"]}
    assert len(traces) == 1
