"""Mixture of experts as NNX modules: the grouped matmul with its scaling state, and the block."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax import ops
from lowprec_jax.nnx.layers import DEFAULT_RECIPE
from lowprec_jax.nnx.sites import Site
from lowprec_jax.ops.moe import (
    DOWN_INIT,
    GATE_UP_INIT,
    ROUTER_INIT,
    MoEOutput,
    gated_mlp,
    mixture_of_experts,
)
from lowprec_jax.recipes import Recipe


class RaggedDot(Site):
    """A callable with the signature of `jax.lax.ragged_dot`, computed as a recipe says.

    Its scaling state has a leading group axis: a group that gets no rows keeps its scales.

    Args:
      recipe: a recipe or its name.
      groups: number of groups.
    """

    def __init__(self, recipe: Recipe | str, *, groups: int):
        super().__init__(recipe, stack=(groups,))

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        group_sizes: jax.Array,
        precision=None,
        preferred_element_type=None,
    ) -> jax.Array:
        """See `lowprec_jax.ops.ragged_dot`."""
        return ops.ragged_dot(
            lhs,
            rhs,
            group_sizes,
            recipe=self.recipe,
            state=self.state,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )


class MoE(nnx.Module):
    """Top-k mixture of gated MLPs: ``down(activation(gate(x)) * up(x))`` of the chosen experts.

    The router is always computed in f32. Dropless and deterministic. Every array but the router,
    scaling state included, has a leading expert axis. To split the experts over a mesh axis, put
    that axis first in the specs of all of them, build the layer with `expert_axis`, and call it
    inside `jax.shard_map` with the tokens split over the same axis. Tokens are then gathered and
    outputs scattered: no token is ever dropped, but each device receives all tokens. An all-to-all
    with capacities moves less and drops tokens when the load is uneven
    (`lowprec_jax.ops.moe.mixture_of_experts`).

    Under `jax.jit` with sharded arrays, leave `expert_axis` None: the compiler partitions.

    Args:
      features: size of the last axis of input and output.
      hidden_features: width of one expert.
      num_experts: experts in all.
      top_k: experts per token.
      recipe: of the two grouped matmuls, a recipe or its name.
      expert_axis: mesh axis that the experts are split over, inside `jax.shard_map`.
      activation: of the gate; `jax.nn.silu` makes it SwiGLU.
      dtype: compute type; default: the promoted type of input and parameters.
      param_dtype: type of the parameters.
      rngs: random keys of the initialisers.

    Attributes:
      router: [features, num_experts].
      gate_up: [num_experts, features, 2, hidden_features].
      down: [num_experts, hidden_features, features].
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_experts: int,
        *,
        top_k: int = 2,
        recipe: Recipe | str = DEFAULT_RECIPE,
        expert_axis: str | None = None,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        gate_up_shape = (num_experts, features, 2, hidden_features)
        down_shape = (num_experts, hidden_features, features)
        self.router = nnx.Param(ROUTER_INIT(rngs.params(), (features, num_experts), param_dtype))
        self.gate_up = nnx.Param(GATE_UP_INIT(rngs.params(), gate_up_shape, param_dtype))
        self.down = nnx.Param(DOWN_INIT(rngs.params(), down_shape, param_dtype))
        self.gate_up_dot = RaggedDot(recipe, groups=num_experts)
        self.down_dot = RaggedDot(recipe, groups=num_experts)
        self.top_k, self.expert_axis = top_k, expert_axis
        self.activation, self.dtype = activation, dtype

    def __call__(self, x: jax.Array) -> MoEOutput:
        """Output, load-balance loss and tokens per expert.

        Args:
          x: float [..., features].

        Raises:
          UserError: `top_k` or the split of the experts does not fit.
        """
        gate_up, down = self.gate_up[...], self.down[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, gate_up.dtype)
        network = functools.partial(
            gated_mlp,
            gate_up=gate_up.astype(dtype),
            down=down.astype(dtype),
            activation=self.activation,
            gate_up_dot=self.gate_up_dot,
            down_dot=self.down_dot,
        )
        return mixture_of_experts(
            x.astype(dtype),
            self.router[...],
            network,
            top_k=self.top_k,
            local_experts=gate_up.shape[0],
            expert_axis=self.expert_axis,
        )
