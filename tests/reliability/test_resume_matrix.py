"""2 N steps at once are N steps, a crash, and N more: bit for bit, in every corner.

Compared are all arrays of the last checkpoint (parameters, masters, moments, scaling state), what
its manifest remembers (the next batch, guard, alarms), and every logged number. The crash comes
three steps after the checkpoint, so that logged steps are undone and made again.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from training.helpers import metrics_of

from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.loop import train
from lowprec_jax.training.trainer import Trainer

pytestmark = pytest.mark.reliability
OUTPUTS = {"plots": False, "sample_tokens": 0, "eval_every": 5, "keep_best": False}
RECIPES = ("none", "fp8_delayed", "fp8_current")
CELLS = list(itertools.product(RECIPES, (1, 8), (1, 4), ("none", "full")))
# Stochastic rounding draws what it drew: one device with accumulation, several with remat.
CELLS += [("mxfp4", 1, 4, "none"), ("nvfp4", 8, 1, "full")]
# Device counts, accumulation and remat; the full product is nightly.
SMALL = [("fp8_delayed", 1, 4, "none"), ("none", 8, 1, "full")]


class CrashError(Exception):
    """Ends a run between two steps, as a crash does: nothing is saved, nothing closed in order."""


def crashed_after(step: int, config) -> None:
    plain = Trainer._step

    def crashing(self):
        plain(self)
        if self.completed == step:
            raise CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", crashing)
        with pytest.raises(CrashError):
            train(config)


def remembered(run: Path):
    """The newest checkpoint: its fingerprints, and what else its manifest holds."""
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        manifest = checkpoints.newest().manifest
    about = dict(manifest.about)
    del about["config"]
    return manifest.step, manifest.arrays, json.dumps(about, sort_keys=True)


@contextlib.contextmanager
def compiled_anew():
    """Without the cache of compiled programs.

    A step of fp8_current with accumulation on 8 emulated devices that XLA:CPU (jaxlib 0.10.2) loads
    from the cache corrupts the heap; compiled anew it does not.
    """
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = CELLS if metafunc.config.getoption("--full-matrix") else SMALL
        metafunc.parametrize("cell", cells, ids=lambda cell: "-".join(map(str, cell)))


def test_resume__n_steps_crash_n_steps__is_2n_steps_bit_for_bit(
    cell, run_config, tmp_path, request
):
    recipe, devices, accumulate, remat = cell
    n = 50 if request.config.getoption("--full-matrix") else 10
    config = run_config(
        tmp_path / "straight",
        recipe=recipe,
        devices=devices,
        batch_size=32,
        steps=2 * n,
        checkpoint_every=n,
        model={"remat": remat, "param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
        optim={"accumulate": accumulate, "ema_decay": 0.9},
        **OUTPUTS,
    )
    crashed = dataclasses.replace(config, run_dir=str(tmp_path / "crashed"))
    with compiled_anew() if devices > 1 else contextlib.nullcontext():
        train(config)
        crashed_after(n + 3, crashed)
        train(dataclasses.replace(crashed, resume=True))
    assert remembered(tmp_path / "crashed") == remembered(tmp_path / "straight")
    assert metrics_of(tmp_path / "crashed") == metrics_of(tmp_path / "straight")
    names = remembered(tmp_path / "straight")[1].keys()
    groups = {name.split("/")[0] for name in names}
    assert groups >= {"params", "opt_state", "ema", "step"}
    assert ("scaling" in groups) == (recipe != "none")
    assert any(name.startswith("opt_state/master/") for name in names)


def losses(run: Path) -> np.ndarray:
    return np.array([r["loss"] for r in metrics_of(run) if "loss" in r])


def on_devices(run_config, run: Path, counts: list[int], **options) -> np.ndarray:
    """Six steps on each count of devices, one after the other, resumed in between."""
    for part, devices in enumerate(counts, 1):
        config = run_config(
            run,
            devices=devices,
            steps=6 * len(counts),
            checkpoint_every=6,
            resume=part > 1,
            **{**OUTPUTS, **options},
        )
        if part < len(counts):
            crashed_after(6 * part, config)
        else:
            train(config)
    return losses(run)


@pytest.mark.nightly
def test_resume__8_to_4_to_8_devices__high_precision_is_the_same_to_1e_6(run_config, tmp_path):
    straight = on_devices(run_config, tmp_path / "8", [8, 8, 8], recipe="none")
    changed = on_devices(run_config, tmp_path / "848", [8, 4, 8], recipe="none")
    np.testing.assert_allclose(changed, straight, rtol=1e-6)
    np.testing.assert_array_equal(changed[:6], straight[:6])


@pytest.mark.nightly
def test_resume__8_to_4_to_8_devices__fp8_is_within_the_noise_floor(
    run_config, tmp_path, request, monkeypatch
):
    """The floor: the spread of five runs whose initial weights differ by 1e-7."""
    straight = on_devices(run_config, tmp_path / "8", [8, 8, 8])
    changed = on_devices(run_config, tmp_path / "848", [8, 4, 8])
    begin = Trainer.begin
    spread = np.zeros_like(straight)
    for seed in range(5):

        def perturbed(self, rng):
            events = begin(self)

            def shaken(x):
                return x * (1 + 1e-7 * rng.standard_normal(x.shape)).astype(np.float32)

            self.state = self.state._replace(params=jax.tree.map(shaken, self.state.params))
            return events

        rng = np.random.default_rng(seed)
        monkeypatch.setattr(Trainer, "begin", functools.partialmethod(perturbed, rng))
        run = on_devices(run_config, tmp_path / f"noise{seed}", [8, 8, 8])
        spread = np.maximum(spread, np.abs(run - straight))
    floor = np.maximum.accumulate(spread)
    difference = np.abs(changed - straight)
    print(f"largest difference {difference.max():.2e}, noise floor {floor[-1]:.2e}")
    assert (difference <= np.maximum(floor, 1e-6 * straight)).all()
