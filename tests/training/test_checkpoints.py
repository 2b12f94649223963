"""Checkpoints by themselves: what is published, what is refused, what is used in its place.

Corruption is made in the files, as disks and people make it; the arrays are compared with what was
saved.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax.errors import UserError
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.fingerprint import fingerprint, fingerprints
from lowprec_jax.training.state_leaves import abstract, kind, leaves_of

pytestmark = pytest.mark.reliability


class State(NamedTuple):
    params: Any
    scaling: Any
    step: Any


def mesh_of(devices: int, axis_type: AxisType = AxisType.Auto):
    kinds = (axis_type,)
    return jax.make_mesh((devices,), ("data",), axis_types=kinds, devices=jax.devices()[:devices])


def state_of(step: int, devices: int = 4) -> State:
    """A state whose numbers depend on the step; a kernel is split over the devices."""
    mesh = mesh_of(devices)
    rng = np.random.default_rng(step)

    def put(x: Any, *axes: str) -> jax.Array:
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*axes)))

    kernel = put(rng.normal(size=(8, 4)).astype(np.float32), "data")
    bias = put(rng.normal(size=4).astype(ml_dtypes.bfloat16))
    return State({"kernel": kernel, "bias": bias}, {"amax": put(np.ones(3))}, put(np.int32(step)))


def like(state: State) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in leaves_of(state).items()
    }


def saved(folder: Path, *steps: int, **options: Any) -> Path:
    with Checkpoints(folder, **{"keep": 9, **options}) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), {"batch": 10 * step})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is saved is read.


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_read__on_other_devices__has_the_bits_that_were_saved(devices, tmp_path):
    saved(tmp_path, 3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.newest()
        assert found is not None
        assert (found.manifest.step, found.manifest.about) == (3, {"batch": 30})
        wanted = like(state_of(3, devices))
        actual = checkpoints.read(found, wanted)
    for name, expected in leaves_of(state_of(3)).items():
        assert actual[name].sharding == wanted[name].sharding
        assert kind(actual[name]) == kind(expected) == found.manifest.arrays[name].kind
        assert np.asarray(actual[name]).tobytes() == np.asarray(expected).tobytes()


def test_abstract__of_kinds__is_what_they_were_made_from():
    for name, leaf in leaves_of(state_of(1)).items():
        made = abstract({name: kind(leaf)})[name]
        assert (made.shape, made.dtype) == (leaf.shape, leaf.dtype)


def test_save__state_donated_at_once__is_written_as_it_was(tmp_path):
    state = state_of(1)
    expected = np.asarray(state.params["kernel"]).copy()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {})
        double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
        jax.block_until_ready(double(state))
        found = checkpoints.newest()
        actual = checkpoints.read(found, like(state_of(1)))
    np.testing.assert_array_equal(actual["params/kernel"], expected)


def test_save__without_waiting__publishes_in_the_background(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state_of(1), {})
        for _ in range(200):
            checkpoints.check()
            if (tmp_path / "1" / "manifest.json").exists():
                break
            time.sleep(0.05)
        assert names(tmp_path / "1") == ["manifest.json", "state"]


# What stays.


def test_keep__newest_and_best__stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None), (5, None)):
            checkpoints.save(state_of(step), {}, validation_loss=loss)
    assert names(tmp_path) == ["2", "4", "5"]


def test_keep__without_the_best__only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            checkpoints.save(state_of(step), {}, validation_loss=loss)
    assert names(tmp_path) == ["2"]


def test_save__a_step_twice__is_written_once(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state_of(1), {"batch": 1})
        checkpoints.save(state_of(1), {"batch": 2})
        assert checkpoints.newest().manifest.about == {"batch": 1}


def test_forget_after__a_rollback__later_steps_are_gone_and_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_of(step), {})
        checkpoints.forget_after(1)
        assert names(tmp_path) == ["1"]
        checkpoints.save(state_of(2), {"again": True})
        assert checkpoints.newest().manifest.about == {"again": True}


# Damage.


def arrays_of(folder: Path) -> list[Path]:
    """The files with array data, large ones first."""
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip(path: Path, where: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[where if where >= 0 else len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(folder: Path) -> Path:
    path = arrays_of(folder)[0]
    os.truncate(path, path.stat().st_size // 2)
    return path


def flip_a_byte(folder: Path) -> Path:
    flip(path := arrays_of(folder)[0])
    return path


def flip_in_metadata(folder: Path) -> Path:
    flip(path := folder / "state" / "_METADATA")
    return path


def flip_in_manifest(folder: Path) -> Path:
    flip(path := folder / "manifest.json")
    return path


def delete_a_shard(folder: Path) -> Path:
    path = arrays_of(folder)[0]
    path.unlink()
    return path


def swap_shards(folder: Path) -> Path:
    by_content = {path.read_bytes(): path for path in arrays_of(folder)}
    first, second = sorted(by_content.values())[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first


def empty_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text("")
    return path


def other_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text("[]")
    return path


def add_a_file(folder: Path) -> Path:
    path = folder / "state" / "d" / "stray"
    path.write_bytes(b"x")
    return path


def rewrite(folder: Path, state: Any) -> Path:
    """Another state in the place of the one that was saved, complete and readable."""
    other = folder.parent / "other"
    with Checkpoints(other, keep=1) as checkpoints:
        checkpoints.save(state, {})
    shutil.rmtree(folder / "state")
    shutil.copytree(other / str(int(state.step)) / "state", folder / "state")
    shutil.rmtree(other)
    return folder / "state"


def wrong_shape(folder: Path) -> Path:
    state = state_of(2)
    return rewrite(folder, state._replace(params={**state.params, "kernel": jnp.zeros((4, 4))}))


def wrong_dtype(folder: Path) -> Path:
    state = state_of(2)
    return rewrite(folder, state._replace(params={**state.params, "bias": jnp.zeros(4)}))


def without_scaling(folder: Path) -> Path:
    return rewrite(folder, state_of(2)._replace(scaling={}))


DAMAGE = [
    truncate,
    flip_a_byte,
    flip_in_metadata,
    flip_in_manifest,
    delete_a_shard,
    swap_shards,
    empty_manifest,
    other_manifest,
    add_a_file,
    wrong_shape,
    wrong_dtype,
    without_scaling,
]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_newest__damaged__is_found_out_named_and_the_one_before_used(damage, two, tmp_path):
    shutil.copytree(two, folder := tmp_path / "checkpoints")
    touched = damage(folder / "2")
    with Checkpoints(folder, keep=9) as checkpoints:
        found = checkpoints.newest()
        assert found.manifest.step == 1
        [problem] = found.damaged
        assert problem.startswith("The checkpoint of step 2 is damaged: ")
        assert str(touched) in problem
        actual = checkpoints.read(found, like(state_of(1)))
        expected = np.asarray(state_of(1).params["kernel"])
        np.testing.assert_array_equal(actual["params/kernel"], expected)
        checkpoints.save(state_of(2), {})  # over the damaged one
        assert checkpoints.newest().manifest.step == 2


def test_newest__undamaged__is_the_last(two):
    with Checkpoints(two, keep=9) as checkpoints:
        found = checkpoints.newest()
        assert (found.manifest.step, found.damaged) == (2, [])
        assert checkpoints.newest(skip=1).manifest.step == 1
        assert checkpoints.newest(skip=2) is None


def test_newest__all_damaged__says_what_is_wrong_with_each(two, tmp_path):
    shutil.copytree(two, folder := tmp_path / "checkpoints")
    for step in ("1", "2"):
        empty_manifest(folder / step)
    with (
        Checkpoints(folder, keep=9) as checkpoints,
        pytest.raises(UserError, match=r"step 2 is damaged.*step 1 is damaged"),
    ):
        checkpoints.newest()


def test_newest__one_good_one_damaged__passing_over_the_good_one_finds_none(two, tmp_path):
    shutil.copytree(two, folder := tmp_path / "checkpoints")
    empty_manifest(folder / "1")
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.newest().manifest.step == 2
        assert checkpoints.newest(skip=1) is None


def test_newest__of_another_format__is_not_used(two, tmp_path, monkeypatch):
    monkeypatch.setattr("lowprec_jax.training.manifest.FORMAT_VERSION", 5)
    with (
        Checkpoints(two, keep=9) as checkpoints,
        pytest.raises(UserError, match="has format 4, this version of lowprec_jax reads 5"),
    ):
        checkpoints.newest()


def test_newest__killed_before_the_manifest__does_not_count(two, tmp_path):
    shutil.copytree(two, folder := tmp_path / "checkpoints")
    (folder / "2" / "manifest.json").unlink()
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.newest().manifest.step == 1
        checkpoints.save(state_of(3), {})
    assert names(folder) == ["1", "3"]  # what the kill left is gone


# Saves that fail.


def test_save__value_not_finite__is_never_published(tmp_path):
    saved(tmp_path, 1)
    bad = state_of(2)
    bad = bad._replace(params={**bad.params, "bias": bad.params["bias"].at[2].set(jnp.nan)})
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(bad, {})
    with pytest.raises(UserError, match=r"step 2 could not be made.*params/bias is not finite"):
        checkpoints.wait()
    with checkpoints:
        assert checkpoints.newest().manifest.step == 1


def test_save__written_otherwise_than_it_was__is_never_published(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write = checkpoints._checkpointer.save

    def flipped(path, arrays):
        bad = {k: -x if k == "params/kernel" else x for k, x in arrays.items()}
        write(path, bad)

    monkeypatch.setattr(checkpoints._checkpointer, "save", flipped)
    checkpoints.save(state_of(1), {})
    with pytest.raises(UserError, match="params/kernel was not read back as it was written"):
        checkpoints.wait()
    with checkpoints:
        assert checkpoints.newest() is None


def test_save__disk_full__says_so_and_the_last_good_one_is_intact(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(
        "lowprec_jax.training.manifest.os.fsync",
        lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    checkpoints.save(state_of(2), {})
    with pytest.raises(UserError, match=r"No space left on device\. The newest one is of step 1"):
        checkpoints.wait()
    monkeypatch.undo()
    with checkpoints:
        assert checkpoints.newest().manifest.step == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_save__no_more_room_for_files__says_so_and_the_last_good_one_is_intact(tmp_path):
    """Files may not grow: what Orbax writes fails as on a full disk, inside its own threads."""
    saved(tmp_path, 1)
    state = state_of(2)
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    checkpoints = Checkpoints(tmp_path, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError, match="step 2 could not be made") as caught:  # noqa: PT012
            checkpoints.save(state._replace(scaling={"amax": jnp.asarray(noise)}), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "The newest one is of step 1" in str(caught.value)
    with checkpoints:
        assert checkpoints.newest().manifest.step == 1
        checkpoints.save(state_of(3), {})  # there is room again
        assert checkpoints.newest().manifest.step == 3
    gc.collect()  # Orbax leaves futures of an event loop that is closed


def test_save__directory_is_read_only__says_so_and_the_last_good_one_is_intact(tmp_path):
    saved(folder := tmp_path / "checkpoints", 1)
    checkpoints = Checkpoints(folder, keep=1)
    with as_a_user_without_rights(folder), pytest.raises(UserError, match="step 2 could not be"):  # noqa: PT012
        checkpoints.save(state_of(2), {})
        checkpoints.wait()
    with checkpoints:
        assert checkpoints.newest().manifest.step == 1


@contextlib.contextmanager
def as_a_user_without_rights(folder: Path):
    """The directory cannot be written to; root, who may write anywhere, becomes somebody else."""
    is_root = os.geteuid() == 0
    folder.chmod(0o555)
    for parent in folder.parents[:4]:
        if is_root and parent.stat().st_uid == 0 and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_save__folder_cannot_be_made__says_so_at_once(tmp_path):
    saved(folder := tmp_path / "checkpoints", 1)
    (folder / "2").write_text("a file is in the way")
    checkpoints = Checkpoints(folder, keep=1)
    with pytest.raises(UserError, match="step 2 could not be made"):  # noqa: PT012
        checkpoints.save(state_of(2), {})
        checkpoints.wait()
    with checkpoints:
        assert checkpoints.newest().manifest.step == 1


# Fingerprints.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_fingerprint__of_devices_and_host__is_the_same(axis_type):
    mesh = mesh_of(8, axis_type)
    rng = np.random.default_rng(0)
    arrays = {
        "float32": rng.normal(size=(16, 3, 5)).astype(np.float32),
        "bfloat16": rng.normal(size=(8, 2)).astype(ml_dtypes.bfloat16),
        "float8": rng.normal(size=8).astype(ml_dtypes.float8_e4m3fn),
        "int32": np.int32(-7),
        "bool": np.array([True, False] * 4),
        "empty": np.zeros((8, 0), np.float32),
    }
    put = {
        name: jax.device_put(x, NamedSharding(mesh, P("data") if np.ndim(x) else P()))
        for name, x in arrays.items()
    }
    assert {k: int(v) for k, v in fingerprints(put).items()} == {
        name: fingerprint(x) for name, x in arrays.items()
    }


def test_fingerprint__one_bit_or_a_swap__changes_it():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, (64, 16), dtype=np.uint32)
    seen = {fingerprint(x)}
    for row in range(64):
        other = x.copy()
        other[row, row % 16] ^= np.uint32(1 << (row % 32))
        seen.add(fingerprint(other))
    swapped = x.copy()
    swapped[[0, 32]] = swapped[[32, 0]]
    seen |= {fingerprint(swapped), fingerprint(np.roll(x, 1)), fingerprint(x.T.copy())}
    powers = np.repeat(np.float32([1, 2, 4, 8]), 256)  # equal shards but for a power of two
    seen |= {fingerprint(powers), fingerprint(powers.reshape(4, 256)[[1, 0, 2, 3]].ravel())}
    assert len(seen) == 1 + 64 + 3 + 2


def test_manifest__is_plain_json(two):
    stored = json.loads((two / "2" / "manifest.json").read_text())
    assert json.loads(stored["body"])["step"] == 2
