"""The dry-run table of NNX models: shares of the work, reasons, what cannot be reached."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lowprec_jax import nnx as lp_nnx
from lowprec_jax import ops
from lowprec_jax.errors import UserError
from lowprec_jax.ops.plan import find_matmuls


class Model(nnx.Module):
    """Two layers, one of them called twice, a stack that is scanned, and a raw matmul."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(8, 8, rngs=rngs)
        self.stack = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), 3)
        )
        self.raw = nnx.Param(jnp.ones((8, 16)))
        self.head = nnx.Einsum("bf,fo->bo", (16, 4), rngs=rngs)
        self.unused = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = self.inner(self.inner(x))
        graphdef, state = nnx.split(self.stack)
        x, _ = jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)
        return self.head(x @ self.raw[...])


INPUT = jax.ShapeDtypeStruct((5, 8), jnp.float32)
FLOPS = {"inner": 2 * 5 * 8 * 8 * 2, "stack": 3 * 5 * 8 * 8 * 2, "raw": 5 * 8 * 16 * 2}
FLOPS["head"] = 5 * 16 * 4 * 2
TOTAL = sum(FLOPS.values())


def rows_of(plan):
    return {row.layer: row for row in plan.rows}


def test_plan__default_rules__share_counts_every_call_of_every_layer():
    plan = lp_nnx.plan(Model(nnx.Rngs(0)), "fp8_delayed", INPUT)
    rows = rows_of(plan)
    assert {name: row.calls for name, row in rows.items()} == {
        "inner": 2,
        "stack": 3,
        "head": 1,
        "unused": 0,
        "(no layer)": 1,
    }
    for layer, key in (("inner", "inner"), ("stack", "stack"), ("(no layer)", "raw")):
        assert rows[layer].flop_share == pytest.approx(FLOPS[key] / TOTAL)
    assert plan.quantized_share == pytest.approx((FLOPS["inner"] + FLOPS["stack"]) / TOTAL)


def test_plan__default_rules__reasons_are_told():
    rows = rows_of(lp_nnx.plan(Model(nnx.Rngs(0)), "fp8_delayed", INPUT))
    assert (rows["head"].recipe, rows["head"].reason) == ("none", "high precision by default")
    assert (rows["inner"].recipe, rows["inner"].reason) == ("fp8_delayed", "rule '.*'")
    assert rows["unused"].shapes == "not called"
    assert rows["(no layer)"].reason == "not reachable"


def test_plan__model__is_not_changed():
    model = Model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    lp_nnx.plan(model, "fp8_delayed", INPUT)
    assert nnx.graphdef(model) == before


def test_plan__quantized_model__same_work():
    plain = lp_nnx.plan(Model(nnx.Rngs(0)), "fp8_delayed", INPUT)
    model = lp_nnx.quantize(Model(nnx.Rngs(0)), "fp8_current")
    assert lp_nnx.plan(model, "fp8_delayed", INPUT) == plain


def test_plan__printed__has_a_line_for_each_row_and_the_total():
    plan = lp_nnx.plan(Model(nnx.Rngs(0)), "fp8_delayed", INPUT)
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.rows) + 2
    assert lines[-1].startswith(f"{plan.quantized_share:.1%}")


def test_plan__rule_that_matches_nothing__is_an_error():
    with pytest.raises(UserError, match=r"blok.*inner"):
        lp_nnx.plan(Model(nnx.Rngs(0)), [("blok/.*", "fp8_delayed")], INPUT)


def test_find_matmuls__branches_for_platforms__count_as_the_one_that_runs():
    def product(x, w):
        return ops.dot_general(x, w, (((1,), (0,)), ((), ())), recipe="fp8_current")

    (found,) = find_matmuls(jax.make_jaxpr(product)(jnp.ones((4, 8)), jnp.ones((8, 2))))
    assert (found.calls, found.flops) == (1, 2 * 4 * 8 * 2)
