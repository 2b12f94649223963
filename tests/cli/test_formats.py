"""``lowprec_jax formats``: its rows, its choice of rows, and bad names."""

import pytest

from lowprec_jax import numerics
from lowprec_jax.cli.main import main


def _cells(text: str) -> list[list[str]]:
    """Words of every row below the line under the titles; a list of chips may take more lines."""
    rows: list[list[str]] = []
    for line in text.split("─ \n")[1].splitlines():
        if line.startswith("  "):
            rows[-1] += line.split()
        elif line.strip():
            rows.append(line.split())
    return rows


def test_formats__no_name__has_a_row_for_every_registered_format(capsys):
    assert main(["formats"]) == 0

    assert [row[0] for row in _cells(capsys.readouterr().out)] == [
        fmt.name for fmt in numerics.formats()
    ]


def test_formats__names__shows_the_published_numbers_of_these(capsys):
    assert main(["formats", "e5m2", "int8", "e2m1"]) == 0

    float8, int8, float4 = (" ".join(row) for row in _cells(capsys.readouterr().out))
    assert float8.startswith("e5m2 8 e5m2, bias 15 57344 2^-14 2^-16 2^-2 Inf NaN -0 nvidia-hopper")
    assert int8.startswith("int8 8 integer 127 1 1 2^-6 nvidia-hopper")
    assert float4 == "e2m1 4 e2m1, bias 1 6 1 2^-1 2^-1 -0 nvidia-blackwell, amd-mi350, trainium3"


def test_formats__widths_without_registration__are_emulated(capsys):
    assert main(["formats", "float_e3m5"]) == 0

    (row,) = _cells(capsys.readouterr().out)
    assert " ".join(row) == "float_e3m5 9 e3m5, bias 3 31.5 2^-2 2^-7 2^-5 -0 emulated only"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["e4m3fm"], "Did you mean 'e4m3fn'?"),
        (["float_e9m9"], "use 1 to 7 exponent bits"),
        (["--all"], "given: --all. Write: lowprec_jax formats e4m3fn int8."),
    ],
)
def test_formats__bad_word__is_one_line_and_code_2(words, part, capsys):
    assert main(["formats", *words]) == 2

    shown = capsys.readouterr()
    assert part in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
