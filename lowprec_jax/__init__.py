"""Low-precision training and inference for JAX and Flax.

``import lowprec_jax as lp`` gives every part by name (``lp.nnx``, ``lp.linen``, ``lp.ops``, ...);
a part is imported when it is first used, so that the root imports neither Flax nor Optax.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowprec_jax import (
        data,
        linen,
        models,
        nnx,
        numerics,
        ops,
        optim,
        recipes,
        sharding,
        state,
        training,
    )

__version__ = "0.1.0"

__all__ = [
    "data",
    "linen",
    "models",
    "nnx",
    "numerics",
    "ops",
    "optim",
    "recipes",
    "sharding",
    "state",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(__all__)}."
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
