import json

TINY = (
    *("--model.num_layers", "1", "--model.num_heads", "2", "--model.width", "32"),
    *("--model.context", "16", "--batch_size", "4"),
)


def test_main__tiny_model__only_the_fp8_config_multiplies_fp8(run_benchmark, tmp_path):
    record = tmp_path / "out.json"

    done = run_benchmark(
        *("train_step", "quickstart_fp32", "quickstart --optim.learning_rate 1e-4", *TINY),
        *("--rounds", "2", "--inner", "1", "--json", str(record)),
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    fp32, fp8 = found["rows"]
    assert (fp32["case"], fp32["x first"]) == ("quickstart_fp32", 1.0)
    assert fp32["exact upcasts"] == 0 < fp8["exact upcasts"]
    assert fp32["other GEMMs"] == fp8["exact upcasts"] + fp8["other GEMMs"]
    assert [c["optim"]["learning_rate"] for c in found["configs"].values()] == [1e-3, 1e-4]
    assert {c["model"]["width"] for c in found["configs"].values()} == {32}


def test_main__unknown_config__exits_with_2(run_benchmark):
    done = run_benchmark("train_step", "quikstart", "--allocator", "default")

    assert done.returncode == 2
    assert "'quikstart'" in done.stderr
    assert "Traceback" not in done.stderr
