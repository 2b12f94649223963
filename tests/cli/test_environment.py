"""What is set before JAX starts, for each kind of machine."""

import importlib.util

import pytest

from lowprec_jax.cli.environment import emulate_devices, prepare_environment
from lowprec_jax.training.config import MeshConfig, TrainConfig

FLAG = "--xla_force_host_platform_device_count"


def config(devices: int) -> TrainConfig:
    return TrainConfig(batch_size=16, mesh=MeshConfig(data=devices))


@pytest.fixture
def plugins(monkeypatch):
    """Lets a test say which plugins are installed."""
    installed: set[str] = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    return installed


def test_prepare_environment__one_device__sets_nothing(plugins):
    environ: dict[str, str] = {}
    prepare_environment(config(1), environ)
    assert environ == {}


@pytest.mark.parametrize(("devices", "threads"), [(2, "32"), (8, "32"), (16, "64")])
def test_prepare_environment__emulated_devices__have_threads_enough(plugins, devices, threads):
    environ: dict[str, str] = {}
    prepare_environment(config(devices), environ)
    assert environ["PJRT_NPROC"] == threads


def test_prepare_environment__threads_of_the_user__stay(plugins):
    environ = {"PJRT_NPROC": "5"}
    prepare_environment(config(4), environ)
    assert environ["PJRT_NPROC"] == "5"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, f"{FLAG}=4"),
        ({"XLA_FLAGS": "--xla_a=1"}, f"--xla_a=1 {FLAG}=4"),
        ({"XLA_FLAGS": f"{FLAG}=2"}, f"{FLAG}=2"),
        ({"JAX_PLATFORMS": "cpu"}, f"{FLAG}=4"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None),
    ],
    ids=["nothing set", "other flag kept", "count kept", "cpu asked", "cuda asked"],
)
def test_prepare_environment__several_devices__emulates_them_on_the_cpu(plugins, before, after):
    environ = dict(before)
    prepare_environment(config(4), environ)
    assert environ.get("XLA_FLAGS") == after


@pytest.mark.parametrize(
    ("processes", "after"),
    [("2", f"{FLAG}=4"), ("3", f"{FLAG}=3"), ("8", None), ("0", f"{FLAG}=8"), ("x", f"{FLAG}=8")],
)
def test_prepare_environment__several_processes__each_emulates_its_part(plugins, processes, after):
    environ = {"LOWPREC_NUM_PROCESSES": processes}
    prepare_environment(config(8), environ)
    assert environ.get("XLA_FLAGS") == after


def test_prepare_environment__device_count_by_jax_option__is_not_asked_for_twice(plugins):
    environ = {"JAX_NUM_CPU_DEVICES": "4"}
    prepare_environment(config(4), environ)
    assert environ == {"JAX_NUM_CPU_DEVICES": "4", "PJRT_NPROC": "32"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, f"{FLAG}=3"),
        ({"XLA_FLAGS": f"--xla_a=1 {FLAG}=8 --xla_b=2"}, f"--xla_a=1 --xla_b=2 {FLAG}=3"),
        ({"JAX_NUM_CPU_DEVICES": "8"}, f"{FLAG}=3"),
    ],
)
def test_emulate_devices__another_number_was_set__is_replaced(before, after):
    environ = dict(before)
    emulate_devices(3, environ)
    assert environ == {"XLA_FLAGS": after, "PJRT_NPROC": "32"}


@pytest.mark.parametrize("plugin", ["jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu"])
def test_prepare_environment__accelerator_installed__emulates_only_when_cpu_is_asked(
    plugins, plugin
):
    plugins.add(plugin)
    environ: dict[str, str] = {}
    prepare_environment(config(4), environ)
    assert "XLA_FLAGS" not in environ
    cpu = {"JAX_PLATFORMS": "cpu"}
    prepare_environment(config(4), cpu)
    assert cpu["XLA_FLAGS"] == f"{FLAG}=4"
