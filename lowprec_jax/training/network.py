"""The network of a run: built and quantized from the config, split into pure trees of arrays."""

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax import recipes, state
from lowprec_jax.errors import UserError
from lowprec_jax.models import Transformer, TransformerConfig, next_token_loss, partitioning
from lowprec_jax.nnx import Scaling, gather_kernels, plan, quantize
from lowprec_jax.nnx.sites import iter_sites
from lowprec_jax.ops import Gather, check_backend, gather
from lowprec_jax.ops.plan import Plan
from lowprec_jax.recipes import translate_rules
from lowprec_jax.sharding import (
    FSDP_AXIS,
    TENSOR_AXIS,
    Layout,
    ShardingRule,
    dimension_over,
    make_mesh,
)
from lowprec_jax.training.config import ModelConfig, PrecisionConfig, TrainConfig
from lowprec_jax.training.mesh_config import MeshConfig
from lowprec_jax.training.phases import precision_at

Tree = Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as functions on trees, and where it lives.

    Attributes:
      layout: the devices and how the parameters are split over them.
      init: ``key -> (params, scaling)``, nested dicts of arrays.
      merge: ``(params, scaling) -> model``.
      split: ``model -> (params, scaling)``.
      whole: ``model -> model`` with the sharded parameters that no linear layer gathers by itself
        brought together: what is called.
      loss: ``(model, inputs, targets) -> sum``, the loss of a batch or a part of it, not divided.
      recipes: the recipe of every site of the scaling state, by path.
    """

    layout: Layout
    init: Callable[[jax.Array], tuple[Tree, Tree]]
    merge: Callable[[Tree, Tree], nnx.Module]
    split: Callable[[nnx.Module], tuple[Tree, Tree]]
    whole: Callable[[nnx.Module], nnx.Module]
    loss: Callable[..., jax.Array]
    recipes: Mapping[str, recipes.Recipe]


def build_network(config: TrainConfig, vocab_size: int) -> Network:
    """Builds the model of a run and lays it out over its devices.

    Raises:
      UserError: an unknown recipe or target, a rule that matches no layer, a mesh that the devices
        or the sizes of the model do not allow.
    """
    rules = precision_rules(config.precision)
    tokens = config.batch_size * config.model.context
    sizes = transformer_config(config.model, vocab_size, tokens)

    def create(key: jax.Array) -> nnx.Module:
        model = Transformer(sizes, rngs=nnx.Rngs(key))
        model.sequence_axis = TENSOR_AXIS if config.mesh.sequence else None
        return quantize(model, rules)

    def loss(model: nnx.Module, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return next_token_loss(model(inputs_BT), targets_BT)[0]

    return lay_out(create, loss, config.mesh, partitioning.TRANSFORMER)


def lay_out(
    create: Callable[[jax.Array], nnx.Module],
    loss: Callable[..., jax.Array],
    config: MeshConfig,
    rules: Sequence[ShardingRule],
) -> Network:
    """A model on the devices of a config.

    Args:
      create: makes the quantized model from a random key.
      loss: ``(model, *batch) -> sum``, see `Network`.
      config: the devices.
      rules: which of them split which parameters.

    Raises:
      UserError: see `make_mesh` and `partition_specs`.
    """
    layout = _layout(config, nnx.eval_shape(create, jax.random.key(0)), rules)
    gathers = _gathers(layout)

    def create_sharded(key: jax.Array) -> nnx.Module:
        model = create(key)
        gather_kernels(model, gathers)
        return model

    abstract_model = nnx.eval_shape(create_sharded, jax.random.key(0))
    others = {k: v for k, v in gathers.items() if k not in gather_kernels(abstract_model, gathers)}
    graphdef, *abstract = nnx.split(abstract_model, nnx.Param, Scaling)

    def merge(params: Tree, scaling: Tree) -> nnx.Module:
        trees = zip(abstract, (params, scaling), strict=True)
        return nnx.merge(graphdef, *(_filled(state, tree) for state, tree in trees))

    def split(model: nnx.Module) -> tuple[Tree, Tree]:
        _, params, scaling = nnx.split(model, nnx.Param, Scaling)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(scaling)

    return Network(
        layout=layout,
        init=lambda key: split(create_sharded(key)),
        merge=merge,
        split=split,
        whole=functools.partial(_whole, gathers=others),
        loss=loss,
        recipes={f"{path}/scaling": site.recipe for path, site in iter_sites(abstract_model)},
    )


def plan_network(config: TrainConfig, vocab_size: int = 256) -> Plan:
    """What the config's recipe and rules do to its model, as a table."""
    model = nnx.eval_shape(
        lambda: Transformer(transformer_config(config.model, vocab_size), rngs=nnx.Rngs(0))
    )
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.model.context), jnp.int32)
    return plan(model, precision_rules(config.precision), tokens)


def _layout(config: MeshConfig, model: nnx.Module, rules: Sequence[ShardingRule]) -> Layout:
    return Layout.of(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        rules,
        make_mesh(config.data, config.fsdp, config.tensor, explicit=config.strategy == "explicit"),
        config.strategy,
        zero1=config.zero1,
        reduce_dtype=jnp.bfloat16 if config.reduce == "bfloat16" else jnp.float32,
    )


def _gathers(layout: Layout) -> dict[str, Gather]:
    """How each parameter that is split over the fsdp axis is brought together, by path."""
    flat = jax.tree_util.tree_leaves_with_path(layout.specs)
    split = {_name(path): dimension_over(spec, FSDP_AXIS) for path, spec in flat}
    return {
        name: Gather((FSDP_AXIS,), axis, layout.reduce_dtype)
        for name, axis in split.items()
        if axis is not None
    }


def _whole(model: nnx.Module, gathers: Mapping[str, Gather]) -> nnx.Module:
    if not gathers:
        return model
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def brought(path, x):
        how = gathers.get(_name(path))
        return x if how is None else gather(x, how)

    gathered = jax.tree_util.tree_map_with_path(brought, nnx.to_pure_dict(params))
    return nnx.merge(graphdef, _filled(params, gathered), rest)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _filled(abstract: nnx.State, tree: Tree) -> nnx.State:
    """A state with its values taken from nested dicts."""

    def value(path):
        return functools.reduce(operator.getitem, path, tree)

    flat = nnx.to_flat_state(abstract)
    return nnx.from_flat_state([(path, variable.replace(value(path))) for path, variable in flat])


def transformer_config(
    model: ModelConfig, vocab_size: int, loss_tokens: int = 1
) -> TransformerConfig:
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
        parametrization=model.parametrization,
        residual_tau=model.residual_tau,
        loss_tokens=loss_tokens,
    )


def precision_rules(precision: PrecisionConfig) -> tuple[recipes.Rule, ...]:
    """The rules of a run: the config's, then the defaults. All recipes are observed.

    Raises:
      UserError: an unknown recipe or target.
    """
    return _rules_and_messages(precision)[0]


def target_messages(config: TrainConfig) -> list[str]:
    """What the target of a run changes and emulates, in any of its phases; each sentence once."""
    begins = [0, *(phase.begin(config.steps) for phase in config.precision.phases)]
    said = (_rules_and_messages(precision_at(config, begin))[1] for begin in begins)
    return list(dict.fromkeys(itertools.chain.from_iterable(said)))


def _rules_and_messages(
    precision: PrecisionConfig,
) -> tuple[tuple[recipes.Rule, ...], tuple[str, ...]]:
    _check_backend(precision.backend)

    def configured(name: str) -> recipes.Recipe:
        recipe = recipes.get_recipe(name)
        if not recipe.quantizes:
            return recipe
        return dataclasses.replace(
            recipe,
            history_length=precision.history_length,
            amax_reduction=precision.amax_reduction,
            margin=precision.margin,
            scale_rounding=precision.scale_rounding,
            amax_scope=precision.amax_scope,
            backend=precision.backend,
            observe=True,
        )

    own = (recipes.Rule(rule.path, configured(rule.recipe)) for rule in precision.rules)
    rules = (*own, *recipes.default_rules(configured(precision.recipe)))
    return (rules, ()) if precision.target is None else translate_rules(rules, precision.target)


def _check_backend(name: str | None) -> None:
    try:
        check_backend(name)
    except ValueError as error:
        raise UserError(f"precision.backend: {error}") from None


def operand_names(scaling: Tree) -> list[str]:
    """Names of the operands in health reports: ``"blocks/mlp/down[2] output_grad"``."""
    return [name.replace("/dot_general/scaling", "") for name in state.operand_names(scaling)]


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to the scales of norms."""
    return re.search(r"norm", path) is None
