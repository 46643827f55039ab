"""A run's checkpoints: what goes into them and comes back out of them, all ranks together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sashimi.atomic import Entry
from sashimi.checkpoint import (
    Checkpoint,
    abandon_checkpoint,
    begin_checkpoint,
    compare_engines,
    has_checkpoint,
    part_name,
    prune,
    save_checkpoint,
    save_part,
    write_best,
)
from sashimi.distributed import Distributed
from sashimi.errors import InputError
from sashimi.model import Sashimi
from sashimi.model_folder import best_step, load_weights
from sashimi.objective import Rows, divide_rows, join_rows
from sashimi.optim import optimizer_tensors, restore_ema, restore_optimizer
from sashimi.run_state import RunState, check_state
from sashimi.stream import TrainingData
from sashimi.tracking import Tracker
from sashimi.zero import Zero


class Saver:
    """Saves and restores what one rank trains. All ranks construct it alike and call its methods together."""

    def __init__(
        self,
        dist: Distributed,
        model: Sashimi,
        optimizer: torch.optim.Optimizer,
        ema: AveragedModel | None,
        rows: list[Rows],
        data: TrainingData,
        run_config: dict[str, Any],
        folder: Path,
        keep_last: int,
    ) -> None:
        """Args:
        dist: this process among the others.
        model, optimizer: not prepared, or as they were before that.
        ema: the average of the model's weights, if there is one.
        rows: of each micro-batch of a step, with what they carry.
        data: this rank's share of the segments.
        run_config: the whole config as JSON, saved beside the weights.
        folder: of checkpoints, runs/NAME/checkpoints.
        keep_last: newest checkpoints to keep, beside the best one.
        """
        self.dist, self.model, self.optimizer, self.ema = dist, model, optimizer, ema
        self.rows, self.carry, self.data = rows, bool(rows[0].beginning), data
        self.run_config, self.folder, self.keep_last = run_config, folder, keep_last

    def restore(self, checkpoint: Checkpoint) -> RunState:
        """Put a checkpoint's content in place. InputError if it is of other audio or does not fit."""
        check_state(checkpoint.state)
        state = RunState.from_json(checkpoint.step, checkpoint.state)
        if checkpoint.state["data"] != self.data.fingerprint:
            raise InputError(
                f"data.shards={self.data.data.shards}: not the shards that the checkpoint was trained on; name those, "
                "or start another run from its weights with --init-from and a new --name"
            )
        compare_engines(checkpoint.state, self.dist.zero_stage, self.dist.world_size)
        if isinstance(self.dist, Zero):
            self.dist.restore_optimizer_part(checkpoint.folder / part_name(self.dist.rank))
        else:
            load_weights(self.model, checkpoint.model, "checkpoint")
            restore_optimizer(self.optimizer, self.model.named_parameters(), checkpoint.optimizer)
        if self.ema is not None:
            # A run that had no average so far starts one from its weights.
            restore_ema(self.ema, checkpoint.ema or checkpoint.model, checkpoint.state["ema_updates"])
        self.dist.loss_scale = checkpoint.state["loss_scale"]
        if self.carry:
            division = (self.data.micro_batch, self.data.accumulation, self.dist.rank, self.dist.world_size)
            parts = divide_rows(checkpoint.carried, self.rows[0].beginning, *division)
            for rows, part in zip(self.rows, parts, strict=True):
                rows.carried = part
        return state

    def save(self, state: RunState, tracker: Tracker) -> bool:
        """Write a checkpoint of this state. False, and a message, if it could not be written."""
        dist, place = self.dist, (self.folder, state.step)

        def on_all(write: Callable[[], Any]) -> list[Any] | None:
            """What each rank's `write` returned, in their order; None, and a message, if one could not write."""
            result, failure = None, ""
            try:
                result = write()
            except (OSError, InputError) as error:
                failure = str(error)
            results = dist.gather([(result, failure)])
            if reasons := "; ".join(failure for _, failure in results if failure):
                if dist.is_main:
                    tracker.note(f"step {state.step} is NOT SAVED: {reasons}; older checkpoints stand")
                return None
            return [result for result, _ in results]

        with tracker.pause(), dist.whole_model(self.model) as model:
            carried = self._rows_of_all()
            parts: dict[str, Entry] | None = None
            if isinstance(dist, Zero):
                if on_all(lambda: begin_checkpoint(*place) if dist.is_main else None) is None:
                    return False
                written = on_all(lambda: save_part(*place, dist.rank, dist.optimizer_part()))
                if written is None:
                    if dist.is_main:
                        abandon_checkpoint(*place)
                    return False
                parts = dict(written)
            content = (model.state_dict(), parts, carried)
            return on_all(lambda: self._write(state, tracker, *content) if dist.is_main else None) is not None

    def _rows_of_all(self) -> dict[str, Tensor]:
        """On the main process, what the rows of the global batch carry; empty elsewhere, and if nothing is carried."""
        if not self.carry:
            return {}
        own = [tuple(t.cpu() for t in rows.carried) for rows in self.rows]
        rows_of_all = self.dist.gather_to_main(own)
        return join_rows(rows_of_all, self.data.accumulation, self.dist.world_size) if self.dist.is_main else {}

    def _write(
        self,
        now: RunState,
        tracker: Tracker,
        weights: dict[str, Tensor],
        parts: dict[str, Entry] | None,
        carried: dict[str, Tensor],
    ) -> None:
        spoilt = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if spoilt:  # by the last update, whose loss was finite
            raise InputError(f"NaN or infinity in {spoilt[0]} ({len(spoilt)} of {len(weights)} tensors)")
        state = {
            **now.to_json(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "loss_scale": self.dist.loss_scale,
            "data": self.data.fingerprint,
            "world_size": self.dist.world_size,
            "zero_stage": self.dist.zero_stage,
            "mixed_precision": self.dist.precision,
        }
        save_checkpoint(
            self.folder,
            now.step,
            weights,
            optimizer_tensors(self.optimizer, self.model.named_parameters()),
            state,
            self.run_config,
            None if self.ema is None else self.ema.module.state_dict(),
            parts,
            carried,
        )
        run = self.folder.parent
        try:
            if now.best_step is not None and now.best_bits is not None and has_checkpoint(self.folder, now.best_step):
                write_best(run, now.best_step, now.best_bits)
            prune(self.folder, self.keep_last, best_step(run))
        except (OSError, InputError) as error:
            tracker.note(f"step {now.step} is saved, but best.json or old checkpoints are as they were: {error}")
