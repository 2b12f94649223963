"""Quantized ops as NNX modules: one call site each, with scaling state of its own."""

import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax import ops
from lowprec_jax.numerics import ScaledArray
from lowprec_jax.recipes import Column, Recipe, Role, get_recipe, init_state


class Scaling(nnx.Variable):
    """One array of the scaling state of a call site, see `lowprec_jax.recipes.init_state`.

    No `nnx.Param`: optimizers, gradients and weight decay never see it.
    """


class SiteIndex(nnx.Variable):
    """Which layer of a stack this is, int32 []; exists during an observed call only."""


class QuantizedKernel(nnx.Variable):
    """A kernel quantized once for all calls of a step; exists during an observed call only."""


class Observation(nnx.Variable):
    """A `lowprec_jax.ops.Probe` of a call site; exists during an observed call only.

    An `nnx.Variable`, so that a scan over a stack of layers hands every layer its own.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Observer:
    """Where a call site writes during one observed call.

    It is a static attribute of the module, compared by identity, and the ref is closed over: NNX
    transforms return the arrays of a module from every traced function, which JAX forbids for refs.

    Attributes:
      ref: f32[3, 5], of a stack f32[layers, 3, 5]; None where the site has a probe.
      calibrating: compute in high precision and only observe.
      seed: what tells call sites apart in random keys.
      kernel: the kernel, from `lowprec_jax.ops.quantize_rhs`, for all calls; None: each quantizes.
    """

    ref: Any
    calibrating: bool
    seed: int
    kernel: ScaledArray | None = None

    @classmethod
    def of(
        cls, path: str, ref: Any, *, calibrating: bool, kernel: ScaledArray | None = None
    ) -> Self:
        """The observer of the call site at `path`."""
        return cls(ref, calibrating, zlib.crc32(path.encode()), kernel)

    def sink(self, index: jax.Array | None) -> Any:
        """The sink of one layer of the stack; None: there is no stack."""
        return self.ref if index is None else ops.IndexedSink(self.ref, index)


class Site(nnx.Module):
    """Base of the modules that compute one quantized op.

    Args:
      recipe: a recipe or its name.
      stack: leading axes of a stack of layers that is scanned.
    """

    def __init__(self, recipe: Recipe | str, *, stack: tuple[int, ...] = ()):
        self.recipe = get_recipe(recipe)
        state = init_state(self.recipe, stack)
        self.scaling = nnx.Dict({name: Scaling(value) for name, value in state.items()})
        self.observer: Observer | None = nnx.static(None)
        self.index: SiteIndex | None = nnx.data(None)
        self.kernel: QuantizedKernel | None = nnx.data(None)
        self.probe: Observation | None = nnx.data(None)

    def get_scaling(self) -> dict[str, jax.Array]:
        """The scaling state; empty for a recipe without state."""
        return {name: variable.get_value() for name, variable in self.scaling.items()}

    def set_scaling(self, state: dict[str, jax.Array]) -> None:
        """Replaces the scaling state."""
        for name, value in state.items():
            self.scaling[name].set_value(value)

    @property
    def state(self) -> dict[str, Any] | None:
        """The state that the op is given: with a sink during an observed call."""
        if not self.scaling:
            return None
        state: dict[str, Any] = self.get_scaling()
        observer = self.observer
        if observer is not None:
            index = None if self.index is None else self.index.get_value()
            state["sink"] = observer.sink(index) if self.probe is None else self.probe.get_value()
            if observer.calibrating:
                state.pop("amax_history", None)
            if "counter" in state:
                layer = 0 if index is None else index.astype(jnp.uint32)
                state["seed"] = jnp.uint32(observer.seed) + layer
        return state

    def start_observing(self, observer: Observer) -> None:
        """Connects the site to an observer; layers of a stack get their index."""
        self.observer = nnx.static(observer)
        if observer.kernel is not None:
            self.kernel = nnx.data(QuantizedKernel(observer.kernel))
        stack = self.stack
        if stack:
            index = jnp.arange(math.prod(stack), dtype=jnp.int32).reshape(stack)
            self.index = nnx.data(SiteIndex(index))

    def attach_probe(self, probe: ops.Probe) -> None:
        """Lets the site observe into a probe f32[*stack, 3, 5] instead of a ref."""
        self.probe = nnx.data(Observation(probe))

    def detach_probe(self) -> None:
        """Takes the probe away."""
        self.probe = nnx.data(None)

    def stop_observing(self) -> None:
        """Disconnects the site."""
        self.observer = nnx.static(None)
        self.index = nnx.data(None)
        self.kernel = nnx.data(None)

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the state: those of the stack of layers, if any."""
        return self.get_scaling()["pending"].shape[:-2] if self.scaling else ()

    def new_observations(self) -> jax.Array:
        """Zeros for what one call observes: f32[3, 5], of a stack f32[layers, 3, 5]."""
        return jnp.zeros((*flat(self.stack), len(Role), len(Column)), jnp.float32)


class DotGeneral(Site):
    """A callable with the signature of `jax.lax.dot_general`, computed as a recipe says.

    Fits the ``dot_general`` argument of stock Flax layers:
    ``nnx.Linear(8, 16, dot_general=DotGeneral("fp8_delayed"), rngs=rngs)``. One per layer.

    Attributes:
      gather: how the kernel is sharded, if it is; see `lowprec_jax.ops.Gather`.
    """

    gather: ops.Gather | None = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
    ) -> jax.Array:
        """See `lowprec_jax.ops.dot_general`."""
        return ops.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            recipe=self.recipe,
            state=self.state,
            rhs_gather=self.gather,
            rhs_quantized=None if self.kernel is None else self.kernel.get_value(),
            out_sharding=out_sharding,
        )


class EinsumOp(Site):
    """A callable with the signature of `jnp.einsum` of two operands, computed as a recipe says.

    Fits the ``einsum_op`` argument of `nnx.Einsum`. One per layer.
    """

    def __call__(
        self,
        subscripts: str,
        lhs: jax.Array,
        rhs: jax.Array,
        *,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
    ) -> jax.Array:
        """See `lowprec_jax.ops.einsum`."""
        return ops.einsum(
            subscripts,
            lhs,
            rhs,
            recipe=self.recipe,
            state=self.state,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )


def flat(stack: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a stack as one, or none: what `IndexedSink` counts along."""
    return (math.prod(stack),) if stack else ()


def iter_sites(*nodes: Any) -> Iterator[tuple[str, Site]]:
    """``(path, site)`` of every quantized op with state in the given modules, in a fixed order.

    With more than one module, paths start with the number of the module.
    """
    first = 0 if len(nodes) > 1 else 1
    for path, value in nnx.iter_graph(list(nodes)):
        if isinstance(value, Site) and value.scaling:
            yield "/".join(map(str, path[first:])), value
