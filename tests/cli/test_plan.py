"""``lowprec_jax plan``, with and without a chip."""

import re

import pytest

from lowprec_jax.cli.main import main

SMALL = ["--model.width", "64", "--model.num_layers", "2", "--model.context", "16"]


def shown(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_plan__no_target__shows_the_layers_only(capsys):
    out = shown(capsys, "--config", "quickstart", *SMALL)
    assert out.splitlines()[0].split() == [
        "layer", "calls", "lhs", "x", "rhs", "recipe", "FLOPs", "reason"
    ]  # fmt: skip
    assert "roofline" not in out
    assert out.splitlines()[-1].endswith("of the matmul FLOPs in low precision.")


def test_plan__chips_of_all_kinds__make_a_plan(capsys):
    for chip in ("h100", "mi300x", "tpu-v6e", "trn3"):
        out = shown(capsys, *SMALL, "--target", chip)
        assert f"Target {chip}: " in out
        assert "blocks/mlp/down" in out.split("Break-even")[1]


def test_plan__70b_on_10000_chips__is_planned_without_arrays(capsys):
    sizes = ["--model.width", "8192", "--model.num_layers", "80", "--model.num_heads", "64"]
    sizes += ["--model.mlp", "swiglu", "--model.mlp_width", "28672", "--model.context", "2048"]
    sizes += ["--model.compute_dtype", "bfloat16", "--model.remat", "full"]
    mesh = ["--mesh.fsdp", "16", "--batch_size", "16"]
    out = shown(capsys, *sizes, *mesh, "--target", "h200", "--chips", "16,10000")
    memory = out.split("Memory of a chip")[1]
    (parameters,) = {row.split()[1] for row in memory.splitlines()[2:4]}
    # f32, 80 blocks and the embedding of 256 tokens; the norms are not split.
    count = 80 * (4 * 8192**2 + 3 * 8192 * 28672) + 256 * 8192
    assert float(parameters) == pytest.approx(count * 4 / 16 / 1e9, rel=1e-3)
    assert [row.split()[0] for row in memory.splitlines()[2:4]] == ["16", "10,000"]
    tokens = re.findall(r"([\d,]+) +[\d.]+%$", out.split("Steps.")[1], re.MULTILINE)
    few, many = (float(x.replace(",", "")) for x in tokens)
    assert 100 < many / few < 625  # weak scaling, less the sum of gradients over the network


def test_plan__cpu__has_no_times_until_a_peak_is_given(capsys):
    words = [*SMALL, "--target", "cpu"]
    out = shown(capsys, *words)
    assert "n/a" in out.split("Linear layers")[1]
    assert "cpu does not multiply these codes" in out
    out = shown(capsys, *words, "--peak", "1", "--bandwidth", "100")
    assert "n/a" not in out.split("Linear layers")[1]


def test_plan__a_slower_chip__takes_longer(capsys):
    words = ["--target", "h200", *SMALL]

    def step(*more):
        row = shown(capsys, *words, *more).split("Steps.")[1].splitlines()[2]
        return float(row.split()[7])

    assert step("--efficiency", "0.7,0.4") > 1.5 * step()


def test_plan__fewer_bytes_on_the_link__take_less_time(capsys):
    def milliseconds(link):
        out = shown(capsys, *SMALL, "--target", "h200", "--chips", "8", "--link", link)
        (row,) = (line for line in out.splitlines() if line.startswith("gradients  "))
        return float(row.split()[-2])

    assert milliseconds("0.01") > 5 * milliseconds("0.1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chips", "8"], "needs a chip. Add --target h200"),
        (["--target", "h2000"], "Unknown chip 'h2000'"),
        (["--target", "h200", "--chips", "8,x"], "--chips is '8,x': give positive integers"),
        (["--target", "h200", "--efficiency", "1.5"], "--efficiency is '1.5': give one or two"),
        (["--target", "h200", "--link", "-1"], "--link"),
        (["--target", "h200", "--batch_size", "16", "--mesh.fsdp", "16", "--chips", "40"],
         "--chips 40 is not divisible by mesh.fsdp 16 x mesh.tensor 1 = 16. Use 32 chips"),
        (["--target", "h200", "--precision.target", "amd-mi300"], "precision.target is"),
        (["--target", "h200", "--mesh.fsdp", "3", "--batch_size", "12"], "Dimension"),
    ],
)  # fmt: skip
def test_plan__bad_input__is_refused(capsys, words, message):
    assert message in refused(capsys, *words)
