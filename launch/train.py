"""Train: accelerate launch launch/train.py --config launch/recipes/NAME.yaml [--any.field value] [--dry-run]."""

import sys
from pathlib import Path

import torch
from torch import nn

from sashimi.audio import Quantizer
from sashimi.checkpoint import compare_configs, find_resume, load_checkpoint, load_model_folder, load_weights, rewind
from sashimi.config import adopt_model, parse_run_config, save_config
from sashimi.distributed import Distributed, run_command
from sashimi.model import Sashimi
from sashimi.parsing import to_dict
from sashimi.sampler import generate
from sashimi.stream import TrainingData
from sashimi.tracking import RunTracker, Tracker
from sashimi.trainer import Trainer


def main() -> None:
    """Everything that a run is made of, put together; then `Trainer.train`."""
    config = parse_run_config(sys.argv[1:])
    dist = Distributed()
    tracker = Tracker()
    note = tracker.note if dist.is_main else lambda text: None

    checkpoints, checkpoint, weights = config.folder / "checkpoints", None, None
    if found := None if config.dry_run else find_resume(checkpoints, config.resume, note):
        checkpoint = load_checkpoint(found)
        if config.init_from:
            config = adopt_model(config, checkpoint.config, str(found))
        compare_configs(checkpoint.config, to_dict(config))
    elif config.init_from:
        weights, folder_config = load_model_folder(Path(config.init_from))
        config = adopt_model(config, folder_config, config.init_from)

    torch.manual_seed(config.seed)
    model = Sashimi(config.model)
    if weights is not None:
        load_weights(model, weights, str(config.init_from))
    batch = (config.train.batch_size, config.train.micro_batch)
    place = (dist.rank, dist.world_size, dist.device.type == "cuda")
    data = TrainingData(config.data, config.audio, config.seed, *batch, *place)
    settings = (config.train, config.optim, config.seed, to_dict(config))
    trainer = Trainer(dist, model.to(dist.device), data, *settings, checkpoints)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if config.dry_run:
        note(trainer.rehearse())
        return dist.close()

    dist.barrier()  # every rank has read its checkpoint, and none refused it: now the run folder may change
    if dist.is_main:
        start = trainer.progress.step
        rewind(checkpoints, start, note)
        tracker = RunTracker(config.folder, config.track, start, config.train.steps, data.segments_per_epoch)
        save_config(config, config.folder / "config.yaml")
        tracker.text("config", (config.folder / "config.yaml").read_text())

    def listen(model: nn.Module, step: int) -> None:
        track, rate = config.track, config.audio.sample_rate
        if dist.is_main and track.audio_every and step % track.audio_every == 0:
            with tracker.pause():
                ids = generate(model, round(track.audio_seconds * rate), range(track.audio_clips), seed=config.seed)
                tracker.audio(step, Quantizer(config.audio).decode(ids), rate)

    with dist.stop_signals():
        complete = trainer.train(tracker, listen)
    tracker.close()
    note(f"{'done' if complete else 'stopped by a signal; go on with --resume auto'}: {config.folder}")
    dist.close()


if __name__ == "__main__":
    run_command(main)
