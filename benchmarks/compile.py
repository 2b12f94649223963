"""How long JAX traces and XLA compiles a training step, against its depth.

    python -m benchmarks.compile [--depths 12 48 96] [--unrolled 12 48] [--peers "flax direct"]

The step is the one that ``train.py`` runs, of quickstart's model with more layers: scanned, where
one block is compiled for all, and unrolled. Nothing runs. JAX's caches are cleared before every
turn, and XLA's cache of compiled programs is off. "trace s" is tracing and lowering to StableHLO;
"fusions" and "instructions" are those of the compiled program, with instructions within fusions.
Peers' matmuls are in the layers of the same model, in a step without guard and health report.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.machine import use_allocator
from benchmarks.peers.linen import PEERS, available
from benchmarks.peers.training import build_peer
from benchmarks.timing import Times, median_ratio, report, section_parser
from lowprec_jax.cli.config_file import load_config, resolve_config_path
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.network import build_network
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import abstract_state, build_step

REFERENCE = "f32"
CASES = {
    REFERENCE: ("quickstart_fp32",),
    "bf16": ("quickstart_bf16",),
    "fp8_delayed": ("quickstart",),
    "fp8_current": ("quickstart", "--precision.recipe", "fp8_current"),
}
VOCABULARY = 256
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    code = use_allocator(options.allocator, "benchmarks.compile", words)
    if code is not None:
        return code
    jax.config.update("jax_enable_compilation_cache", False)
    names = list(dict.fromkeys([REFERENCE, *options.cases, *filter(available, options.peers)]))
    stacks = [(depth, True) for depth in options.depths]
    stacks += [(depth, False) for depth in options.unrolled]
    rows, seconds = [], {}
    for depth, scanned in stacks:
        group = f"{depth} layers, {'scanned' if scanned else 'unrolled'}"
        print(f"compiling {group}", flush=True)
        found, seconds[group] = _measure(names, depth, scanned, options)
        rows += [{"group": group, **row} for row in found]
    report(options.json, rows, seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = section_parser("compile", __doc__, rounds=3)
    parser.add_argument("--depths", nargs="*", type=int, default=[12, 48, 96], help="scanned")
    parser.add_argument("--unrolled", nargs="*", type=int, default=[12, 48])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["fp8_delayed"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    return parser


def _measure(names: Sequence[str], depth: int, scanned: bool, options: argparse.Namespace):
    """A row for every case, and the seconds of all turns: of both parts, and each by itself."""
    traces: Times = {name: [] for name in names}
    compilations: Times = {name: [] for name in names}
    programs: dict[str, str] = {}
    sizes = ("--model.num_layers", str(depth), "--model.scan_layers", str(scanned).lower())
    for turn in range(options.rounds):
        for name in list(names)[:: -1 if turn % 2 else 1]:
            overrides = (*sizes, "--model.width", str(options.width))
            trace, compilation, programs[name] = _turn(name, overrides)
            traces[name].append(trace)
            compilations[name].append(compilation)
    rows = [
        {
            "case": name,
            "trace s": statistics.median(traces[name]),
            "trace x f32": median_ratio(traces[name], traces[REFERENCE]),
            "compile s": statistics.median(compilations[name]),
            "compile x f32": median_ratio(compilations[name], compilations[REFERENCE]),
            "fusions": programs[name].count(" fusion("),
            "instructions": len(_INSTRUCTION.findall(programs[name])),
        }
        for name in names
    ]
    seconds = {f"trace {name}": times for name, times in traces.items()}
    return rows, seconds | {f"compile {name}": times for name, times in compilations.items()}


def _turn(case: str, overrides: Sequence[str]) -> tuple[float, float, str]:
    """Seconds to trace and lower, and to compile, the step of a case from nothing; the HLO."""
    name, *own = CASES.get(case, CASES[REFERENCE])
    config = load_config(TrainConfig, resolve_config_path(name), [*own, *overrides])
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.model.context), jnp.int32)
    if case in CASES:
        network, tx = build_network(config, VOCABULARY), build_optimizer(config)
        state = abstract_state(network, tx)
        step = build_step(network, tx, state)
    else:
        step, state = build_peer(config, VOCABULARY, case)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(state, (tokens, tokens))
    traced = time.perf_counter()
    compiled = lowered.compile()
    compilation = time.perf_counter() - traced
    return traced - start, compilation, compiled.as_text()


if __name__ == "__main__":
    sys.exit(main())
