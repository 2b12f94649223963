"""FP32 master weights for bfloat16 and float16 parameters, as an Optax transformation.

Imports JAX and Optax only. Public names: `master_weights`, `read_masters`,
`MasterWeightsState`, `Assign`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      master: tree like the parameters. f32 masters at bfloat16 and float16 leaves;
        `optax.MaskedNode()` (nothing stored) at every other leaf.
      inner: state of the wrapped transformation, made for the f32 masters.
    """

    master: Any
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assign:
    """Update leaf whose addition to a parameter *is* the new value.

    ``p + Assign(value, replace)`` is `value` where `replace` is true and `p` where it is
    false. An all-zero `Assign` therefore leaves the parameter as it was, so wrappers may
    multiply it by a boolean, select it with `where` or replace it by zeros, as they do
    with any update; scaling it by another number, or adding to it, means nothing.

    No plain array can do this: from p = 1 to 2**-20 in bfloat16 the sum p + u would need
    u = -1 + 2**-20, which bfloat16 does not have.
    """

    value: jax.Array
    """New parameter, in the parameter's dtype and shape."""
    replace: jax.Array
    """bool[], or the leading axes of `value` after a `vmap`: whether to take it."""

    __array_ufunc__ = None  # NumPy arrays leave the addition to us, as JAX arrays do.

    def __radd__(self, param: Any) -> jax.Array:
        replace = jnp.asarray(self.replace).astype(bool)
        trailing = jnp.ndim(self.value) - replace.ndim
        return jnp.where(replace.reshape(replace.shape + (1,) * trailing), self.value, param)

    __add__ = __radd__


def master_weights(
    tx: optax.GradientTransformation, param_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on FP32 masters of low-precision parameters.

    At every bfloat16 or float16 parameter the state holds an f32 master m. A step is
    ``m = m + tx(f32(gradient), m)``, and after ``optax.apply_updates(params, updates)``
    the parameter is ``m.astype(param.dtype)``, bit for bit, for updates of any size, sign
    flips, subnormals, ±0, Inf and NaN (`updates` holds `Assign` leaves there). float32
    and wider parameters are their own masters: nothing is stored for them, and the update
    is that of `tx`, in their dtype. Leaves that are not floats are hidden from `tx` and
    keep their values. `tx` runs under standard dtype promotion: everything it sees is f32
    already, and Optax's own Adam fails under the strict setting.

    Compose it as the last member of an `optax.chain`, or around one; inside or around
    `optax.MultiSteps`. Around it is better, ``master_weights(MultiSteps(...)
    .gradient_transformation())``, as then micro-batches are averaged in f32; inside,
    MultiSteps rounds their mean to the gradients' dtype. Put `optax.apply_if_finite` and
    other wrappers that return zeros shaped like the gradients inside. Parameters changed
    behind its back (a checkpoint, an EMA swap) are overwritten by the masters at the
    next step: call `init` again.

    bfloat16 parameters that are quantized to FP8 are rounded twice: f32 to bfloat16 to
    e4m3 gives another code than f32 to e4m3 for 1.65 % of the values. float32 parameters
    avoid that and are the default of this library; bfloat16 is a stated choice that
    halves the memory of the parameters, not of the optimizer.

    Args:
      tx: transformation to run on the masters; it gets f32 gradients and f32 parameters,
        and any extra arguments unchanged.
      param_dtype: bfloat16 or float16 makes `init` reject parameters that are neither of
        this dtype nor float32 (norm scales); None accepts any mixture.

    Returns:
      A transformation with state `MasterWeightsState`; `update` needs `params`.

    Raises:
      TypeError: `param_dtype` or a parameter has a dtype that has no masters here.
      ValueError: `update` was called without `params`.

    Example:
      >>> tx = master_weights(optax.sgd(1e-4))
      >>> params = {"w": jnp.ones((), jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((), jnp.bfloat16)}, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> float(params["w"]), round(float(state.master["w"]), 6)
      (1.0, 0.9999)

    Source: Micikevicius et al., Mixed Precision Training, arXiv:1710.03740, section 3.1.
    Differs from: Optax's usual updates, which are arrays to add. Here they hold the new
    value, so their norm is not the size of a step, and nothing may be chained after it.
    """
    if param_dtype is not None and not _is_half(jnp.dtype(param_dtype)):
        raise TypeError(
            f"master_weights: param_dtype is {jnp.dtype(param_dtype)}; allowed: bfloat16, "
            "float16, or None (float32 parameters are their own masters)."
        )
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> MasterWeightsState:
        _check_dtypes(params, param_dtype)
        leaves, treedef = jax.tree.flatten(params)
        stored = [p.astype(jnp.float32) if _is_half(p.dtype) else _NOTHING for p in leaves]
        masters = treedef.unflatten(_seen_by_inner(leaves, stored))
        with jax.numpy_dtype_promotion("standard"):
            return MasterWeightsState(treedef.unflatten(stored), inner.init(masters))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MasterWeightsState]:
        if params is None:
            raise ValueError(
                "master_weights: update got no params; call tx.update(grads, state, params)."
            )
        leaves, treedef = jax.tree.flatten(params)
        masters = _seen_by_inner(leaves, treedef.flatten_up_to(state.master))
        grads = [
            m if m is _NOTHING else g.astype(m.dtype)
            for g, m in zip(treedef.flatten_up_to(updates), masters, strict=True)
        ]
        with jax.numpy_dtype_promotion("standard"):
            steps, inner_state = inner.update(
                treedef.unflatten(grads), state.inner, treedef.unflatten(masters), **extra_args
            )
        steps = treedef.flatten_up_to(steps)
        pairs = [_step(*leaf) for leaf in zip(leaves, masters, steps, strict=True)]
        new_updates, stored = zip(*pairs, strict=True) if pairs else ((), ())
        return (
            treedef.unflatten(new_updates),
            MasterWeightsState(treedef.unflatten(stored), inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def read_masters(state: Any, params: Any = None) -> Any:
    """Returns the f32 masters held somewhere in an optimizer state.

    Args:
      state: state of `master_weights`, or of any chain or wrapper around it. From
        `nnx.Optimizer`: ``nnx.as_pure(optimizer.opt_state)``.
      params: model parameters, to fill in the leaves that are their own masters.

    Returns:
      Tree like the parameters: f32 masters, and at leaves without one the parameter, or
      `optax.MaskedNode()` if `params` is None.

    Raises:
      ValueError: the state holds no `MasterWeightsState`, or more than one.
    """
    found = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MasterWeightsState))
        if isinstance(leaf, MasterWeightsState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"read_masters: found {len(found)} MasterWeightsState in {type(state).__name__}, "
            "expected 1. Pass the optimizer state of one master_weights transformation."
        )
    if params is None:
        return found[0].master
    leaves, treedef = jax.tree.flatten(params)
    masters = treedef.flatten_up_to(found[0].master)
    return treedef.unflatten(
        m if _is_half(p.dtype) else p for p, m in zip(leaves, masters, strict=True)
    )


_NOTHING = optax.MaskedNode()  # An empty tree node, so it adds nothing to any state.


def _is_half(dtype: Any) -> bool:
    """Whether parameters of this dtype get a master."""
    return dtype in (jnp.bfloat16, jnp.float16)


def _seen_by_inner(leaves: list[Any], stored: list[Any]) -> list[Any]:
    """Masters where there is one, the parameter itself if float, nothing elsewhere."""
    return [
        m if _is_half(p.dtype) else p if jnp.issubdtype(p.dtype, jnp.inexact) else _NOTHING
        for p, m in zip(leaves, stored, strict=True)
    ]


def _step(param: Any, master: Any, step: Any) -> tuple[Any, Any]:
    """Update leaf and master to store for one parameter."""
    if master is _NOTHING:
        return jnp.zeros_like(param), _NOTHING
    step = step.astype(master.dtype)
    if not _is_half(param.dtype):
        return step, _NOTHING
    # A zero step is the identity also for -0 (-0 + 0 is +0) and where XLA flushes subnormals.
    master = jnp.where(step == 0, master, master + step)
    return Assign(master.astype(param.dtype), jnp.ones((), bool)), master


def _check_dtypes(params: Any, param_dtype: Any) -> None:
    """Raises TypeError at the first float leaf that is neither trained nor its own master."""
    allowed = [jnp.float32]
    allowed += [jnp.bfloat16, jnp.float16, jnp.float64] if param_dtype is None else [param_dtype]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype not in allowed:
            names = ", ".join(jnp.dtype(dtype).name for dtype in allowed)
            raise TypeError(
                f"master_weights: parameter {jax.tree_util.keystr(path)} is {leaf.dtype}; "
                f"allowed: {names}. Cast the parameter, or pass another param_dtype."
            )
