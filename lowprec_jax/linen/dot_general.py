"""The call site: quantized products as Linen modules, for the injection slots of stock layers.

The scaling state of a call site is one variable, ``scaling``, in Flax's collection for values that
are overwritten with their "gradient": `flax.training.train_state.TrainState` carries it as it is.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from lowprec_jax import compat, ops
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import Recipe, get_recipe, init_state

SCALING = "scaling"


class DotGeneral(nn.Module):
    """`lowprec_jax.ops.dot_general` with its scaling state.

    Stock layers take it through `dot_general_cls`. A recipe without state creates no variable.

    Attributes:
      recipe: a recipe or its registered name.

    Differs from: `flax.linen.Fp8DotGeneral`, whose state is summed when a layer is used twice and
      set to zero when it is not used.
    """

    recipe: Recipe | str = "fp8_delayed"

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The product of two float arrays; arguments as in `jax.lax.dot_general`.

        Raises:
          UserError: the variables given to `apply` have no scaling state for this layer.
        """
        return ops.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            recipe=self.recipe,
            state=state_of(self),
            **kwargs,
        )


class EinsumOp(nn.Module):
    """`lowprec_jax.ops.einsum` of two arrays with its scaling state.

    For slots that take an einsum: ``qk_attn_weights_einsum_cls`` and
    ``attn_weights_value_einsum_cls`` of stock attention.

    Attributes:
      recipe: a recipe or its registered name.
    """

    recipe: Recipe | str = "fp8_delayed"

    @nn.compact
    def __call__(
        self,
        subscripts: str,
        lhs: jax.Array,
        rhs: jax.Array,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The product of two float arrays; arguments as in `jnp.einsum`.

        Raises:
          UserError: the variables given to `apply` have no scaling state for this layer.
        """
        return ops.einsum(
            subscripts,
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
            recipe=self.recipe,
            state=state_of(self),
            **kwargs,
        )


@dataclasses.dataclass(frozen=True)
class Injection:
    """Makes the modules that a slot like ``dot_general_cls`` asks for; compares by its fields.

    Attributes:
      module: `DotGeneral` or `EinsumOp`.
      recipe: what they compute.
    """

    module: type[nn.Module]
    recipe: Recipe

    def __call__(self) -> nn.Module:
        """A new call site, a child of the module that is being called."""
        return self.module(recipe=self.recipe)  # pyright: ignore[reportCallIssue]


@dataclasses.dataclass(frozen=True)
class StatelessDotGeneral:
    """`lowprec_jax.ops.dot_general` with a fixed recipe; compares by its fields."""

    recipe: Recipe

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """As `jax.lax.dot_general`."""
        return ops.dot_general(*args, recipe=self.recipe, **kwargs)


def dot_general_cls(recipe: Recipe | str) -> Injection:
    """What ``nn.Dense(dot_general_cls=...)``, ``nn.DenseGeneral`` and stock attention take.

    Raises:
      UserError: an unknown recipe.
    """
    return Injection(DotGeneral, get_recipe(recipe))


def einsum_cls(recipe: Recipe | str) -> Injection:
    """What the slots ``qk_attn_weights_einsum_cls``, ``attn_weights_value_einsum_cls`` take."""
    return Injection(EinsumOp, get_recipe(recipe))


def dot_general(recipe: Recipe | str) -> StatelessDotGeneral:
    """What ``dot_general=`` of stock layers takes: a plain function, so recipes without state only.

    Raises:
      UserError: an unknown recipe, or one that keeps state.
    """
    recipe = get_recipe(recipe)
    if recipe.stateful:
        raise UserError(
            f"Recipe {recipe.name!r} keeps state, which a plain function cannot hold. Use "
            f"dot_general_cls=lowprec_jax.linen.dot_general_cls({recipe.name!r}) instead of "
            "dot_general=, or a recipe without state such as 'fp8_current'."
        )
    return StatelessDotGeneral(recipe)


def state_of(module: nn.Module, stack: tuple[int, ...] = ()) -> Mapping[str, Any] | None:
    """The scaling state of a call site, created where the collection may be created.

    Args:
      module: the call site, with a recipe.
      stack: leading axes of the state, see `init_state`.
    """
    recipe = get_recipe(module.recipe)  # pyright: ignore[reportAttributeAccessIssue]
    if not recipe.stateful:
        return None
    known = module.has_variable(OVERWRITE_WITH_GRADIENT, SCALING)
    if not (known or module.is_mutable_collection(OVERWRITE_WITH_GRADIENT)):
        if not recipe.delayed and not module.is_initializing():
            return None  # observed only while there is a place for it
        raise _missing_state_error(module, recipe)
    state = module.variable(OVERWRITE_WITH_GRADIENT, SCALING, init_state, recipe, stack).value
    if "counter" in state:
        state = {**state, "seed": jnp.uint32(zlib.crc32("/".join(module.path).encode()))}
    sink = state.get("sink")
    if sink is None or compat.is_ref(sink) or isinstance(sink, ops.IndexedSink | ops.Probe):
        return state
    # nn.scan first traces its body with arrays in the place of refs, only to find constants. If it
    # were the real call, the op would refuse to be differentiated without a sink.
    return {**init_state(recipe, stack), **{key: x for key, x in state.items() if key != "sink"}}


def _missing_state_error(module: nn.Module, recipe: Recipe) -> UserError:
    where = f"Layer {'/'.join(module.path)!r} with recipe {recipe.name!r} has no scaling state"
    lifted = (
        "list lowprec_jax.linen.OVERWRITE_WITH_GRADIENT in variable_axes (one state per layer) or "
        "variable_broadcast (a shared one) of the nn.scan or nn.vmap around it"
    )
    if module.is_initializing():
        return UserError(f"{where} and cannot create it: {lifted}, as for 'params'.")
    return UserError(
        f"{where} in the variables given to apply. Pass all of `variables`, not only "
        "{'params': params}. For parameters from elsewhere: variables = "
        f"lowprec_jax.linen.init_scaling(model, variables, *inputs). If they have it, {lifted}."
    )
