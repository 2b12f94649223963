import json


def test_main__tiny_shape__every_case_computes_the_same_layer(run_benchmark, tmp_path):
    record = tmp_path / "out.json"

    done = run_benchmark(
        "dot_general", "--shapes", "32x64x48", "--rounds", "2", "--json", str(record)
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    rows = {row["case"]: row for row in found["shapes"]["32x64x48"]["rows"]}
    errors = {name: row["error"] for name, row in rows.items()}
    # bf16 rounds to 2**-9, e5m2 to 2**-3 at most and about 6 % on average.
    assert errors.pop("f32") == 0
    assert 0 < errors.pop("bf16") < 2**-8
    assert errors
    assert all(2**-6 < error < 2**-3 for error in errors.values()), errors
    assert [rows[name]["exact upcasts"] for name in ("f32", "fp8_delayed", "fp8_current")] == [
        0,
        3,
        3,
    ]
    assert rows["flax direct"]["f8 GEMMs"] == 3


def test_main__default__states_the_raised_allocator_beside_the_times(run_benchmark, tmp_path):
    record = tmp_path / "out.json"

    done = run_benchmark(
        *("dot_general", "--shapes", "8x16x24", "--cases", "bf16", "--rounds", "3"),
        *("--json", str(record)),
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert "MALLOC_MMAP_THRESHOLD_=1073741824" in found["machine"]["allocator"]
    assert {k: len(v) for k, v in found["shapes"]["8x16x24"]["seconds"].items()} == {
        "f32": 3,
        "bf16": 3,
    }


def test_main__no_shape__exits_with_2(run_benchmark):
    done = run_benchmark("dot_general", "--shapes", "16x32")

    assert done.returncode == 2
    assert "'16x32'" in done.stderr
