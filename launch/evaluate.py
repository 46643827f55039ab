"""Evaluate: accelerate launch launch/evaluate.py MODEL_OR_RUN [--data shards/NAME] [--split test]; prints JSON."""

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sashimi.distributed import Distributed, begin_worker, run_command
from sashimi.errors import InputError
from sashimi.loss import bits_per_sample
from sashimi.model_folder import find_model_folder, load_model, read_audio_config, read_config
from sashimi.objective import Objective
from sashimi.parsing import build, parse
from sashimi.split import open_split
from sashimi.stream import DataConfig, Place, eval_batches
from sashimi.trainer import evaluate


@dataclass(frozen=True)
class EvaluateConfig:
    """Bits per sample of a model on one split."""

    model: str
    """Model folder, checkpoint or run (then its best checkpoint)."""
    data: str | None = None
    """Folder of shards, or its address; left out: what the model was trained on."""
    cache: str | None = None
    """Folder that keeps whole shards of an address; left out: as in training."""
    split: str = "test"
    """train, valid or test."""
    segment: int = 0
    """Length of a segment in samples; 0: as in training."""
    carry: bool | None = None
    """Play each recording as a whole, the model's state carried over its segments; left out: as in training."""
    batch_size: int = 8
    """Segments at once and rank; does not change the result."""
    out: str | None = None
    """File for the JSON result, beside printing it."""


def main() -> None:
    """Load, evaluate on all ranks, print on one."""
    config = parse(EvaluateConfig, sys.argv[1:], "evaluate.py", "Bits per sample of a model on a split, as JSON.")
    dist = Distributed(timeout_minutes=7 * 24 * 60)  # the ranks meet at the end, some much later than others
    folder = dist.from_main(find_model_folder(Path(config.model)) if dist.is_main else None)
    saved = read_config(folder)
    if config.out and (Path(config.out).is_dir() or not Path(config.out).absolute().parent.is_dir()):
        raise InputError(f"out={config.out}: is a folder, or in a folder that does not exist; give another file")
    if config.data is None and "data" not in saved:
        raise InputError(f"{folder}: does not say what it was trained on; name the shards with --data")
    data = build(DataConfig, saved.get("data", {}), str(folder))
    segment, cache = config.segment or data.segment, config.cache or data.cache
    carry = data.carry > 0 if config.carry is None else config.carry  # over whole recordings, whatever the number
    data = replace(data, shards=config.data or data.shards, segment=segment, cache=cache, carry=2 if carry else 0)
    audio = read_audio_config(folder)
    split = open_split(data.shards, config.split, data.cache)
    place = Place(dist.rank, dist.world_size, dist.device.type == "cuda", begin_worker)
    batches = eval_batches(split, data, audio, config.batch_size, place)
    objective = Objective(load_model(folder, dist.device), carry)
    pool = objective.model.config.total_pool
    if carry and segment % pool:
        raise InputError(f"segment={segment}: with carry it must be a multiple of {pool}, the model's total pooling")
    nats, count, faults = evaluate(objective, batches, dist, objective.beginning)
    if not math.isfinite(nats):
        raise InputError(f"{folder}: its output is not finite: its weights have diverged; take an earlier checkpoint")
    if not count:
        raise InputError(f"{data.shards}: not one segment of split {config.split} can be decoded; pack it again")
    if dist.is_main:
        bits = {"bits_per_sample": bits_per_sample(nats, count), "samples": count, "undecodable": faults}
        of = {"model": str(folder), "data": data.shards, "split": config.split, "segment": segment, "carry": carry}
        of["precision"] = dist.precision
        print(text := json.dumps(bits | of, indent=2))
        if config.out:
            Path(config.out).write_text(text + "\n")
    dist.close()


if __name__ == "__main__":
    run_command(main)
