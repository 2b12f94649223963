import json
from pathlib import Path

import pytest

TINY = (
    *("--steps", "4", "--optim.warmup_steps", "1", "--batch_size", "2"),
    *("--model.num_layers", "1", "--model.num_heads", "2", "--model.width", "16"),
    *("--model.mlp_width", "16", "--model.context", "8"),
)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 20, encoding="utf-8")
    return path


def write_run(out: Path, name: str, validation: float, losses: list[float]) -> None:
    """What the study reads of a finished run."""
    run = out / name
    run.mkdir(parents=True)
    lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses, start=1)]
    lines.append(json.dumps({"step": len(losses), "validation_loss": validation}))
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (run / "summary.json").write_text(json.dumps({"validation_loss": validation}))


def write_study(out: Path, **validation: list[float]) -> None:
    for variant, values in validation.items():
        for seed, value in enumerate(values):
            write_run(out, f"{variant}-{seed}", value, [9.0, 1.0, 2.0])


def test_report__two_seeds__differences_are_paired(run_benchmark, tmp_path, text):
    out = tmp_path / "study"
    reference = [1.60, 1.70]  # the spread between seeds is far above that of the differences
    write_study(
        out, fp8_delayed=[1.61, 1.704], fp8_current=reference, bf16=reference, fp32=reference
    )

    done = run_benchmark(
        *("precision_gap", "--report-only", "--seeds", "2", "--last-steps", "2"),
        *("--source", str(text), "--out", str(out)),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "gap.json").read_text())
    gap = report["gaps"]["fp8_delayed - bf16"]
    assert gap["validation"] == {
        "mean": pytest.approx(0.007),
        "standard_error": pytest.approx(0.003),
        "n": 2,
    }
    assert report["means"]["fp32"]["training"]["mean"] == 1.5  # of the last two steps
    assert report["verdict"]["complete"]
    assert (out / "gap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fp8", "missed"),
    [(1.6, "validation gap fp8_delayed - fp32"), (1.73, "validation loss fp8_delayed")],
    ids=["gap", "level"],
)
def test_report__limit_missed__exits_with_1(run_benchmark, tmp_path, text, fp8, missed):
    out = tmp_path / "study"
    write_study(out, fp8_delayed=[fp8], fp8_current=[1.5], bf16=[fp8], fp32=[1.58])

    done = run_benchmark(
        *("precision_gap", "--report-only", "--seeds", "1"),
        *("--source", str(text), "--out", str(out)),
    )

    assert done.returncode == 1, done.stderr
    assert f"MISSED: {missed} is" in done.stdout


def test_report__a_seed_not_finished__exits_with_1(run_benchmark, tmp_path, text):
    out = tmp_path / "study"
    write_study(out, fp8_delayed=[1.5], fp8_current=[1.5, 1.5], bf16=[1.5, 1.5], fp32=[1.5, 1.5])

    done = run_benchmark(
        *("precision_gap", "--report-only", "--seeds", "2"),
        *("--source", str(text), "--out", str(out)),
    )

    assert done.returncode == 1, done.stderr
    assert "Not all runs are finished" in done.stdout


def test_main__three_runs_finished__trains_only_the_fourth(run_benchmark, tmp_path, text):
    out = tmp_path / "study"
    write_study(out, fp8_current=[1.5], bf16=[1.5], fp32=[1.5])
    killed = out / "fp8_delayed-0"
    killed.mkdir()
    (killed / "metrics.jsonl").write_text('{"step": 1, "lo')

    done = run_benchmark(
        "precision_gap", "--seeds", "1", "--source", str(text), "--out", str(out), *TINY
    )

    assert done.returncode == 1, done.stdout + done.stderr  # four steps teach nothing
    trained = [line for line in done.stdout.splitlines() if line.startswith("training ")]
    assert trained == ["training fp8_delayed-0"]
    runs = json.loads((out / "gap.json").read_text())["runs"]
    assert runs["bf16"]["0"]["validation"] == 1.5
    assert 1.5 < runs["fp8_delayed"]["0"]["validation"] < 6
    assert "recipe: fp8_delayed" in (killed / "config.yaml").read_text()


def test_main__other_text__exits_with_2(run_benchmark, tmp_path, text):
    out = tmp_path / "study"
    words = ("precision_gap", "--report-only", "--source", str(text), "--out", str(out))
    run_benchmark(*words)
    text.write_text("another text")

    done = run_benchmark(*words)

    assert done.returncode == 2
    assert "text_sha256" in done.stderr


@pytest.mark.parametrize(("loss", "code"), [(1.64, 0), (1.66, 1)])
def test_report__four_bit_recipe__has_a_gap_of_its_own(run_benchmark, tmp_path, text, loss, code):
    """0.04 nats pass for nvfp4, and anything passes for mxfp4, which is only reported."""
    out = tmp_path / "study"
    write_study(out, nvfp4=[loss], mxfp4=[1.9], bf16=[1.60], fp32=[1.60])

    done = run_benchmark(
        *("precision_gap", "--report-only", "--seeds", "1", "--recipes", "nvfp4,mxfp4"),
        *("--source", str(text), "--out", str(out)),
    )

    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads((out / "gap.json").read_text())
    assert {row["what"] for row in report["verdict"]["checks"]} == {
        "validation gap nvfp4 - bf16",
        "validation gap nvfp4 - fp32",
    }
