"""Tiny runs: two layers, width 32, context 16. Plain functions that the tests import."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec_jax.recipes import Column, Role
from lowprec_jax.state import sites
from lowprec_jax.training.config import (
    DataConfig,
    GuardConfig,
    HealthConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)
from lowprec_jax.training.network import build_network
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import TrainState, build_calibration, init_state

VOCAB = 29
CONTEXT = 16


def tiny_config(
    *,
    recipe: str = "fp8_delayed",
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
    source: str = "unused",
    devices: int = 1,
    mesh: dict[str, Any] | None = None,
    guard: dict[str, Any] | None = None,
    health: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainConfig:
    sizes = {"num_layers": 2, "num_heads": 2, "width": 32, "mlp_width": 48, "context": CONTEXT}
    run = {"steps": 20, "batch_size": 8, "progress": False, "plots": False, "sample_tokens": 0}
    return TrainConfig(
        **{**run, **changes},
        model=ModelConfig(**{**sizes, **(model or {})}),
        data=DataConfig(source=source),
        precision=PrecisionConfig(recipe=recipe, **(precision or {})),
        optim=OptimConfig(**{"warmup_steps": 2, "learning_rate": 1e-2, **(optim or {})}),
        mesh=MeshConfig(**{"data": devices, **(mesh or {})}),
        guard=GuardConfig(**(guard or {})),
        health=HealthConfig(**(health or {})),
    )


@functools.cache
def network_of(config: TrainConfig):
    return build_network(config, VOCAB)


def batch_of(config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, another batch for each step."""
    shape = (config.batch_size, config.model.context + 1)
    ids = np.random.default_rng(step).integers(0, VOCAB, shape, dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


def start(config: TrainConfig, tx: Any = None) -> TrainState:
    """A fresh state, calibrated if its recipe has state."""
    network, key = network_of(config), jax.random.key(config.seed)
    tx = tx or build_optimizer(config)
    state = init_state(network, tx, key, reduce=config.mesh.reduce)
    if not jax.tree.leaves(state.scaling):
        return state
    batch = network.layout.put_batch(batch_of(config, 0))
    return build_calibration(network, state)(state, batch)[0]


def compiled(step: Any, state: TrainState, batch: Any) -> Any:
    """The step compiled in half the time; its arithmetic is the same."""
    options = {"xla_backend_optimization_level": 0}
    return step.lower(state, batch).compile(compiler_options=options)


def copy(state: TrainState) -> TrainState:
    """A copy to give to a step, which donates what it is given."""
    return jax.tree.map(jnp.copy, state)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(jax.device_get(x)) for path, x in flat}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the speed of the machine."""
    times = ("seconds", "tokens_per_second", "data_seconds", "mfu")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run, all or of some kinds."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = map(json.loads, lines)
    return [event for event in found if not kinds or event["event"] in kinds]


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = by_path(actual), by_path(expected)
    assert actual.keys() == expected.keys()
    assert actual
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        assert actual[path].tobytes() == value.tobytes(), path


def assert_same_scaling(actual: Any, expected: Any, *, times_rhs: int) -> None:
    """Scaling state of the same batch, whole or in `times_rhs` parts that each see the weights.

    Bit for bit where the forward pass is: the weights, and the input of the first layer. After the
    first product it is not, as XLA blocks a product of 32 rows otherwise than one of 256: amaxes
    differ by 1.5e-7 (measured, one unit in the last place). A code that rounds the other way could
    make it a percent; a mean over the parts in place of the maximum makes it tens.
    """
    assert len(sites(actual)) == len(sites(expected)) == 4
    for (path, old), (_, new) in zip(sites(expected), sites(actual), strict=True):
        history, once = np.asarray(new["amax_history"]), np.asarray(old["amax_history"])
        np.testing.assert_array_equal(history[:, Role.RHS], once[:, Role.RHS], err_msg=path)
        np.testing.assert_allclose(history, once, rtol=1e-2, err_msg=path)
        np.testing.assert_array_equal(history == 0, once == 0, err_msg=path)
        if path.startswith("blocks/attention/qkv"):
            np.testing.assert_array_equal(history[0, Role.LHS], once[0, Role.LHS])
        times = np.ones(len(Role))
        times[Role.RHS] = times_rhs
        sizes, size = (np.asarray(s["observed"])[..., Column.SIZE] for s in (new, old))
        np.testing.assert_array_equal(sizes, size * times, err_msg=path)
