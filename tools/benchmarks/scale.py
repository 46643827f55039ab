"""Weak scaling of a training step on this machine: one rank alone, then several at the same batch a rank."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.settings import Settings
from sashimi.errors import InputError
from sashimi.parsing import to_dict


@dataclass(frozen=True)
class ScaleSettings(Settings):
    """The step's size and the number of ranks."""

    batch_size: int = 2
    """Segments of a batch, on each rank."""
    threads: int = 1
    """Threads of each rank."""
    ranks: int = 2
    """Processes to start on this machine, each on a core or a GPU of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.ranks <= 1024:
            raise InputError(f"ranks={self.ranks}: must be 2 to 1024, to be compared with one")
        if self.threads < 1:
            raise InputError(f"threads={self.threads}: must be at least 1")


def bench_scale(config: ScaleSettings, device: torch.device) -> dict[str, Any]:
    """What `benchmarks.ranks` measures in so many processes, started by torchrun: medians, and of ratios within a turn.

    speedup: steps of all ranks together in the time of one step alone, times their number. crowding_share: of a step,
    what the ranks lose to each other without a word between them (memory, caches, clock). communication_share: what the
    three all-reduces take of a step beyond that. gradient_mb is what DDP reduces, ring_mb_per_rank what a rank must
    send for it in a ring, sent_mb_per_rank what the network interfaces counted (where the ranks talk by gloo).
    """
    if device.type == "cuda" and torch.cuda.device_count() < config.ranks:
        raise InputError(f"ranks={config.ranks}: this machine has {torch.cuda.device_count()} GPUs; give at most that")
    options = [f"--{name}={value}" for name, value in to_dict(config).items() if name not in ("json", "compare")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {"OMP_NUM_THREADS": str(config.threads), "PYTHONPATH": os.pathsep.join(paths)}
    if device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*torchrun, "-m", "benchmarks.ranks", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror" in line] or [f"exit code {done.returncode}"]
        raise InputError(f"ranks={config.ranks}: {said[0].strip()}")
    return json.loads(done.stdout.splitlines()[-1])
