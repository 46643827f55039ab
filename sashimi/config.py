"""RunConfig: everything that defines a run, composed of the configs that live beside the code that reads them."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sashimi import atomic, parsing
from sashimi.audio import AudioConfig
from sashimi.errors import InputError
from sashimi.model import ModelConfig
from sashimi.optim import OptimConfig
from sashimi.stream import DataConfig
from sashimi.tracking import TrackConfig
from sashimi.trainer import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """A run. Its data and audio, its model, how it is optimized, and what it writes."""

    name: str = "run"
    """Name of the run; its folder is RUNS/NAME."""
    seed: int = 0
    """Seed of the initial weights, the data order, dropout and generated clips."""
    runs: str = "runs"
    """Folder of all runs."""
    resume: str = "auto"
    """auto: go on from the run's newest whole checkpoint, or start if it has none. never: refuse to if there is one.
    Otherwise a checkpoint's path (RUNS/NAME/checkpoints/step-XXXXXXXX) to go on from."""
    init_from: str | None = None
    """Model folder, checkpoint or run whose weights a new run starts from (fine-tuning); a resumed run ignores it."""
    dry_run: bool = False
    """Run two steps, print parameters, segments, memory and time, and leave nothing behind."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """Sound as the model sees it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Recordings and segments."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, schedule, weight averaging."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batches, validation, checkpoints."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Logs."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name or not self.name.isprintable():
            raise InputError(f"name={self.name!r}: must be a plain folder name, such as sc09")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed={self.seed}: must be from 0 to 2^63 - 1")
        if self.model.levels != 1 << self.audio.bits:
            raise InputError(
                f"model.levels={self.model.levels}: audio.bits={self.audio.bits} needs {1 << self.audio.bits}"
            )
        pool, segment = self.model.total_pool, self.data.segment
        if segment % pool:
            raise InputError(
                f"data.segment={segment}: must be a multiple of {pool}, the product of "
                f"model.pool={list(self.model.pool)}; the next one is {-(-segment // pool) * pool}"
            )
        seconds, rate = self.track.audio_seconds, self.audio.sample_rate
        if round(seconds * rate) < 1:
            raise InputError(f"track.audio_seconds={seconds}: is less than one sample at {rate} Hz")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """The config of a command line of launch/train.py; see `parsing.parse`.

    InputError if it is that of a run which was moved or renamed, and would be started anew where it was.
    """
    about = "Train a SaShiMi model. Later options win over earlier ones."
    config = parsing.parse(RunConfig, argv, "train.py", about)
    file = _naming_file(argv)
    if file is not None and file.name == "config.yaml" and (file.parent / "checkpoints").is_dir():
        run = Path(os.path.realpath(file.parent))
        if run != Path(os.path.realpath(config.folder)):
            raise InputError(
                f"{file}: is of the run in {file.parent}, but names {config.folder}; to go on with that run, add "
                f"--runs {os.path.relpath(run.parent)} --name {run.name}, to start another one, a --name"
            )
    return config


def _naming_file(argv: Sequence[str]) -> Path | None:
    """The --config file that names the run of a command line that can be parsed; None if an option does, or nothing."""
    words = [part for word in argv for part in word.split("=", 1)]
    for word, value in reversed(list(pairwise(words))):
        if word in ("--name", "--runs"):
            return None
        if word == "--config":
            fields = yaml.load(Path(value).read_text(encoding="utf-8"), yaml.BaseLoader)  # whatever its values are
            if fields.keys() & {"name", "runs"}:
                return Path(value)
    return None


def save_config(config: RunConfig, file: Path) -> None:
    """Write every field as YAML: `--config` with this file alone is the same run."""
    atomic.write_file(file, yaml.dump(parsing.to_dict(config), Dumper=_Dumper, sort_keys=False).encode())


class _Dumper(yaml.SafeDumper):
    """With quotes around a text such as 1e-3, which is a number to whoever reads it, but not to PyYAML."""

    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
        looks_like_a_number = re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", value)
        return super().represent_scalar(tag, value, "'" if tag.endswith(":str") and looks_like_a_number else style)


def adopt_model(
    config: RunConfig, folder_config: Mapping[str, Any], where: str, log: Callable[[str], None] = lambda text: None
) -> RunConfig:
    """`config` with the model and quantizer of a model folder's config.json, for a run that starts from its weights.

    The sample rate stays the shards' own, and dropout this run's choice. What else differs from `config` is logged, and
    that the rate is not the model's. InputError if that model only runs.
    """
    if folder_config.get("format", "sashimi") != "sashimi":
        raise InputError(f"{where}: a model of format {folder_config['format']} can be sampled, not trained")
    model = parsing.build(ModelConfig, folder_config["model"], where)
    audio = parsing.build(AudioConfig, folder_config["audio"], where)
    adopted = replace(
        config,
        model=replace(model, dropout=config.model.dropout),
        audio=replace(audio, sample_rate=config.audio.sample_rate),
    )
    before, after = parsing.to_dict(config), parsing.to_dict(adopted)
    changed = [
        f"{section}.{name}={value} instead of {before[section][name]}"
        for section in ("model", "audio")
        for name, value in after[section].items()
        if value != before[section][name]
    ]
    if changed:
        log(f"{where} decides: {', '.join(changed)}")
    if audio.sample_rate != config.audio.sample_rate:
        log(f"{where} was trained at {audio.sample_rate} Hz and goes on at {config.audio.sample_rate} Hz")
    return adopted
