"""The training loop: read it top to bottom. Everything it needs arrives as an argument.

A step's loss is (nats over the scored samples of the global batch) / (their number), whatever the ranks, the
micro-batches and their masks, so W ranks train as one process does.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sashimi.checkpoint import Checkpoint
from sashimi.distributed import Distributed, leave_workers_to_their_loader
from sashimi.errors import InputError, LostWorker, Unavailable
from sashimi.layers import compile_layers
from sashimi.loss import bits_per_sample
from sashimi.model import Sashimi
from sashimi.objective import Carried, Objective, Rows
from sashimi.optim import OptimConfig, build_ema, build_optimizer, lr_factor, plateau_step, set_learning_rates
from sashimi.recording import record
from sashimi.run_state import RunState
from sashimi.saver import Saver
from sashimi.stream import Batch, TrainingData
from sashimi.tracking import Tracker

_UNREADABLE = "restore the shards and go on with --resume auto"
_KILLED = "if memory or /dev/shm was full, make room, or lower data.workers or data.prefetch; the same command goes on"
_DIVERGED = "lower optim.lr or set optim.clip, and go on with --resume auto"


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what batches, and how often to validate and save."""

    steps: int = 100_000
    """Optimizer steps in all; a resumed run goes on to the same number."""
    batch_size: int = 8
    """Segments a step, over all ranks (the global batch)."""
    micro_batch: int = 0
    """Segments a forward pass and rank; the rest of the batch is accumulated. 0: batch_size / world size."""
    recompute: bool = False
    """Keep each layer's input only, and compute the layer once more for its gradient: less memory, slower steps."""
    compile: bool = False
    """Run the layers by torch.compile: fewer and larger kernels, which is for GPUs. The first step takes minutes."""
    graph: bool = True
    """On a GPU, launch each forward and each backward pass as one CUDA graph. Not with ZeRO."""
    valid_every: int = 1000
    """Steps between evaluations of the whole validation split."""
    save_every: int = 1000
    """Steps between checkpoints; a new best validation and the end are saved too."""
    keep_last: int = 2
    """Newest checkpoints to keep, beside the best one."""
    max_bad_steps: int = 10
    """Steps in a row without a finite loss and gradient (each skipped on all ranks) that stop the run."""
    timeout_minutes: float = 30
    """How long a rank waits for the others, who may be lost or busy with a save, before the run ends with an error."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "valid_every", "save_every", "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)}: must be at least 1")
        if self.steps * self.batch_size > 1 << 62:  # positions are 64-bit numbers
            raise InputError(f"train.steps={self.steps}: with batch_size={self.batch_size} more than 2^62 segments")
        if self.batch_size > 1 << 24:
            raise InputError(f"train.batch_size={self.batch_size}: must be at most {1 << 24}")
        if self.micro_batch < 0:
            raise InputError(f"train.micro_batch={self.micro_batch}: must be 0 (batch_size / world size) or more")
        if not 0 < self.timeout_minutes <= 7 * 24 * 60:
            raise InputError(f"train.timeout_minutes={self.timeout_minutes}: must be above 0 and at most a week, 10080")


class Trainer:
    """One run on one rank. All ranks construct it alike and call `train` together."""

    def __init__(
        self,
        dist: Distributed,
        model: Sashimi,
        data: TrainingData,
        config: TrainConfig,
        optim: OptimConfig,
        seed: int,
        run_config: dict[str, Any],
        folder: Path,
    ) -> None:
        """Args:
        dist: this process among the others.
        model: on `dist.device`, not prepared.
        data: this rank's share of the training and validation splits.
        seed: of dropout.
        run_config: the whole config as JSON, saved beside the weights.
        folder: of checkpoints, runs/NAME/checkpoints.
        """
        self.dist, self.model, self.data = dist, model, data
        self.config, self.optim, self.seed, self.folder = config, optim, seed, folder
        self.state, self.tracker = RunState(), Tracker()
        if optim.ema and dist.zero_stage == 3:
            raise InputError(
                f"optim.ema={optim.ema}: ZeRO stage 3 divides the weights; use stage 1 or 2, or set it to 0"
            )
        if config.compile and dist.zero_stage == 3:
            raise InputError("train.compile=true: ZeRO stage 3 divides the weights; use stage 1 or 2, or set false")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.n_parameters = sum(p.numel() for p in self.parameters)
        self.ema = build_ema(model, optim.ema) if optim.ema else None
        # An update in one kernel keeps its step counts on the GPU, where older checkpoints of ZeRO have none.
        optimizer = build_optimizer(model.named_parameters(), optim, fused=not dist.zero_stage)
        if config.recompute:
            model.recompute_layers()
        if config.compile:
            compile_layers(model)
            if self.ema is not None:
                compile_layers(self.ema.module)
        objective = Objective(model, carry=data.data.carry > 0)
        self.rows = [Rows(objective.beginning) for _ in range(data.accumulation)]
        self.saver = Saver(dist, model, optimizer, self.ema, self.rows, data, run_config, folder, config.keep_last)
        self.beginning = objective.beginning
        if config.graph and dist.device.type == "cuda" and not dist.zero_stage:
            self._record(objective)
        self.objective, self.optimizer = dist.prepare(objective, optimizer)

    def _record(self, objective: Objective) -> None:
        """Have the passes of a training step launched at once, or say why not."""
        model = self.model.config
        try:
            if self.config.recompute and model.dropout:
                raise Unavailable("dropout that is drawn once more for train.recompute is in another graph")
            if model.kernel == "cauchy_keops":
                raise Unavailable("PyKeOps waits for the GPU")
            record(objective, self._example(), self.dist.autocast, accumulate=self.data.accumulation > 1)
        except Unavailable as reason:
            warnings.warn(f"train.graph: steps are launched kernel by kernel, {reason}", stacklevel=2)

    def _example(self) -> tuple[torch.Tensor, ...]:
        """Inputs of the objective, of the shapes of a micro-batch."""
        size = (self.data.micro_batch, self.data.data.segment)
        ids = torch.zeros(size, dtype=torch.int64, device=self.dist.device)
        mask = torch.ones(size, dtype=torch.bool, device=self.dist.device)
        carried = (tensor.repeat(size[0], *[1] * (tensor.dim() - 1)) for tensor in self.beginning)
        return ids, ids.clone(), mask, *carried

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as if the run had never stopped. InputError if the shards hold other audio."""
        self.state = self.saver.restore(checkpoint)

    @property
    def finished(self) -> str:
        """How to go on with a run that has no step left to do; "" for any other."""
        step, steps = self.state.step, self.config.steps
        return (
            "" if step < steps else f"finished at step {step}; to go on, give train.steps more than that (now {steps})"
        )

    def save(self) -> bool:
        """Write a checkpoint, all ranks together. False, and a message, if it could not be written."""
        return self.saver.save(self.state, self.tracker)

    def train(self, tracker: Tracker, listen: Callable[[nn.Module, int], None] = lambda model, step: None) -> bool:
        """Run to the last step, or until a signal asks to stop. Saves at the end. True if the run is complete.

        `tracker` takes scalars, and is a silent one on other ranks than the main one. `listen` is given the model that
        validation uses after every step, on every rank, to generate and log audio when it likes.

        Raises `InputError` if the loss is not finite `max_bad_steps` times in a row (nothing is saved within such a
        row), if in as many steps no segment can be decoded, after saving if one cannot and that is fatal, or if a
        loader's worker was killed, and if the last save fails.
        """
        self.tracker = tracker
        if self.dist.is_main:
            place, how = f"{self.dist.world_size} x {self.dist.device.type}", f"precision {self.dist.precision}"
            if self.dist.zero_stage:
                how += f", ZeRO stage {self.dist.zero_stage}"
            if self.dist.restarts:
                how += f", restart {self.dist.restarts} of the SLURM job"
            tracker.note(f"from step {self.state.step}: {self.n_parameters:,} parameters on {place}, {how}")
        if self.dist.restarts:
            tracker.log(self.state.step, {"slurm_restarts": self.dist.restarts})
        if self.state.step == 0:
            self.validate()
        batches = self.data.batches(self.state.position)
        leave_workers_to_their_loader()
        saved, unscored = self.state.step, 0
        while self.state.step < self.config.steps:
            micro_batches, lost = self._next(batches)
            faults = [fault for batch in micro_batches for fault in batch.faults]
            for fault in faults:
                self.tracker.note(f"cannot decode {fault}; it is not scored")
            scored = sum(batch.scored for batch in micro_batches)
            count, stop, n_faults, n_lost = self.dist.sum(scored, self.dist.stop_requested, len(faults), len(lost))
            if stop or n_lost or (n_faults and self.data.data.on_damage == "fatal"):
                # This batch has not been consumed: a resumed run begins with it. Weights that have just given no
                # finite loss are not worth a checkpoint: an older one is.
                if saved != self.state.step and not self.state.bad and not self.save():
                    raise InputError(f"{self.folder}: the last save failed, make room; steps after {saved} are lost")
                if stop:
                    return False
                if n_lost:
                    raise LostWorker(f"stopped after step {self.state.step}: {self.dist.gather(lost)[0]}; {_KILLED}")
                found = "; ".join(self.dist.gather(faults))
                raise InputError(f"data.on_damage=fatal stopped after step {self.state.step}: {found}; {_UNREADABLE}")
            unscored = 0 if count or not n_faults else unscored + 1
            if unscored == self.config.max_bad_steps:
                found = "; ".join(self.dist.gather(faults)[:1])
                raise InputError(f"no segment of {unscored} steps could be decoded, such as {found}; {_UNREADABLE}")

            self.step(micro_batches, int(count))
            step, last = self.state.step, self.state.step == self.config.steps
            if self.state.bad and last:
                raise InputError(f"no finite loss at the last step, {step}, so it is not saved; {_DIVERGED}")
            if self.state.bad:
                continue
            try:
                improved = (step % self.config.valid_every == 0 or last) and self.validate()
            except LostWorker:
                self.save()
                raise
            listen(self.model if self.ema is None else self.ema.module, step)
            if improved or step % self.config.save_every == 0 or last:
                if self.save():
                    saved = step
                elif last:
                    raise InputError(f"{self.folder}: the last save failed, make room; steps after {saved} are lost")
        return True

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], list[str]]:
        """This rank's micro-batches of a step, or none and why, if a worker that makes them was killed."""
        try:
            return [next(batches) for _ in range(self.data.accumulation)], []
        except _LOST as error:
            return [], [_lost_worker(error, self.dist)]

    def rehearse(self) -> str:
        """Two steps that nothing is kept of, as a report: size, epoch, memory, time."""
        batches, seconds = self.data.batches(0), 0.0
        for _ in range(2):
            start = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.data.accumulation)]
            (count,) = self.dist.sum(sum(batch.scored for batch in micro_batches))
            self.step(micro_batches, int(count))
            seconds = time.perf_counter() - start  # of the second one: the first compiles and allocates
        memory = [int(line) for line in self.dist.gather([str(self.dist.peak_memory())])]
        lines = {
            "parameters": f"{self.n_parameters:,}",
            "segments per epoch": f"{self.data.segments_per_epoch:,}",
            "steps per epoch": f"{self.data.segments_per_epoch / self.config.batch_size:,.1f}",
            "batch": f"{self.config.batch_size} segments = {self.dist.world_size} ranks x "
            f"{self.data.accumulation} micro-batches x {self.data.micro_batch}",
            "memory per rank": f"{max(memory) / 2**30:.2f} GiB",
            "seconds per step": f"{seconds:.3f}",
            "all steps": f"{timedelta(seconds=round(seconds * self.config.steps))}, without validation",
        }
        return "\n".join(f"{name:<18} {value}" for name, value in lines.items())

    def step(self, micro_batches: list[Batch], count: int) -> None:
        """One global batch with `count` scored samples over all ranks: forward, backward, agree, update."""
        now = self.state
        torch.manual_seed(int(np.random.SeedSequence([self.seed, now.step, self.dist.rank]).generate_state(1)[0]))
        factor = lr_factor(now.step, self.config.steps, now.plateau, self.optim)
        set_learning_rates(self.optimizer, factor)
        self.objective.train()

        own_nats = []
        for i, batch in enumerate(micro_batches):
            with self.dist.synchronize_when(i == len(micro_batches) - 1, self.objective):
                nats = self.rows[i].play(self.objective, batch, self.dist.device)
                self.dist.backward(nats / max(count, 1))
            own_nats.append(nats.detach())
        norm = self.dist.clip_gradients(self.parameters, self.optim.clip)
        (nats_sum,) = self.dist.sum(float(torch.stack(own_nats).sum()))

        # The reduced loss and gradient are the same on every rank, so all of them update or none does.
        finite = math.isfinite(nats_sum) and math.isfinite(norm)
        if finite and count:
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        else:
            self.dist.discard_gradients(self.optimizer)
        # An fp16 gradient that overflows only lowers the loss scale: nothing is wrong with the run.
        overflow = math.isfinite(nats_sum) and not finite and self.dist.loss_scale.get("scale", 0.0) > 1
        self.state = now = replace(
            now,
            step=now.step + 1,
            position=now.position + self.config.batch_size,
            skipped=now.skipped + (not finite or not count),
            bad=0 if finite or overflow else now.bad + 1,
        )
        self.tracker.step(
            now.step,
            {
                "train/bits": bits_per_sample(nats_sum, count),
                "train/grad_norm": norm,
                "train/skipped_steps": now.skipped,
                **{f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups},
                "memory_bytes": self.dist.peak_memory(),
            },
            samples=count,
            position=now.position,
        )
        if now.bad >= self.config.max_bad_steps:
            bad = [b for b, n in zip(micro_batches, own_nats, strict=True) if not math.isfinite(float(n))]
            names = self.dist.gather(self.data.describe([i for b in bad for i in b.segment_ids.tolist() if i >= 0]))
            raise InputError(
                f"no finite loss and gradient in {now.bad} steps up to {now.step}, last gradient norm {norm}; "
                f"segments of the last one: {', '.join(names) or 'finite losses, only the gradient is not'}; "
                f"{_DIVERGED}"
            )

    def validate(self) -> bool:
        """Evaluate, log, step the plateau. True if this is the best validation so far."""
        objective = self.objective
        if self.ema is not None and self.state.step > 0:
            assert isinstance(self.ema.module, Sashimi)
            objective = Objective(self.ema.module, bool(self.beginning))
        with self.tracker.pause():
            nats, count, faults = evaluate(objective, self.data.valid_batches, self.dist, self.beginning)
        if self.dist.is_main and self.state.step == 0:
            for fault in faults:
                self.tracker.note(f"validation goes without {fault}")
        bits, now = bits_per_sample(nats, count), self.state
        self.tracker.log(now.step, {"valid/bits": bits})
        if now.step > 0:
            now = replace(now, plateau=plateau_step(now.plateau, bits, self.optim))
        improved = now.step > 0 and bits < (math.inf if now.best_bits is None else now.best_bits)
        if improved:
            now = replace(now, best_step=now.step, best_bits=bits)
        self.state = now
        return improved


@torch.no_grad()
def evaluate(
    objective: nn.Module, batches: Iterable[Batch], dist: Distributed, beginning: Carried = ()
) -> tuple[float, int, list[str]]:
    """Summed nats, scored samples and undecodable segments of all ranks' batches: exact for any number of ranks.

    `beginning`: the objective's own, if its model's state is to be carried from batch to batch. Raises LostWorker on
    all ranks.
    """
    objective.eval()
    nats, count = 0.0, 0
    faults: list[str] = []
    lost: list[str] = []
    rows = Rows(beginning)
    try:
        for batch in batches:
            with dist.autocast():
                nats += float(rows.play(objective, batch, dist.device))
            count += batch.scored
            faults += batch.faults
    except _LOST as error:
        lost = [_lost_worker(error, dist)]
    nats, total, n_lost = dist.sum(nats, count, len(lost))
    if n_lost:
        raise LostWorker(f"{dist.gather(lost)[0]}; {_KILLED}")
    return nats, int(total), dist.gather(faults)


_LOST = (RuntimeError, ConnectionError, EOFError)  # what a loader may raise whose worker was killed


def _lost_worker(error: Exception, dist: Distributed) -> str:
    """A line on it, if that is why; any other error is raised again."""
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
        raise error
    return f"a loader's worker ended unexpectedly on rank {dist.rank} ({error})"
