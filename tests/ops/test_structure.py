"""What one layer does to its whole operands, forward and backward, for every recipe.

A step that became slower has one more pass, product, reduction, move or conversion. `EXPECTED` says
how many there are, so that a regression fails without timing anything. The counts of a change that
was meant are printed by ``python tests/ops/structure.py``.
"""

import types

import jax
import jax.numpy as jnp
import pytest

from .structure import (
    CASES,
    Compiled,
    Lowered,
    Structure,
    compiled_structure,
    layer_structure,
    lowered_structure,
    rows,
)

EXPECTED = {
    "fp8_current": Structure(
        compiled=Compiled(dots=3, passes=10, reduces=3, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=4, reduces=3, moves=1),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=3, decodes=0, reduces=3, moves=1),
    ),
    "fp8_delayed": Structure(
        compiled=Compiled(dots=3, passes=10, reduces=3, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=4, reduces=3, moves=1),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=3, decodes=0, reduces=3, moves=1),
    ),
    "fp8_delayed_hp_forward": Structure(
        compiled=Compiled(dots=3, passes=8, reduces=3, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=2, other=1, f32=1, encodes=3, decodes=2, reduces=3, moves=1),
        cuda=Lowered(native=2, upcast=0, other=1, f32=1, encodes=3, decodes=0, reduces=3, moves=1),
    ),
    "fp8_rowwise": Structure(
        compiled=Compiled(dots=3, passes=18, reduces=6, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=6, decodes=3, reduces=6, moves=1),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=6, decodes=0, reduces=6, moves=1),
    ),
    "fp8_rowwise_hp_wgrad": Structure(
        compiled=Compiled(dots=3, passes=11, reduces=4, moves=0, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=2, other=1, f32=1, encodes=4, decodes=2, reduces=4, moves=1),
        cuda=Lowered(native=2, upcast=0, other=1, f32=1, encodes=4, decodes=0, reduces=4, moves=1),
    ),
    "fp8_block": Structure(
        compiled=Compiled(dots=3, passes=13, reduces=5, moves=4, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=2, encodes=5, decodes=3, reduces=5, moves=1),
        cuda=Lowered(native=6, upcast=0, other=0, f32=0, encodes=5, decodes=0, reduces=5, moves=6),
    ),
    "fp8_static": Structure(
        compiled=Compiled(dots=3, passes=4, reduces=0, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=4, reduces=0, moves=1),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=3, decodes=0, reduces=0, moves=1),
    ),
    "none": Structure(
        compiled=Compiled(dots=3, passes=0, reduces=0, moves=0, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=0, other=3, f32=3, encodes=0, decodes=0, reduces=0, moves=1),
        cuda=Lowered(native=0, upcast=0, other=3, f32=3, encodes=0, decodes=0, reduces=0, moves=1),
    ),
    "int8": Structure(
        compiled=Compiled(dots=3, passes=18, reduces=6, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=6, decodes=3, reduces=6, moves=1),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=6, decodes=0, reduces=6, moves=1),
    ),
    "int4_weights": Structure(
        compiled=Compiled(dots=3, passes=3, reduces=1, moves=0, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=0, other=3, f32=3, encodes=1, decodes=2, reduces=1, moves=1),
        cuda=Lowered(native=0, upcast=0, other=3, f32=3, encodes=1, decodes=2, reduces=1, moves=1),
    ),
    "nf4_weights": Structure(
        compiled=Compiled(dots=3, passes=3, reduces=1, moves=1, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=0, other=3, f32=3, encodes=1, decodes=2, reduces=1, moves=1),
        cuda=Lowered(native=0, upcast=0, other=3, f32=3, encodes=1, decodes=2, reduces=1, moves=1),
    ),
    "mxfp8": Structure(
        compiled=Compiled(dots=3, passes=12, reduces=6, moves=4, loops=0, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=3, reduces=6, moves=1),
        cuda=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=3, reduces=6, moves=1),
    ),
    "mxfp4": Structure(
        compiled=Compiled(dots=5, passes=21, reduces=10, moves=12, loops=4, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=2, f32=2, encodes=3, decodes=3, reduces=10, moves=3),
        cuda=Lowered(native=0, upcast=3, other=2, f32=2, encodes=3, decodes=3, reduces=10, moves=3),
    ),
    "nvfp4": Structure(
        compiled=Compiled(dots=5, passes=26, reduces=13, moves=15, loops=4, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=2, f32=2, encodes=2, decodes=3, reduces=14, moves=3),
        cuda=Lowered(native=0, upcast=3, other=2, f32=2, encodes=2, decodes=3, reduces=14, moves=3),
    ),
    "fp8_delayed, large": Structure(
        compiled=Compiled(dots=3, passes=13, reduces=3, moves=0, loops=1, collectives=0),
        cpu=Lowered(native=0, upcast=3, other=0, f32=0, encodes=3, decodes=4, reduces=3, moves=0),
        cuda=Lowered(native=3, upcast=0, other=0, f32=0, encodes=3, decodes=0, reduces=3, moves=1),
    ),
}

# A program with two whole arrays (of 32 elements), one of them transposed in a fusion.
HLO = """
HloModule made_up

%largest (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %max = f32[] maximum(%a, %b)
}

%turn_and_multiply (p: f32[8,4], q: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[8,4]{1,0} parameter(1)
  %turned = f32[4,8]{0,1} transpose(%p), dimensions={1,0}
  %laid_out = f32[4,8]{1,0} copy(%turned)
  ROOT %dot = f32[4,4]{1,0} dot(%laid_out, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%amax (p: f32[8,4], start: f32[]) -> (f32[], f32[]) {
  %p = f32[8,4]{1,0} parameter(0)
  %start = f32[] parameter(1)
  %one = f32[] reduce(%p, %start), dimensions={0,1}, to_apply=%largest
  %small = f32[4]{0} constant({1, 2, 3, 4})
  %two = f32[] reduce(%small, %start), dimensions={0}, to_apply=%largest
  ROOT %both = (f32[], f32[]) tuple(%one, %two)
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%carry), index=0
  %array = f32[8,4]{1,0} get-tuple-element(%carry), index=1
  %twice = f32[8,4]{1,0} add(%array, %array)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%index, %twice)
}

%condition (carry: (s32[], f32[8,4])) -> pred[] {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %again = pred[] constant(false)
}

ENTRY %main (x: f32[8,4]) -> f32[4,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %index = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%index, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %amaxes = (f32[], f32[]) fusion(%y, %zero), kind=kLoop, calls=%amax
  ROOT %out = f32[4,4]{1,0} fusion(%x, %y), kind=kOutput, calls=%turn_and_multiply
}
"""


@pytest.mark.parametrize("case", CASES)
def test_structure__layer_of_every_recipe__has_the_expected_counts(case):
    found, expected = layer_structure(*CASES[case]), EXPECTED.get(case)
    assert found == expected, (
        f"one layer of {case} is no longer the program it was.\nFound:\n{rows({case: found})}"
        f"Expected:\n{rows({case: expected}) if expected else '    nothing yet'}\n"
        "If the change was meant (or JAX is another version), take over the rows that "
        "`python tests/ops/structure.py` prints."
    )


def test_structure__table__has_no_other_rows():
    assert set(EXPECTED) <= set(CASES)


def test_compiled_structure__made_up_program__counts_what_touches_whole_arrays():
    compiled = types.SimpleNamespace(as_text=lambda: HLO)
    # Passes: the addition in the loop and the fusion of the reduction.
    assert compiled_structure(compiled, 32) == Compiled(
        dots=1, passes=2, reduces=1, moves=1, loops=1, collectives=0
    )


def test_lowered_structure__known_operations__are_counted_as_often_as_they_run():
    def program(x):
        codes = x.astype(jnp.float8_e4m3fn)
        positive = (x > 0).astype(jnp.float32)  # from one bit: not decoded
        small = x[0].astype(jnp.float8_e4m3fn).max()  # not whole
        again = jax.lax.fori_loop(0, 3, lambda _, total: total + x.max(), jnp.float32(0))
        return codes.astype(jnp.bfloat16).T, positive, x.T @ x, small, again

    lowered = jax.jit(program).lower(jax.ShapeDtypeStruct((8, 4), jnp.float32))
    assert lowered_structure(lowered, 32) == Lowered(
        native=0, upcast=0, other=1, f32=1, encodes=1, decodes=1, reduces=3, moves=2
    )
