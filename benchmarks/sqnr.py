"""What quantizing loses, in dB, beside reference figures of other libraries.

    python -m benchmarks.sqnr

Casts of normal, heavy-tailed and outlier data in every granularity, the scale rules of MX, and the
output and gradients of a gated MLP under whole recipes. The references were measured with Qwix, AQT
and torchao on the same draws, or on draws of the same distribution.

Writes ``sqnr.json`` into the output folder. Exit code 0: no figure is more than 0.3 dB below its
reference or 0.4 dB above; 1: one is.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.machine import describe_machine, write_json
from lowprec_jax import ops
from lowprec_jax.numerics import E2M1, E4M3FN, E5M2, Quantizer, get_format, sqnr_db
from lowprec_jax.recipes import Gemm, Recipe, get_recipe, init_state

MAX_BELOW, MAX_ABOVE = 0.3, 0.4  # dB
SIZE = 1024


class Row(NamedTuple):
    """A figure and its reference."""

    table: str
    what: str
    ours: float
    reference: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sqnr"), help="folder for sqnr.json")
    options = parser.parse_args(argv)
    rows = []
    for row in tables():
        rows.append(row)
        off = not is_close(row)
        print(
            f"{row.table:24} {row.what:44} {row.ours:8.2f} {row.reference:8.2f} "
            f"{row.ours - row.reference:+6.2f}{'  <--' if off else ''}"
        )
    worst = max(rows, key=lambda row: abs(row.ours - row.reference))
    difference = abs(worst.ours - worst.reference)
    print(f"{len(rows)} figures, largest difference {difference:.2f} ({worst.table}, {worst.what})")
    report = {"machine": describe_machine(), "rows": [row._asdict() for row in rows]}
    write_json(options.out / "sqnr.json", report)
    return int(not all(map(is_close, rows)))


def is_close(row: Row) -> bool:
    """Whether a figure is that of its reference."""
    return -MAX_BELOW <= row.ours - row.reference <= MAX_ABOVE


def tables() -> Iterator[Row]:
    """All figures, one after the other."""
    yield from casts("normal", normal(), NORMAL)
    yield from formats_of_blocks()
    yield from scale_rules("MX scales, normal", normal(), RULES)
    yield from casts("Student t(3)", student(), STUDENT)
    yield from scale_rules("MX scales, Student t(3)", student(), STUDENT_RULES)
    yield from outlier_column()
    yield from underflow()
    yield from mlp()


def normal() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (SIZE, SIZE))


def student() -> jax.Array:
    """The draw of the references; an INT8 cast of another draw differs by up to 10 dB."""
    return jax.random.t(jax.random.key(3), 3.0, (SIZE, SIZE))


GRANULARITIES = {
    "tensor": {},
    "row": {"free": 1},
    "1x128": {"contract": 128, "free": 1},
    "1x32": {"contract": 32, "free": 1},
}
NORMAL = {
    "e4m3fn": (31.56, 31.55, 31.79, 32.39),
    "e5m2": (25.58, 25.57, 25.79, 26.40),
    "e3m4": (37.56, 37.59, 37.93, 38.63),
    "int8": (39.55, 42.11, 43.73, 45.08),
    "int4": (14.95, 17.50, 19.12, 20.46),
}
STUDENT = {
    "e4m3fn": (31.67, 32.23, 33.06, 34.18),
    "int8": (12.66, 31.10, 37.12, 41.05),
    "int4": (0.70, 8.50, 13.42, 16.98),
}
RULE_NAMES = ("floor", "rceil", "ceil", "even")
RULES = {
    "e4m3fn": (30.63, 31.53, 31.53, 31.18),
    "e5m2": (25.36, 25.55, 25.55, 25.55),
    "e2m1": (18.78, 18.76, 16.82, 19.03),
}
STUDENT_RULES = {"e4m3fn": (29.24, 31.60, None, None), "e2m1": (16.93, None, 14.20, 17.18)}


def cast_db(x: jax.Array, quantizer: Quantizer) -> float:
    """SQNR of a cast, the scales along the last axis."""
    tile = quantizer.tile(x.shape, (1,), (0,))
    return float(jax.jit(lambda x: sqnr_db(x, quantizer(x, tile).dequantize()))(x))


def casts(table: str, x: jax.Array, references) -> Iterator[Row]:
    for name, figures in references.items():
        for (granularity, sizes), figure in zip(GRANULARITIES.items(), figures, strict=True):
            ours = cast_db(x, Quantizer(get_format(name), **sizes))
            yield Row(f"cast, {table}", f"{name}, {granularity}", ours, figure)


def formats_of_blocks() -> Iterator[Row]:
    kinds = {
        "MXFP8 e4m3fn": (Quantizer(E4M3FN, 32, 1, "rceil"), 31.53),
        "MXFP4": (Quantizer(E2M1, 32, 1, "rceil"), 18.76),
        "NVFP4": (Quantizer(E2M1, 16, 1, "nvfp4"), 20.44),
        "NF4, blocks of 32": (Quantizer(get_format("nf4"), 32, 1), 21.18),
        "e4m3fn, row, power of two": (Quantizer(E4M3FN, None, 1, "power_of_two"), 31.53),
    }
    for what, (quantizer, figure) in kinds.items():
        yield Row("cast, normal", what, cast_db(normal(), quantizer), figure)


def scale_rules(table: str, x: jax.Array, references) -> Iterator[Row]:
    for name, figures in references.items():
        for rule, figure in zip(RULE_NAMES, figures, strict=True):
            if figure is not None:
                ours = cast_db(x, Quantizer(get_format(name), 32, 1, rule))
                yield Row(table, f"{name}, {rule}", ours, figure)


def outlier_column() -> Iterator[Row]:
    """One column 200 times as large; the SQNR of the others."""
    x = normal().at[:, 7].multiply(200.0)
    others = jnp.arange(SIZE) != 7
    references = {"e4m3fn": (31.54, 31.54, 31.76, 32.36), "int8": (0.15, 7.46, 16.58, None)}
    for name, figures in references.items():
        for (granularity, sizes), figure in zip(GRANULARITIES.items(), figures, strict=True):
            if figure is None:
                continue
            quantizer = Quantizer(get_format(name), **sizes)
            values = quantizer(x, quantizer.tile(x.shape, (1,), (0,))).dequantize()
            ours = float(sqnr_db(jnp.where(others, x, 0), jnp.where(others, values, 0)))
            yield Row("outlier column x 200", f"{name}, {granularity}", ours, figure)


def underflow() -> Iterator[Row]:
    """Percentage of zeros after a cast of numbers log-uniform in 2**-24 to 1."""
    x = jnp.exp2(jax.random.uniform(jax.random.key(0), (SIZE, SIZE), minval=-24.0, maxval=0.0))
    for name, figure in {"e4m3fn": 21.7, "e5m2": 0.0, "int8": 66.8}.items():
        values = Quantizer(get_format(name))(x).dequantize()
        yield Row("zeros, log-uniform, %", name, float((values == 0).mean()) * 100, figure)


def mlp() -> Iterator[Row]:
    """A gated MLP 512 - 1792 - 512 on 2048 tokens: output and all gradients.

    The references for INT8 and for blocks reuse residuals of the forward pass; that of NVFP4 has no
    second level of scales, so that ours is up to 0.4 dB better.
    """
    row, row5 = Quantizer(E4M3FN, free=1), Quantizer(E5M2, free=1)
    block = Quantizer(E4M3FN, contract=128, free=1)
    rowwise = get_recipe("fp8_rowwise")
    kinds = {
        "tensor, e4m3 + e5m2": (get_recipe("fp8_current"), (23.7, 20.7, 22.0, 20.8, 20.8)),
        "row, e4m3 + e5m2": (
            dataclasses.replace(rowwise, dgrad=Gemm(row5, row), wgrad=Gemm(row, row5)),
            (23.8, 20.8, 22.1, 20.9, 20.8),
        ),
        "row, e4m3": (rowwise, (23.8, 23.6, 23.8, 23.8, 23.7)),
        "row, high-precision wgrad": (
            dataclasses.replace(rowwise, dgrad=Gemm(row, None), wgrad=None),
            (23.8, 26.4, 25.5, 26.7, 25.4),
        ),
        "1x128, high-precision residuals": (
            Recipe(
                name="tiles",
                fwd=Gemm(block, block),
                dgrad=Gemm(block, None),
                wgrad=Gemm(None, block),
            ),
            (24.1, 25.4, 24.7, 25.6, 25.5),
        ),
        "int8, row": (get_recipe("int8"), (31.5, 31.5, 31.0, 31.2, 31.5)),
        "MXFP8 forward": (forward_only("mxfp8"), (23.7, 27.9, 25.4, 28.3, 28.1)),
        "NVFP4 forward, 1x16": (
            Recipe(name="nvfp4", fwd=Gemm(*[Quantizer(E2M1, 16, 1, "nvfp4")] * 2)),
            (12.4, 16.5, 14.0, 16.9, 16.7),
        ),
    }
    names = ("out", "w1 (gate)", "w2 (down)", "w3 (up)", "x")
    for what, (recipe, figures) in kinds.items():
        exact, ours = gated_mlp(get_recipe("none")), gated_mlp(recipe)
        for name, a, b, figure in zip(names, exact, ours, figures, strict=True):
            yield Row("gated MLP", f"{what}: {name}", float(sqnr_db(a, b)), figure)


def forward_only(name: str) -> Recipe:
    return dataclasses.replace(get_recipe(name), dgrad=None, wgrad=None)


def gated_mlp(recipe: Recipe) -> Sequence[jax.Array]:
    """out, gradients of w1, w2, w3 and x."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (2048, 512))
    w1, w3 = (jax.random.normal(k, (512, 1792)) * 0.02 for k in keys[1:3])
    w2 = jax.random.normal(keys[3], (1792, 512)) * 0.02
    state = init_state(recipe) or None

    def linear(x, w):
        return ops.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, state=state)

    @jax.jit
    def run(x, w1, w2, w3, grad):
        out, vjp = jax.vjp(
            lambda w1, w2, w3, x: linear(jax.nn.silu(linear(x, w1)) * linear(x, w3), w2),
            *(w1, w2, w3, x),
        )
        return out, *vjp(grad)

    return run(x, w1, w2, w3, jax.random.normal(keys[4], (2048, 512)))


if __name__ == "__main__":
    sys.exit(main())
