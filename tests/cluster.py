"""A SLURM cluster of two nodes on this machine, in a private folder, for the tests marked `slurm`."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import ROOT

# Two nodes of two cores and two pretended GPUs each. Authentication is off: the daemons listen on this machine alone.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=1
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
KillWait=60
GresTypes=gpu
FirstJobId={ports[0]}
NodeName=DEFAULT CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=tests Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # states that a job does not leave


class Cluster:
    """SLURM's commands on a cluster that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VENV": str(folder / "venv"),
            "ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml",
        }

    def call(self, *command: str, **variables: str) -> str:
        """One of SLURM's commands in the repository's root; its output."""
        environment = self.environment | variables
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def submit(self, script: str, *arguments: str, **variables: str) -> str:
        """sbatch launch/slurm/SCRIPT ARGUMENTS on both nodes, with these variables; the number of the job."""
        options = ["--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
        log = f"--output={self.folder}/%x-%j.log"
        return self.call("sbatch", *options, log, f"launch/slurm/{script}", *arguments, **variables)

    def log(self, job: str) -> str:
        """What a job has written so far."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.log"))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        return re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", job))[1]  # type: ignore[index]

    def wait(self, job: str, reached: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Until `reached()`; AssertionError with the job's log if it takes too long or the job is over."""
        deadline = time.monotonic() + seconds
        while not reached():
            hopeless = time.monotonic() > deadline or (self.state(job) in OVER and not reached())
            assert not hopeless, f"no {what}:\n{self.call('scontrol', 'show', 'job', job)}\n{self.log(job)}"
            time.sleep(0.3)

    def end(self, job: str) -> str:
        """Wait until a job is over; its last state."""
        self.wait(job, lambda: self.state(job) in OVER, "end")
        return self.state(job)

    def restart(self, job: str) -> None:
        """A job that was queued again would wait two minutes: wait until it is queued, and have it start now."""
        self.wait(job, lambda: self.state(job) == "PENDING", "requeue")
        time.sleep(3)  # sooner, it is not yet startable
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait(job, lambda: self.state(job) == "RUNNING", "restart")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Bring slurmctld and two slurmd up, and take them and all their jobs' processes down, whatever happens."""
    running = Cluster(folder)
    for name in ("state", "spool-node1", "spool-node2", "venv/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "venv/bin/activate").write_text("")  # the tests' own environment, wherever it is
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    host = socket.gethostname().partition(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = CONFIGURATION.format(host=host, user=user, folder=folder, ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    with ExitStack() as stack:
        stack.callback(kill_all, folder)
        configuration = ["-f", str(folder / "slurm.conf")]
        for daemon in (["slurmctld", "-c"], ["slurmd", "-N", "node1"], ["slurmd", "-N", "node2"]):
            # They die with this process, however it ends.
            command = ["setpriv", "--pdeathsig", "KILL", *daemon, "-D", *configuration]
            stack.enter_context(daemonized(command, running.environment))
        deadline = time.monotonic() + 120
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        while subprocess.run(idle, env=running.environment, capture_output=True, text=True).stdout.strip() != "2":
            logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"the nodes do not come up:\n{logs}"
            time.sleep(0.3)
        yield running


@contextmanager
def daemonized(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """A process that runs within."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def kill_all(folder: Path) -> None:
    """Kill every process that belongs to the cluster of this folder: its jobs have SLURM_CONF in their environment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"SLURM_CONF={folder}/slurm.conf".encode() in (process / "environ").read_bytes().split(b"\0")
            if mine and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
