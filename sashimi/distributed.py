"""The one place that asks about ranks, devices and signals: everything else is told.

`Distributed` builds Accelerate's Accelerator. The data loader, the learning-rate schedule and gradient accumulation
are not given to Accelerate: it would divide the data again, step the schedule once a process, and rescale the loss.
"""

import ctypes
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from sashimi.errors import InputError, one_line

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_ONCE = 2.0  # seconds: a launcher passes on the signals that a terminal sends to all processes anyway

_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def deepspeed_file() -> str | None:
    """DeepSpeed's configuration by the launcher's choice: "" if it asks for DeepSpeed and names none; None: DDP."""
    asked = os.environ.get(_DEEPSPEED, "").lower() == "true"
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "") if asked else None


class Distributed:
    """This process among those that a launcher started: rank, device, precision, and what they do together."""

    def __init__(self, timeout_minutes: float = 30) -> None:
        """Join the others. Precision and devices are the launcher's choice; a machine without a GPU uses gloo."""
        # Accelerate would bring its own DeepSpeed; zero.py has ours, and what does not train needs none.
        asked = os.environ.pop(_DEEPSPEED, None)
        _check_environment()
        try:
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                gradient_accumulation_steps=1,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
                ],
            )
        except ValueError as error:  # a variable, or a package that an option needs
            raise InputError(f"the launcher's options or environment: {error}") from None
        finally:
            if asked is not None:
                os.environ[_DEEPSPEED] = asked
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the argument, and backward() would divide by it.
        self.accelerator.gradient_accumulation_steps = 1
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.precision = self.accelerator.mixed_precision
        # Whatever the environment says: TF32, of 10 bits, would make another kernel than generation's steps have.
        torch.set_float32_matmul_precision("highest")
        if self.device.type == "cpu":
            _keep_freed_memory()
            # Powers of A and gradients run out into numbers with which a processor is ten times as slow as with zeros.
            torch.set_flush_denormal(True)
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")  # set from the second time on that SLURM runs the job
        self.restarts = int(restarts) if restarts.isdecimal() else 0
        self.zero_stage = 0  # 1 to 3 in zero.Zero
        self.stop_requested = False

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """DDP around the module, autocast in its forward, fp16's loss scaling in the optimizer."""
        return self.accelerator.prepare(module, optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """The launcher's precision, for a module that `prepare` has not seen."""
        return self.accelerator.autocast()

    def synchronize_when(self, last: bool, module: nn.Module) -> AbstractContextManager[None]:
        """Let the ranks exchange gradients in the last micro-batch of a step only."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a share of the global mean, given as if this rank were alone.

        DDP averages the ranks' gradients, so the loss is multiplied by their number and the gradients add up.
        """
        self.accelerator.backward(loss * self.world_size)

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Unscale, clip to `max_norm` (0: no clipping) and return the norm of the whole gradient before that."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm or float("inf"))
        assert norm is not None
        return float(norm)

    def discard_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop a step's gradients; a loss scale backs off."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        optimizer.zero_grad()

    @property
    def loss_scale(self) -> dict[str, Any]:
        """The fp16 gradient scaler's state as JSON, empty in other precisions."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def whole_model(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within: the model with its whole weights, to read and run. All ranks enter together."""
        return nullcontext(model)

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in one small all-reduce of float64."""
        if self.world_size == 1:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(vector)
        return vector.tolist()

    def gather(self, values: list[T]) -> list[T]:
        """Every rank's values, in order of rank, on every rank."""
        return gather_object(values)

    def gather_to_main(self, values: list[T]) -> list[T]:
        """Every rank's values, in order of rank, on the main rank; nothing on the others."""
        if self.world_size == 1:
            return values
        of_ranks: list[Any] | None = [None] * self.world_size if self.is_main else None
        torch.distributed.gather_object(values, of_ranks)
        return [value for of_rank in of_ranks or () for value in of_rank]

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every rank."""
        return broadcast_object_list([value])[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    @contextmanager
    def stop_signals(self) -> Iterator[None]:
        """Within: SIGTERM, SIGUSR1 (of a scheduler that wants its node back) and SIGHUP set `stop_requested`.

        So does Ctrl-C, and KeyboardInterrupt follows at the end; or at a second one, that comes later.
        """
        interrupts: list[float] = []

        def request_stop(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True
            if number != signal.SIGINT:
                return
            if not interrupts and self.is_main:
                os.write(2, b"\nstopping after this step, to save; Ctrl-C once more ends at once, unsaved\n")
            interrupts.append(time.monotonic())
            if interrupts[-1] - interrupts[0] > _ONCE:
                raise KeyboardInterrupt

        # What nohup or a shell's & has ignored stays so. A batch script has the others ignored until this.
        unheard = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
        heard = [number for number in STOP_SIGNALS if number not in unheard]
        previous = {number: signal.signal(number, request_stop) for number in heard}
        try:
            yield
            if interrupts:
                raise KeyboardInterrupt
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Leave the process group. The pause lets gloo's threads end; without it the interpreter can abort at exit."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            time.sleep(0.2)

    def peak_memory(self) -> int:
        """Bytes: the most that was taken of the device, recorded passes' too; or by the process where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step.

    By default it returns large blocks to the system, which zeroes each page anew: up to a quarter of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)


def _check_environment() -> None:
    """InputError for what the environment says of processes and precision, if no launcher would."""
    numbers = {"RANK": 1 << 20, "LOCAL_RANK": 1 << 20, "WORLD_SIZE": 1 << 20, "MASTER_PORT": 65535}
    for name, most in numbers.items():
        value = os.environ.get(name, "0")
        if (name, value) == ("LOCAL_RANK", "-1"):  # how some launchers say that there is none
            continue
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) > most:
            raise InputError(f"{name}={value}: must be 0 to {most}; unset it, or let `accelerate launch` set it")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank >= size:
        raise InputError(
            f"RANK={rank}: must be below WORLD_SIZE={size}; unset both, or let `accelerate launch` set them"
        )
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 0 < gpus <= local_rank:
        raise InputError(
            f"LOCAL_RANK={local_rank}: more processes than the {gpus} GPUs here: lower num_processes to {gpus} a "
            "machine, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPUs"
        )
    for name in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise InputError(
                f"ACCELERATE_USE_{name}=true: take it out of Accelerate's configuration, or give another one "
                "(--config_file); models too large for a GPU are trained by DeepSpeed (launch/accelerate)"
            )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in ("", "no"):
        raise InputError(f"ACCELERATE_DYNAMO_BACKEND={dynamo}: set dynamo_backend to no, and train.compile to true")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: choose no, bf16 or fp16 (--mixed_precision)")


def begin_worker(worker: int) -> None:
    """What a loader's worker does first: a signal to the whole job is for the trainer, which saves and ends them.

    Where the trainer was killed, its workers go too. They might wait for ever for someone to take their batches.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_workers_to_their_loader() -> None:
    """Where a loader's worker was killed, let the loader raise it, not torch's handler of signals at any moment."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what its user can mend becomes one line on stderr and exit code 2.

    That is bad input, files and folders that cannot be used, too little memory, and a missing compiler. A rank that has
    lost another one says so in one line and leaves at once with exit code 1.
    """
    try:
        main()
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        if _is_lost_peer(error):
            reason = " ".join(str(error).partition(" This is typically")[0].split())
            _report(
                f"lost another process ({reason}), see its own message; the same command goes on from what is saved"
            )
            os._exit(1)  # the process group can neither go on nor be left in order
        line = _mendable(error)
        if line is None:
            raise
        _report(line)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is saved", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    finally:
        _end_workers()


def _report(line: str) -> None:
    rank, line = os.environ.get("RANK", "0"), one_line(line)
    print(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}", file=sys.stderr, flush=True)


def _end_workers() -> None:
    """Loaders' workers that an error left behind ignore SIGTERM, so the interpreter would wait for them for ever."""
    workers = multiprocessing.active_children()
    if workers:
        leave_workers_to_their_loader()  # not over our line
    for worker in workers:
        worker.kill()


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed. NCCL and the store have exceptions of their own, gloo has only its message."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _mendable(error: Exception) -> str | None:
    """One line for the user, or None if the error is ours."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another path, make room or mend its permissions"
    if isinstance(error, InputError | OSError):
        return str(error)
    # torch.OutOfMemoryError on a GPU; on a CPU numpy's MemoryError, or a plain RuntimeError of torch's allocator.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory|size calculation", str(error)):
        return (
            "out of memory: lower train.micro_batch, data.segment or the model's size, "
            "or --batch-size and --seconds where there are such"
        )
    if missing := re.search("InvalidCxxCompiler|TritonMissing|Failed to find C compiler", str(error)):
        remedy = "install a C++ compiler (g++), and on GPUs Triton, or set it to false"
        return f"train.compile=true: cannot compile ({missing[0]}): {remedy}"
    return None
