import json
import subprocess
import sys
import time

import numpy as np
import pytest

from lowprec_jax.data import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Corpus,
    DataError,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

KINDS = ("byte", "char", "bpe")
UNUSUAL = "naïve 日本語 🙂\r\n\t\x00 e\u0301 \ufeff\u2028   \n\n\n  end  "


@pytest.fixture(scope="module")
def sample(stdlib):
    """Real code of both splits, with every non-ASCII character of the corpus and more."""
    lines = stdlib.train.splitlines(keepends=True)
    foreign = "".join(line for line in lines if not line.isascii())
    assert len(foreign) > 1000
    train = stdlib.train[:400_000] + foreign + UNUSUAL
    return Corpus("sample", train=train, validation=stdlib.validation[:100_000] + "ж", card={})


@pytest.fixture(scope="module")
def tokenizers(sample):
    return {kind: build_tokenizer(kind, sample, vocab_size=700) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer__real_text__round_trip_is_exact(tokenizers, sample, kind):
    tokenizer = tokenizers[kind]
    for text in (sample.train, sample.validation, UNUSUAL, ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text


def test_vocab_size__each_kind__is_bytes_characters_or_as_asked(tokenizers, sample):
    assert tokenizers["byte"].vocab_size == 256
    assert tokenizers["char"].vocab_size == len(set(sample.train + sample.validation))
    assert tokenizers["bpe"].vocab_size == 700


def test_byte__encode__gives_utf8_bytes():
    assert ByteTokenizer().encode("aé🙂").tolist() == list("aé🙂".encode())


def test_char__ids__are_those_of_nanogpt(sample, tokenizers):
    chars = sorted(set(sample.train + sample.validation))
    table = {char: i for i, char in enumerate(chars)}
    text = sample.validation[:5000] + UNUSUAL
    assert tokenizers["char"].encode(text).tolist() == [table[char] for char in text]


def test_char__character_of_validation_only__is_in_the_vocabulary(tokenizers, sample):
    assert "ж" not in sample.train
    assert tokenizers["char"].decode(tokenizers["char"].encode("ж")) == "ж"


def test_char__ten_megabytes__encode_in_under_two_seconds(tokenizers, stdlib):
    text = (stdlib.train[:400_000] * 25)[:10_000_000]
    tokenizers["char"].encode("warm")
    start = time.perf_counter()
    assert tokenizers["char"].encode(text).size == 10_000_000
    assert time.perf_counter() - start < 2.0  # 0.06 s measured; a Python loop needs over 3 s


@pytest.mark.parametrize(
    ("text", "name"), [("aab♥a☃", r"'♥' \(U\+2665\) at position 3"), ("c", r"'c' \(U\+0063\)")]
)
def test_char__unknown_character__is_named(text, name):
    with pytest.raises(DataError, match=rf"{name} .*the 2 characters"):
        CharTokenizer.from_text("abab").encode(text)


def test_char__gap_in_the_set__is_unknown():
    with pytest.raises(DataError, match="'b'"):
        CharTokenizer.from_text("ac").encode("abc")


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_char__characters_not_a_sorted_set__raises(characters):
    with pytest.raises(DataError, match=rf"given: {len(characters)}\).*from_text"):
        CharTokenizer(characters)


def test_bpe__trained_twice__is_identical(tokenizers, sample):
    again = BpeTokenizer.train(sample.train, vocab_size=700)
    assert again == tokenizers["bpe"]


def test_bpe__learned_merges__shorten_real_code(tokenizers, sample):
    assert tokenizers["bpe"].encode(sample.validation).size < 0.6 * len(sample.validation)


def test_bpe__long_text__has_the_tokens_of_the_text_in_one_piece(tokenizers, sample):
    bpe = tokenizers["bpe"]
    whole = bpe._engine.encode(sample.train).ids
    assert len(sample.train) > 5 * 2**16
    assert bpe.encode(sample.train).tolist() == whole


def test_bpe__short_text__reports_the_vocabulary_it_found():
    bpe = BpeTokenizer.train("ab ab ab", vocab_size=1000)
    assert 256 < bpe.vocab_size < 270


def test_bpe__vocab_size_below_256__raises():
    with pytest.raises(DataError, match=r"vocab_size 255 .*256 or more"):
        BpeTokenizer.train("text", vocab_size=255)


def test_bpe__package_absent__names_the_install_command(monkeypatch, sample):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        build_tokenizer("bpe", sample)


def test_bpe__validation_text__is_not_trained_on():
    corpus = Corpus("c", train="x y z", validation="secret " * 100, card={})
    assert "secret" not in build_tokenizer("bpe", corpus, vocab_size=400).to_dict().__str__()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_decode__cut_utf8__gives_replacement_characters(tokenizers, kind):
    ids = tokenizers[kind].encode("a\U0001f9ff")  # not in the corpus: one token a byte
    assert tokenizers[kind].decode(ids[:-1]).startswith("a�")


def test_decode__ids_of_two_rows__are_read_in_row_order():
    assert ByteTokenizer().decode(np.array([[97, 98], [99, 100]], np.int64)) == "abcd"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, "vocab_size"])
def test_decode__id_outside_the_vocabulary__is_named(tokenizers, kind, bad):
    size = tokenizers[kind].vocab_size
    value = size if bad == "vocab_size" else bad
    with pytest.raises(DataError, match=rf"id {value} at position 2 .*vocabulary of {size}"):
        tokenizers[kind].decode([1, 2, value])


def test_decode__float_ids__raises():
    with pytest.raises(DataError, match="float64"):
        ByteTokenizer().decode([1.0, 2.0])


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load__each_kind__gives_an_equal_tokenizer(tokenizers, sample, tmp_path, kind):
    save_tokenizer(tokenizers[kind], tmp_path / "tokenizer.json")
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded == tokenizers[kind]
    text = sample.validation[:20_000]
    np.testing.assert_array_equal(loaded.encode(text), tokenizers[kind].encode(text))
    assert loaded.decode(loaded.encode(UNUSUAL)) == UNUSUAL
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == kind


def test_load_tokenizer__missing_file__names_it(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json.*No such file.*save_tokenizer"):
        load_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["not json", "[1]", "{}", '{"kind": "char"}', "3"])
def test_load_tokenizer__other_file__says_it_is_no_tokenizer(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(DataError, match=r"other\.json' is not a tokenizer file"):
        load_tokenizer(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [({"kind": "chr"}, "Unknown tokenizer 'chr'"), ({"kind": "bpe", "definition": {}}, "BPE")],
)
def test_load_tokenizer__wrong_content__names_file_and_reason(tmp_path, data, reason):
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=rf"wrong\.json': {reason}"):
        load_tokenizer(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("kind", "nearest"), [("bytes", "byte"), ("chars", "char"), ("bpe4096", "bpe")]
)
def test_build_tokenizer__unknown_kind__names_the_nearest(sample, kind, nearest):
    expected = f"'{kind}'. Known: byte, char, bpe. Did you mean '{nearest}'?"
    with pytest.raises(DataError) as error:
        build_tokenizer(kind, sample)
    assert expected in str(error.value)


def test_import__data_package__imports_neither_jax_nor_tokenizers():
    code = (
        "import sys, lowprec_jax.data;"
        "print(sorted({'jax', 'flax', 'optax', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
