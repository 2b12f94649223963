"""How the devices of a run are arranged. Imports no JAX. Public name: `MeshConfig`."""

import dataclasses
from typing import Literal, get_args

from lowprec_jax.training.config_checks import require, require_at_least

StrategyName = Literal["shard_map", "jit", "explicit", "pmap"]
ReduceName = Literal["float32", "bfloat16", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged; emulated on the CPU where there is no accelerator."""

    data: int = 1
    """Devices, each with all parameters, that share a batch."""
    fsdp: int = 1
    """Devices that share a batch and the parameters; these travel as FP8 where the layer is."""
    tensor: int = 1
    """Devices that share each matmul."""
    strategy: StrategyName = "shard_map"
    """Who places communication: "shard_map" this program; "jit" (automatic axes) and "explicit"
    the compiler; "pmap" as shard_map, data parallel only."""
    zero1: bool = False
    """Also split masters and moments of the optimizer over `data`."""
    sequence: bool = False
    """Split activations between tensor-parallel blocks along the sequence."""
    reduce: ReduceName = "float32"
    """Type in which gradients are summed over devices; "fp8" with strategy "shard_map" and `data`
    alone."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            require_at_least(name, getattr(self, name), 1)
        for name, kind in (("strategy", StrategyName), ("reduce", ReduceName)):
            options = get_args(kind)
            require(
                getattr(self, name) in options,
                f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, options))}.",
            )
        plain = self.fsdp == self.tensor == 1 and not self.zero1
        require(
            self.strategy != "pmap" or plain,
            'strategy "pmap" is data parallel only: it needs fsdp 1, tensor 1 and zero1 false. '
            'Use strategy "shard_map".',
        )
        require(
            self.reduce == "float32" or self.strategy in ("shard_map", "pmap"),
            f'reduce "{self.reduce}" needs strategy "shard_map": under "{self.strategy}" the '
            "compiler sums gradients.",
        )
        require(
            self.reduce != "fp8" or (plain and self.strategy == "shard_map"),
            'reduce "fp8" needs strategy "shard_map", fsdp 1, tensor 1 and zero1 false.',
        )
        require(
            not self.sequence or self.tensor > 1,
            "sequence splits activations over the tensor axis; set tensor to more than 1.",
        )

    @property
    def size(self) -> int:
        """All devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_parts(self) -> int:
        """Into how many parts a batch is split."""
        return self.data * self.fsdp
