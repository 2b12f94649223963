"""A training state as a flat mapping from paths to arrays, as checkpoints store it.

Public names: `Leaves`, `leaves_of`, `state_from`, `kind`, `abstract`.
"""

from collections.abc import Mapping
from typing import Any

import jax

__all__ = ["Leaves", "abstract", "kind", "leaves_of", "state_from"]

Leaves = Mapping[str, Any]


def leaves_of(state: Any) -> dict[str, Any]:
    """``{"params/blocks/mlp/down/kernel": array}`` of a tree of arrays, or of abstract ones."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def state_from(leaves: Leaves, like: Any) -> Any:
    """A tree of the structure of `like` with the leaves of those paths."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in leaves_of(like)])


def kind(x: Any) -> str:
    """``"float32[3, 4]"`` of an array."""
    return f"{x.dtype}{list(x.shape)}"


def abstract(kinds: Mapping[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays from the texts that `kind` gives of them."""
    found = {}
    for name, text in kinds.items():
        dtype, _, shape = text.removesuffix("]").partition("[")
        sizes = tuple(int(size) for size in shape.split(",") if size)
        found[name] = jax.ShapeDtypeStruct(sizes, jax.numpy.dtype(dtype))
    return found
