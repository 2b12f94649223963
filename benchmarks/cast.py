"""Quantizing a tensor, beside a copy of the same bytes: the limit that memory sets.

    python -m benchmarks.cast [--elements 4194304] [--rounds 15]

"copy" reads an f32 tensor, multiplies it by a number known at run time and writes it. "delayed" is
what a step does to one operand: scale from a known amax, codes, and amax and health counts of what
was seen. "current" finds the amax first. The parts of both follow, then the casts of other
libraries: Flax's, with the amax that its delayed scaling records, and Qwix's, which finds it first.

Then the codes transposed, as a layer keeps them on CPUs and as XLA:CPU does it by itself, and the
tensor times random numbers of stochastic rounding and of `jax.random.uniform`.

"GB/s" counts the bytes of arguments and results once, so that a second pass over the tensor shows
as a lower number. The codes leave as bytes, as a layer keeps them.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops
from jax import lax

from benchmarks.machine import use_allocator
from benchmarks.timing import interleave, median_ms, median_ratio, report, section_parser
from lowprec_jax import numerics
from lowprec_jax.numerics import Quantizer
from lowprec_jax.numerics.transpose import transpose
from lowprec_jax.numerics.uniform import uniform

COPY, GROUP = "copy", "f32 tensor"
E4M3, E5M2 = numerics.get_format("e4m3fn"), numerics.get_format("e5m2")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = section_parser("cast", __doc__, rounds=15)
    parser.add_argument("--elements", type=int, default=2**22, help="size of the tensor")
    options = parser.parse_args(words)
    code = use_allocator(options.allocator, "benchmarks.cast", words)
    if code is not None:
        return code
    rows, times = _measure(_tensor(options.elements), options.rounds)
    report(options.json, rows, {GROUP: times}, elements=options.elements)
    return 0


def _tensor(elements: int) -> jax.Array:
    """N(0, 1), f32: a matrix about as wide as high, of this many elements or a few more."""
    columns = max(64, 2 ** (elements.bit_length() // 2))
    return jax.random.normal(jax.random.key(0), (-(-elements // columns), columns))


def _bytes(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.uint8)


def _delayed(x: jax.Array, amax: jax.Array, fmt: numerics.Format) -> Any:
    quantized = Quantizer(fmt)(x, tensor_amax=amax)
    return _bytes(quantized.data), numerics.range_statistics(x, quantized.scale, fmt)


def _current(x: jax.Array, amax: jax.Array) -> Any:
    del amax
    return _delayed(x, numerics.compute_amax(x), E4M3)


def _cast(x: jax.Array, amax: jax.Array) -> Any:
    return _bytes(Quantizer(E4M3)(x, tensor_amax=amax).data)


def _counts(x: jax.Array, amax: jax.Array) -> Any:
    return numerics.range_statistics(x, numerics.scale_from_amax(amax, E4M3), E4M3)


def _times_random(x: jax.Array, amax: jax.Array, draw: Callable) -> Any:
    return x * draw(jax.random.key(amax.astype(jnp.uint32)), x.shape)


def _flax(x: jax.Array, amax: jax.Array) -> Any:
    codes = fp8_ops.quantize(x, jnp.float8_e4m3fn, amax / 448.0, jnp.float32)
    return _bytes(codes), jnp.max(jnp.abs(x))


def _qwix(x: jax.Array, amax: jax.Array) -> Any:
    del amax
    quantized = importlib.import_module("qwix").quantize(x, jnp.float8_e4m3fn)
    return _bytes(quantized.qvalue), quantized.scale


CASES: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    COPY: lambda x, amax: x * amax,
    "delayed e4m3": functools.partial(_delayed, fmt=E4M3),
    "delayed e5m2": functools.partial(_delayed, fmt=E5M2),
    "current e4m3": _current,
    "amax alone": lambda x, amax: numerics.compute_amax(x),
    "counts alone": _counts,
    "cast alone": _cast,
    "cast, transposed": lambda x, amax: transpose(_cast(x, amax), (1, 0)),
    "cast, transposed by XLA": lambda x, amax: _cast(x, amax).T,
    "random numbers": functools.partial(_times_random, draw=uniform),
    "random numbers, Threefry": functools.partial(_times_random, draw=jax.random.uniform),
    "flax e4m3": _flax,
    "qwix e4m3": _qwix,
}


def _measure(x: jax.Array, rounds: int):
    amax = numerics.compute_amax(x)
    names = [n for n in CASES if not n.startswith("qwix") or importlib.util.find_spec("qwix")]
    compiled, moved = {}, {}
    for name in names:
        program = jax.jit(CASES[name]).lower(x, amax).compile()
        compiled[name] = functools.partial(program, x, amax)
        moved[name] = x.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(compiled[name]()))
    times = interleave(compiled, rounds)
    rows = [
        {
            "group": GROUP,
            "case": name,
            "ms": median_ms(times[name]),
            "x copy": median_ratio(times[name], times[COPY]),
            "GB/s": moved[name] / median_ms(times[name]) / 1e6,
        }
        for name in names
    ]
    return rows, times


if __name__ == "__main__":
    sys.exit(main())
