"""Mixture of experts as Linen modules: the same numerics and state as `lowprec_jax.nnx.MoE`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lowprec_jax import ops
from lowprec_jax.linen.dot_general import state_of
from lowprec_jax.ops.moe import (
    DOWN_INIT,
    GATE_UP_INIT,
    ROUTER_INIT,
    MoEOutput,
    gated_mlp,
    mixture_of_experts,
)
from lowprec_jax.recipes import Recipe


class RaggedDot(nn.Module):
    """`lowprec_jax.ops.ragged_dot` with its scaling state, one row for each group.

    Attributes:
      recipe: a recipe or its registered name.
    """

    recipe: Recipe | str = "fp8_delayed"

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        group_sizes: jax.Array,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """The product; arguments as in `jax.lax.ragged_dot`.

        Raises:
          UserError: the variables given to `apply` have no scaling state for this layer.
        """
        return ops.ragged_dot(
            lhs,
            rhs,
            group_sizes,
            recipe=self.recipe,
            state=state_of(self, rhs.shape[:1]),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )


class MoE(nn.Module):
    """Top-k mixture of gated MLPs; see `lowprec_jax.nnx.MoE` for what it computes.

    Parameters and scaling state have a leading expert axis, all but ``router``. With `expert_axis`,
    initialise outside `jax.shard_map`, split the variables, and apply inside it.

    Attributes:
      hidden_features: width of one expert.
      num_experts: experts in all.
      top_k: experts per token.
      recipe: of the two grouped matmuls, a recipe or its registered name.
      expert_axis: mesh axis that the experts are split over, inside `jax.shard_map`.
      activation: of the gate; `jax.nn.silu` makes it SwiGLU.
      dtype: compute type; default: the promoted type of input and parameters.
      param_dtype: type of the parameters.
    """

    hidden_features: int
    num_experts: int
    top_k: int = 2
    recipe: Recipe | str = "fp8_delayed"
    expert_axis: str | None = None
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> MoEOutput:
        """Output, load-balance loss and tokens per expert of x, float [..., features].

        Raises:
          UserError: `top_k` or the split of the experts does not fit.
        """
        features, axis = x.shape[-1], None if self.is_initializing() else self.expert_axis
        local = self.num_experts // (lax.axis_size(axis) if axis else 1)
        shapes = (features, 2, self.hidden_features), (self.hidden_features, features)
        router = self.param("router", ROUTER_INIT, (features, self.num_experts), self.param_dtype)
        gate_up = self.param("gate_up", GATE_UP_INIT, (local, *shapes[0]), self.param_dtype)
        down = self.param("down", DOWN_INIT, (local, *shapes[1]), self.param_dtype)
        dtype = self.dtype or jnp.promote_types(x.dtype, gate_up.dtype)
        network = functools.partial(
            gated_mlp,
            gate_up=gate_up.astype(dtype),
            down=down.astype(dtype),
            activation=self.activation,
            gate_up_dot=RaggedDot(self.recipe, name="gate_up_dot"),
            down_dot=RaggedDot(self.recipe, name="down_dot"),
        )
        return mixture_of_experts(
            x.astype(dtype),
            router,
            network,
            top_k=self.top_k,
            local_experts=local,
            expert_axis=axis,
        )
