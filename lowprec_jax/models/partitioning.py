"""How the reference models are split over a mesh: one table per model.

Tensor parallelism after Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3): the first matmul
of attention and of the MLP is split by its columns, the second by its rows, so that a block needs
one all-reduce each forward. The other dimension of each kernel is split by ``fsdp``.
"""

from lowprec_jax.sharding import FSDP_AXIS as FSDP
from lowprec_jax.sharding import TENSOR_AXIS as TENSOR
from lowprec_jax.sharding import ShardingRule

TRANSFORMER = (
    ShardingRule(r"attention/qkv/kernel$", (FSDP, TENSOR)),
    ShardingRule(r"attention/out/kernel$", (TENSOR, FSDP)),
    ShardingRule(r"mlp/gate_up/kernel$", (FSDP, None, TENSOR)),
    ShardingRule(r"mlp/up/kernel$", (FSDP, TENSOR)),
    ShardingRule(r"mlp/down/kernel$", (TENSOR, FSDP)),
    ShardingRule(r"embedding/embedding$", (None, FSDP)),
    ShardingRule(r"head/kernel$", (FSDP, None)),
)
