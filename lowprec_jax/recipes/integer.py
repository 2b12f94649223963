"""Integers: INT8 training, weight-only quantization, and n-bit fake quantization for studies.

Source: INT8 training with a scale per row, Wortsman et al. 2023, arXiv:2304.13013; fake-quantized
  training with separate bits for weights and activations, Kumar et al. 2024, arXiv:2411.04330.
"""

import re

from lowprec_jax.errors import UserError
from lowprec_jax.numerics import Quantizer, get_format
from lowprec_jax.recipes.recipe import Gemm, Recipe
from lowprec_jax.recipes.registry import register_family, register_recipe

_INT8 = Quantizer(get_format("int8"), free=1)

INT8 = register_recipe(
    Recipe(
        name="int8",
        fwd=Gemm(_INT8, _INT8),
        dgrad=Gemm(_INT8, _INT8),
        wgrad=Gemm(_INT8, _INT8),
    )
)

_BITS = range(2, 17)


def fake_quantized(weight_bits: int | None, activation_bits: int | None) -> Recipe:
    """Training as if weights and activations had so few bits, gradients in high precision.

    The backward GEMMs multiply the quantized weights and activations of the forward pass: the
    straight-through estimator. Weights have a scale per output channel, activations one per token.

    Args:
      weight_bits: 2 to 16, or None for high precision.
      activation_bits: likewise.

    Returns:
      The recipe ``"w4a8"``; weights only, ``"w4"``; activations only, ``"a8"``.

    Raises:
      UserError: bits out of range, or none given.
    """
    given = {"w": weight_bits, "a": activation_bits}
    name = "".join(f"{kind}{bits}" for kind, bits in given.items() if bits is not None)
    if not name or any(bits not in _BITS for bits in given.values() if bits is not None):
        raise UserError(
            f"fake_quantized: weight_bits {weight_bits}, activation_bits {activation_bits}; give "
            f"{_BITS.start} to {_BITS.stop - 1} bits for one or both."
        )
    weight, activation = (
        None if bits is None else Quantizer(get_format(f"int{bits}"), free=1, axes="forward")
        for bits in given.values()
    )
    return Recipe(
        name=name,
        fwd=Gemm(activation, weight),
        dgrad=weight and Gemm(None, weight),
        wgrad=activation and Gemm(activation, None),
    )


def _from_name(match: re.Match[str]) -> Recipe:
    bits = (match["w"], match["a"])
    return fake_quantized(*(None if text is None else int(text) for text in bits))


register_family("w<n>a<n>, w<n>, a<n>", r"(?=.)(w(?P<w>\d+))?(a(?P<a>\d+))?", _from_name)

# Weights of four bits in groups along the contraction, everything else high: what weight-only
# inference multiplies.
_INT4_GROUPS = Quantizer(get_format("int4"), contract=128, free=1, axes="forward")
INT4_WEIGHTS = register_recipe(
    Recipe(
        name="int4_weights",
        fwd=Gemm(None, _INT4_GROUPS),
        dgrad=Gemm(None, _INT4_GROUPS),
    )
)
_NF4_BLOCKS = Quantizer(get_format("nf4"), contract=64, free=1, axes="forward")
NF4_WEIGHTS = register_recipe(
    Recipe(
        name="nf4_weights",
        fwd=Gemm(None, _NF4_BLOCKS),
        dgrad=Gemm(None, _NF4_BLOCKS),
    )
)
