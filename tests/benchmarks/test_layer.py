import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import layer
from benchmarks.peers.gemm import gemm_rate, measured_peaks, peak_dtypes

CASES = ("bf16", "fp8_delayed", "flax direct", "qwix fp8", "aqt fp8", "aqt int8")


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # by AQT
def test_main__tiny_shape__every_case_computes_the_same_layer(tmp_path):
    for package in ("qwix", "aqt"):
        pytest.importorskip(package)
    record = tmp_path / "out.json"

    words = ("--shapes", "32x64x48", "--rounds", "3", "--allocator", "default", "--cases", *CASES)
    with jax.numpy_dtype_promotion("standard"):
        code = layer.main([*words, "--json", str(record)])

    assert code == 0
    found = json.loads(record.read_text())
    rows = {row["case"]: row for row in found["rows"]}
    errors = {name: row["error"] for name, row in rows.items()}
    # bf16 rounds to 2**-9, int8 to 2**-8 of the largest, e5m2 to 2**-3 and about 6 % on average.
    assert errors.pop("f32") == 0
    assert 0 < errors.pop("bf16") < 2**-8
    assert 2**-8 < errors.pop("aqt int8") < 2**-5
    assert set(errors) == {"fp8_delayed", "flax direct", "qwix fp8", "aqt fp8"}
    assert all(2**-6 < error < 2**-3 for error in errors.values()), errors
    upcasts = {name: row["exact upcasts"] for name, row in rows.items() if row["exact upcasts"]}
    assert upcasts == {"fp8_delayed": 3}
    eight_bit = {name for name, row in rows.items() if row["8-bit GEMMs"] == 3}
    assert eight_bit == {"flax direct", "qwix fp8", "aqt fp8", "aqt int8"}
    lengths = {name: len(times) for name, times in found["seconds"]["32x64x48"].items()}
    assert lengths == dict.fromkeys(rows, 3)


def test_main__no_shape__exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        layer.main(["--shapes", "16x32"])

    assert stopped.value.code == 2
    assert "'16x32'" in capsys.readouterr().err


def test_peaks__by_platform__measured_on_gpus_only():
    assert measured_peaks("cpu") == measured_peaks("tpu") == {}
    assert peak_dtypes("gpu") == {"bf16": jnp.bfloat16, "f8": jnp.float8_e4m3fn}
    assert gemm_rate(jnp.bfloat16, 16, rounds=1) > 0
