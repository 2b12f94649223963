"""One layer, forward and backward: our FP8 beside f32, bf16 and Flax's FP8 ops.

    python -m benchmarks.dot_general [--shapes 1024x1024x4096 …] [--cases f32 fp8_delayed …]

Every case takes the same f32 input [M, K], kernel [K, N] and random output gradient [M, N], all
arguments at run time, and returns the output, both gradients and the next scaling state. Delayed
scaling, ours and Flax's, starts from a history that has seen the data. Ours observes into a ref
and counts saturation, underflow and non-finite values; Flax counts nothing.

Cases take turns; times are medians, ratios the medians of the rounds. "error" is the largest
relative difference (Frobenius) of output and gradients to f32: it shows that a case computes the
same thing. On a CPU with AVX512-BF16 expect our FP8 at 0.75 to 1.0 of f32, and Flax's direct op
above 1.

Runs in a subprocess with glibc's thresholds raised; ``--allocator default`` leaves them alone.
Writes a JSON file with times, machine, versions and date.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import fp8_ops

from benchmarks.machine import (
    ALLOCATORS,
    describe_allocator,
    describe_machine,
    use_allocator,
    write_json,
)
from benchmarks.timing import format_table, interleave, median_ms, median_ratio
from lowprec_jax import ops, recipes, state

REFERENCE, FLAX = "f32", "flax direct"
SHAPES = ("1024x1024x4096", "4096x512x2048")  # M x K x N
DIMENSIONS = (((1,), (0,)), ((), ()))  # [M, K] x [K, N]


class Inputs(NamedTuple):
    """Input [M, K], kernel [K, N] and output gradient [M, N], f32."""

    x: jax.Array
    w: jax.Array
    g: jax.Array


class Case(NamedTuple):
    """A jitted function and its arguments; it returns ``(output, dx, dw, next state)``."""

    step: Any
    args: tuple[Any, ...]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    code = use_allocator(options.allocator, "benchmarks.dot_general", words)
    if code is not None:
        return code
    names = list(dict.fromkeys([REFERENCE, *options.cases]))
    record = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "shapes": {}}
    for shape in options.shapes:
        m, k, n = shape
        rows, times = _measure(_inputs(m, k, n), names, options.rounds)
        print(f"\n{m}x{k}x{n} (MxKxN), allocator: {describe_allocator()}")
        print(format_table(rows), flush=True)
        record["shapes"][f"{m}x{k}x{n}"] = {"rows": rows, "seconds": times}
    write_json(Path(options.json), record)
    print(f"\nWritten to {options.json}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dot_general",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[_shape(s) for s in SHAPES], metavar="MxKxN"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="turns of every case")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="raised")
    parser.add_argument("--json", default="runs/benchmarks/dot_general.json")
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write MxKxN, as 1024x1024x4096")
    m, k, n = map(int, sizes)
    return m, k, n


def _inputs(m: int, k: int, n: int) -> Inputs:
    keys = jax.random.split(jax.random.key(0), 3)
    return Inputs(
        x=jax.random.normal(keys[0], (m, k)),
        w=jax.random.normal(keys[1], (k, n)) * 0.02,
        g=jax.random.normal(keys[2], (m, n)) * 1e-3,
    )


def _plain(dtype: Any, inputs: Inputs) -> Case:
    """The product in one type, gradients of the f32 arrays."""

    @jax.jit
    def step(x, w, g):
        y, pull = jax.vjp(lambda x, w: x.astype(dtype) @ w.astype(dtype), x, w)
        return y, *pull(g.astype(y.dtype)), ()

    return Case(step, inputs)


def _ours(recipe: str, inputs: Inputs) -> Case:
    """Our op with its sinks, and the advance that follows it in a training step."""

    def layer(x, w, scaling):
        return ops.dot_general(x, w, DIMENSIONS, recipe=recipe, state=scaling)

    @jax.jit
    def step(x, w, g, scaling):
        live = state.make_sinks(scaling)
        y, pull = jax.vjp(lambda x, w: layer(x, w, live), x, w)
        return y, *pull(g), state.advance(state.collect(scaling, live))

    scaling = recipes.init_state(recipes.get_recipe(recipe))
    if scaling:
        scaling = state.calibrate(
            lambda w, scaling: (layer(inputs.x, w, scaling) * inputs.g).sum(), inputs.w, scaling
        )
    return Case(step, (*inputs, scaling))


def _flax(op: type[nn.Module], inputs: Inputs) -> Case:
    """Flax's op in its Dense layer; the gradient of its state is the next state."""
    module = nn.Dense(inputs.w.shape[1], use_bias=False, dot_general_cls=op)
    collection = fp8_ops.OVERWRITE_WITH_GRADIENT

    @jax.jit
    def step(x, w, g, scaling):
        def layer(x, w, scaling):
            return module.apply({"params": {"kernel": w}, collection: scaling}, x)

        y, pull = jax.vjp(layer, x, w, scaling)
        return y, *pull(g)

    scaling = module.init(jax.random.key(0), inputs.x)[collection]
    for _ in range(2):  # the first call fills the history, the second takes scales from it
        *_, scaling = step(*inputs, scaling)
    return Case(step, (*inputs, scaling))


CASES: dict[str, Callable[[Inputs], Case]] = {
    REFERENCE: functools.partial(_plain, jnp.float32),
    "bf16": functools.partial(_plain, jnp.bfloat16),
    "fp8_delayed": functools.partial(_ours, "fp8_delayed"),
    "fp8_current": functools.partial(_ours, "fp8_current"),
    FLAX: functools.partial(_flax, fp8_ops.Fp8DirectDotGeneralOp),
    "flax qdq": functools.partial(_flax, fp8_ops.Fp8DotGeneralOp),
}


def _measure(inputs: Inputs, names: Sequence[str], rounds: int):
    """A row of the table and the seconds of all rounds, for every case."""
    cases = {name: CASES[name](inputs) for name in names}
    compiled, gemms = {}, {}
    for name, case in cases.items():
        lowered = case.step.lower(*case.args)
        gemms[name] = ops.count_gemms(lowered)
        compiled[name] = functools.partial(lowered.compile(), *case.args)
    outputs = {name: run()[:3] for name, run in compiled.items()}
    errors = {name: _error(out, outputs[REFERENCE]) for name, out in outputs.items()}
    times = interleave(compiled, rounds)
    rows = [
        {
            "case": name,
            "ms": median_ms(times[name]),
            "x f32": median_ratio(times[name], times[REFERENCE]),
            "x flax direct": median_ratio(times[name], times[FLAX]) if FLAX in times else None,
            "f8 GEMMs": gemms[name].native,
            "exact upcasts": gemms[name].emulated,
            "other GEMMs": gemms[name].other,
            "error": errors[name],
        }
        for name in names
    ]
    return rows, times


def _error(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> float:
    """Largest relative difference of output and gradients, Frobenius norms."""
    differences = (
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        for a, b in zip(found, expected, strict=True)
    )
    return float(max(differences))


if __name__ == "__main__":
    sys.exit(main())
