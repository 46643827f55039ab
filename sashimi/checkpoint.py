"""Checkpoints, whole or absent, and the model folders that sampling, evaluation and fine-tuning read.

    runs/NAME/best.json                         {"step": ..., "valid/bits": ...}
    runs/NAME/checkpoints/step-00001000/        model.safetensors, ema.safetensors (if averaged), optimizer.safetensors,
                                                config.json (the run's), state.json, manifest.json
                                                under ZeRO, zero-00000.pt, ... of each rank for optimizer.safetensors

A *model folder* has model.safetensors (or ema.safetensors, which goes first) and a config.json with "model" and
"audio"; every checkpoint is one. Nothing here is ever unpickled, so folders from strangers are safe to load: zero.py
alone reads the .pt files, of a run that goes on. One process writes, after all have written theirs under ZeRO; any
number may read.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sashimi import atomic, parsing
from sashimi.audio import AudioConfig
from sashimi.errors import InputError
from sashimi.foreign import legacy
from sashimi.model import ModelConfig, Sashimi

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
) -> Path:
    """Write `folder`/step-XXXXXXXX and return it. OSError (a full disk, say) leaves `folder` as it was.

    `folder` is runs/NAME/checkpoints; `state` and `config` must be JSON. A checkpoint of that step is replaced.
    `parts`: what the ranks' `save_part` returned, where the optimizer's state is theirs.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        yield "model.safetensors", _to_safetensors(model)
        if ema is not None:
            yield "ema.safetensors", _to_safetensors(ema)
        if parts is None:
            yield "optimizer.safetensors", _to_safetensors(optimizer)
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
    for step, path in _steps(folder)[keep_last:]:
        if step != best_step:
            atomic.remove_folder(path)
    atomic.clear_unfinished(folder, "step-*")


def rewind(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Before a run goes on from `step`: rename its later checkpoints to step-XXXXXXXX.abandoned, and log that.

    Otherwise `--resume auto` and `prune` would take the abandoned branch, or a damaged folder, for the newest state.
    """
    for later, path in _steps(folder):
        if later > step:
            abandoned = path.with_name(f"{path.name}.abandoned")
            if abandoned.exists():
                atomic.remove_folder(abandoned)
            path.rename(abandoned)
            log(f"going on from step {step}: {path} is now {abandoned.name}")
    best = folder.parent / "best.json"
    if (best_step(folder.parent) or 0) > step:
        best.unlink()


def write_best(run: Path, step: int, bits: float) -> None:
    """Name `step` the best checkpoint of the run folder: `bits` (per sample, validation) is its lowest so far."""
    atomic.write_json(run / "best.json", {"step": step, "valid/bits": bits})


def best_step(run: Path) -> int | None:
    """The step that `write_best` named last, if any."""
    best = run / "best.json"
    if not best.exists():
        return None
    step = atomic.read_json(best).get("step")
    if type(step) is not int:
        raise InputError(
            f"{best}: step={step}: must be a number; delete the file, the next best checkpoint writes it anew"
        )
    return step


# ---- reading


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether `folder` holds a checkpoint of that step."""
    return step in dict(_steps(folder))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, checksums verified. InputError naming the file and the fault if it is damaged."""
    _require_whole(folder)
    state = atomic.read_json(folder / "state.json")
    named, step = re.fullmatch(r"step-(\d+)", folder.name), state.get("step")
    if type(step) is not int or step < 0 or (named and int(named[1]) != step):
        raise InputError(f"{folder / 'state.json'}: step={step}: not that of the folder's name; give it its name again")
    ema = folder / "ema.safetensors"
    return Checkpoint(
        folder=folder,
        step=state.pop("step"),
        model=_read_safetensors(folder / "model.safetensors"),
        optimizer={} if state.get("zero_stage") else _read_safetensors(folder / "optimizer.safetensors"),
        ema=_read_safetensors(ema) if ema.exists() else None,
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
    existing = _steps(folder)
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
        _require_whole(Path(resume), "choose a runs/NAME/checkpoints/step-XXXXXXXX, or --resume auto for the newest")
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


# ---- model folders


def save_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model_config: Mapping[str, Any],
    audio_config: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    format: str = "sashimi",
) -> None:
    """Write a model folder. `source` says where the weights come from; `format` names the class that runs them.

    InputError if `folder` exists and is not an empty folder: it may be a checkpoint, with more than weights in it.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; delete it or give another one")
    config = {"format": format, "model": dict(model_config), "audio": dict(audio_config), "source": source}
    atomic.write_folder(
        folder, [("model.safetensors", _to_safetensors(tensors)), ("config.json", atomic.to_json(config))]
    )


def find_model_folder(path: Path) -> Path:
    """The model folder meant by `path`: itself, or for a run folder its best checkpoint, else the newest whole one."""
    if path.is_file():
        raise InputError(
            f"{path}: is a file; give a model folder, which tools/import_checkpoint.py makes of a checkpoint"
        )
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a model folder, a checkpoint or a run folder")
    if (path / "config.json").exists():
        return path
    checkpoints = _steps(path / "checkpoints")
    best = best_step(path)
    for step, folder in checkpoints:
        if step == best:
            return folder
    for _, folder in checkpoints:
        if not atomic.faults(folder):
            return folder
    if checkpoints:
        raise InputError(f"{path}: none of its {len(checkpoints)} checkpoints is whole; restore one from a copy")
    raise InputError(f"{path}: no config.json and no checkpoints; give a model folder, a checkpoint or a run folder")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json: objects "model" and "audio", and more. InputError if it is not that."""
    config = atomic.read_json(folder / "config.json")
    for key in ("model", "audio"):
        if not isinstance(config.get(key), dict):
            raise InputError(f'{folder / "config.json"}: "{key}" is missing or not an object')
    return config


def read_audio_config(path: str | Path) -> AudioConfig:
    """How the levels of a model folder's, checkpoint's or run's model are audio: sample rate, quantizer, bits."""
    folder = find_model_folder(Path(path))
    return parsing.build(AudioConfig, read_config(folder)["audio"], str(folder / "config.json"))


def load_model_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (averaged ones, if there) and config ("model", "audio", ...) of what `find_model_folder` finds."""
    folder = find_model_folder(path)
    if (folder / atomic.MANIFEST).exists():
        _require_whole(folder)
    config = read_config(folder)
    ema = folder / "ema.safetensors"
    return _read_safetensors(ema if ema.exists() else folder / "model.safetensors"), config


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `model`. InputError naming `source` and the first few differences if they do not fit.

    Numbers that are not real, or not finite, do not fit either.
    """
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in tensors]
    differences += [f"{name} is unknown" for name in tensors if name not in own]
    differences += [
        f"{name} is {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    differences += [f"{name} is {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()]
    if differences:
        raise InputError(f"{source}: its weights do not fit the model: {_listed(differences)}")
    if spoilt := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise InputError(f"{source}: NaN or infinity in {_listed(spoilt)}; take an earlier checkpoint")
    model.load_state_dict(tensors)


def require_size(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """InputError if weights, or audio, are of a model of another size than a folder's config says: before it is built.

    Else one digit too many in a config.json would ask for all memory there is. `load_weights` checks the rest.
    """
    model = parsing.build(ModelConfig, config["model"], f"{source}, model")
    audio = parsing.build(AudioConfig, config["audio"], f"{source}, audio")
    if model.levels != 1 << audio.bits:
        raise InputError(f"{source}: model.levels={model.levels}, but audio.bits={audio.bits} needs {1 << audio.bits}")
    depth = len(model.pool)
    last = f"tier.{'pooled.tier.' * depth}layers.{2 * model.n_layers - 2}.layer.s4.C"  # of the innermost tier
    expected = {
        "embedding.weight": [model.levels, model.d_model],
        last: [model.d_model * model.expand**depth, model.d_state // 2, 2],
    }
    differences = [
        f"{name} is {list(tensors[name].shape) if name in tensors else 'missing'} instead of {shape}"
        for name, shape in expected.items()
        if name not in tensors or list(tensors[name].shape) != shape
    ]
    if differences:
        raise InputError(f"{source}: its weights do not fit the model: {_listed(differences)}")


def build_model(config: Mapping[str, Any], source: str) -> nn.Module:
    """An untrained model from a model folder's config; `source` goes into the errors."""
    model_config = parsing.build(ModelConfig, config["model"], f"{source}, model")
    format = config.get("format", "sashimi")
    return Sashimi(model_config) if format == "sashimi" else legacy.build(format, model_config)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a model folder, checkpoint or run folder, with its (averaged) weights, in eval mode."""
    tensors, config = load_model_folder(Path(path))
    require_size(config, tensors, str(path))
    model = build_model(config, str(path))
    load_weights(model, tensors, str(path))
    return model.to(device).eval()


# ---- helpers


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint by name, whole or not, the newest first. OSError if they cannot be listed."""
    paths = folder.iterdir() if folder.is_dir() else ()  # glob would find nothing where it may not look
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in paths]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _listed(what: list[str]) -> str:
    return ", ".join(what[:3]) + (f" and {len(what) - 3} more" if len(what) > 3 else "")


def _require_whole(folder: Path, remedy: str = "use another one") -> None:
    if found := atomic.faults(folder):
        raise InputError(f"not a whole checkpoint: {'; '.join(found)}; {remedy}")


def _to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: of a type of numbers that torch does not have
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """{"model": {"pool": (4, 4)}} -> {"model.pool": [4, 4]}; sequences become lists, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flatten(f"{key}.{name}", item).items()}
    return {key: list(value) if isinstance(value, tuple) else value}
