"""Peers as users of Flax Linen write them: a ``dot_general_cls``, or a quantized model.

Public names: `PEERS`, `available`, `dot_general_cls`, `qwix_provider`, `aqt_config`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax.linen import fp8_ops

# Peer -> the package that it needs beside Flax.
PEERS = {
    "flax direct": None,
    "flax qdq": None,
    "qwix fp8": "qwix",
    "aqt fp8": "aqt",
    "aqt int8": "aqt",
}


class FlaxQdq(fp8_ops.Fp8DotGeneralOp):
    """Flax's op that quantizes and dequantizes; a subclass gives no deprecation warning."""


def available(peer: str) -> bool:
    """Whether the package of a peer is installed."""
    package = PEERS[peer]
    return package is None or importlib.util.find_spec(package) is not None


def dot_general_cls(peer: str) -> Callable[[], Any]:
    """What stock Linen layers take as ``dot_general_cls``; not for Qwix, which has providers."""
    if peer == "flax direct":
        return fp8_ops.Fp8DirectDotGeneralOp
    if peer == "flax qdq":
        return FlaxQdq
    flax = importlib.import_module("aqt.jax.v2.flax.aqt_flax")
    return functools.partial(flax.AqtDotGeneral, aqt_config(peer), prng_name=None)


def qwix_provider() -> Any:
    """Qwix's training in FP8: e4m3 forward, e5m2 output gradients, a scale for each row."""
    qwix = importlib.import_module("qwix")
    fp8 = jnp.float8_e4m3fn
    rule = qwix.QtRule(weight_qtype=fp8, act_qtype=fp8, bwd_qtype=jnp.float8_e5m2)
    return qwix.QtProvider([rule])


def aqt_config(peer: str) -> Any:
    """AQT with all three GEMMs quantized: e4m3 with e5m2 output gradients, or int8.

    Without its stochastic rounding, which would cost it time that the others do not spend.
    """
    config = importlib.import_module("aqt.jax.v2.config")
    if peer == "aqt int8":
        return config.fully_quantized(use_stochastic_rounding=False)
    made = config.config_v4()
    config.set_bits(made, *("e4m3", "e4m3"), *("e5m2", "e4m3"), *("e5m2", "e4m3"))
    config.set_stochastic_rounding(made, False, False, "jax.uniform")
    return made
