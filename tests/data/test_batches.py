import math
import sys
import time

import numpy as np
import pytest

from lowprec_jax.data import Batches, ByteTokenizer, DataError, validation_windows

pytestmark = pytest.mark.reliability


def make(tokens=None, *, batch_size=5, context=7, seed=3):
    tokens = np.arange(1000) if tokens is None else tokens
    return Batches(tokens, batch_size=batch_size, context=context, seed=seed)


def test_batch__same_seed_and_step__is_the_same_in_any_order():
    first, second = make(), make()
    forward = [first.batch(step) for step in (0, 1, 2)]
    backward = [second.batch(step) for step in (2, 1, 0)][::-1]
    np.testing.assert_array_equal(forward, backward)


def test_batch__steps_and_seeds__all_differ():
    starts = {
        tuple(make(np.arange(10**6), seed=seed).batch(step)[0][:, 0])
        for seed in range(10)
        for step in range(100)
    }
    assert len(starts) == 1000


def test_batch__known_seed_and_step__has_the_recorded_positions():
    """A resumed run must see the same text after any upgrade: these are raw Philox words."""
    counter = np.array([0, 0, 17, 0], np.uint64)
    key = np.array([3, 0], np.uint64)
    words = [int(w) for w in np.random.Philox(key=key, counter=counter).random_raw(5)]
    assert make().batch(17)[0][:, 0].tolist() == [word % 993 for word in words]
    assert make().batch(17)[0][:, 0].tolist() == [81, 228, 691, 676, 280]


def test_batch__targets__are_the_inputs_shifted_by_one_in_the_corpus(stdlib):
    text = stdlib.train[:50_000]
    inputs, targets = make(ByteTokenizer().encode(text), context=33).batch(4)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for row, following in zip(inputs, targets, strict=True):
        window = ByteTokenizer().decode(np.append(row, following[-1]))
        assert len(window) == 34
        assert window in text


def test_batch__result__is_contiguous_int32_of_the_asked_shape():
    for array in make(np.arange(300, dtype=np.uint16)).batch(0):
        assert (array.shape, array.dtype) == ((5, 7), np.int32)
        assert array.flags.c_contiguous


def test_batch__many_draws__reach_every_position_equally_often():
    batches = make(np.arange(27), batch_size=10_000)  # starts 0 .. 19
    counts = np.bincount(batches.batch(0)[0][:, 0], minlength=20)
    assert counts.size == 20
    assert np.abs(counts - 500).max() < 5 * (500 * 0.95) ** 0.5  # five sigma of a fair draw


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_batch__rows_of_each_host__make_up_the_global_batch(hosts):
    batches, n = make(batch_size=12), 12 // hosts
    parts = [batches.batch(5, rows=slice(i * n, (i + 1) * n)) for i in range(hosts)]
    assert all(x.shape == (n, 7) and x.flags.c_contiguous for part in parts for x in part)
    joined = [np.concatenate(side) for side in zip(*parts, strict=True)]
    np.testing.assert_array_equal(joined, make(batch_size=12).batch(5))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(None), slice(0, 5)),
        (slice(None, None, None), slice(0, 5)),
        (slice(None, 2, None), slice(0, 2)),
        (slice(3, None, 1), slice(3, 5)),
        (slice(2, 2), slice(2, 2)),
    ],
)
def test_batch__rows_with_open_ends__are_those_of_numpy(rows, expected):
    whole, part = make().batch(3), make().batch(3, rows=rows)
    for x, y in zip(whole, part, strict=True):
        np.testing.assert_array_equal(x[expected], y)


def test_batch__rows_through_make_array_from_callback__are_the_global_batch():
    jax = pytest.importorskip("jax")
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = make(batch_size=8)
    for side in (0, 1):
        array = jax.make_array_from_callback(
            (8, 7), sharding, lambda index, side=side: batches.batch(2, rows=index[0])[side]
        )
        np.testing.assert_array_equal(array, batches.batch(2)[side])


HOST = """
import sys
import numpy as np
from lowprec_jax.data import Batches
from lowprec_jax.sharding import Layout, make_mesh
from lowprec_jax.training.process_settings import DistributedConfig
from lowprec_jax.training.processes import start_processes

with start_processes(DistributedConfig(timeout_seconds=60)) as processes:
    layout = Layout.of({}, [], make_mesh(*map(int, sys.argv[2:])))
    batches = Batches(np.arange(1000), batch_size=8, context=7, seed=3)
    asked = []

    def load(rows):
        asked.extend(range(rows.start, rows.stop))
        return batches.batch(2, rows)

    sides = layout.load_batch(load, 8)
    shards = [(s.index[0].indices(8)[:2], s.data) for x in sides for s in x.addressable_shards]
    np.savez(
        f"{sys.argv[1]}/{processes.index}.npz",
        asked=asked,
        ends=[ends for ends, _ in shards],
        rows=[np.asarray(data) for _, data in shards],
        shape=sides[0].shape,
    )
"""


@pytest.mark.parametrize(
    ("hosts", "mesh"), [(1, (4,)), (2, (2, 2)), (4, (4,)), (4, (2, 1, 2))], ids=str
)
def test_load_batch__hosts_of_a_run__load_disjoint_rows_of_the_same_global_batch(
    tmp_path, hosts, mesh
):
    """As training loads them. Hosts that share rows (a tensor axis between them) load the same."""
    pytest.importorskip("jax")
    from lowprec_jax.cli.launch import launch

    words = [sys.executable, "-c", HOST, str(tmp_path), *map(str, mesh)]
    assert launch(words, processes=hosts, devices=4 // hosts) == 0
    copies = max(hosts * math.prod(mesh[2:]) // 4, 1)  # hosts that need the same rows
    expected = make(batch_size=8).batch(2)
    asked = []
    for index in range(hosts):
        host = np.load(tmp_path / f"{index}.npz")
        asked += host["asked"].tolist()
        assert host["shape"].tolist() == [8, 7]
        halves = len(host["ends"]) // 2
        for k, (ends, rows) in enumerate(zip(host["ends"], host["rows"], strict=True)):
            np.testing.assert_array_equal(rows, expected[k // halves][slice(*ends)])
    assert sorted(asked) == sorted([*range(8)] * copies)


class _CountsReads(np.ndarray):
    """Tokens that count how many of them are read."""

    reads = 0

    def __getitem__(self, index):
        type(self).reads += np.size(index)
        return np.asarray(self)[index]


def test_batch__rows__reads_no_other_window():
    batches = make(np.arange(1000, dtype=np.uint16).view(_CountsReads), batch_size=100)
    batches.batch(0, rows=slice(40, 42))
    assert _CountsReads.reads == 2 * 8


@pytest.mark.parametrize(
    "rows", [slice(0, 6), slice(-2, None), slice(3, 2), slice(0, 4, 2), slice(6, None)]
)
def test_batch__rows_outside_the_batch__are_refused(rows):
    with pytest.raises(DataError, match=r"rows is slice\(.*start <= stop <= batch_size 5"):
        make().batch(0, rows=rows)


def test_batch__corpus_of_one_window__is_that_window():
    inputs, targets = make(np.arange(8)).batch(9)
    np.testing.assert_array_equal(inputs, np.tile(np.arange(7), (5, 1)))
    np.testing.assert_array_equal(targets, np.tile(np.arange(1, 8), (5, 1)))


def test_batch__step_of_a_million__is_reached_in_under_a_second():
    tokens = np.arange(10**6, dtype=np.uint16)
    start = time.perf_counter()
    batches = make(tokens)
    found = batches.batch(10**6)
    batches.batch(2**64 - 1)
    assert time.perf_counter() - start < 1.0
    counter = np.array([0, 0, 10**6, 0], np.uint64)
    words = np.random.Philox(key=np.array([3, 0], np.uint64), counter=counter).random_raw(5)
    starts = [int(word) % (10**6 - 7) for word in words]
    np.testing.assert_array_equal(found[0], [tokens[s : s + 7] for s in starts])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batch__saved_after_40_steps__goes_on_bit_for_bit_across_the_end_of_an_epoch(
    tmp_path, hosts
):
    """The number of the step is all that is saved; another number of hosts takes over."""
    tokens = np.random.default_rng(0).integers(0, 256, 1400, dtype=np.uint8)
    assert 40 * 4 * 8 < tokens.size < 48 * 4 * 8  # as many tokens are drawn as there are
    np.save(tmp_path / "tokens.npy", tokens)
    straight = [make(tokens, batch_size=4, context=8).batch(step) for step in range(48)]
    (tmp_path / "cursor").write_text("40", encoding="utf-8")

    first = int((tmp_path / "cursor").read_text(encoding="utf-8"))
    rows = [slice(i * 4 // hosts, (i + 1) * 4 // hosts) for i in range(hosts)]
    for step in range(first, first + 8):
        parts = []
        for part in rows:  # each host starts anew
            batches = make(np.load(tmp_path / "tokens.npy"), batch_size=4, context=8)
            parts.append(batches.batch(step, rows=part))
        joined = [np.concatenate(side) for side in zip(*parts, strict=True)]
        np.testing.assert_array_equal(joined, straight[step])


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.int32)],
)
def test_tokens__int64__are_kept_in_the_smallest_dtype(largest, dtype):
    tokens = np.full(50, largest, np.int64)
    batches = make(tokens)
    assert batches.tokens.dtype == dtype
    assert (batches.batch(0)[1] == largest).all()


def test_tokens__given_array__is_not_shared_writeable():
    tokens = np.arange(100, dtype=np.uint8)
    batches = make(tokens)
    assert np.shares_memory(batches.tokens, tokens)
    assert tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        batches.tokens[0] = 1


def test_tokens__memory_mapped_file__are_not_read_into_memory(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    batches = make(mapped)
    assert np.shares_memory(batches.tokens, mapped)
    np.testing.assert_array_equal(batches.batch(6), make(np.arange(500)).batch(6))


@pytest.mark.parametrize("length", [8, 14, 15, 16, 100, 101])
def test_validation_windows__any_length__cover_the_split_once_in_order(length):
    tokens = np.random.default_rng(0).integers(0, 50, length)
    inputs, targets = validation_windows(tokens, 7)
    n = (length - 1) // 7
    assert inputs.shape == targets.shape == (n, 7)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs.ravel(), tokens[: n * 7])
    np.testing.assert_array_equal(targets.ravel(), tokens[1 : n * 7 + 1])
    assert length - 1 - targets.size < 7


@pytest.mark.parametrize("size", [1, 7])
def test_context__longer_than_the_corpus__names_both_numbers(size):
    expected = rf"context 7 needs at least 8 tokens, the corpus has {size}\."
    with pytest.raises(DataError, match=expected):
        make(np.arange(size))
    with pytest.raises(DataError, match=expected):
        validation_windows(np.arange(size), 7)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("context", 0), ("context", -2), ("seed", -1), ("seed", 2**64)],
)
def test_batches__option_out_of_range__is_named(option, value):
    with pytest.raises(DataError, match=rf"{option} is {value}; it must be \d"):
        make(**{option: value})


@pytest.mark.parametrize("step", [-1, 2**64])
def test_batch__step_out_of_range__is_named(step):
    with pytest.raises(DataError, match=rf"step is {step}; it must be 0 to {2**64 - 1}"):
        make().batch(step)


@pytest.mark.parametrize("tokens", [np.ones(20), np.ones((4, 5), np.int32)])
def test_batches__tokens_not_1d_integers__are_described(tokens):
    with pytest.raises(DataError, match=rf"{tokens.dtype} of shape \({tokens.shape[0]},"):
        make(tokens)


@pytest.mark.parametrize("bad", [-4, 2**31])
def test_batches__token_outside_int32__is_named(bad):
    with pytest.raises(DataError, match=rf"tokens are .*{bad}\b.*0 to {2**31 - 1}"):
        make(np.array([0, bad] * 10))
