import json

from benchmarks import memory


def test_main__two_layers__fp8_keeps_less_than_bf16(tmp_path):
    record = tmp_path / "out.json"

    code = memory.main(
        [
            *("--layers", "2", "--width", "32", "--tokens", "64"),
            *("--cases", "bf16", "fp8_delayed", "--allocator", "default", "--json", str(record)),
        ]
    )

    assert code == 0
    bf16, fp8 = json.loads(record.read_text())["rows"]
    # Weights [32, 32] and biases [32] of two products in each of two layers.
    assert bf16["parameters"] == fp8["parameters"] == 2 * 2 * (32 * 32 + 32)
    # State of four sites, f32: history 3 x 16, pending and observed 3 x 5, age and dropped 3.
    assert (bf16["state bytes"], fp8["state bytes"]) == (0, 4 * 4 * 3 * (16 + 2 * 5 + 2))
    assert fp8["kept MiB"] < bf16["kept MiB"]
    assert fp8["temp MiB"] < bf16["temp MiB"]
