"""Training on two hosts, each a network namespace with its own address, whose link is cut and restored."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, launch, metrics
from test_elastic import assert_one_history

from sashimi import atomic

pytestmark = pytest.mark.timeout(600)

HOSTS = tuple(f"sashimi-{os.getpid()}-{number}" for number in (1, 2))
CARD = "link0"  # the network card of either
ADDRESS = "10.9.8.{}"


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """HOSTS, with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    with ExitStack() as stack:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
                stack.callback(ip, "netns", "delete", host)
            ip("link", "add", CARD, "netns", HOSTS[0], "type", "veth", "peer", "name", CARD, "netns", HOSTS[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for number, host in enumerate(HOSTS, 1):
            ip("-n", host, "address", "add", f"{ADDRESS.format(number)}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", host, "link", "set", card, "up")
        yield


def start(host: int, argv: list[str]) -> subprocess.Popen[str]:
    """`accelerate launch` of one process on one of two machines."""
    machine = ["--num_machines", "2", "--machine_rank", str(host), "--num_processes", "2"]
    main = ["--main_process_ip", ADDRESS.format(1), "--main_process_port", "29555"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CARD}
    return subprocess.Popen(
        ["ip", "netns", "exec", HOSTS[host], *launcher, *machine, *main, "launch/train.py", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def both_hosts(argv: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """`start` on either; no process is left behind."""
    sides = [start(host, argv) for host in (0, 1)]
    try:
        yield sides
    finally:
        for side in sides:
            if side.poll() is None:
                for process in [*psutil.Process(side.pid).children(recursive=True), side]:
                    process.kill()


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def test_the_link_is_cut(hosts: None, tiny_shards: Path, tmp_path: Path) -> None:
    """Laws 12 and 14: when the link is cut in mid-run, both sides end with an error within the timeout and all
    checkpoints are whole; when it is back, the run goes on to the curve of an uninterrupted one on one host.

    Mutations: in launch/train.py, `Distributed()` without the timeout (both sides wait for half an hour); no
    `cut_back`.
    """
    run, length = tmp_path / "run", tmp_path / "length.yaml"
    length.write_text("train: {steps: 5000}")
    argv = [*TINY, "--data.shards", str(tiny_shards), "--runs", str(tmp_path), "--config", str(length)]
    argv += "--optim.schedule constant --train.valid_every 15 --train.save_every 15 --train.batch_size 8".split()
    argv += "--train.micro_batch 1 --train.keep_last 1000 --train.timeout_minutes 0.33".split()

    with both_hosts([*argv, "--name", "run"]) as sides:
        deadline = time.monotonic() + 120
        while not newest(run) or metrics(run)[-1]["step"] < newest(run) + 2:
            assert time.monotonic() < deadline
            assert [side.poll() for side in sides] == [None, None]
            time.sleep(0.2)
        ip("-n", HOSTS[1], "link", "set", CARD, "down")
        errors = [side.communicate(timeout=180)[1] for side in sides]
    assert all(side.returncode != 0 for side in sides)
    for error in errors:
        assert "lost another process" in error
    assert all(not atomic.faults(path) for path in (run / "checkpoints").glob("step-*"))

    ip("-n", HOSTS[1], "link", "set", CARD, "up")
    length.write_text(f"train: {{steps: {newest(run) + 5}}}")
    with both_hosts([*argv, "--name", "run"]) as sides:
        errors = [side.communicate(timeout=180)[1] for side in sides]
    assert [side.returncode for side in sides] == [0, 0], errors
    done = launch(2, "launch/train.py", [*argv, "--name", "whole"])
    assert done.returncode == 0, done.stderr
    assert_one_history(run, metrics(tmp_path / "whole"), rel=0)
