"""Several local processes: output, exit codes, and that none is left behind.

Most children are plain Python; the last test starts JAX in two and adds over their devices.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lowprec_jax.cli.launch import launch, run_launch
from lowprec_jax.cli.main import main
from lowprec_jax.errors import UserError
from lowprec_jax.training.process_settings import EXIT_PEER_LOST, PEER_LOST_PREFIX

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_cache(monkeypatch):
    """A cache of compiled programs that processes share would be one more way to fail."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


def child(tmp_path: Path, body: str) -> list[str]:
    """A command whose `index` is that of the process."""
    script = tmp_path / "child.py"
    head = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "index = int(os.environ['LOWPREC_PROCESS_ID'])\n"
        "folder = Path(__file__).parent\n"
        "sys.stdout.reconfigure(line_buffering=True)  # as lowprec_jax's own main\n"
    )
    script.write_text(head + textwrap.dedent(body), encoding="utf-8")
    return [sys.executable, str(script)]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_files(*paths: Path) -> list[str]:
    """The texts of files once all are there and complete (they end with a newline)."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        texts = [path.read_text() if path.exists() else "" for path in paths]
        if all(text.endswith("\n") for text in texts):
            return texts
        time.sleep(0.02)
    raise AssertionError(f"not written: {paths}")


def test_launch__all_succeed__shows_process_0_alone_without_noise(tmp_path, capfd):
    command = child(
        tmp_path,
        """
        print("out", index, os.environ["LOWPREC_NUM_PROCESSES"])
        print("err", index, file=sys.stderr)
        print("[Gloo] Rank 0 is connected to 1 peer ranks. Expected number ...")
        print("1 peer ranks. Expected number of connected peer ranks is : 1")
        """,
    )
    assert launch(command, processes=3) == 0
    shown = capfd.readouterr()
    assert shown.out == "out 0 3\n"
    assert shown.err == "err 0\n"


def test_launch__environment__names_one_coordinator_and_each_process(tmp_path):
    command = child(
        tmp_path,
        """
        names = ["LOWPREC_COORDINATOR", "LOWPREC_PROCESS_ID", "XLA_FLAGS", "JAX_PLATFORMS"]
        (folder / f"{index}.txt").write_text("|".join(os.environ[n] for n in names))
        """,
    )
    assert launch(command, processes=2, devices=3) == 0
    first, second = ((tmp_path / f"{i}.txt").read_text().split("|") for i in (0, 1))
    assert first[0] == second[0]
    assert first[0].startswith("127.0.0.1:")
    assert (first[1], second[1]) == ("0", "1")
    assert first[2].count("device_count") == 1
    assert "--xla_force_host_platform_device_count=3" in first[2].split()
    assert first[3] == "cpu"


def test_launch__one_fails__its_errors_and_code_are_reported_and_the_rest_ended(tmp_path, capfd):
    command = child(
        tmp_path,
        """
        (folder / f"{index}.pid").write_text(f"{os.getpid()}\\n")
        if index == 1:
            while not (folder / "0.pid").exists():
                time.sleep(0.01)
            sys.exit(print("the reason", file=sys.stderr) or 7)
        time.sleep(60)
        """,
    )
    start = time.monotonic()
    assert launch(command, processes=2) == 7
    assert time.monotonic() - start < 20
    err = capfd.readouterr().err
    assert err.startswith("[1] the reason\n")
    assert "process 1 of 2 ended with exit code 7; the others were ended." in err
    assert not is_alive(int((tmp_path / "0.pid").read_text()))


def test_launch__a_child_that_ignores_sigterm__is_killed(tmp_path, capfd):
    command = child(
        tmp_path,
        """
        if index == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / "0.pid").write_text(f"{os.getpid()}\\n")
            time.sleep(60)
        while not (folder / "0.pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert launch(command, processes=2) == 128 + signal.SIGKILL
    assert "process 1 of 2 ended by SIGKILL" in capfd.readouterr().err
    assert not is_alive(int((tmp_path / "0.pid").read_text()))


def test_launch__a_survivor_ends_first__its_peer_is_blamed(tmp_path, capfd):
    command = child(
        tmp_path,
        f"""
        if index == 0:
            print("{PEER_LOST_PREFIX}process 1 failed.", file=sys.stderr)
            sys.exit({EXIT_PEER_LOST})
        time.sleep(1)
        sys.exit(5)
        """,
    )
    assert launch(command, processes=2) == 5
    err = capfd.readouterr().err
    assert "process 1 of 2 ended with exit code 5" in err
    assert PEER_LOST_PREFIX not in err


def test_launch__all_fail_alike__the_first_is_reported_once(tmp_path, capfd):
    command = child(
        tmp_path,
        """
        print("bad input", file=sys.stderr, flush=True)
        time.sleep(0.2 * (index == 0))  # the first is the last to end
        sys.exit(2)
        """,
    )
    assert launch(command, processes=2) == 2
    err = capfd.readouterr().err
    assert err.count("bad input") == 1
    assert "process 0 of 2 ended with exit code 2" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch__ctrl_c_or_sigterm__ends_all_children_and_grandchildren(tmp_path, number):
    command = child(
        tmp_path,
        """
        import subprocess
        inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / f"{index}.pid").write_text(f"{os.getpid()} {inner.pid}\\n")
        time.sleep(60)
        """,
    )
    code = "import sys; from lowprec_jax.cli.launch import launch; "
    code += f"sys.exit(launch({command!r}, processes=2))"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    pids: list[int] = []
    try:
        texts = wait_for_files(tmp_path / "0.pid", tmp_path / "1.pid")
        pids = [int(pid) for text in texts for pid in text.split()]
        assert all(is_alive(pid) for pid in pids)
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + number
        assert b"Traceback" not in err
        assert [pid for pid in pids if is_alive(pid)] == []
    finally:
        launcher.kill()
        launcher.communicate()
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--processes", "2", "train"], "does not know train. Write the subcommand after '--'"),
        (["--processes", "2"], "has nothing to run"),
        (["--", "train"], "has no --processes"),
        (["--processes", "two", "--", "train"], "invalid int value: 'two'"),
        (["--processes", "0", "--", "train"], "--processes is 0; allowed: 1 or more"),
        (["--processes", "2", "--devices", "0", "--", "train"], "--devices is 0; allowed"),
    ],
)
def test_run_launch__bad_words__say_what_to_write(words, part):
    with pytest.raises(UserError, match=part):
        run_launch(words)


def test_main__launch__runs_the_subcommand_and_returns_its_code(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["launch", "--processes", "2", "--", "trian"])
    assert caught.value.code == 2
    assert "Did you mean 'train'?" in capfd.readouterr().err


MESH = """
from lowprec_jax.training.process_settings import DistributedConfig
from lowprec_jax.training.processes import start_processes

with start_processes(DistributedConfig(timeout_seconds=60)) as processes:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.make_array_from_callback(
        (4,), NamedSharding(mesh, P("data")), lambda i: jnp.arange(1.0, 5.0)[i]
    )
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        )
    )(rows)
    print(processes.count, processes.is_first, jax.device_count(), jax.local_device_count())
    print(float(total.addressable_data(0)[0]), flush=True)
    if index == 0:
        (folder / "printed").touch()
    if "killed" in sys.argv and index == 1:
        while not (folder / "printed").exists():  # what it printed is looked at
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if "killed" in sys.argv:
        time.sleep(60)
"""


def test_launch__two_processes_of_two_devices__form_one_mesh(tmp_path, capfd):
    assert launch(child(tmp_path, MESH), processes=2, devices=2) == 0
    assert capfd.readouterr().out == "2 True 4 2\n10.0\n"  # 1 + 2 + 3 + 4


def test_launch__a_killed_process__is_named_within_a_minute(tmp_path, capfd):
    start = time.monotonic()
    assert launch([*child(tmp_path, MESH), "killed"], processes=2, devices=2) == 137
    assert time.monotonic() - start < 60
    shown = capfd.readouterr()
    assert shown.out.endswith("10.0\n")
    assert shown.err.endswith(
        "lowprec_jax launch: process 1 of 2 ended by SIGKILL; the others were ended.\n"
    )
