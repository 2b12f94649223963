r"""NVFP4 training without one of its parts each; importing this registers the recipes.

    python -m benchmarks.precision_gap --source shakespeare.txt --seeds 3 \
        --recipes nvfp4,nvfp4_nearest,nvfp4_unrotated,nvfp4_weight_rows --out runs/nvfp4 \
        --import benchmarks.nvfp4_ablations --config shakespeare_char_nvfp4

The config keeps the first and last block in high precision, as the recipe's authors do. Also an
example of a project's own recipes. Source: arXiv:2509.25149, section 4.
"""

import dataclasses
from collections.abc import Callable

from lowprec_jax.numerics import Quantizer
from lowprec_jax.recipes import Gemm, Recipe, get_recipe, register_recipe


def without(name: str, change: Callable[[Quantizer], Quantizer]) -> Recipe:
    """`nvfp4` with every quantizer changed, under a name of its own."""
    recipe = get_recipe("nvfp4")
    changed = {}
    for gemm in ("fwd", "dgrad", "wgrad"):
        sides = getattr(recipe, gemm)
        changed[gemm] = Gemm(change(sides.left), change(sides.right))
    return register_recipe(dataclasses.replace(recipe, name=name, **changed))


# Gradients rounded to nearest.
NEAREST = without("nvfp4_nearest", lambda q: dataclasses.replace(q, rounding="nearest"))
# No Hadamard rotation of the operands of wgrad.
UNROTATED = without("nvfp4_unrotated", lambda q: dataclasses.replace(q, hadamard=0))
# Weights in rows of 16 along each contraction, so that forward and backward pass see other weights.
WEIGHT_ROWS = without("nvfp4_weight_rows", lambda q: dataclasses.replace(q, free=1))
