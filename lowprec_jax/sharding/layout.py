"""How a training step is spread over a mesh: where its state lives, who sums what.

One step function runs under every strategy; what differs is here. Gradients are computed in a
*region*; the optimizer runs outside of it, where the compiler sees whole arrays, so that global
norms, clipping and any Optax chain are right without knowing of devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import compat
from lowprec_jax.errors import UserError
from lowprec_jax.sharding.mesh import (
    BATCH_AXES,
    DATA_AXIS,
    FSDP_AXIS,
    TENSOR_AXIS,
    batch_size_of,
)
from lowprec_jax.sharding.region import device_axes
from lowprec_jax.sharding.rules import (
    ShardingRule,
    dimension_over,
    only,
    partition_specs,
    split_further,
)

Tree = Any
Strategy = Literal["shard_map", "jit", "explicit", "pmap"]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where state lives on a mesh, and how gradients are computed on it.

    Attributes:
      mesh: from `make_mesh`; with explicit axes for the strategy "explicit".
      strategy: "shard_map": data and fsdp are manual axes, communication is what is written here
        and in `lowprec_jax.ops.gather`. "jit" and "explicit": the compiler places it. "pmap": data
        parallel only. In all of them the compiler splits over the tensor axis.
      specs: a `PartitionSpec` for each parameter.
      optimizer_specs: the same for masters and moments; split further with ZeRO-1.
      reduce_dtype: type in which gradients are summed over devices, under "shard_map" and "pmap".
    """

    mesh: Mesh
    strategy: Strategy
    specs: Tree
    optimizer_specs: Tree
    reduce_dtype: Any = jnp.float32

    @classmethod
    def of(
        cls,
        params: Tree,
        rules: Sequence[ShardingRule],
        mesh: Mesh,
        strategy: Strategy = "shard_map",
        *,
        zero1: bool = False,
        reduce_dtype: Any = jnp.float32,
    ) -> "Layout":
        """The layout that a table of rules gives parameters (arrays or abstract).

        Args:
          params: parameters, nested dicts.
          rules: see `ShardingRule`.
          mesh: the devices.
          strategy: see the class.
          zero1: split masters and moments over the data axis too.
          reduce_dtype: see the class.

        Raises:
          UserError: see `partition_specs`; bfloat16 sums beside a tensor axis on CPU.
        """
        platform = mesh.devices.flat[0].platform
        if reduce_dtype == jnp.bfloat16 and mesh.shape[TENSOR_AXIS] > 1 and platform == "cpu":
            raise UserError(
                "Summing gradients in bfloat16 beside a tensor axis ends XLA:CPU (JAX 0.10.2). Use "
                "float32 (mesh.reduce float32) on CPU."
            )
        specs = partition_specs(params, rules, mesh)
        optimizer = specs
        if zero1:
            optimizer = jax.tree.map(
                lambda leaf, spec: split_further(spec, leaf.shape, DATA_AXIS, mesh), params, specs
            )
        return cls(mesh, strategy, specs, optimizer, reduce_dtype)

    def shardings(self, state: Tree) -> Tree:
        """The sharding of every array of a training state, arrays or abstract.

        A leaf of ``params`` has the spec of the parameter; one elsewhere that is called and shaped
        like a parameter (a master, a moment) has its optimizer spec; all others are replicated.
        """
        params = state.params
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        shapes = [x.shape for x in jax.tree.leaves(params)]
        optimizer = _leaves(self.optimizer_specs)
        known = dict(zip(names, zip(shapes, optimizer, strict=True), strict=True))

        def sharding(path, leaf):
            for start in range(len(path)):
                shape, spec = known.get(_name(path[start:]), (None, P()))
                if shape == leaf.shape:
                    return NamedSharding(self.mesh, spec)
            return NamedSharding(self.mesh, P())

        placed = jax.tree_util.tree_map_with_path(sharding, state)
        return placed._replace(params=self._named(self.specs))

    def init(self, init: Callable[..., Tree], *args: Any) -> Tree:
        """Runs an initialiser so that each device makes its own part: nothing exists whole."""
        state = self.initializer(init, *args)(*args)
        if self.strategy != "explicit":
            return state
        return jax.device_put(state, self.shardings(state))

    def initializer(self, init: Callable[..., Tree], *args: Any) -> Any:
        """`init`, jitted for its results to be split as `shardings` says.

        On automatic axes always: initialisers know no shardings.
        """
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        automatic = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        shardings = self.shardings(jax.eval_shape(init, *args))
        made = jax.tree.map(lambda s: NamedSharding(automatic, s.spec), shardings)
        return jax.jit(init, out_shardings=made)

    def put_batch(self, batch: Sequence[np.ndarray]) -> tuple[Any, ...]:
        """Puts a global batch that every host has on the mesh, split along its first axis."""
        return self.load_batch(lambda rows: tuple(x[rows] for x in batch), len(batch[0]))

    def load_batch(
        self, load: Callable[[slice], tuple[np.ndarray, ...]], size: int
    ) -> tuple[Any, ...]:
        """Makes a global batch from what each host loads of it.

        Args:
          load: the arrays of some rows, the same on every host; called for the rows of the devices
            of this host.
          size: rows of the batch.
        """
        sharding = NamedSharding(self.mesh, P(BATCH_AXES))
        indices = sharding.addressable_devices_indices_map((size,)).items()
        rows = {device: index[0].indices(size)[:2] for device, index in indices if index}
        loaded = {ends: load(slice(*ends)) for ends in dict.fromkeys(rows.values())}

        def assemble(parts: dict[tuple[int, int], np.ndarray]) -> jax.Array:
            shape = (size, *next(iter(parts.values())).shape[1:])
            arrays = [jax.device_put(parts[ends], device) for device, ends in rows.items()]
            return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

        count = len(next(iter(loaded.values())))
        return tuple(assemble({e: part[k] for e, part in loaded.items()}) for k in range(count))

    def on_one_device(self, tree: Tree) -> Tree:
        """A whole copy of arrays of the mesh, for work that is not worth spreading."""
        replicated = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), replicated)

    def spread(self, f: Callable, *, gradients: bool = True) -> Callable:
        """Wraps ``f(params, others, batch) -> (values, grads, others)`` in its region.

        Inside, `batch` is the part of this device, `params` are shards (see
        `lowprec_jax.ops.gather`) and `others`, such as scaling state, the same on all devices. The
        gradients must have passed `reduce`; the other outputs must be the same on all devices.

        Args:
          f: the function.
          gradients: if not, `f` returns no gradients, only what is the same on all devices.
        """
        if batch_size_of(self.mesh) == 1 or self.strategy in ("jit", "explicit"):
            return f
        if self.strategy == "pmap":
            return self._pmap(f)
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=(self._manual(self.specs), P(), P(BATCH_AXES)),
            out_specs=(P(), self._manual(self.optimizer_specs), P()) if gradients else P(),
            axis_names=self._manual_axes,
        )

    def reduce(self, grads: Tree) -> Tree:
        """Sums gradients over the devices; with ZeRO-1 each keeps its part.

        Those of shards have been summed over the fsdp axis where they were made.
        """
        axes = device_axes()
        if not axes:
            return jax.tree.map(self._constrained, grads, self.optimizer_specs)
        grads, treedef = jax.tree.flatten(grads)
        specs = zip(_leaves(self.specs), _leaves(self.optimizer_specs), strict=True)
        return treedef.unflatten(
            self._reduce_leaf(grad, *spec, axes) for grad, spec in zip(grads, specs, strict=True)
        )

    def automatic(self, f: Callable, like: Tree) -> Callable:
        """`f` with all axes automatic, for code that does not know of explicit ones (optimizers).

        Args:
          f: a function of arrays; its results live where those of `like` do.
          like: arrays of the structure of its results.
        """
        if self.strategy != "explicit":
            return f
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
        return jax.sharding.auto_axes(f, out_sharding=specs)

    def place(self, params: Tree) -> Tree:
        """Updated parameters, back where parameters live: with ZeRO-1 this gathers them."""
        return jax.tree.map(self._constrained, params, self.specs)

    def compile(self, step: Callable, like: Tree) -> Any:
        """``step(state, batch) -> (state, metrics)``, jitted; the state is donated.

        Args:
          step: the step.
          like: a state such as it will be given, arrays or abstract.
        """
        out_shardings = (self.shardings(like), None)
        return self.jit(step, donate_argnums=0, out_shardings=out_shardings)

    def jit(self, f: Callable, **options: Any) -> Any:
        """`jax.jit` of a function traced where the mesh is known by its axis names."""

        @functools.wraps(f)
        def wrapped(*args):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return f(*args)

        return jax.jit(f if self.strategy == "pmap" else wrapped, **options)

    @property
    def _manual_axes(self) -> set[str]:
        """The axes of the region; all of them where the compiler has nothing left to split."""
        automatic = self.mesh.shape[TENSOR_AXIS] > 1
        return set(BATCH_AXES) if automatic else set(self.mesh.axis_names)

    def _pmap(self, f: Callable) -> Callable:
        mapped = jax.pmap(
            f,
            axis_name=DATA_AXIS,
            in_axes=(None, None, 0),  # pyright: ignore[reportArgumentType]
            out_axes=None,
            devices=list(self.mesh.devices.flat),
        )
        parts = batch_size_of(self.mesh)

        def wrapped(params: Tree, others: Tree, batch: Tree):
            split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
            return mapped(params, others, split)

        return wrapped

    def _reduce_leaf(self, grad: jax.Array, spec: P, optimizer_spec: P, axes) -> jax.Array:
        dtype = grad.dtype
        grad = grad.astype(self.reduce_dtype)
        split = dimension_over(optimizer_spec, DATA_AXIS)
        done = {FSDP_AXIS} if dimension_over(spec, FSDP_AXIS) is not None else set()
        if split is not None:
            grad = lax.psum_scatter(grad, DATA_AXIS, scatter_dimension=split, tiled=True)
            done |= {DATA_AXIS}
        rest = tuple(a for a in axes if a not in done)
        return (lax.psum(grad, rest) if rest else grad).astype(dtype)

    def _constrained(self, x: jax.Array, spec: P) -> jax.Array:
        if self.mesh.size == 1 or self.strategy == "pmap":
            return x
        if compat.explicit_shardings(x)[0] is not None:
            return jax.sharding.reshard(x, NamedSharding(self.mesh, only(spec, BATCH_AXES)))
        return lax.with_sharding_constraint(x, spec)

    def _named(self, specs: Tree) -> Tree:
        return _map_specs(lambda spec: NamedSharding(self.mesh, spec), specs)

    def _manual(self, specs: Tree) -> Tree:
        return _map_specs(lambda spec: only(spec, BATCH_AXES), specs)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _map_specs(f: Callable, specs: Tree) -> Tree:
    return jax.tree.map(f, specs, is_leaf=_is_spec)


def _leaves(specs: Tree) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=_is_spec)


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
