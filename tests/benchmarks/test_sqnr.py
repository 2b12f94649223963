"""The SQNR table: figures of casts are those of the references, and a wrong one is told."""

import pytest

from benchmarks import sqnr


@pytest.mark.parametrize("name", ["e4m3fn", "int8", "int4"])
def test_casts__normal_data__are_within_a_tenth_of_the_references(name):
    for row in sqnr.casts("normal", sqnr.normal(), {name: sqnr.NORMAL[name]}):
        assert abs(row.ours - row.reference) < 0.1, row


def test_formats_of_blocks__normal_data__are_within_a_tenth_of_the_references():
    for row in sqnr.formats_of_blocks():
        assert abs(row.ours - row.reference) < 0.1, row


@pytest.mark.parametrize(("ours", "code"), [(20.0, 0), (19.6, 1), (20.5, 1)])
def test_main__figure_off_its_reference__is_exit_code_1(monkeypatch, tmp_path, capsys, ours, code):
    monkeypatch.setattr(sqnr, "tables", lambda: [sqnr.Row("table", "what", ours, 20.0)])
    assert sqnr.main(["--out", str(tmp_path)]) == code
    assert ("<--" in capsys.readouterr().out) == bool(code)
    assert (tmp_path / "sqnr.json").exists()
