import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowprec_jax as lp
from linen.helpers import newest_amax, scaling_of, sum_of_squares
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT, layers, quantize

DELAYED = "fp8_delayed"


class Attentive(nn.Module):
    """An unmodified user's model: compact, with attention, einsum, remat and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.Einsum((16, 8), "bi,io->bo")(x)
        x = nn.remat(nn.Dense)(8, name="rematted")(x)
        return nn.Dense(4, name="head")(x)


class SetUp(nn.Module):
    """The other style; one layer is used by two methods."""

    width: int = 9

    def setup(self):
        self.encoder = nn.Dense(self.width)
        self.decoder = [nn.Dense(12), nn.DenseGeneral((3, 4))]

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        x = self.encode(x)
        for layer in self.decoder[:1]:
            x = layer(x)
        return self.decoder[1](x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x)), None


class Scanned(nn.Module):
    listed: bool = True

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, OVERWRITE_WITH_GRADIENT: 0} if self.listed else {"params": 0}
        blocks = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
        return blocks(name="blocks")(x, None)[0]


class Trunk(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(x.shape[-1])(x))


class Whole(nn.Module):
    """A model of which one part is quantized, and called twice."""

    quantized: bool
    in_setup: bool = False

    def setup(self):
        if self.in_setup:
            self.trunk = self.make_trunk()

    def make_trunk(self):
        return quantize(Trunk(), DELAYED) if self.quantized else Trunk()

    @nn.compact
    def __call__(self, x):
        trunk = self.trunk if self.in_setup else self.make_trunk()
        return nn.Dense(3)(trunk(0.01 * trunk(x)))


class Borrower(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


class Lender(nn.Module):
    """A part is quantized and borrows a layer that is also used outside of it."""

    quantized: bool

    def setup(self):
        self.dense = nn.Dense(5)
        part = Borrower(self.dense)
        self.part = quantize(part, "fp8_current") if self.quantized else part

    def __call__(self, x):
        return self.part(x), self.dense(x)


MODELS = {
    "attentive": Attentive(),
    "setup": SetUp(),
    "scanned": Scanned(),
    "layer": nn.Dense(5),
    "fields": nn.Sequential([nn.Dense(5), nn.relu, nn.Sequential([nn.Dense(4)])]),
    "remat": nn.remat(Trunk)(),
}
every_model = pytest.mark.parametrize("name", MODELS)


def init(model, x):
    return model.init(jax.random.key(0), x)


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@every_model
def test_quantize__init__parameters_are_the_models_bitwise(x, name):
    got, expected = init(quantize(MODELS[name], DELAYED), x), init(MODELS[name], x)
    assert_trees_equal(got["params"], expected["params"])


@every_model
def test_quantize__recipe_none__loss_and_gradients_are_the_models_bitwise(x, name):
    variables = init(MODELS[name], x)
    results = [
        jax.value_and_grad(sum_of_squares(model))(variables, x)
        for model in (MODELS[name], quantize(MODELS[name], "none"))
    ]
    assert_trees_equal(*results)


@every_model
def test_quantize__every_listed_layer__is_observed(x, name):
    model = quantize(MODELS[name], [(".*", DELAYED)])
    variables = init(model, x)
    _, grads = jax.jit(lp.linen.value_and_grad(sum_of_squares(model)))(variables, x)
    seen = {path.removesuffix("/EinsumOp_0"): amax for path, amax in newest_amax(grads).items()}
    assert sorted(seen) == sorted(layer.path for layer in layers(MODELS[name], x))
    # softmax of a nearly one-hot attention has no gradient to query and key
    assert all((amax[..., :2] > 0).all() for amax in seen.values())


def test_quantize__dense__equals_injection_and_layer_bitwise(x):
    models = [
        quantize(nn.Dense(5), DELAYED),
        nn.Dense(5, dot_general_cls=lp.linen.dot_general_cls(DELAYED)),
        lp.linen.Dense(5, recipe=DELAYED),
    ]
    results = []
    for model in models:
        variables = lp.linen.calibrate(sum_of_squares(model), init(model, x), x)
        results.append(lp.linen.value_and_grad(sum_of_squares(model))(variables, x))
    assert_trees_equal(results[0], results[1])
    assert_trees_equal(results[0], results[2])


def test_quantize__default_rules__head_stays_in_high_precision(x):
    variables = init(quantize(Attentive(), DELAYED), x)
    assert "head" not in scaling_of(variables)
    assert "attention/query" in scaling_of(variables)


def test_quantize__first_matching_rule__wins(x):
    rules = [("encoder", "none"), ("decoder_1", "fp8_current"), (".*", DELAYED)]
    variables = init(quantize(SetUp(), rules), x)
    assert list(scaling_of(variables)) == ["decoder_0"]


def test_quantize__dropout_and_static_argument__work_as_in_the_model(x):
    model, rngs = Attentive(), {"dropout": jax.random.key(5)}
    variables = init(model, x)
    expected = model.apply(variables, x, train=True, rngs=rngs)
    got = quantize(model, "none").apply(variables, x, train=True, rngs=rngs)
    assert (got == expected).all()
    assert (got != model.apply(variables, x)).any()


@pytest.mark.parametrize("method", ["encode", SetUp.encode, lambda m, x: m.encode(x)])
def test_apply__method_of_the_model__is_quantized(x, method):
    model = quantize(SetUp(), "fp8_current")
    variables = init(model, x)
    expected = lp.linen.Dense(9, recipe="fp8_current").apply(
        {"params": variables["params"]["encoder"]}, x
    )
    assert (model.apply(variables, x, method=method) == expected).all()


def test_getattr__field_of_the_model__is_that_of_the_model():
    assert quantize(SetUp(width=21), DELAYED).width == 21


@pytest.mark.parametrize("in_setup", [False, True])
def test_quantize__part_of_a_model_called_twice__tree_is_kept_and_amax_is_the_max(x, in_setup):
    plain, model = Whole(False, in_setup), Whole(True, in_setup)
    variables = init(model, x)
    assert_trees_equal(variables["params"], init(plain, x)["params"])
    _, grads = jax.jit(lp.linen.value_and_grad(sum_of_squares(model)))(variables, x)
    ((path, amax),) = newest_amax(grads).items()
    assert path == ("trunk/Dense_0" if in_setup else "Trunk_0/Dense_0")
    assert amax[0] == jnp.abs(x).max()


def test_quantize__capture_intermediates__layers_report_once(x):
    model = quantize(SetUp(), "fp8_current")
    _, kept = model.apply(init(model, x), x, capture_intermediates=True, mutable=["intermediates"])
    calls = kept["intermediates"]
    assert len(calls["__call__"]) == len(calls["encoder"]["__call__"]) == 1


def test_quantize__layer_lent_to_a_quantized_part__is_quantized_only_there(x):
    variables = init(Lender(False), x)
    assert_trees_equal(init(Lender(True), x), variables)
    (inside, outside), (_, plain) = (Lender(q).apply(variables, x) for q in (True, False))
    assert (inside != plain).any()
    assert (outside == plain).all()


def test_quantize__layer_with_its_own_dot_general__is_left_alone(x):
    model = nn.Sequential([nn.Dense(5, dot_general=jax.lax.dot_general), nn.Dense(3)])
    assert [layer.path for layer in layers(model, x)] == ["layers_1"]
    assert list(scaling_of(init(quantize(model, DELAYED), x))) == ["layers_1"]


@pytest.mark.parametrize("call", ["init", "apply"])
def test_quantize__rule_matches_nothing__error_lists_the_layers(x, call):
    model = quantize(SetUp(), [("encodr", "fp8_current"), ("decoder_0", "fp8_current")])
    variables = init(SetUp(), x)
    with pytest.raises(UserError, match=r"'encodr'.*decoder_0, decoder_1, encoder"):
        init(model, x) if call == "init" else model.apply(variables, x)


def test_apply__method_that_runs_some_layers__rules_for_others_are_no_error(x):
    model = quantize(SetUp(), [("decoder_0", "fp8_current")])
    assert model.apply(init(model, x), x, method="encode").shape == (16, 9)


def test_quantize__scan_without_the_collection__error_names_variable_axes(x):
    with pytest.raises(UserError, match=r"blocks/dense.*variable_axes"):
        init(quantize(Scanned(listed=False), DELAYED), x)


def test_quantize__scan_without_the_collection__stateless_recipe_works(x):
    model = quantize(Scanned(listed=False), "fp8_current")
    variables = init(model, x)
    assert (model.apply(variables, x) != Scanned().apply(variables, x)).any()


def test_quantize__twice__error():
    with pytest.raises(UserError, match="already"):
        quantize(quantize(SetUp(), DELAYED), DELAYED)


def test_layers__abstract_inputs__paths_kinds_and_kernel_shapes(x):
    found = layers(SetUp(), jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert found == [
        ("encoder", "Dense", (12, 9)),
        ("decoder_0", "Dense", (9, 12)),
        ("decoder_1", "DenseGeneral", (12, 3, 4)),
    ]
    assert layers(quantize(SetUp(), DELAYED), x) == found


def test_layers__scan__kernel_of_one_layer(x):
    assert layers(Scanned(), x) == [("blocks/dense", "Dense", (12, 12))]


def test_layers__partitioned_kernel__is_unboxed(x):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Sequential([nn.Dense(5, kernel_init=boxed)])
    assert layers(model, x) == [("layers_0", "Dense", (12, 5))]
    quantized = quantize(model, [("layers_0", "fp8_current")])
    assert quantized.apply(init(quantized, x), x).shape == (16, 5)
