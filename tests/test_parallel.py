"""Worker processes: every job once, reports on the way, and no worker outlives its master."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sashimi.errors import InputError
from sashimi.packing.parallel import Report, run_jobs

SCRIPT = """
import os, pathlib, sys, time
from sashimi.packing.parallel import run_jobs

def job(number, report):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    for _ in range(600):
        time.sleep(0.05)
        report(number)

for _ in run_jobs(job, [0, 1, 2], 3, lambda report: None):
    pass
"""


def square(job: int, report: Report) -> tuple[int, int]:
    report(job)
    report(1)
    return job * job, os.getpid()


def fail(job: int, report: Report) -> None:
    if job == 3:
        raise InputError(f"job={job}: bad")


def die(job: int, report: Report) -> None:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2, 20])
def test_every_job_is_done_once(processes: int) -> None:
    """With fewer or more processes than jobs. Mutation: `zip(range(processes), waiting)` -> the other way round."""
    reports: list[int] = []
    results = list(run_jobs(square, range(10), processes, reports.append))
    assert sorted(result for result, _ in results) == [job * job for job in range(10)]
    assert sorted(reports) == sorted([*range(10), *[1] * 10])
    assert 1 <= len({worker for _, worker in results}) <= processes
    assert os.getpid() not in {worker for _, worker in results}
    assert list(run_jobs(square, [], processes, reports.append)) == []


def test_the_first_error_ends_it() -> None:
    """As itself. Mutation: `raise value` -> `yield value`."""
    with pytest.raises(InputError, match="job=3: bad"):
        list(run_jobs(fail, range(10), 2, lambda report: None))


def test_a_killed_worker_is_noticed() -> None:
    """Rather than waited for. Mutation: catch `ConnectionError` only."""
    with pytest.raises(InputError, match="a worker process was killed"):
        list(run_jobs(die, range(10), 2, lambda report: None))


def test_workers_end_with_their_master(tmp_path: Path) -> None:
    """Even if it is killed. Mutation: drop `other.close()`."""
    master = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=os.environ | {"PYTHONPATH": "."})
    while len(workers := list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
        assert master.poll() is None
    master.kill()
    master.wait()
    deadline = time.monotonic() + 10
    while any(Path("/proc", worker.name, "exe").exists() for worker in workers):
        time.sleep(0.05)
        assert time.monotonic() < deadline
