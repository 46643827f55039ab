"""Jobs on worker processes that report while they work, and that end when the process that started them ends."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from sashimi.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[Any], None]


def run_jobs(
    function: Callable[[Job, Report], Result], jobs: Iterable[Job], processes: int, on_report: Report
) -> Iterator[Result]:
    """Results of `function(job, report)` on as many `processes`, in the order in which jobs are done.

    What a job passes to `report` reaches `on_report` here. The first exception in a job ends them all and is raised
    here; a worker that is killed is an InputError. Function, jobs, reports and results must be picklable.
    """
    waiting = iter(jobs)
    workers: dict[Connection, multiprocessing.Process] = {}
    try:
        for _, job in zip(range(processes), waiting, strict=False):
            ours, theirs = multiprocessing.Pipe()
            inherited = [*workers, ours]
            workers[ours] = multiprocessing.Process(target=_work, args=(function, theirs, inherited), daemon=True)
            workers[ours].start()
            theirs.close()
            ours.send(job)
        busy = list(workers)
        while busy:
            ready = wait(busy)
            for ours in [one for one in busy if one in ready]:
                kind, value = ours.recv()
                if kind == "report":
                    on_report(value)
                elif kind == "failed":
                    raise value
                else:
                    busy.remove(ours)
                    for job in waiting:
                        ours.send(job)
                        busy.append(ours)
                        break
                    yield value
    except (EOFError, ConnectionError):
        raise InputError("a worker process was killed, perhaps for want of memory: use fewer --processes") from None
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(function: Callable[[Any, Report], Any], connection: Connection, inherited: list[Connection]) -> None:
    """Serves jobs until the other end of the pipe is gone, be it by a kill: then receiving or sending fails."""
    for other in inherited:
        other.close()  # the master's ends: a copy of them here would keep workers waiting for a master that is gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders written in C print there; our errors use the pipe
    try:
        while True:
            job = connection.recv()
            connection.send(("done", function(job, lambda value: connection.send(("report", value)))))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass
    except Exception as error:
        connection.send(("failed", error))
