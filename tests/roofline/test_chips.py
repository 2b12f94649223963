"""The table of chips is one that the rest can use."""

import math
import re

import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.recipes import get_target
from lowprec_jax.roofline.chips import chips, get_chip

PLANNED = [chip for chip in chips() if chip.target and chip.name != "cpu"]


@pytest.mark.parametrize("chip", PLANNED, ids=lambda chip: chip.name)
def test_chips__a_target__has_all_figures_of_a_plan(chip):
    figures = (chip.bf16, chip.fp8, chip.bandwidth, chip.capacity, chip.link, chip.network)
    assert all(x > 0 for x in figures)
    assert chip.node > 1
    assert chip.link >= chip.network
    target = get_target(chip.target)
    # Faster FP8 units, or a row that says there are none.
    assert (chip.fp8 > chip.bf16) != bool(target.no_gain)
    assert math.isnan(chip.int8) or "int8" in target.native


def test_chips__names_and_patterns__are_well_formed():
    names = [chip.name for chip in chips()]
    assert len(set(names)) == len(names)
    for chip in chips():
        re.compile(chip.kind)
        assert chip.source.endswith(".")


def test_get_chip__unknown__names_the_nearest():
    with pytest.raises(UserError, match=r"Unknown chip 'h20'.*b200.*mean 'h200'"):
        get_chip("h20")


def test_rate__a_width_that_is_not_published__is_that_of_the_next():
    h200, cpu = get_chip("h200"), get_chip("cpu")
    assert h200.rate(4) == h200.rate(8) == 1978.9e12
    assert h200.rate(16) == 989.4e12
    assert get_chip("tpu-v7").rate(8, integer=True) == 2307e12
    assert math.isnan(cpu.rate(8))
