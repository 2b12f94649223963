"""The optimizer of a run: Optax's, with clipping, a schedule, and FP32 masters where needed."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lowprec_jax.optim import master_weights
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.network import is_decayed
from lowprec_jax.training.optim_config import OptimConfig


def build_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping and the optimizer; with parameters below f32, on f32 masters."""
    optim = config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        _OPTIMIZERS[optim.optimizer](optim, learning_rate(config)),
        _scale_by_width(optim, config.model.width),
    )
    if jnp.dtype(config.model.param_dtype).itemsize < 4:
        return master_weights(tx)
    return optax.with_extra_args_support(tx)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from zero to the peak, then the schedule of the config.

    cosine and linear: from the peak to `final_fraction` of it over the remaining steps. wsd: the
    peak, then linearly to `final_fraction` of it in the last `decay_fraction` of all steps.

    Source: for wsd, Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4.
    """
    optim, steps = config.optim, config.steps
    peak, warmup = optim.learning_rate, optim.warmup_steps
    end, rest = peak * optim.final_fraction, steps - warmup
    last = min(max(round(optim.decay_fraction * steps), 1), rest)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, optim.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "wsd": lambda: optax.linear_schedule(peak, end, last, transition_begin=rest - last),
        "constant": lambda: optax.constant_schedule(peak),
    }[optim.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def _scale_by_width(optim: OptimConfig, width: int) -> optax.GradientTransformation:
    """Learning rate of the matrices of the blocks times sqrt(base_width / width).

    It is their learning rate: the decay, which is multiplied by it, shrinks too.

    Source: Narayan et al. 2025 (mu-nit scaling), arXiv:2502.05967, for Adam and Lion.
    """
    if optim.base_width is None:
        return optax.identity()
    return optax.masked(optax.scale(math.sqrt(optim.base_width / width)), _hidden)


def _adamw(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=_decayed
    )


def _lion(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(
        rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=_decayed
    )


def _sgd(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Nesterov momentum, decay decoupled from it."""
    return optax.chain(
        optax.trace(optim.b1, nesterov=True),
        optax.add_decayed_weights(optim.weight_decay, _decayed),
        optax.scale_by_learning_rate(rate),
    )


def _adafactor(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Factored second moments, no momentum; the decay is decoupled, as in the others."""
    return optax.chain(
        optax.adafactor(None, multiply_by_parameter_scale=False),
        optax.scale(-1.0),  # it descends by itself; the decay below must not
        optax.add_decayed_weights(optim.weight_decay, _decayed),
        optax.scale_by_learning_rate(rate),
    )


def _muon(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Orthogonalized momentum, with updates of the size of Adam's, so that rates carry over.

    Source: Jordan 2024, kellerjordan.github.io/posts/muon; the size after Liu et al. 2025
      (Moonlight), arXiv:2502.16982, section 2.2.
    """
    return contrib.muon(
        rate,
        beta=optim.b1,
        weight_decay=optim.weight_decay,
        weight_decay_mask=_decayed,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        adam_weight_decay=optim.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


_OPTIMIZERS: dict[str, Callable[[OptimConfig, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _by_name(f: Callable[[str, jax.Array], Any], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: f(jax.tree_util.keystr(path, simple=True, separator="/"), x), params
    )


def _decayed(params: Any) -> Any:
    return _by_name(lambda name, _: is_decayed(name), params)


def _hidden(params: Any) -> Any:
    return _by_name(lambda name, _: _is_hidden(name), params)


def _is_hidden(name: str) -> bool:
    return re.search(r"blocks/.*/kernel$", name) is not None


def _matrices(params: Any) -> Any:
    """Which parameters muon takes and along which axes; leading ones are layers of a stack."""

    def dimensions(name: str, x: jax.Array) -> contrib.MuonDimensionNumbers | None:
        if not _is_hidden(name):
            return None
        # gate_up [D, 2, F] is two matrices.
        inputs = x.ndim - (3 if "gate_up" in name else 2)
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=x.ndim - 1)

    return _by_name(dimensions, params)
