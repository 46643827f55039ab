"""Model folders, which sampling, evaluation and fine-tuning read; and where runs keep theirs.

A *model folder* has model.safetensors (or ema.safetensors, which goes first) and a config.json with "model" and
"audio". Exports and imports are such folders, and every checkpoint is one. Nothing here is ever unpickled, so folders
from strangers are safe to load.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sashimi import atomic, parsing
from sashimi.audio import AudioConfig
from sashimi.errors import InputError
from sashimi.foreign import legacy
from sashimi.model import ModelConfig, Sashimi


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
        folder, [("model.safetensors", to_safetensors(tensors)), ("config.json", atomic.to_json(config))]
    )


def find_model_folder(path: Path) -> Path:
    """The model folder meant by `path`: itself, or for a run folder its best checkpoint, else the newest whole one.

    InputError naming the newest whole one if the best is there and damaged: another model is taken only if asked for.
    """
    if path.is_file():
        raise InputError(
            f"{path}: is a file; give a model folder, which tools/import_checkpoint.py makes of a checkpoint"
        )
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a model folder, a checkpoint or a run folder")
    if (path / "config.json").exists():
        return path
    checkpoints = checkpoints_of(path / "checkpoints")
    best = best_step(path)
    found: list[str] = []
    for step, folder in checkpoints:
        if step == best and not (found := atomic.faults(folder)):
            return folder
    for _, folder in checkpoints:
        if not atomic.faults(folder):
            if found:
                raise InputError(
                    f"{path}: its best checkpoint is not whole: {'; '.join(found)}; "
                    f"restore it from a copy, or give {folder}, the newest whole one"
                )
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
        require_whole(folder)
    config = read_config(folder)
    ema = folder / "ema.safetensors"
    return read_safetensors(ema if ema.exists() else folder / "model.safetensors"), config


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


# ---- a run's checkpoints


def checkpoints_of(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint by name, whole or not, the newest first. OSError if they cannot be listed."""
    paths = folder.iterdir() if folder.is_dir() else ()  # glob would find nothing where it may not look
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in paths]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


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


# ---- files


def require_whole(folder: Path, remedy: str = "use another one") -> None:
    """InputError naming the files that are not as the folder's manifest says, and the remedy."""
    if found := atomic.faults(folder):
        raise InputError(f"not a whole checkpoint: {'; '.join(found)}; {remedy}")


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. InputError naming it if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: of a type of numbers that torch does not have
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def _listed(what: list[str]) -> str:
    return ", ".join(what[:3]) + (f" and {len(what) - 3} more" if len(what) > 3 else "")
