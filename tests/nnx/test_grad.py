"""`value_and_grad` as a drop-in: exact observations, everything else as in `nnx.value_and_grad`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import lowprec_jax as lp

from .helpers import (
    HIDDEN,
    LABELS,
    WIDTH,
    C,
    Classifier,
    Mlp,
    Pair,
    X,
    amaxes,
    arrays,
    assert_same,
    cross_entropy,
    kernel_of,
    linear,
    linear_loss,
    newest,
    pair_loss,
)

step = nnx.jit(lp.nnx.value_and_grad(linear_loss))
pair_step = nnx.jit(lp.nnx.value_and_grad(pair_loss))


def _assert_exact(layer, x=X, c=C):
    (seen,) = newest(layer).values()
    np.testing.assert_array_equal(seen, amaxes(x, kernel_of(layer), c))


def test_value_and_grad__eager__observes_exactly():
    layer = linear()
    value, grads = lp.nnx.value_and_grad(linear_loss)(layer, X, C)
    _assert_exact(layer)
    assert value.shape == ()
    assert grads["kernel"][...].shape == (WIDTH, HIDDEN)


def test_value_and_grad__nnx_jit__observes_exactly_and_pushes_once_per_step():
    layer = linear()
    for i in range(1, 4):
        step(layer, i * X, C / i)
        _assert_exact(layer, i * X, C / i)
    (state,) = lp.nnx.scaling_state(layer).values()
    assert (state["amax_history"] > 0).sum(-1).tolist() == [3, 3, 3]
    assert not state["pending"].any()
    assert state["observed"][:, lp.recipes.Record.DROPPED].tolist() == [0, 0, 0]


def test_value_and_grad__jax_jit_on_split_and_merge__observes_exactly():
    graphdef, state = nnx.split(linear())

    @jax.jit
    def pure_step(state, x, c):
        model = nnx.merge(graphdef, state)
        out = lp.nnx.value_and_grad(linear_loss)(model, x, c)
        return out, nnx.state(model)

    (value, _), state = pure_step(state, X, C)
    layer = nnx.merge(graphdef, state)
    _assert_exact(layer)
    assert_same(value, step(linear(), X, C)[0])


def test_value_and_grad__same_layer_three_times__takes_the_maximum():
    def loss(layer, x, c):
        return sum((layer(f * x) * (c / f)).sum() for f in (1.0, 4.0, 2.0))

    layer = linear()
    nnx.jit(lp.nnx.value_and_grad(loss))(layer, X, C)
    _assert_exact(layer, 4 * X, C)
    (state,) = lp.nnx.scaling_state(layer).values()
    assert state["observed"][:, lp.recipes.Column.SIZE].tolist() == [
        3 * X.size,
        3 * WIDTH * HIDDEN,
        3 * C.size,
    ]


def test_value_and_grad__layer_off_the_loss_path__keeps_its_state():
    model = lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")
    pair_step(model, X, C)
    before = lp.nnx.scaling_state(model)
    nnx.jit(lp.nnx.value_and_grad(lambda m, x, c: (m.first(x) * c).sum()))(model, 5 * X, C)
    after = lp.nnx.scaling_state(model)
    assert_same(after["second/dot_general"], before["second/dot_general"])
    assert after["first/dot_general"]["amax_history"][0, 0] == amaxes(5 * X)[0]


def test_value_and_grad__frozen_trunk__trunk_is_observed_forward_only():
    model = lp.nnx.quantize(Mlp(nnx.Rngs(0)), "fp8_delayed")
    head_only = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("down")))
    grad = lp.nnx.value_and_grad(lambda m, x, y: cross_entropy(m, x, y), argnums=head_only)
    _, grads = nnx.jit(grad)(model, X, LABELS)
    assert list(grads) == ["down"]
    trunk, head = newest(model)["up"], newest(model)["down"]
    np.testing.assert_array_equal(trunk, [*amaxes(X, kernel_of(model.up)), 0])
    assert (head > 0).all()


def test_value_and_grad__evaluation_between_steps__changes_no_state():
    model = lp.nnx.quantize(Classifier(nnx.Rngs(0)), "fp8_delayed")
    nnx.jit(lp.nnx.value_and_grad(cross_entropy))(model, X, LABELS)
    model.eval()
    before = arrays(model)
    nnx.jit(cross_entropy)(model, 100 * X, LABELS)
    assert_same(arrays(model), before)


def _train(value_and_grad, recipe, steps=5):
    model = Classifier(nnx.Rngs(0))
    if recipe:
        lp.nnx.quantize(model, recipe)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    metrics = nnx.metrics.Average("loss")

    @nnx.jit
    def train_step(model, optimizer, metrics, x, labels):
        value, grads = value_and_grad(cross_entropy)(model, x, labels)
        metrics.update(loss=value)
        optimizer.update(model, grads)
        return value

    losses = [train_step(model, optimizer, metrics, X + i, LABELS) for i in range(steps)]
    return model, np.array(losses), metrics.total[...]


@pytest.fixture(scope="module")
def stock_run():
    return _train(nnx.value_and_grad, None)


def test_value_and_grad__recipe_none_five_steps__everything_is_bitwise_stock(stock_run):
    model, losses, mean = _train(lp.nnx.value_and_grad, "none")
    expected, expected_losses, expected_mean = stock_run
    assert_same(losses, expected_losses)
    assert_same(mean, expected_mean)
    assert_same(arrays(model), arrays(expected))
    assert losses[-1] < losses[0]


def test_value_and_grad__fp8_five_steps__batch_norm_and_dropout_keys_are_bitwise_stock(stock_run):
    """Both come before the first matmul, so that nothing is rounded before them."""
    model, losses, _ = _train(lp.nnx.value_and_grad, "fp8_delayed")
    expected, expected_losses, _ = stock_run
    for part in (nnx.BatchStat, nnx.RngState):
        found = jax.tree.leaves(nnx.state(model, part))
        assert len(found) == 2
        for a, b in zip(found, jax.tree.leaves(nnx.state(expected, part)), strict=True):
            assert a.dtype == b.dtype
            assert (a == b).all()
    assert (losses != expected_losses).all()
    # Measured: 0.9 % at most over the five steps; three times that.
    np.testing.assert_allclose(losses, expected_losses, rtol=0.027)


def test_value_and_grad__has_aux__returns_it():
    def loss(layer, x, c):
        y = layer(x)
        return (y * c).sum(), {"y": y}

    layer = linear()
    (value, aux), grads = nnx.jit(lp.nnx.value_and_grad(loss, has_aux=True))(layer, X, C)
    _assert_exact(layer)
    np.testing.assert_allclose(value, (aux["y"] * C).sum(), rtol=1e-5)
    assert grads["kernel"][...].shape == (WIDTH, HIDDEN)


@pytest.mark.parametrize(
    ("argnums", "structure"),
    [
        (0, lambda g: g["kernel"][...].shape == (WIDTH, HIDDEN)),
        (nnx.DiffState(0, nnx.Param), lambda g: g["kernel"][...].shape == (WIDTH, HIDDEN)),
        (1, lambda g: g.shape == X.shape),
        ((0, 1), lambda g: g[0]["kernel"][...].shape == (WIDTH, HIDDEN) and g[1].shape == X.shape),
        ((nnx.DiffState(0, nnx.Param), 2), lambda g: len(g) == 2 and g[1].shape == C.shape),
    ],
    ids=["model", "filter", "array", "both", "filter_and_array"],
)
def test_value_and_grad__argnums__are_those_of_nnx(argnums, structure):
    layer = linear()
    _, grads = nnx.jit(lp.nnx.value_and_grad(linear_loss, argnums=argnums))(layer, X, C)
    assert structure(grads)
    _assert_exact(layer)


@pytest.mark.parametrize(
    "call",
    [
        lambda grad, model: grad(model, X, c=C),
        lambda grad, model: grad(model, c=C, x=X),
        lambda grad, model: grad(c=C, x=X, model=model),
    ],
    ids=["last", "reordered", "model"],
)
def test_value_and_grad__keyword_arguments__are_resolved_as_in_nnx(call):
    """They raised TypeError, and a model given by keyword would not have been observed."""
    layer = linear()
    value, grads = call(lp.nnx.value_and_grad(linear_loss), layer)
    _assert_exact(layer)
    assert grads["kernel"].shape == layer.kernel.shape
    np.testing.assert_allclose(value, step(linear(), X, C)[0], rtol=1e-5)


def test_value_and_grad__keyword_only_argument__raises_naming_it():
    def loss(layer, x, *, c):
        return linear_loss(layer, x, c)

    with pytest.raises(TypeError, match=r"\bc\b.*functools.partial"):
        lp.nnx.value_and_grad(loss)(linear(), X, c=C)
    layer = linear()
    lp.nnx.value_and_grad(functools.partial(loss, c=C))(layer, X)
    _assert_exact(layer)


def test_value_and_grad__model_second_and_metrics_among_the_arguments__observes_exactly():
    def loss(x, model, metrics, c):
        value = linear_loss(model, x, c)
        metrics.update(loss=value)
        return value

    layer, metrics = linear(), nnx.metrics.Average("loss")
    grad = nnx.jit(lp.nnx.value_and_grad(loss, argnums=1))
    values = [grad(X, layer, metrics, f * C)[0] for f in (1.0, 2.0)]
    _assert_exact(layer, X, 2 * C)
    np.testing.assert_allclose(metrics.total[...], sum(values), rtol=1e-6)


def test_value_and_grad__two_models__each_observes_its_own():
    def loss(first, second, x, c):
        return linear_loss(first, x, c) + linear_loss(second, 3 * x, 5 * c)

    first, second = linear(), linear(seed=1)
    _, grads = nnx.jit(lp.nnx.value_and_grad(loss, argnums=(0, 1)))(first, second, X, C)
    _assert_exact(first)
    _assert_exact(second, 3 * X, 5 * C)
    assert len(grads) == 2


def test_value_and_grad__teacher_in_evaluation__is_observed_only_if_it_is_an_argument():
    teacher, student = linear(seed=1), linear()
    before = lp.nnx.scaling_state(teacher)
    loss = lambda model, x: ((model(x) - jax.lax.stop_gradient(teacher(x))) ** 2).sum()  # noqa: E731
    lp.nnx.value_and_grad(loss)(student, X)
    assert_same(lp.nnx.scaling_state(teacher), before)
    assert newest(student)[""][0] == amaxes(X)[0]


def test_value_and_grad__nnx_view__train_and_evaluation_views_share_the_state():
    model = lp.nnx.quantize(Classifier(nnx.Rngs(0)), "fp8_delayed")
    training = nnx.view(model, deterministic=False, use_running_average=False)
    nnx.jit(lp.nnx.value_and_grad(cross_entropy))(training, X, LABELS)
    assert (newest(model)["mlp/up"] > 0).all()


def test_value_and_grad__several_steps__compiles_once():
    traces = []

    @nnx.jit
    def counted(model, optimizer, x, c):
        traces.append(None)
        _, grads = lp.nnx.value_and_grad(pair_loss)(model, x, c)
        optimizer.update(model, grads)

    model = lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")
    optimizer = nnx.Optimizer(model, optax.sgd(1e-6, momentum=0.9), wrt=nnx.Param)
    for i in range(4):
        counted(model, optimizer, (i + 1) * X, C)
    assert len(traces) == 1


def test_value_and_grad__loss_raises__leaves_the_model_usable():
    def broken(layer, x, c):
        linear_loss(layer, x, c)
        raise RuntimeError("broken")

    layer = linear()
    with pytest.raises(RuntimeError, match="broken"):
        lp.nnx.value_and_grad(broken)(layer, X, C)
    step(layer, X, C)
    _assert_exact(layer)


def test_calibrate__before_step_0__changes_nothing_but_scaling_state():
    def loss(model, x, labels):
        return cross_entropy(model, x, labels), "aux"

    model, stock = (lp.nnx.quantize(Classifier(nnx.Rngs(0)), "fp8_delayed") for _ in range(2))
    lp.nnx.calibrate(loss, model, X, labels=LABELS)
    rest = nnx.Not(lp.nnx.Scaling)
    assert_same(
        arrays(nnx.state(model, rest)),
        arrays(nnx.state(stock, rest)),
    )
    assert all((amax > 0).all() for amax in newest(model).values())


def test_calibrate__then_step_0__state_and_scales_are_those_of_the_exact_amaxes():
    layer, uncalibrated = linear(), linear()
    lp.nnx.calibrate(linear_loss, layer, X, C)
    _assert_exact(layer)
    assert float(lp.nnx.health(layer).saturated) == 0
    expected = jax.grad(lambda k: ((X @ k) * C).sum())(layer.kernel[...])
    error = lambda grads: (  # noqa: E731
        jnp.linalg.norm(grads["kernel"][...] - expected) / jnp.linalg.norm(expected)
    )
    calibrated = error(step(layer, X, C)[1])
    assert calibrated < 0.06
    assert calibrated < error(step(uncalibrated, 100 * X, 100 * C)[1])


def test_state__orbax_round_trip__resumes_bit_for_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")
    pair_step(model, X, C)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(lambda: lp.nnx.quantize(Pair(nnx.Rngs(1)), "fp8_delayed"))
        graphdef, target = nnx.split(abstract)
        resumed = nnx.merge(graphdef, checkpointer.restore(tmp_path / "state", target))
    assert_same(pair_step(resumed, 2 * X, C), pair_step(model, 2 * X, C))
    assert_same(arrays(resumed), arrays(model))


def test_state__flax_msgpack_round_trip__resumes_bit_for_bit():
    """Plain bytes of named arrays: nothing is pickled."""
    model = lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")
    pair_step(model, X, C)
    data = serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(model)))
    assert b"amax_history" in data
    resumed = lp.nnx.quantize(Pair(nnx.Rngs(1)), "fp8_delayed")
    leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(nnx.state(resumed)))
    restored = serialization.msgpack_restore(data)
    assert jax.tree.structure(restored) == treedef
    state = jax.tree.unflatten(jax.tree.structure(nnx.state(resumed)), jax.tree.leaves(restored))
    nnx.update(resumed, state)
    assert len(leaves) == len(jax.tree.leaves(restored))
    assert_same(pair_step(resumed, 2 * X, C), pair_step(model, 2 * X, C))
    assert_same(arrays(resumed), arrays(model))
