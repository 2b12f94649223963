"""`quantize`: which layers, which recipe, and that the model is otherwise as it was."""

import jax
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import Rule

from .helpers import BATCH, CLASSES, HIDDEN, WIDTH, Mlp, X, arrays, assert_same, newest, stack


class Transformer(nnx.Module):
    """One layer of every kind that `quantize` reaches or must leave alone."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=3, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.router = nnx.Linear(WIDTH, 4, rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(WIDTH, HIDDEN, rngs=rngs)])
        self.mix = nnx.Einsum("bto,oi->bti", (HIDDEN, WIDTH), rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.norm(self.embed(tokens)))
        x = self.mix(nnx.relu(self.mlp[0](x))) * nnx.sigmoid(self.router(x).sum(-1, keepdims=True))
        return self.lm_head(x)


TOKENS = jax.random.randint(jax.random.key(9), (3, 5), 0, 11)
QUANTIZED = [
    "attention/key",
    "attention/out",
    "attention/query",
    "attention/value",
    "mix",
    "mlp/0",
]


def _recipes(model):
    """Recipe name by path, of the layers whose op is ours."""
    ops = {
        path: getattr(layer, "einsum_op", None) or layer.dot_general
        for path, layer in lp.nnx.layers(model)
    }
    ours = lp.nnx.DotGeneral | lp.nnx.EinsumOp
    return {path: op.recipe.name for path, op in ops.items() if isinstance(op, ours)}


def test_quantize__a_name__leaves_embeddings_heads_routers_and_norms():
    model = lp.nnx.quantize(Transformer(nnx.Rngs(0)), "fp8_delayed")
    assert _recipes(model) == dict.fromkeys(QUANTIZED, "fp8_delayed")
    assert sorted(dict(lp.nnx.layers(model))) == sorted([*QUANTIZED, "lm_head", "router"])


def test_quantize__attention_and_einsum__are_observed_in_training():
    model = lp.nnx.quantize(Transformer(nnx.Rngs(0)), "fp8_delayed")
    nnx.jit(lp.nnx.value_and_grad(lambda model, x: (model(x) ** 2).sum()))(model, TOKENS)
    seen = newest(model)
    assert sorted(seen) == QUANTIZED
    assert all((amax > 0).all() for amax in seen.values())


def test_quantize__any_model__keeps_parameters_and_returns_the_same_object():
    model, stock = Transformer(nnx.Rngs(0)), Transformer(nnx.Rngs(0))
    assert lp.nnx.quantize(model, "fp8_delayed") is model
    assert_same(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(nnx.state(stock, nnx.Param))
    )


def test_quantize__two_rules_match__the_first_wins_and_the_rest_stays():
    model = lp.nnx.quantize(
        Transformer(nnx.Rngs(0)),
        [
            ("attention/out", "fp8_current"),
            Rule("attention/.*", "fp8_delayed"),
            ("lm_head", "none"),
        ],
    )
    assert _recipes(model) == {
        "attention/key": "fp8_delayed",
        "attention/out": "fp8_current",
        "attention/query": "fp8_delayed",
        "attention/value": "fp8_delayed",
    }


def test_quantize__rule_without_match__raises_with_the_paths_and_changes_nothing():
    model = Mlp(nnx.Rngs(0))
    with pytest.raises(UserError, match=r"'blocks/\.\*' matches no layer.*down, up"):
        lp.nnx.quantize(model, [("up", "fp8_delayed"), ("blocks/.*", "fp8_delayed")])
    assert _recipes(model) == {}


@pytest.mark.parametrize("rules", ["fp8_delayd", [("up", "fp8_delayd")]], ids=["name", "rule"])
def test_quantize__unknown_recipe__raises_naming_the_nearest(rules):
    with pytest.raises(UserError, match=r"fp8_delayd.*Did you mean 'fp8_delayed'"):
        lp.nnx.quantize(Mlp(nnx.Rngs(0)), rules)


def test_quantize__stacked_layers__get_state_with_the_same_leading_axis():
    layers = stack(5)
    (state,) = lp.nnx.scaling_state(layers).values()
    assert state["amax_history"].shape == (5, 3, 16)
    assert state["observed"].shape == (5, 3, 7)


def test_quantize__stack_of_stacks_of_linear_general__gets_both_axes():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def create(rngs):
        return nnx.LinearGeneral((3, 4), 7, axis=(-2, -1), rngs=rngs)

    layers = lp.nnx.quantize(create(nnx.Rngs(0)), "fp8_delayed")
    (state,) = lp.nnx.scaling_state(layers).values()
    assert state["pending"].shape == (2, 5, 3, 5)


def test_quantize__shared_layer__has_one_site():
    shared = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    model = lp.nnx.quantize(nnx.List([shared, shared]), "fp8_delayed")
    assert model[0] is model[1]
    assert len(list(lp.nnx.layers(model))) == len(lp.nnx.scaling_state(model)) == 1


def test_quantize__called_again__replaces_the_recipe_and_the_state():
    model = lp.nnx.quantize(Mlp(nnx.Rngs(0)), "fp8_delayed")
    lp.nnx.calibrate(lambda model, x: model(x).sum(), model, X)
    assert newest(model)["up"].min() > 0
    lp.nnx.quantize(model, "fp8_delayed")
    assert newest(model)["up"].max() == 0
    lp.nnx.quantize(model, "fp8_current")
    assert _recipes(model) == {"up": "fp8_current", "down": "fp8_current"}
    assert lp.nnx.scaling_state(model) == {}


def test_quantize__none_after_fp8__restores_high_precision_bitwise():
    model, stock = Mlp(nnx.Rngs(0)), Mlp(nnx.Rngs(0))
    lp.nnx.quantize(model, "fp8_delayed")
    lp.nnx.calibrate(lambda model, x: model(x).sum(), model, X)
    assert not np.array_equal(model(X), stock(X))
    lp.nnx.quantize(model, "none")
    assert_same(arrays(model), arrays(stock))
    assert_same(nnx.jit(lambda m, x: m(x))(model, X), nnx.jit(lambda m, x: m(x))(stock, X))
    assert model(X).shape == (BATCH, CLASSES)
