"""Long and repeated runs: what must not grow, and what must come out the same.

    python -m benchmarks.soak steps         10,000 steps: memory, live arrays, compilations
    python -m benchmarks.soak determinism   3 runs of 200 steps, each a process: the same bits
    python -m benchmarks.soak processes     2 processes x 4 devices against 1 process x 8

A model of two layers, width 32 and context 16 learns the English of `pydoc_data.topics` on 8
emulated devices. Each check prints a table and writes a JSON file with machine, versions and date;
the exit code is 1 if a limit is exceeded:

steps        resident memory within 5 % of that after the first 500 steps; as many live arrays;
             nothing compiled after the first step
determinism  one SHA-256 over every array of the final state (parameters, scaling, optimizer) on
             every device, and all copies of an array the same
processes    losses of 20 steps: recipe "none" within 1e-6 of each; fp8_delayed within the noise
             floor, the spread of five runs on one device whose initial weights are multiplied by
             1 + 1e-7 N(0, 1). One code that rounds the other way is 6 %: no two orders of summation
             give the same losses for long.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, write_json
from lowprec_jax.cli.environment import prepare_environment
from lowprec_jax.config_text import dump_config
from lowprec_jax.training.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)

DEVICES = 8
LAYOUTS = {
    "data 8": {"data": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
MEMORY_TOLERANCE = 0.05
LOSS_TOLERANCE = 1e-6
PERTURBATION = 1e-7
PERTURBED_RUNS = 5


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    prepare_environment(config_of("fp8_delayed", "data 8"))
    if options.check == "digest":
        print(json.dumps(digest_of_run(options.layout, options.steps)))
        return 0
    from benchmarks.timing import format_table  # starts JAX

    rows, problems = options.measure(options)
    print(format_table(rows))
    record = {"machine": describe_machine(), "rows": rows, "problems": problems}
    path = Path(options.json or f"runs/benchmarks/soak_{options.check}.json")
    write_json(path, record)
    print(f"\n{'FAILED: ' + '; '.join(problems) if problems else 'Passed'}. Written to {path}.")
    return 1 if problems else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    checks = parser.add_subparsers(dest="check", required=True)

    def add(name: str, steps: int, measure: Any = None, **options: Any) -> argparse.ArgumentParser:
        check = checks.add_parser(name, **options)
        check.set_defaults(measure=measure)
        check.add_argument("--steps", type=int, default=steps, help="steps of a run")
        check.add_argument("--json", help="file to write (default: in runs/benchmarks/)")
        return check

    add("steps", 10_000, measure_steps).add_argument(
        "--every", type=int, default=500, help="steps between samples"
    )
    repeated = add("determinism", 200, measure_determinism)
    repeated.add_argument("--runs", type=int, default=3, help="runs of each layout")
    repeated.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=["data 8", "data 2 x fsdp 2 x tensor 2"]
    )
    add("processes", 20, measure_processes)
    add("digest", 200, help="one run of determinism").add_argument("layout", choices=LAYOUTS)
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}; allowed: 2 or more")
    if options.check == "steps" and not 1 <= options.every <= options.steps:
        parser.error(f"--every is {options.every}; allowed: 1 to --steps, {options.steps}")
    return options


def config_of(recipe: str, layout: str | None, **changes: Any) -> TrainConfig:
    """The tiny run; layout None is one device. Its schedule does not depend on its length."""
    axes: dict[str, Any] = LAYOUTS[layout] if layout else {}
    outputs = {"sample_tokens": 0, "plots": False, "progress": False, "eval_windows": 8}
    return TrainConfig(
        **{"steps": 20, "batch_size": 8, **outputs, **changes},
        model=ModelConfig(num_layers=2, num_heads=2, width=32, mlp_width=48, context=16),
        data=DataConfig(source=str(pydoc_data.topics.__file__)),
        precision=PrecisionConfig(recipe=recipe),
        optim=OptimConfig(warmup_steps=2, learning_rate=1e-2, final_fraction=1.0),
        mesh=MeshConfig(**axes),
    )


class Run:
    """The program's training step on its own batches, called as jit calls it: it may recompile."""

    def __init__(self, config: TrainConfig):
        import jax

        from lowprec_jax import data, state
        from lowprec_jax.training.network import build_network
        from lowprec_jax.training.optimizer import build_optimizer
        from lowprec_jax.training.step import build_calibration, build_step, init_state

        text = data.load_corpus(config.data.source).train
        tokenizer = data.ByteTokenizer()
        self._batches = data.Batches(
            tokenizer.encode(text),
            batch_size=config.batch_size,
            context=config.model.context,
            seed=config.seed,
        )
        network, tx = build_network(config, tokenizer.vocab_size), build_optimizer(config)
        self._layout, self._done = network.layout, 0
        self.state = init_state(network, tx, jax.random.key(config.seed))
        if state.sites(self.state.scaling):
            calibrate = build_calibration(network, self.state)
            self.state, _ = calibrate(self.state, self._batch())
        self._step = build_step(network, tx, self.state)

    def step(self) -> float:
        """One step; waits for it, and returns its loss."""
        self.state, metrics = self._step(self.state, self._batch())
        self._done += 1
        return float(metrics.loss)

    def _batch(self):
        return self._layout.put_batch(self._batches.batch(self._done))

    def perturb(self, seed: int) -> None:
        """Multiplies the parameters by ``1 + 1e-7 N(0, 1)``."""
        import jax

        leaves, treedef = jax.tree.flatten(self.state.params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noisy = [
            p * (1 + PERTURBATION * jax.random.normal(key, p.shape, p.dtype))
            for p, key in zip(leaves, keys, strict=True)
        ]
        self.state = self.state._replace(params=treedef.unflatten(noisy))


def measure_steps(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Samples of memory, live arrays and compilations along one run."""
    import jax

    rows: list[dict[str, Any]] = []
    with _compilations() as compiled:
        run = Run(config_of("fp8_delayed", "data 8"))
        loss, first, start = run.step(), len(compiled), time.perf_counter()
        assert first, "JAX reports no compilation at all: its event has another name"
        for number in range(2, options.steps + 1):
            loss = run.step()
            if number % options.every == 0:
                row = {
                    "step": number,
                    "resident MiB": _resident_bytes() / 2**20,
                    "live arrays": len(jax.live_arrays()),
                    "compiled after step 1": len(compiled) - first,
                    "ms per step": (time.perf_counter() - start) / (number - 1) * 1e3,
                    "loss": loss,
                }
                print(row, flush=True)
                rows.append(row)
    return rows, growth(rows)


def growth(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What did not stay as in the first sample."""
    begin, problems = rows[0], []
    furthest = max(abs(row["resident MiB"] / begin["resident MiB"] - 1) for row in rows)
    if furthest > MEMORY_TOLERANCE:
        problems.append(f"resident memory moved by {furthest:.1%}")
    if any(row["live arrays"] != begin["live arrays"] for row in rows):
        problems.append("the number of live arrays changed")
    if rows[-1]["compiled after step 1"]:
        problems.append(f"{rows[-1]['compiled after step 1']} programs compiled after step 1")
    return problems


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles."""
    import jax.monitoring

    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_determinism(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The digests of repeated runs, each in a process of its own."""
    rows, problems = [], []
    for layout in options.layouts:
        words = ["-m", "benchmarks.soak", "digest", "--steps", str(options.steps), layout]
        found = []
        for _ in range(options.runs):
            found.append(json.loads(_output(words)))
            rows.append({"layout": layout, **found[-1]})
            print(rows[-1], flush=True)
        if len({one["sha256"] for one in found}) > 1:
            problems.append(f"{layout}: the runs differ")
        if not all(one["copies agree"] for one in found):
            problems.append(f"{layout}: devices hold different copies of one array")
    return rows, problems


def digest_of_run(layout: str, steps: int) -> dict[str, Any]:
    """One run: its last loss, and the digest of its final state."""
    run = Run(config_of("fp8_delayed", layout))
    for _ in range(steps):
        loss = run.step()
    sha256, agree = digest(run.state)
    return {"steps": steps, "loss": loss, "copies agree": agree, "sha256": sha256}


def digest(tree: Any) -> tuple[str, bool]:
    """SHA-256 over the arrays of a tree on every device, and whether copies are the same."""
    import jax
    import numpy as np

    found, agree = hashlib.sha256(), True
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        parts: dict[str, bytes] = {}
        for shard in x.addressable_shards:
            part = np.asarray(shard.data).tobytes()
            agree &= parts.setdefault(str(shard.index), part) == part
            found.update(part)
    return found.hexdigest(), agree


def measure_processes(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Losses of two processes against one, for both recipes and two layouts."""
    import numpy as np

    floor, rows, problems = noise_floor(options.steps), [], []
    for recipe in ("none", "fp8_delayed"):
        for layout in ("data 8", "data 2 x fsdp 4"):
            one, two = (_losses(recipe, layout, n, options.steps) for n in (1, 2))
            difference = np.abs(two - one)
            relative, floors = (difference / one).max(), (difference / floor).max()
            row = {"recipe": recipe, "layout": layout, "relative": float(relative)}
            rows.append({**row, "noise floors": float(floors), "last loss": float(two[-1])})
            print(rows[-1], flush=True)
            if relative > LOSS_TOLERANCE if recipe == "none" else floors > 1:
                problems.append(f"{recipe}, {layout}: the losses differ")
    return rows, problems


def noise_floor(steps: int):
    """For each step the spread (largest - smallest) of the losses of perturbed runs so far.

    The running maximum, as runs that have come apart may meet by chance. Before the first code
    flips it is f32 rounding, for which 1e-6 of the loss is allowed.
    """
    import numpy as np

    runs = []
    for seed in range(PERTURBED_RUNS):
        run = Run(config_of("fp8_delayed", None))
        run.perturb(seed)
        runs.append([run.step() for _ in range(steps)])
    losses = np.array(runs)
    spread = np.maximum.accumulate(np.ptp(losses, axis=0))
    print(f"noise floor at steps 1, 2, ...: {' '.join(f'{x:.1e}' for x in spread)}", flush=True)
    return np.maximum(spread, LOSS_TOLERANCE * losses.mean(axis=0))


def _losses(recipe: str, layout: str, processes: int, steps: int):
    """The losses that a real run logs, in one process or through the launcher."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(recipe, layout, steps=steps, run_dir=f"{folder}/run")
        path = Path(folder, "config.yaml")
        path.write_text(dump_config(config), encoding="utf-8")
        words = ["train", "--config", str(path)]
        if processes > 1:
            count = ["--processes", str(processes), "--devices", str(DEVICES // processes)]
            words = ["launch", *count, "--", *words]
        _output(["-m", "lowprec_jax", *words])
        lines = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    return np.array([record["loss"] for record in records if "loss" in record])


def _output(words: Sequence[str]) -> str:
    """What a Python process prints; its errors are shown."""
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
