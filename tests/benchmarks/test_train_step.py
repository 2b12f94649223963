import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = (
    *("--model.num_layers", "1", "--model.num_heads", "2", "--model.width", "32"),
    *("--model.context", "16", "--batch_size", "4"),
)


def test_main__tiny_model__only_the_fp8_config_multiplies_fp8(tmp_path):
    record = tmp_path / "out.json"
    words = (
        *("quickstart_fp32", "quickstart --optim.learning_rate 1e-4", *TINY),
        *("--rounds", "2", "--inner", "1", "--group", "tiny", "--json", str(record)),
        *("--peers", "flax direct", "--allocator", "default"),
    )

    # A process of its own, which compiles in half the time.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    fp32, fp8, flax = found["rows"]
    assert (fp32["case"], fp32["x first"]) == ("quickstart_fp32", 1.0)
    assert fp32["exact upcasts"] == 0 < fp8["exact upcasts"]
    assert fp32["other GEMMs"] == fp8["exact upcasts"] + fp8["other GEMMs"]
    # The same matmuls of the same model, which starts from the same parameters.
    assert flax["f8 GEMMs"] == fp8["exact upcasts"]
    assert flax["other GEMMs"] == fp8["other GEMMs"]
    assert flax["loss"] == pytest.approx(fp32["loss"], rel=0.01)
    assert {row["group"] for row in found["rows"]} == {*found["seconds"]} == {"tiny"}
    assert [c["optim"]["learning_rate"] for c in found["configs"].values()] == [1e-3, 1e-4]
    assert {c["model"]["width"] for c in found["configs"].values()} == {32}


def test_main__unknown_config__exits_with_2(run_benchmark):
    done = run_benchmark("train_step", "quikstart", "--allocator", "default")

    assert done.returncode == 2
    assert "'quikstart'" in done.stderr
    assert "Traceback" not in done.stderr
