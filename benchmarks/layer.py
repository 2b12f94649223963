"""One layer, forward and backward: our FP8 beside plain precisions and other libraries.

    python -m benchmarks.layer [--shapes 1024x1024x4096 llama-qkv …] [--cases f32 fp8_delayed …]

Every case takes the same f32 input [M, K], kernel [K, N] and random output gradient [M, N], all
arguments at run time, and returns the output, both gradients and the next scaling state. Delayed
scaling, ours and Flax's, starts from a history that has seen the data. Ours observes into a ref
and counts saturation, underflow and non-finite values; the others count nothing.

Cases take turns; times are medians, ratios the medians of the rounds. "error" is the largest
relative difference (Frobenius) of output and gradients to f32: it shows that a case computes the
same thing. "TFLOP/s" counts the three GEMMs. On a GPU "of peak" is the fraction of the rate that
the largest square matmuls reach there: in bf16 for f32 and bf16, in f8 for the others.

Runs in a subprocess with glibc's thresholds raised; ``--allocator default`` leaves them alone.
Writes a JSON file with times, machine, versions and date.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.machine import use_allocator
from benchmarks.peers.gemm import measured_peaks
from benchmarks.peers.linen import PEERS, available
from benchmarks.peers.ops import peer_op
from benchmarks.timing import interleave, median_ms, median_ratio, report, section_parser
from lowprec_jax import ops, recipes, state

REFERENCE, FLAX = "f32", "flax direct"
GATED = ("1024x1024x4096", "4096x512x2048")  # M x K x N
NAMED = {
    "llama-qkv": "512x2048x3072",  # tokens, width of 2048, 16 query and 4 + 4 key-value heads
    "llama-down": "512x5632x2048",
    "small": "128x128x384",
    "odd": "509x1021x769",  # primes: no tile divides them
    "long-context": "16384x256x256",
}
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
    code = use_allocator(options.allocator, "benchmarks.layer", words)
    if code is not None:
        return code
    cases = (name for name in options.cases if name not in PEERS or available(name))
    names = list(dict.fromkeys([REFERENCE, *cases]))
    peaks = measured_peaks(jax.default_backend())
    rows, seconds = [], {}
    for shape in options.shapes:
        group = "x".join(map(str, shape))
        print(f"measuring {group} (MxKxN)", flush=True)
        found, seconds[group] = _measure(_inputs(*shape), names, options.rounds, peaks)
        rows += [{"group": group, **row} for row in found]
    report(options.json, rows, seconds, peaks=peaks, device=jax.devices()[0].device_kind)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = section_parser("layer", __doc__)
    shapes = [_shape(s) for s in (*GATED, *NAMED)]
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=shapes,
        metavar="MxKxN",
        help=f"or one of {', '.join(NAMED)}",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    sizes = NAMED.get(text, text).split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write MxKxN, as 1024x1024x4096, or {', '.join(NAMED)}"
        )
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

    def layer(x, w):
        return lax.dot_general(x.astype(dtype), w.astype(dtype), DIMENSIONS)

    @jax.jit
    def step(x, w, g):
        y, pull = jax.vjp(layer, x, w)
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

        def loss(w, scaling, x, g):
            return (layer(x, w, scaling) * g).sum()

        calibrate = jax.jit(functools.partial(state.calibrate, loss))
        scaling = calibrate(inputs.w, scaling, inputs.x, inputs.g)
    return Case(step, (*inputs, scaling))


def _peer(name: str, inputs: Inputs) -> Case:
    """Another library's op; the gradient of its state is the next state."""
    op = peer_op(name)

    @jax.jit
    def step(x, w, g, scaling):
        y, pull = jax.vjp(lambda s, x, w: op.apply(s, x, w, DIMENSIONS), scaling, x, w)
        scaling, dx, dw = pull(g)
        return y, dx, dw, scaling

    scaling = op.state
    for _ in range(2 if scaling else 0):  # the first fills the history, the second uses it
        *_, scaling = step(*inputs, scaling)
    return Case(step, (*inputs, scaling))


CASES: dict[str, Callable[[Inputs], Case]] = {
    REFERENCE: functools.partial(_plain, jnp.float32),
    "bf16": functools.partial(_plain, jnp.bfloat16),
    "fp8_delayed": functools.partial(_ours, "fp8_delayed"),
    "fp8_current": functools.partial(_ours, "fp8_current"),
    **{name: functools.partial(_peer, name) for name in PEERS},
}


def _measure(inputs: Inputs, names: Sequence[str], rounds: int, peaks: dict[str, float]):
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
    operations = 6 * inputs.x.size * inputs.w.shape[1]
    rows = []
    for name in names:
        rate = operations / median_ms(times[name]) / 1e9
        peak = peaks.get("bf16" if name in (REFERENCE, "bf16") else "f8")
        rows.append(
            {
                "case": name,
                "ms": median_ms(times[name]),
                "x f32": median_ratio(times[name], times[REFERENCE]),
                "x flax direct": median_ratio(times[name], times[FLAX]) if FLAX in times else None,
                "TFLOP/s": rate,
                "of peak": rate / peak if peak else None,
                "8-bit GEMMs": gemms[name].native,
                "exact upcasts": gemms[name].emulated,
                "other GEMMs": gemms[name].other,
                "error": errors[name],
            }
        )
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
