import dataclasses
import hashlib
import json
import re
import sysconfig
from pathlib import Path

import pytest

from lowprec_jax.data import DataError, held_out, load_corpus


def write_files(folder, count, text="text of file {}\n"):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"f{i:03d}.txt").write_text(text.format(i), encoding="utf-8")
    return folder


def stdlib_text(name):
    return Path(sysconfig.get_paths()["stdlib"], name).read_bytes().decode()


def test_load_corpus__stdlib__has_sane_size(stdlib):
    assert 7e6 < len(stdlib.train) < 40e6
    share = len(stdlib.validation) / (len(stdlib.train) + len(stdlib.validation))
    assert 0.04 < share < 0.2
    assert stdlib.card["files"] > 300


def test_load_corpus__stdlib__files_are_in_one_split_each(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in sorted((root / "json").glob("*.py"))]
    names += [path.name for path in sorted(root.glob("[a-d]*.py"))]
    sides = set()
    for name in names:
        text, out = stdlib_text(name), held_out(name, 0.1)
        assert (text in stdlib.validation, text in stdlib.train) == (out, not out), name
        sides.add(out)
    assert sides == {True, False}


@pytest.mark.parametrize(
    "name", ["unittest/test/test_case.py", "test/test_json/test_decode.py", "pydoc_data/topics.py"]
)
def test_load_corpus__stdlib__leaves_out_tests_and_topics(stdlib, name):
    if not Path(sysconfig.get_paths()["stdlib"], name).exists():
        pytest.skip(f"this Python is installed without {name}")
    text = stdlib_text(name)
    assert text not in stdlib.train
    assert text not in stdlib.validation


def test_load_corpus__stdlib_with_foreign_files__reads_library_code_only(tmp_path, monkeypatch):
    write_files(tmp_path, 0)
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"module = {i}\n")
    for name in ["site-packages/a.py", "lib2to3/tests/b.py", "idlelib/idle_test/c.py"]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("foreign\n")
    for name in ["_sysconfigdata__linux.py", "sitecustomize.py", "notes.txt"]:
        (tmp_path / name).write_text("foreign\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    corpus = load_corpus("stdlib")

    assert sorted((corpus.train + corpus.validation).splitlines()) == sorted(
        f"module = {i}" for i in range(40)
    )
    assert corpus.card["not_utf8"] == ["latin.py"]


def test_load_corpus__stdlib_twice__gives_the_same_corpus(stdlib):
    again = load_corpus("stdlib")
    assert again == stdlib
    assert again.card["licence"].startswith("Python Software Foundation License")


def test_load_corpus__card__is_json_and_true(stdlib):
    card = json.loads(json.dumps(stdlib.card))
    for split in ("train", "validation"):
        data = getattr(stdlib, split).encode()
        assert card[split]["bytes"] == len(data)
        assert card[split]["characters"] == len(getattr(stdlib, split))
        assert card[split]["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["train"]["files"] + card["validation"]["files"] == card["files"]
    assert card["split"]["validation_fraction"] == 0.1
    assert (card["name"], card["source"]) == ("stdlib", "stdlib")


def test_load_corpus__corpus__is_frozen_and_its_repr_short(stdlib):
    with pytest.raises(dataclasses.FrozenInstanceError):
        stdlib.train = ""
    assert repr(stdlib) == "Corpus(name='stdlib')"


def test_load_corpus__file_of_1000_characters__splits_by_the_nanogpt_rule(tmp_path):
    text = "".join(chr(0x100 + i % 500) for i in range(1000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "text.txt"))
    assert corpus.train == text[:900]
    assert corpus.validation == text[900:]
    assert corpus.name == "text.txt"
    assert corpus.card["train"]["bytes"] == 1800


@pytest.mark.parametrize("n", [11, 99, 1115394])
def test_load_corpus__file__trains_on_int_of_nine_tenths(tmp_path, n):
    (tmp_path / "text.txt").write_text("x" * n)
    assert len(load_corpus(str(tmp_path / "text.txt")).train) == int(0.9 * n)


def test_load_corpus__windows_line_ends__are_kept(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\r\nb\rc\n" * 20)
    corpus = load_corpus(str(tmp_path / "text.txt"))
    assert corpus.train + corpus.validation == "a\r\nb\rc\n" * 20


def test_load_corpus__folder_of_9_files__splits_each_by_characters(tmp_path):
    folder = write_files(tmp_path / "nine", 9, text="{}123456789")
    corpus = load_corpus(str(folder))
    assert corpus.train == "\n".join(f"{i}12345678" for i in range(9))
    assert corpus.validation == "\n".join("9" * 9)
    assert "characters" in corpus.card["split"]["rule"]


def test_load_corpus__folder_of_60_files__splits_by_file_in_sorted_order(tmp_path):
    corpus = load_corpus(str(write_files(tmp_path / "sixty", 60)), validation_fraction=0.3)
    lines = [(f"text of file {i}", held_out(f"f{i:03d}.txt", 0.3)) for i in range(60)]
    assert corpus.train.splitlines() == [line for line, out in lines if not out]
    assert corpus.validation.splitlines() == [line for line, out in lines if out]
    assert corpus.card["validation"]["files"] == len(corpus.validation.splitlines())


def test_load_corpus__file_added__moves_no_other_file(tmp_path):
    folder = write_files(tmp_path / "grows", 60)
    before = load_corpus(str(folder))
    (folder / "a_new.txt").write_text("new\n")
    after = load_corpus(str(folder))
    assert after.train.replace("new\n", "") == before.train
    assert after.validation.replace("new\n", "") == before.validation
    assert "new\n" in after.train + after.validation


def test_load_corpus__folder__is_recursive_and_passes_over_hidden_and_empty(tmp_path):
    for name in ["b/deep/x.md", "a.py", ".hidden", ".git/config", "__pycache__/a.pyc", "empty.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else f"{name:.>20}")
    corpus = load_corpus(str(tmp_path), validation_fraction=0.5)
    assert corpus.train == "." * 10 + "\n" + "." * 9 + "b"
    assert corpus.validation == "." * 6 + "a.py" + "\n" + "/deep/x.md"
    assert corpus.card["files"] == 2


def test_held_out__many_paths__holds_out_the_fraction():
    share = sum(held_out(f"folder/{i}.txt", 0.1) for i in range(10_000)) / 10_000
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 10_000) ** 0.5  # four sigma of a fair draw


def test_held_out__known_path__is_the_documented_hash():
    value = int(hashlib.sha256(b"json/decoder.py").hexdigest(), 16) / 2**256
    assert held_out("json/decoder.py", value + 1e-9)
    assert not held_out("json/decoder.py", value - 1e-9)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 7.5, float("nan")])
def test_load_corpus__fraction_outside_0_1__raises(fraction):
    with pytest.raises(DataError, match=rf"validation_fraction {fraction} .*\(0, 1\)"):
        load_corpus("stdlib", validation_fraction=fraction)


def test_load_corpus__missing_path__names_it_and_the_alternatives(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt.*'stdlib'"):
        load_corpus(str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("name", ["empty.txt", "folder"])
def test_load_corpus__no_text__names_the_source(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=f"{name}' holds no text"):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("folder", [False, True])
def test_load_corpus__not_utf8__names_file_byte_and_offset(tmp_path, folder):
    (tmp_path / "latin.txt").write_bytes("é".encode() * 50 + b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt' .*0xe9 at offset 103\b"):
        load_corpus(str(tmp_path if folder else tmp_path / "latin.txt"))


@pytest.mark.parametrize(("fraction", "split"), [(0.1, "train"), (1e-17, "validation")])
def test_load_corpus__file_too_short_to_split__names_the_empty_split(tmp_path, fraction, split):
    (tmp_path / "short.txt").write_text("x")
    expected = rf"The {split} split of '.*short\.txt' is empty .*{fraction} .*of 1 characters"
    with pytest.raises(DataError, match=expected):
        load_corpus(str(tmp_path / "short.txt"), validation_fraction=fraction)


@pytest.mark.parametrize(("fraction", "split"), [(1e-6, "validation"), (0.999999, "train")])
def test_load_corpus__no_file_in_a_split__names_a_fraction_that_works(tmp_path, fraction, split):
    folder = write_files(tmp_path / "ten", 10)
    with pytest.raises(DataError, match=rf"The {split} split .*{fraction} \(10 files") as error:
        load_corpus(str(folder), validation_fraction=fraction)
    advice = re.search(r"validation_fraction of (0\.\d+) or (more|less)", str(error.value))
    assert advice
    corpus = load_corpus(str(folder), validation_fraction=float(advice[1]))
    assert corpus.card[split]["files"] == 1
