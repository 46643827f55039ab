"""Checkpoints, whole or absent: written, kept, found again, and compared with the run that would go on from one.

    runs/NAME/best.json                         {"step": ..., "valid/bits": ...}
    runs/NAME/checkpoints/step-00001000/        model.safetensors, ema.safetensors (if averaged), optimizer.safetensors,
                                                carried.safetensors (with data.carry), config.json (the run's),
                                                state.json, manifest.json
                                                under ZeRO, zero-00000.pt, ... of each rank for optimizer.safetensors

Each is a model folder, see `model_folder`. Nothing here is ever unpickled: zero.py alone reads the .pt files, of a run
that goes on. One process writes, after all have written theirs under ZeRO; any number may read.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sashimi import atomic
from sashimi.errors import InputError
from sashimi.model_folder import best_step, checkpoints_of, read_safetensors, require_whole, to_safetensors

# What a resumed run must share with its checkpoint, and the exceptions: settings of speed and of the damage policy.
FIXED_ON_RESUME = ("model", "audio", "data", "seed")
FREE_ON_RESUME = frozenset(
    {"model.kernel", "data.shards", "data.cache", "data.workers", "data.prefetch", "data.on_damage"}
)


class Checkpoint(NamedTuple):
    """All that a run needs to go on. Tensors are on the CPU, keyed by parameter name."""

    folder: Path
    step: int  # finished optimizer steps
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # see optim.optimizer_tensors; empty under ZeRO, where ranks have their parts
    ema: dict[str, Tensor] | None
    carried: dict[str, Tensor]  # see objective.join_rows; empty if nothing is
    state: dict[str, Any]  # the trainer's: position, plateau, loss scale, ...
    config: dict[str, Any]  # the run's, with "model" and "audio"


# ---- writing


def save_checkpoint(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    parts: Mapping[str, atomic.Entry] | None = None,
    carried: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-XXXXXXXX and return it. OSError (a full disk, say) leaves `folder` as it was.

    `folder` is runs/NAME/checkpoints; `state` and `config` must be JSON. A checkpoint of that step is replaced.
    `parts`: what the ranks' `save_part` returned, where the optimizer's state is theirs.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        yield "model.safetensors", to_safetensors(model)
        if ema is not None:
            yield "ema.safetensors", to_safetensors(ema)
        if parts is None:
            yield "optimizer.safetensors", to_safetensors(optimizer)
        if carried:
            yield "carried.safetensors", to_safetensors(carried)
        yield "config.json", atomic.to_json(config)
        yield "state.json", atomic.to_json({**state, "step": step})

    target = _folder(folder, step)
    atomic.write_folder(target, files(), parts)
    return target


def begin_checkpoint(folder: Path, step: int) -> None:
    """What one process does before each writes its part with `save_part`; then it calls `save_checkpoint`."""
    atomic.begin_folder(_folder(folder, step))


def save_part(folder: Path, step: int, rank: int, content: bytes) -> tuple[str, atomic.Entry]:
    """Write a rank's share of the optimizer's state; returns an item of `parts` for `save_checkpoint`."""
    name = part_name(rank)
    return name, atomic.write_part(_folder(folder, step), name, content)


def part_name(rank: int) -> str:
    """The file of a rank's share in a checkpoint."""
    return f"zero-{rank:05d}.pt"


def abandon_checkpoint(folder: Path, step: int) -> None:
    """Delete a checkpoint that was begun, and of which a part could not be written."""
    atomic.abandon_folder(_folder(folder, step))


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the `keep_last` newest and the one of `best_step`, and what killed saves left."""
    assert keep_last >= 1
    for step, path in checkpoints_of(folder)[keep_last:]:
        if step != best_step:
            atomic.remove_folder(path)
    atomic.clear_unfinished(folder, "step-*")


def rewind(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Before a run goes on from `step`: rename its later checkpoints to step-XXXXXXXX.abandoned, and log that.

    Otherwise `--resume auto` and `prune` would take the abandoned branch, or a damaged folder, for the newest state.
    What was set aside before stays: where there is such a name, it is .abandoned-2, and so on.
    """
    for later, path in checkpoints_of(folder):
        if later > step:
            names = itertools.chain(("abandoned",), (f"abandoned-{n}" for n in itertools.count(2)))
            free = (place for name in names if not (place := path.with_name(f"{path.name}.{name}")).exists())
            abandoned = path.rename(next(free))
            log(f"going on from step {step}: {path} is now {abandoned.name}")
    best = folder.parent / "best.json"
    if (best_step(folder.parent) or 0) > step:
        best.unlink()


def write_best(run: Path, step: int, bits: float) -> None:
    """Name `step` the best checkpoint of the run folder: `bits` (per sample, validation) is its lowest so far."""
    atomic.write_json(run / "best.json", {"step": step, "valid/bits": bits})


# ---- reading


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether `folder` holds a checkpoint of that step."""
    return step in dict(checkpoints_of(folder))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, checksums verified. InputError naming the file and the fault if it is damaged."""
    require_whole(folder)
    state = atomic.read_json(folder / "state.json")
    named, step = re.fullmatch(r"step-(\d+)", folder.name), state.get("step")
    if type(step) is not int or step < 0 or (named and int(named[1]) != step):
        raise InputError(f"{folder / 'state.json'}: step={step}: not that of the folder's name; give it its name again")
    ema, carried = folder / "ema.safetensors", folder / "carried.safetensors"
    return Checkpoint(
        folder=folder,
        step=state.pop("step"),
        model=read_safetensors(folder / "model.safetensors"),
        optimizer={} if state.get("zero_stage") else read_safetensors(folder / "optimizer.safetensors"),
        ema=read_safetensors(ema) if ema.exists() else None,
        carried=read_safetensors(carried) if carried.exists() else {},
        state=state,
        config=atomic.read_json(folder / "config.json"),
    )


def find_resume(folder: Path, resume: str, log: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None for a run that starts. `folder` is runs/NAME/checkpoints.

    "auto": the newest whole checkpoint; what it passes over is logged. None only if there is no checkpoint at all.
    "never": always None. Any other value is the path of one of the run's own checkpoints. InputError if that one is
    damaged, if checkpoints exist and none is whole, and if "never" would write over existing ones: nothing starts
    from scratch beside a run's checkpoints.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; move it away, or take another --name")
    existing = checkpoints_of(folder)
    best_step(folder.parent)  # for its error, before anything of the run is touched
    if resume == "never":
        if existing:
            raise InputError(
                f"{folder}: has checkpoints up to step {existing[0][0]}; "
                "go on with --resume auto, or start afresh under another --name"
            )
        return None
    if resume != "auto":
        if os.path.realpath(resume) not in {os.path.realpath(path) for _, path in existing}:
            raise InputError(
                f"resume={resume}: is not a checkpoint of this run; choose one of {folder}/step-XXXXXXXX, "
                "--resume auto for the newest, or --init-from for the weights of another run"
            )
        require_whole(Path(resume), "choose a runs/NAME/checkpoints/step-XXXXXXXX, or --resume auto for the newest")
        return Path(resume)
    for _, path in existing:
        found = atomic.faults(path)
        if not found:
            return path
        log(f"passed over a damaged checkpoint: {'; '.join(found)}")
    if existing:
        raise InputError(
            f"{folder}: none of its {len(existing)} checkpoints is whole; restore one from a copy, "
            "or start afresh under another --name"
        )
    log(f"{folder}: no checkpoint yet, starting from step 0")
    return None


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """InputError if a run may not resume: model, audio, data or seed differ. Both are run configs as JSON objects.

    What only changes speed may differ: the kernel algorithm, the loader's workers and prefetch, the damage policy.
    Weights to start from (init_from) must be those that the run did start from.
    """
    start = current.get("init_from")
    if start is not None and start != saved.get("init_from"):
        raise InputError(
            f"init_from={start}: this run exists and did not start there; give a new --name to start from it, "
            "or leave it out to go on"
        )
    for section in FIXED_ON_RESUME:
        old, new = _flatten(section, saved.get(section)), _flatten(section, current.get(section))
        for field in sorted(old.keys() | new.keys()):
            if field not in FREE_ON_RESUME and old.get(field) != new.get(field):
                raise InputError(
                    f"{field}={new.get(field)}: the checkpoint to resume from has {old.get(field)}; put that back, "
                    "or start another run from its weights with --init-from and a new --name"
                )


def compare_engines(state: Mapping[str, Any], zero_stage: int, world_size: int) -> None:
    """InputError if a run may not resume: the optimizer's state is divided otherwise, by ZeRO, than it would be."""
    saved = (state.get("zero_stage", 0), state["world_size"])
    if saved != (zero_stage, world_size) and (saved[0] or zero_stage):
        old, new = (
            f"ZeRO stage {stage} on {ranks} processes" if stage else "DDP"
            for stage, ranks in (saved, (zero_stage, world_size))
        )
        raise InputError(
            f"the checkpoint to resume from is of {old}, and this is {new}; start it as it was, "
            "or start another run from its weights with --init-from and a new --name"
        )


# ---- helpers


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """{"model": {"pool": (4, 4)}} -> {"model.pool": [4, 4]}; sequences become lists, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flatten(f"{key}.{name}", item).items()}
    return {key: list(value) if isinstance(value, tuple) else value}
