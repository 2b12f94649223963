"""Mixture of experts around any expert network: route, sort by expert, compute, combine.

Dropless and deterministic: every token reaches all experts it chose, in arrays of static shape.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.errors import UserError

# Initialisers of the parameters: every matrix by its own fan-in.
ROUTER_INIT = jax.nn.initializers.lecun_normal()
GATE_UP_INIT = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=3, batch_axis=(0, 2))
DOWN_INIT = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
      experts: int32 [tokens, top_k], the best first, each expert at most once.
      weights: f32 [tokens, top_k], with sum 1.
      probabilities: f32 [tokens, experts], softmax over all experts.
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


class MoEOutput(NamedTuple):
    """What a mixture of experts returns.

    Attributes:
      out: the tokens' outputs, of the shape of the input.
      aux_loss: load-balance loss, f32 []; 1 where the load is uniform. See `load_balance_loss`.
      tokens_per_expert: int32 [experts], tokens that chose each expert.
    """

    out: jax.Array
    aux_loss: jax.Array
    tokens_per_expert: jax.Array


def route(tokens: jax.Array, router: jax.Array, top_k: int) -> Routing:
    """Chooses the `top_k` experts with the largest logits; always in f32.

    The weights are the softmax over all experts, renormalised over the chosen ones; this is the
    softmax over the chosen logits, and computed so. Of equal logits the first expert wins.

    Args:
      tokens: float [tokens, features].
      router: float [features, experts].
      top_k: experts per token.

    Source: Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """
    logits = jnp.matmul(
        tokens.astype(jnp.float32), router.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    chosen, experts = lax.top_k(logits, top_k)
    return Routing(experts, jax.nn.softmax(chosen), jax.nn.softmax(logits))


def load_balance_loss(tokens_per_expert: jax.Array, mean_probabilities: jax.Array) -> jax.Array:
    """``experts * sum(f * P)``: f of the choices fell on an expert, P is its mean probability.

    1 where the load is uniform, `experts` where one gets everything. Multiply it with a small
    coefficient (0.01) and add it to the loss; the gradient comes through P.

    Args:
      tokens_per_expert: int [experts].
      mean_probabilities: f32 [experts], mean of `Routing.probabilities` over the same tokens.

    Source: Fedus et al. 2021 (Switch Transformer), arXiv:2101.03961, equations 4 to 6, where each
      token has one choice; after Shazeer et al. 2017, arXiv:1701.06538, section 4.
    """
    counts = tokens_per_expert.astype(jnp.float32)
    share = counts / jnp.maximum(counts.sum(), 1)
    return share.size * jnp.sum(share * mean_probabilities)


def mixture_of_experts(
    x: jax.Array,
    router: jax.Array,
    network: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    top_k: int,
    local_experts: int,
    expert_axis: str | None = None,
) -> MoEOutput:
    """Sends every token through its experts and adds their outputs up, weighted.

    With `expert_axis`, inside `jax.shard_map`: experts and tokens are both split over that axis.
    Each device gathers all tokens, computes the rows of its own experts, and the outputs are summed
    and scattered back. No token is dropped and no capacity is tuned, at the price of sending every
    token to every device; an all-to-all with capacities sends only the top_k copies, but drops
    tokens when the load is uneven or pads for the worst case.

    Args:
      x: float [..., features]; with `expert_axis` the tokens of this device.
      router: float [features, experts], replicated.
      network: ``network(rows, group_sizes) -> rows`` of the local experts: rows [M, features]
        sorted by expert, int32 [local_experts]. It returns zeros for rows beyond the sum.
      top_k: experts per token.
      local_experts: number of experts of `network`.
      expert_axis: mesh axis that the experts are split over.

    Returns:
      The output, and loss and counts over the tokens of the whole axis.

    Raises:
      UserError: `top_k` or `local_experts` do not fit the router.
    """
    experts = router.shape[-1]
    devices = lax.axis_size(expert_axis) if expert_axis else 1
    if not 1 <= top_k <= experts:
        raise UserError(f"MoE: top_k is {top_k}; choose 1 to {experts}, the number of experts.")
    if local_experts * devices != experts:
        raise UserError(
            f"MoE: the router knows {experts} experts, but {devices} devices hold {local_experts} "
            "each. Split all expert arrays (not the router) over expert_axis, and call the layer "
            "inside shard_map if they are split."
        )
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(tokens, router, top_k)
    counts = _count(routing.experts.ravel(), experts)
    mean = routing.probabilities.sum(0) / max(len(tokens), 1)
    if expert_axis is None:
        out = _compute(tokens, routing.experts, routing.weights, network, local_experts)
    else:
        tokens, chosen, weights = (
            lax.all_gather(compat.to_varying(y, (expert_axis,)), expert_axis, tiled=True)
            for y in (tokens, routing.experts, routing.weights)
        )
        mine = chosen - lax.axis_index(expert_axis) * local_experts
        out = _compute(tokens, mine, weights, network, local_experts)
        out = lax.psum_scatter(out, expert_axis, tiled=True)
        counts, mean = lax.psum(counts, expert_axis), lax.pmean(mean, expert_axis)
    return MoEOutput(out.astype(x.dtype).reshape(x.shape), load_balance_loss(counts, mean), counts)


def gated_mlp(
    rows: jax.Array,
    group_sizes: jax.Array,
    *,
    gate_up: jax.Array,
    down: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    gate_up_dot: Callable,
    down_dot: Callable,
) -> jax.Array:
    """``down(activation(gate(x)) * up(x))`` of each row's expert: a `network`.

    Args:
      rows: float [M, features], sorted by expert.
      group_sizes: int32 [experts].
      gate_up: [experts, features, 2, hidden].
      down: [experts, hidden, features].
      activation: of the gate; `jax.nn.silu` makes it SwiGLU.
      gate_up_dot: grouped matmul with the signature of `jax.lax.ragged_dot`.
      down_dot: the same, a call site of its own.

    Source: Shazeer 2020 (GLU variants), arXiv:2002.05202.
    """
    experts, features = gate_up.shape[:2]
    hidden = gate_up_dot(rows, gate_up.reshape(experts, features, -1), group_sizes)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return down_dot(activation(gate) * up, down, group_sizes)


def _compute(tokens, experts, weights, network, count: int) -> jax.Array:
    """The weighted outputs f32 [tokens, features] of experts 0 to `count`; others give nothing."""
    top_k = experts.shape[1]
    choice = experts.ravel()
    choice = jnp.where((choice >= 0) & (choice < count), choice, count)
    order = jnp.argsort(choice, stable=True)
    rows = network(_permute(jnp.repeat(tokens, top_k, axis=0), order), _count(choice, count))
    outputs = _permute(rows, jnp.argsort(order)).reshape(-1, top_k, rows.shape[-1])
    return (outputs.astype(jnp.float32) * weights[..., None]).sum(1)


def _permute(rows: jax.Array, order: jax.Array) -> jax.Array:
    """``rows[order]`` of a permutation: its gradient adds nothing up, in no order."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _count(experts: jax.Array, count: int) -> jax.Array:
    """How often each of the experts 0 to `count` occurs, int32 [count]."""
    return jax.ops.segment_sum(jnp.ones_like(experts), experts, count)
