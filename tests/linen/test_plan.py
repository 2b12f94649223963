"""The dry-run table of Linen models."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lowprec_jax import linen as lp_linen
from lowprec_jax.errors import UserError


class Model(nn.Module):
    """A layer that is called twice, a raw matmul and a head."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(8, name="inner")
        x = inner(inner(x)) @ self.param("raw", nn.initializers.ones, (8, 16))
        return nn.Dense(4, name="head")(x)


INPUT = jax.ShapeDtypeStruct((5, 8), jnp.float32)
INNER, RAW, HEAD = 2 * 5 * 8 * 8 * 2, 5 * 8 * 16 * 2, 5 * 16 * 4 * 2


def test_plan__default_rules__share_counts_every_call_of_every_layer():
    plan = lp_linen.plan(Model(), "fp8_delayed", INPUT)
    found = {row.layer: (row.calls, row.recipe, row.reason) for row in plan.rows}
    assert found == {
        "inner": (2, "fp8_delayed", "rule '.*'"),
        "head": (1, "none", "high precision by default"),
        "(no layer)": (1, "none", "not reachable"),
    }
    assert plan.quantized_share == pytest.approx(INNER / (INNER + RAW + HEAD))


def test_plan__quantized_model__same_table():
    plain = lp_linen.plan(Model(), "fp8_delayed", INPUT)
    quantized = lp_linen.quantize(Model(), "fp8_current")
    assert lp_linen.plan(quantized, "fp8_delayed", INPUT) == plain


def test_plan__rule_that_matches_nothing__is_an_error():
    with pytest.raises(UserError, match=r"blok.*inner"):
        lp_linen.plan(Model(), [("blok/.*", "fp8_delayed")], INPUT)
