"""The network of a run: built and quantized from the config, split into pure trees of arrays."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax import recipes, state
from lowprec_jax.models import Transformer, TransformerConfig
from lowprec_jax.nnx import Scaling, plan, quantize
from lowprec_jax.ops.plan import Plan
from lowprec_jax.training.config import ModelConfig, PrecisionConfig, TrainConfig

Tree = Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as functions on trees.

    Attributes:
      init: ``key -> (params, scaling)``, nested dicts of arrays.
      merge: ``(params, scaling) -> model``.
      split: ``model -> (params, scaling)``.
    """

    init: Callable[[jax.Array], tuple[Tree, Tree]]
    merge: Callable[[Tree, Tree], nnx.Module]
    split: Callable[[nnx.Module], tuple[Tree, Tree]]


def build_network(config: TrainConfig, vocab_size: int) -> Network:
    """Builds the model of a run.

    Raises:
      UserError: an unknown recipe, or a rule that matches no layer.
    """
    rules = precision_rules(config.precision)

    def create(key: jax.Array) -> nnx.Module:
        model = Transformer(transformer_config(config.model, vocab_size), rngs=nnx.Rngs(key))
        return quantize(model, rules)

    graphdef, *abstract = nnx.split(nnx.eval_shape(create, jax.random.key(0)), nnx.Param, Scaling)

    def merge(params: Tree, scaling: Tree) -> nnx.Module:
        trees = zip(abstract, (params, scaling), strict=True)
        return nnx.merge(graphdef, *(_filled(state, tree) for state, tree in trees))

    def split(model: nnx.Module) -> tuple[Tree, Tree]:
        _, params, scaling = nnx.split(model, nnx.Param, Scaling)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(scaling)

    return Network(init=jax.jit(lambda key: split(create(key))), merge=merge, split=split)


def plan_network(config: TrainConfig, vocab_size: int = 256) -> Plan:
    """What the config's recipe and rules do to its model, as a table."""
    model = nnx.eval_shape(
        lambda: Transformer(transformer_config(config.model, vocab_size), rngs=nnx.Rngs(0))
    )
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.model.context), jnp.int32)
    return plan(model, precision_rules(config.precision), tokens)


def _filled(abstract: nnx.State, tree: Tree) -> nnx.State:
    """A state with its values taken from nested dicts."""

    def value(path):
        return functools.reduce(operator.getitem, path, tree)

    flat = nnx.to_flat_state(abstract)
    return nnx.from_flat_state([(path, variable.replace(value(path))) for path, variable in flat])


def transformer_config(model: ModelConfig, vocab_size: int) -> TransformerConfig:
    """The sizes of the model, with everything that was left open resolved."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        width=model.width,
        mlp_width=model.hidden_width,
        max_context=model.context,
        mlp=model.mlp,
        tied_head=model.tied_head,
        scan_layers=model.scan_layers,
        remat=model.remat,
        rope_base=model.rope_base,
        compute_dtype=model.compute_dtype,
        param_dtype=model.param_dtype,
        init_scale=model.init_scale,
    )


def precision_rules(precision: PrecisionConfig) -> tuple[recipes.Rule, ...]:
    """The rules of a run: the config's, then the defaults. All recipes are observed."""

    def configured(name: str) -> recipes.Recipe:
        recipe = recipes.get_recipe(name)
        if not recipe.quantizes:
            return recipe
        return dataclasses.replace(
            recipe,
            history_length=precision.history_length,
            amax_reduction=precision.amax_reduction,
            margin=precision.margin,
            observe=True,
        )

    own = (recipes.Rule(rule.path, configured(rule.recipe)) for rule in precision.rules)
    return (*own, *recipes.default_rules(configured(precision.recipe)))


def operand_names(scaling: Tree) -> list[str]:
    """Names of the operands in health reports: ``"blocks/mlp/down[2] output_grad"``."""
    return [name.replace("/dot_general/scaling", "") for name in state.operand_names(scaling)]


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to the scales of norms."""
    return re.search(r"norm", path) is None
