"""launch/train.py with a record of the segments it consumes, and SIGKILL at a given place.

DOOM: "step 7 1" kills rank 1 in the backward pass of its 7th step, "valid 3 0" in its 3rd batch of validation data,
"save 2 all" the launcher and all ranks half-way through the 2nd write of optimizer state. "bug 3 0" is an error of
our own in rank 0's 3rd backward pass; "" nothing.
RECORD: a folder; each rank appends lines [attempt, step, segment ids] to its file there. ATTEMPT: their first number.
"""

import json
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import psutil
import torch

from sashimi import atomic, trainer
from sashimi.distributed import Distributed

PLACE, COUNT, WHO = (os.environ.get("DOOM") or "nowhere 0 none").split()
RANK = os.environ.get("RANK", "0")
visits = dict.fromkeys(("step", "valid", "save", "bug"), 0)


def pass_by(place: str) -> bool:
    """Count a visit; whether this is the one to die at."""
    visits[place] += 1
    return place == PLACE and visits[place] == int(COUNT) and RANK in (WHO, WHO.replace("all", RANK))


def die() -> None:
    launcher = psutil.Process(os.getppid())
    if WHO == "all":
        for process in (launcher, *launcher.children(recursive=True)):
            if process.pid != os.getpid():
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


backward, forward, write, step = (
    Distributed.backward,
    trainer.Objective.forward,
    atomic._write_flushed,
    trainer.Trainer.step,
)


def doomed_backward(self: Distributed, loss: torch.Tensor) -> None:
    if pass_by("step"):
        die()
    if pass_by("bug"):
        raise ArithmeticError("a bug")
    backward(self, loss)


def doomed_forward(self: trainer.Objective, *batch: torch.Tensor) -> torch.Tensor:
    if not self.training and pass_by("valid"):
        die()
    return forward(self, *batch)


def doomed_write(path: Path, content: bytes) -> None:
    if path.name == "optimizer.safetensors" and pass_by("save"):
        write(path, content[: len(content) // 2])
        die()
    write(path, content)


def recorded_step(self: trainer.Trainer, micro_batches: list[Any], count: int) -> None:
    step(self, micro_batches, count)
    ids = [i for batch in micro_batches for i in batch.segment_ids.tolist()]
    with (Path(os.environ["RECORD"]) / f"rank-{RANK}.jsonl").open("a") as file:
        file.write(json.dumps([int(os.environ["ATTEMPT"]), self.state.step, ids]) + "\n")


if __name__ == "__main__":
    Distributed.backward = doomed_backward  # type: ignore[method-assign]
    trainer.Objective.forward = doomed_forward  # type: ignore[method-assign]
    trainer.Trainer.step = recorded_step  # type: ignore[method-assign]
    atomic._write_flushed = doomed_write
    runpy.run_path(str(Path(__file__).parents[1] / "launch/train.py"), run_name="__main__")
