"""Who the processes of a run are, how they meet, and what ends them together.

The protocol is tested with threads of this process; JAX is started in subprocesses, which are
few: each pair takes seconds.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.training.message_line import MessageLine, free_port, listen
from lowprec_jax.training.peers import Peers, meet
from lowprec_jax.training.process_settings import (
    EXIT_PEER_LOST,
    PEER_LOST_PREFIX,
    DistributedConfig,
    ProcessSettings,
    detected_cluster,
    process_settings,
)

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "LOWPREC_COORDINATOR": "10.0.0.1:9876",
    "LOWPREC_NUM_PROCESSES": "4",
    "LOWPREC_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


# Settings.


def test_process_settings__nothing_set__is_one_process():
    assert process_settings(DistributedConfig(), {}) is None


def test_process_settings__variables__go_before_options():
    config = DistributedConfig(coordinator="other:1", num_processes=9, process_id=8)
    assert process_settings(config, VARIABLES) == ProcessSettings("10.0.0.1", 9876, 4, 3)


def test_process_settings__variables_and_options__complete_each_other():
    config = DistributedConfig(coordinator="[::1]:80", num_processes=2)
    settings = process_settings(config, {"LOWPREC_PROCESS_ID": "0"})
    assert settings == ProcessSettings("::1", 80, 2, 0)
    assert settings.address == "[::1]:80"


@pytest.mark.parametrize("missing", VARIABLES)
def test_process_settings__one_of_three_missing__is_named(missing):
    given = {name: value for name, value in VARIABLES.items() if name != missing}
    with pytest.raises(UserError, match=rf"Missing: {missing} \(or distributed\.") as caught:
        process_settings(DistributedConfig(), given)
    assert all(f"{name} {value}" in str(caught.value) for name, value in given.items())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LOWPREC_COORDINATOR", "nohost", "host:port"),
        ("LOWPREC_COORDINATOR", "host:99999", "host:port"),
        ("LOWPREC_COORDINATOR", ":9876", "host:port"),
        ("LOWPREC_NUM_PROCESSES", "0", "1 or more"),
        ("LOWPREC_NUM_PROCESSES", "two", "1 or more"),
        ("LOWPREC_PROCESS_ID", "-1", "0 or more"),
    ],
)
def test_process_settings__malformed_variable__is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(UserError, match=f"{name} is '{value}'; allowed: {allowed}"):
        process_settings(DistributedConfig(), VARIABLES | {name: value})


def test_process_settings__index_not_below_count__says_the_range():
    with pytest.raises(UserError, match=r"PROCESS_ID 4 is not below .* 4; allowed: 0 to 3"):
        process_settings(DistributedConfig(), VARIABLES | {"LOWPREC_PROCESS_ID": "4"})


def test_process_settings__mode_off_with_variables__is_a_contradiction():
    with pytest.raises(UserError, match=r"mode is off, but .*LOWPREC_PROCESS_ID are set"):
        process_settings(DistributedConfig(mode="off"), VARIABLES)


def test_process_settings__mode_off_with_options__is_one_process():
    assert process_settings(DistributedConfig(mode="off", num_processes=2), {}) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout_seconds", 0),
        ("heartbeat_seconds", 4),
        ("num_processes", 0),
        ("process_id", -1),
        ("coordinator", "host"),
    ],
)
def test_distributed_config__bad_value__is_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is .*allowed"):
        DistributedConfig(**{option: value})


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a batch script, not a job step
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
    ],
)
def test_detected_cluster__variables_of_several_processes__name_it(monkeypatch, environ, cluster):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert detected_cluster(environ) == cluster


def test_detected_cluster__without_the_packages_jax_needs__is_none():
    environ = {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}
    environ |= {"MEGASCALE_NUM_SLICES": "2"}
    assert detected_cluster(environ) is None


# Meeting, in threads.


def meet_all(count: int, seconds: int = 10, port: int | None = None, skip=()) -> list:
    """What `meet` returns or raises for each process but those skipped."""
    port = free_port() if port is None else port

    def one(index: int):
        settings = ProcessSettings("127.0.0.1", port, count, index)
        try:
            return meet(settings, DistributedConfig(timeout_seconds=seconds))
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, [i for i in range(count) if i not in skip]))


@pytest.fixture
def three():
    peers = [peer for peer, _ in meet_all(3)]
    yield peers
    for peer in peers:
        peer.close()


class Ends:
    """Collects what the watch of each process reports."""

    def __init__(self, peers: list[Peers]):
        self.seen: dict[int, tuple[int, bool]] = {}
        self.calls = threading.Semaphore(0)
        for index, peer in enumerate(peers):
            peer.watch(lambda process, failed, index=index: self._note(index, process, failed))

    def _note(self, index: int, process: int, failed: bool) -> None:
        self.seen[index] = (process, failed)
        self.calls.release()

    def wait(self, count: int) -> dict[int, tuple[int, bool]]:
        for _ in range(count):
            assert self.calls.acquire(timeout=10)
        return self.seen


def test_meet__all_come__agree_on_a_service_address_of_another_port():
    port = free_port()
    results = meet_all(4, port=port)
    addresses = {address for _, address in results}
    assert len(addresses) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+", next(iter(addresses)))
    assert addresses != {f"127.0.0.1:{port}"}
    for peers, _ in results:
        peers.close()


def test_meet__one_missing__all_the_others_say_which():
    start = time.monotonic()
    errors = meet_all(4, seconds=1, skip=[2])
    assert time.monotonic() - start < 5
    assert len(errors) == 3
    for error in errors:
        assert "waited 1 s for the others at 127.0.0.1:" in str(error)
        assert "process 2 did not come" in str(error)


def test_meet__process_0_missing__the_others_say_so():
    (error,) = meet_all(2, seconds=1, skip=[0])
    assert re.match(r"process 1 of 2 waited 1 s for process 0 at 127\.0\.0\.1:\d+", str(error))


def test_meet__port_taken__is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        (error,) = meet_all(2, port=port, skip=[1])
    assert f"cannot listen at 127.0.0.1:{port}: " in str(error)
    assert "LOWPREC_COORDINATOR must be" in str(error)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (ProcessSettings("127.0.0.1", 0, 3, 1), "two processes say that they are process 1 of 3"),
        (ProcessSettings("127.0.0.1", 0, 2, 1), "told of 2 processes, process 0 of 3"),
    ],
    ids=["same index", "other count"],
)
def test_meet__processes_that_disagree__all_say_how(second, problem):
    port = free_port()
    config = DistributedConfig(timeout_seconds=10)
    everyone = [ProcessSettings("127.0.0.1", port, 3, i) for i in (0, 1)]
    everyone.append(ProcessSettings("127.0.0.1", port, second.count, second.index))
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(meet, settings, config) for settings in everyone[:2]]
        time.sleep(0.5)  # one that comes after process 0 has ended hears nothing of it
        futures.append(pool.submit(meet, everyone[2], config))
        errors = [future.exception(timeout=20) for future in futures]
    assert all(isinstance(error, UserError) and problem in str(error) for error in errors)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n", b""])
def test_meet__a_stranger_connects__is_hung_up_on(words):
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        settings = [ProcessSettings("127.0.0.1", port, 2, i) for i in (0, 1)]
        first = pool.submit(meet, settings[0], DistributedConfig(timeout_seconds=10))
        stranger = connect(port)
        stranger.sendall(words)
        if not words:
            stranger.close()
        else:
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
            stranger.close()
        second = pool.submit(meet, settings[1], DistributedConfig(timeout_seconds=10))
        for future in (first, second):
            future.result(timeout=20)[0].close()


def connect(port: int) -> socket.socket:
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.05)
    raise AssertionError("nobody listens")


# Watching, in threads.


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_peers__a_broken_connection__is_reported_to_all_others(three, lost):
    others = [i for i in range(3) if i != lost]
    ends = Ends([three[i] for i in others])
    start = time.monotonic()
    three[lost].close()
    seen = ends.wait(2)
    assert time.monotonic() - start < 2
    assert seen == {0: (lost, False), 1: (lost, False)}


@pytest.mark.parametrize("failing", [0, 2])
def test_peers__one_fails__all_others_learn_which(three, failing):
    ends = Ends(three)
    three[failing].fail()
    assert ends.wait(2) == {i: (failing, True) for i in range(3) if i != failing}


def test_peers__all_fail_alike__none_is_blamed(three):
    ends = Ends(three)

    def fail(index: int) -> None:
        time.sleep(0.2 * index)
        three[index].fail()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fail, range(3)))
    time.sleep(0.2)
    assert ends.seen == {}


def test_peers__own_failure_after_a_peer_died__blames_the_peer(three):
    ends = Ends(three[:2])
    failing = threading.Thread(target=three[0].fail)
    failing.start()
    three[2].close()
    assert ends.wait(2) == {0: (2, False), 1: (2, False)}
    failing.join()


def test_peers__finish__waits_for_the_slowest_and_reports_nothing(three):
    ends = Ends(three)
    begin = time.monotonic()

    def finish(index: int) -> float:
        time.sleep(0.5 * (index == 1))
        three[index].finish()
        return time.monotonic() - begin

    with ThreadPoolExecutor(3) as pool:
        seconds = list(pool.map(finish, range(3)))
    assert min(seconds) >= 0.5
    assert ends.seen == {}


def test_peers__one_dies_while_others_finish__is_reported(three):
    ends = Ends(three[:2])
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(three[1].finish)
        three[2].close()
        assert ends.wait(2) == {0: (2, False), 1: (2, False)}
        three[0].close()  # as its process would
        finishing.result(timeout=10)


def test_message_line__too_long__is_refused():
    left, right = socket.socketpair()
    line = MessageLine(right)
    left.sendall(b'{"a": "' + b"x" * 5000 + b'"}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        line.receive(5)
    line.close()
    left.close()


# JAX, in subprocesses.

BODY = """
import sys, time
from lowprec_jax.errors import UserError
from lowprec_jax.training.process_settings import DistributedConfig
from lowprec_jax.training.processes import start_processes
config = DistributedConfig(mode=sys.argv[1], timeout_seconds=int(sys.argv[2]))
try:
    with start_processes(config) as p:
        import jax
        import jax.numpy as jnp
        from jax.experimental import multihost_utils
        print(p.index, p.count, jax.device_count(), flush=True)
        while sys.argv[3] != "once":
            multihost_utils.process_allgather(jnp.ones(2))
            print("ready", flush=True)
            time.sleep(0.01)
            if sys.argv[3] == "fail" and p.index == 1:
                raise UserError("my own fault")
except UserError as error:
    print(f"UserError: {error}", file=sys.stderr)
    sys.exit(2)
"""


@contextlib.contextmanager
def running(*environs: dict[str, str], mode: str = "auto", seconds: int = 60, what: str = "once"):
    """JAX processes of one device each; killed at the end, whatever happens."""
    common = {k: v for k, v in os.environ.items() if not k.startswith(("LOWPREC", "SLURM"))}
    common |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PJRT_NPROC": "32"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BODY, mode, str(seconds), what],
            cwd=ROOT,
            env=common | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environ in environs
    ]
    try:
        yield children
    finally:
        for process in children:
            process.kill()
            process.communicate()


def variables(count: int = 2) -> list[dict[str, str]]:
    common = {"LOWPREC_COORDINATOR": f"127.0.0.1:{free_port()}"}
    common["LOWPREC_NUM_PROCESSES"] = str(count)
    return [common | {"LOWPREC_PROCESS_ID": str(index)} for index in range(count)]


def test_start_processes__missing_peer__is_a_user_error_within_the_timeout():
    start = time.monotonic()
    with running(variables()[0], seconds=2) as (first,):
        _, err = first.communicate(timeout=30)
    assert time.monotonic() - start < 20  # 2 s, and the imports
    assert first.returncode == 2
    assert err.startswith("UserError: process 0 of 2 waited 2 s for the others at 127.0.0.1:")
    assert "process 1 did not come" in err


@pytest.mark.parametrize("victim", [0, 1])
def test_start_processes__killed_peer__ends_the_survivor_with_a_message(victim):
    with running(*variables(), what="loop") as children:
        for process in children:
            assert any("ready" in line for line in iter(process.stdout.readline, ""))
        start = time.monotonic()
        children[victim].send_signal(signal.SIGKILL)
        _, err = children[1 - victim].communicate(timeout=60)
    assert time.monotonic() - start < 60  # 0.1 s where nothing else runs
    # JAX may abort first when process 0, which runs its service, is killed.
    assert children[1 - victim].returncode in (EXIT_PEER_LOST, -signal.SIGABRT)[: 2 - victim]
    assert f"{PEER_LOST_PREFIX}process {victim} ended too early" in err
    assert "start all of them again" in err


def test_start_processes__failing_peer__keeps_its_own_error_and_code():
    with running(*variables(), what="fail") as (first, second):
        _, first_err = first.communicate(timeout=60)
        _, second_err = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (EXIT_PEER_LOST, 2)
    assert f"{PEER_LOST_PREFIX}process 1 failed." in first_err
    assert "UserError: my own fault" in second_err
    assert "Check failure" not in second_err


def test_start_processes__slurm__is_detected():
    common = SLURM | {"JAX_COORDINATOR_PORT": str(free_port())}
    with running(common, common | {"SLURM_PROCID": "1"}) as (first, second):
        outs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert ["0 2 2" in outs[0], "1 2 2" in outs[1]] == [True, True]


def test_start_processes__slurm_with_a_missing_peer__ends_with_our_message():
    common = SLURM | {"JAX_COORDINATOR_PORT": str(free_port())}
    with running(common, seconds=2) as (first,):
        _, err = first.communicate(timeout=30)
    assert first.returncode == EXIT_PEER_LOST
    assert "this process of Slurm waited 2 s for the others" in err


def test_start_processes__mode_on_and_nothing_known__names_the_variables():
    with running({}, mode="on") as (process,):
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "distributed.mode is on, but JAX cannot tell which process this is" in err
    assert "LOWPREC_COORDINATOR" in err


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_start_processes__nothing_known__is_one_process_without_jax_distributed(mode):
    from lowprec_jax.training.processes import start_processes

    with start_processes(DistributedConfig(mode=mode)) as processes:
        assert (processes.index, processes.count, processes.is_first) == (0, 1, True)
