"""What a recipe becomes on a chip: the chip's own FP8 formats, and what it has to emulate.

A table of chips, and functions that read it. Sources of the rows: docs/targets.md. The table says
what the matrix units take; whether a compiler emits that is read from the program
(`lowprec_jax.ops.count_gemms`).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from lowprec_jax.errors import UserError, did_you_mean
from lowprec_jax.numerics import E8M0_RULES, Format, Quantizer, get_format
from lowprec_jax.recipes.recipe import Gemm, Recipe
from lowprec_jax.recipes.registry import get_recipe
from lowprec_jax.recipes.rules import Rule, Rules, as_rules

_GEMMS = ("fwd", "dgrad", "wgrad")
_MX_BLOCK, _NVFP4_BLOCK = 32, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A chip, as far as low-precision matmuls see it. Formats are named.

    Attributes:
      name: name of the chip.
      native: formats whose codes its matrix units multiply. Floats may be mixed, integers not.
      mx: elements that it multiplies under E8M0 scales of 32 elements (OCP MX 1.0).
      nvfp4: elements that it multiplies under e4m3 scales of 16 elements.
      dialect: the format that stands for another one here, such as e4m3fnuz for e4m3fn.
      no_gain: formats of `native` for which no rate above that of bf16 is published.
    """

    name: str
    native: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()
    nvfp4: tuple[str, ...] = ()
    dialect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    no_gain: tuple[str, ...] = ()


class Translation(NamedTuple):
    """A recipe as a chip executes it.

    Attributes:
      recipe: with the formats of the chip, named ``"fp8_delayed@amd-mi300"`` if they are others,
        and the "block_scaled" backend where the chip multiplies its blocks.
      messages: a sentence for each format that was changed and for all that is emulated.
    """

    recipe: Recipe
    messages: tuple[str, ...]


_REGISTRY: dict[str, Target] = {}


def register_target(target: Target) -> Target:
    """Adds a chip.

    Returns:
      The same target.

    Raises:
      ValueError: another target has this name, or a format does not exist.
    """
    if _REGISTRY.get(target.name, target) != target:
        raise ValueError(f"Target {target.name!r} is registered already; choose another name.")
    named = (*target.native, *target.mx, *target.nvfp4, *target.no_gain)
    for fmt in (*named, *target.dialect, *target.dialect.values()):
        get_format(fmt)
    _REGISTRY[target.name] = target
    return target


def get_target(name: str | Target) -> Target:
    """Looks a chip up by name; a `Target` is returned as it is.

    Raises:
      UserError: no such name; the message lists the known names and the nearest.
    """
    if isinstance(name, Target):
        return name
    if name not in _REGISTRY:
        raise UserError(
            f"Unknown target {name!r}. Known: {', '.join(_REGISTRY)}."
            + did_you_mean(name, _REGISTRY)
        )
    return _REGISTRY[name]


def targets() -> tuple[Target, ...]:
    """All registered chips, in the order of registration."""
    return tuple(_REGISTRY.values())


def translate(recipe: Recipe | str, target: Target | str) -> Translation:
    """A recipe as a chip executes it.

    Formats become those of the chip's dialect, so that the codes are multiplied as they are; scales
    follow from the new limits. Blocks of MX and NVFP4 keep their elements: a chip without such a
    matmul dequantizes them, which is exact in any format. Nothing else changes, so that scaling
    state and checkpoints are the same on every chip.

    Args:
      recipe: a recipe or its name.
      target: a chip or its name.

    Returns:
      The recipe, unchanged where the dialect has nothing to say, and what somebody should know.

    Raises:
      UserError: an unknown recipe or target.
    """
    recipe, target = get_recipe(recipe), get_target(target)
    gemms = {name: getattr(recipe, name) for name in _GEMMS}
    translated = {name: gemm and _in_dialect(gemm, target) for name, gemm in gemms.items()}
    name = recipe.name if translated == gemms else f"{recipe.name}@{target.name}"
    result = dataclasses.replace(recipe, name=name, **translated)
    resolved = {name: result.gemm(name) for name in _GEMMS}
    if any(gemm and _is_block_scaled(gemm, target) for gemm in resolved.values()):
        result = dataclasses.replace(result, backend=recipe.backend or "block_scaled")
    said = [
        *_changes(gemms, translated),
        *_grouped(resolved, lambda gemm: _emulation(gemm, target)),
        *_grouped(resolved, lambda gemm: _lack_of_gain(gemm, target)),
    ]
    return Translation(result, tuple(f"{recipe.name} on {target.name}: {text}." for text in said))


def translate_rules(rules: Rules, target: Target | str) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """Rules with every recipe as a chip executes it, and the messages, each once.

    Args:
      rules: see `as_rules`.
      target: a chip or its name.
    """
    translated, messages = [], {}
    for rule in as_rules(rules):
        recipe, said = translate(rule.recipe, target)
        translated.append(dataclasses.replace(rule, recipe=recipe))
        messages |= dict.fromkeys(said)
    return tuple(translated), tuple(messages)


def _in_dialect(gemm: Gemm, target: Target) -> Gemm:
    def side(quantizer: Quantizer | None) -> Quantizer | None:
        if quantizer is None or _block_kind(quantizer) in ("mx", "nvfp4"):
            return quantizer
        fmt = target.dialect.get(quantizer.format.name, quantizer.format)
        return dataclasses.replace(quantizer, format=get_format(fmt))

    return Gemm(side(gemm.left), side(gemm.right))


def _block_kind(quantizer: Quantizer) -> str:
    """How scales vary along the contraction: not at all, or in blocks of which kind."""
    if quantizer.scale == "nvfp4":
        return "nvfp4"
    if quantizer.contract is None:
        return "none" if quantizer.free in (None, 1) else "tiles"
    return "mx" if quantizer.scale in E8M0_RULES else "f32"


def _emulation(gemm: Gemm, target: Target) -> str | None:
    """How a GEMM is emulated, in words; None if the chip multiplies its codes."""
    left, right = gemm.left, gemm.right
    if left is None or right is None:
        return "the quantized operand is dequantized first, its partner is in high precision"
    kinds = {_block_kind(left), _block_kind(right)}
    if kinds == {"none"}:
        native = _multiplies(left.format, right.format, target.native)
        return None if native else "codes are converted to a wider type first"
    blocks = left.contract == right.contract
    if blocks and _multiplies(left.format, right.format, _elements(kinds, left, target)):
        return None
    dtype = "bf16" if left.exact_in_bf16 and right.exact_in_bf16 else "f32"
    return f"block-scaled matmuls are dequantized to {dtype} first"


def _is_block_scaled(gemm: Gemm, target: Target) -> bool:
    """Whether the chip multiplies the E8M0 or NVFP4 blocks of a GEMM."""
    kinds = {_block_kind(side) for side in _sides(gemm)}
    return kinds in ({"mx"}, {"nvfp4"}) and _emulation(gemm, target) is None


def _elements(kinds: set[str], quantizer: Quantizer, target: Target) -> tuple[str, ...]:
    """The formats multiplied under such scales; with f32 scales each block is a matmul of codes."""
    if kinds == {"mx"}:
        return target.mx if quantizer.contract == _MX_BLOCK else ()
    if kinds == {"nvfp4"}:
        return target.nvfp4 if quantizer.contract == _NVFP4_BLOCK else ()
    return target.native if kinds <= {"f32", "mx"} else ()


def _multiplies(left: Format, right: Format, native: tuple[str, ...]) -> bool:
    """Whether both formats are native, have a type in XLA, and are floats or the same integers."""
    dtypes = [fmt.native_dtype for fmt in (left, right) if fmt.native_dtype is not None]
    if len(dtypes) < 2 or not {left.name, right.name} <= set(native):
        return False
    return left == right or all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)


def _lack_of_gain(gemm: Gemm, target: Target) -> str | None:
    slow = any(side.format.name in target.no_gain for side in _sides(gemm))
    if not slow or _emulation(gemm, target):
        return None
    return "no gain in speed over bf16 is published"


def _changes(before: Mapping[str, Gemm | None], after: Mapping[str, Gemm | None]) -> list[str]:
    """What is said of each format that became another one."""
    pairs = {
        (a.format, b.format): None
        for name in before
        for a, b in zip(_sides(before[name]), _sides(after[name]), strict=True)
        if a.format != b.format
    }
    return [
        f"{a} becomes {b} ({b.min_subnormal:g} to {b.max:g}, not {a.min_subnormal:g} to {a.max:g})"
        for a, b in pairs
    ]


def _sides(gemm: Gemm | None) -> list[Quantizer]:
    return [side for side in (gemm and gemm.left, gemm and gemm.right) if side is not None]


def _grouped(gemms: Mapping[str, Gemm | None], describe) -> list[str]:
    """What is said of GEMMs, each sentence once, with the names of those it is said of."""
    found: dict[str, list[str]] = {}
    for name, gemm in gemms.items():
        if gemm is not None and (text := describe(gemm)):
            found.setdefault(text, []).append(name)
    return [f"{text} ({', '.join(names)})" for text, names in found.items()]


_OCP = ("e4m3fn", "e5m2")
_F8F6F4 = ("e4m3fn", "e5m2", "e2m3", "e3m2", "e2m1")

register_target(Target(name="nvidia-hopper", native=(*_OCP, "int8")))
register_target(
    Target(name="nvidia-blackwell", native=(*_F8F6F4, "int8"), mx=_F8F6F4, nvfp4=("e2m1",))
)
register_target(
    Target(
        name="amd-mi300",
        native=("e4m3fnuz", "e5m2fnuz", "int8"),
        dialect={"e4m3fn": "e4m3fnuz", "e5m2": "e5m2fnuz"},
    )
)
register_target(Target(name="amd-mi350", native=(*_F8F6F4, "int8"), mx=_F8F6F4))
_TPU_FP8 = ("e5m2", "e4m3b11fnuz")
for _name in ("tpu-v5", "tpu-v6"):
    register_target(
        Target(
            name=_name,
            native=(*_TPU_FP8, "int8", "int4"),
            dialect={"e4m3fn": "e4m3b11fnuz"},
            no_gain=_TPU_FP8,
        )
    )
register_target(Target(name="tpu-v7", native=_OCP))
# NKI's matmul lists no integers for them, a page on Trainium 1 gives an INT8 rate: unknown.
_IEEE = ("e4m3", "e5m2", "e3m4")
register_target(Target(name="trainium1", native=_IEEE, dialect={"e4m3fn": "e4m3"}, no_gain=_IEEE))
register_target(Target(name="trainium2", native=_IEEE, dialect={"e4m3fn": "e4m3"}))
register_target(Target(name="trainium3", native=_OCP, mx=(*_OCP, "e2m1")))
register_target(Target(name="cpu"))
