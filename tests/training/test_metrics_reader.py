"""From metrics on the device to records: one step late, with the time a step took."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.training.efficiency import Clock
from lowprec_jax.training.step_reader import StepReader


class Metrics(NamedTuple):
    loss: object
    grad_norm: object
    skipped: object
    operands: object = None


class Device:
    """Makes metrics that note when they are read."""

    def __init__(self):
        self.read: list[str] = []

    def value(self, name: str, value) -> object:
        device = self

        class Value:
            def __array__(self, dtype=None, copy=None):
                device.read.append(name)
                return np.asarray(value, np.float32)

        return Value()


class Sink:
    """Stands for the log and for the progress line."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    update = write


class Time:
    """A clock that only moves when it is told."""

    def __init__(self):
        self.now = 100.0
        self.clock = Clock(now=lambda: self.now)

    def spend(self, activity, seconds):
        with self.clock.measure(activity):
            self.now += seconds


def metrics(skipped=0, loss=1.5) -> Metrics:
    return Metrics(np.float32(loss), np.float32(0.5), np.int32(skipped))


def reader_of(names=(), **options):
    log, line = Sink(), Sink()
    return StepReader(names, log, line, **{"tokens": 12, **options}), log, line


def test_reader__metrics__are_read_one_step_late_and_none_is_missed():
    device = Device()
    reader, log, line = reader_of()
    for step in (1, 2, 3):
        record = reader.next(step, Metrics(device.value(f"loss {step}", step), 0.5, 0))
        assert device.read == [f"loss {i}" for i in range(1, step)]
        assert (record and record["step"]) == (step - 1 or None)
    assert reader.finish()["loss"] == 3.0
    assert reader.finish() is None
    assert log.records == line.records
    assert [r["step"] for r in log.records] == [1, 2, 3]
    assert len(reader.seconds) == 3


def test_reader__record__has_the_agreed_fields():
    table = np.array([[1, 1, 0, 0.25, 0, 3, 100], [1, 1, 0.5, 0.75, 2, 9, 100]], np.float32)
    reader, *_ = reader_of(["up lhs", "up rhs"], recipe="fp8_delayed")
    reader.next(1, metrics(loss=math.nan)._replace(operands=table), {"sqnr": {"up": 30.0}})
    record = reader.finish()
    assert record.keys() - {"seconds", "tokens_per_second", "data_seconds"} == {
        *("step", "loss", "grad_norm", "skipped", "mfu", "recipe", "sqnr"),
        *("saturated", "underflow", "nonfinite", "scale_age", "worst"),
    }
    assert math.isnan(record["loss"])  # the guard wants it as it is; the file has null
    assert [record[k] for k in ("saturated", "underflow", "scale_age")] == [0.25, 0.5, 9.0]
    assert (record["worst"], record["mfu"]) == ("up rhs", None)
    assert (record["recipe"], record["sqnr"]) == ("fp8_delayed", {"up": 30.0})


def test_reader__seconds__are_those_of_steps_and_their_data():
    time = Time()
    reader, *_ = reader_of(clock=time.clock, ideal_seconds=1.0)
    time.spend("compile", 1000)
    for step, seconds in ((1, 3.0), (2, 5.0)):
        time.spend("data", 1.0)
        time.spend("step", seconds)
        reader.next(step, metrics())
        record = reader.finish()
        time.spend("evaluation", 100)
        assert record["seconds"] == seconds + 1
        assert record["data_seconds"] == 1
        assert record["tokens_per_second"] == 12 / (seconds + 1)
        assert record["mfu"] == 1 / (seconds + 1)
    assert list(reader.seconds) == [4.0, 6.0]


def test_reader__no_clock__counts_all_time():
    reader, *_ = reader_of()
    reader.next(1, metrics())
    record = reader.finish()
    assert record["seconds"] > record["data_seconds"] == 0


def test_reader__precision_changes__holds_from_the_next_step_on():
    observed = metrics()._replace(operands=jnp.zeros((1, 7), jnp.float32))
    time = Time()
    reader, *_ = reader_of(
        ["a lhs"], recipe="first", operands_every=1, ideal_seconds=1.0, clock=time.clock
    )
    reader.next(1, observed)
    reader.names, reader.recipe, reader.ideal_seconds = ["b lhs"], "second", 2.0
    time.spend("step", 4)
    old = reader.next(2, observed)
    time.spend("step", 4)
    new = reader.finish()
    for record, name, recipe, mfu in ((old, "a lhs", "first", 0.25), (new, "b lhs", "second", 0.5)):
        assert (record["worst"], record["recipe"], record["mfu"]) == (name, recipe, mfu)
        assert record["operands"] == {name: [0.0] * 6}


def test_reader__table_of_operands__is_logged_on_due_steps_only():
    rows = np.array([[448, 0.1, 0.25, 0, 0, 7], [math.inf, 2**-9, 0, 1, 3, 0]], np.float32)
    table = np.column_stack([rows, np.array([64, 32], np.float32)])
    reader, log, _ = reader_of(["up lhs", "up rhs"], operands_every=3)
    for step in range(1, 8):
        reader.next(step, metrics()._replace(operands=table))
    reader.finish()
    tables = {r["step"]: r["operands"] for r in log.records if "operands" in r}
    assert tables.keys() == {3, 6}
    # The shortest decimals that are these float32: 0.1 and not 0.10000000149011612.
    assert tables[3] == {
        "up lhs": [448.0, 0.1, 0.25, 0.0, 0.0, 7.0],
        "up rhs": [math.inf, 0.001953125, 0.0, 1.0, 3.0, 0.0],
    }
    back = np.array(list(tables[3].values()), np.float32)
    np.testing.assert_array_equal(back, rows)


def test_reader__operands__are_those_of_the_step_that_was_read_last():
    reader, *_ = reader_of(["up lhs"])  # no tables in the log
    assert reader.operands() == {}
    for step in (1, 2):
        table = jnp.full((1, 7), step, jnp.float32)
        reader.next(step, metrics()._replace(operands=table))
    assert reader.operands() == {"up lhs": [1.0] * 6}
    reader.rewind(0)
    assert reader.operands() == {"up lhs": [1.0] * 6}


def test_reader__table_of_more_rows_than_names__is_an_error():
    reader, *_ = reader_of(["up lhs"], operands_every=1)
    reader.next(1, metrics()._replace(operands=jnp.zeros((2, 7))))
    with pytest.raises(ValueError, match="1 names for 2 operands"):
        reader.finish()


@pytest.mark.parametrize("table", [None, jnp.zeros((0, 7), jnp.float32)])
def test_reader__nothing_is_quantized__has_no_table(table):
    reader, *_ = reader_of(operands_every=1)
    reader.next(1, metrics()._replace(operands=table))
    assert "operands" not in reader.finish()


def test_reader__rewind__forgets_the_step_in_flight_and_counts_undone_ones_as_lost():
    time = Time()
    reader, log, _ = reader_of(clock=time.clock)
    for step, skipped in ((5, 0), (6, 0), (7, 1), (8, 0), (9, 0)):
        time.spend("data", 10)
        time.spend("step", 2.0**step)
        reader.next(step, metrics(skipped))
    # Read are 5 to 8; 9 is in flight. Its time so far: 2**9, in the interval that read 8.
    time.spend("step", 1)
    reader.rewind(6)
    assert reader.finish() is None
    assert [r["step"] for r in log.records] == [5, 6, 7, 8]
    intervals = [r["seconds"] - r["data_seconds"] for r in log.records]
    assert intervals == [2.0**5 + 2.0**6, 2.0**7, 2.0**8, 2.0**9]
    seconds = time.clock.seconds()
    assert seconds["lost"] == intervals[2] + intervals[3] + 1
    assert seconds["step"] == intervals[0] + intervals[1]
    for step in (7, 8):
        time.spend("step", 3)
        reader.next(step, metrics())
    time.spend("step", 3)
    reader.finish()
    assert time.clock.seconds()["step"] == seconds["step"] + 9
    reader.rewind(0)  # to before the steps of this process
    assert time.clock.seconds()["step"] == 0


def test_reader__skipped_update__is_lost_time():
    time = Time()
    reader, *_ = reader_of(clock=time.clock)
    for step, skipped in ((1, 0), (2, 1)):
        reader.next(step, metrics(skipped))
        time.spend("step", 2)
        reader.finish()
    assert time.clock.seconds()["lost"] == 2
    assert time.clock.goodput == 0.5


def test_reader__real_arrays__are_numbers():
    loss, norm = jax.jit(lambda x: (x * 2, x + 1))(jnp.float32(2))
    reader, *_ = reader_of()
    reader.next(1, Metrics(loss, norm, jnp.int32(1)))
    record = reader.finish()
    assert (record["loss"], record["grad_norm"], record["skipped"]) == (4.0, 3.0, 1)
    assert type(record["loss"]) is float
