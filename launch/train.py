"""Train: accelerate launch launch/train.py --config launch/recipes/NAME.yaml [--any.field value] [--dry-run]."""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from sashimi.audio import Quantizer
from sashimi.checkpoint import compare_configs, find_resume, load_checkpoint, rewind
from sashimi.config import adopt_model, parse_run_config, save_config
from sashimi.distributed import begin_worker, run_command
from sashimi.model import Sashimi
from sashimi.model_folder import find_model_folder, load_model_folder, load_weights
from sashimi.parsing import to_dict
from sashimi.sampler import generate
from sashimi.stream import Place, TrainingData
from sashimi.tracking import RunTracker, Tracker
from sashimi.trainer import Trainer
from sashimi.zero import join


def main() -> None:
    """Everything that a run is made of, put together; then `Trainer.train`."""
    config = parse_run_config(sys.argv[1:])
    dist, tracker = join(config.train.timeout_minutes), Tracker()
    note = tracker.note if dist.is_main else lambda text: None
    checkpoints, checkpoint, weights = config.folder / "checkpoints", None, None
    found = find_resume(checkpoints, config.resume, note) if dist.is_main and not config.dry_run else None
    if found := dist.from_main(found):
        checkpoint = load_checkpoint(found)
        if config.init_from:
            config = adopt_model(config, checkpoint.config, str(found))
        compare_configs(checkpoint.config, to_dict(config))
    elif config.init_from:
        found = find_model_folder(Path(config.init_from)) if dist.is_main else None  # of a run, the best one so far
        weights, folder_config = load_model_folder(dist.from_main(found))
        config = adopt_model(config, folder_config, config.init_from, note)

    torch.manual_seed(config.seed)
    model = Sashimi(config.model)
    if weights is not None:
        load_weights(model, weights, str(config.init_from))
    place = Place(dist.rank, dist.world_size, dist.device.type == "cuda", begin_worker)
    train, seed = config.train, config.seed
    data = TrainingData(config.data, config.audio, seed, train.batch_size, train.micro_batch, place)
    trainer = Trainer(dist, model.to(dist.device), data, train, config.optim, seed, to_dict(config), checkpoints)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if config.dry_run or trainer.finished:
        note(trainer.rehearse() if config.dry_run else f"{config.folder}: {trainer.finished}")
        return dist.close()

    dist.barrier()  # every rank has read its checkpoint, and none refused it: now the run folder may change
    if dist.is_main:
        tracker = RunTracker(config.folder, config.track, trainer.state.step, train.steps, data.segments_per_epoch)
        rewind(checkpoints, trainer.state.step, note)
        save_config(replace(config, resume="auto"), config.folder / "config.yaml")
        tracker.text("config", (config.folder / "config.yaml").read_text())

    def listen(model: torch.nn.Module, step: int) -> None:
        track, rate, decode = config.track, config.audio.sample_rate, Quantizer(config.audio).decode
        if track.audio_every and step % track.audio_every == 0:
            with tracker.pause(), dist.whole_model(model) as whole:
                own, samples = range(dist.rank, track.audio_clips, dist.world_size), round(track.audio_seconds * rate)
                clips = generate(whole, samples, own, seed=config.seed, batch_size=1) if own else ()
                made = sorted(dist.gather(list(zip(own, clips, strict=True))))
                tracker.audio(step, [decode(clip) for _, clip in made], rate)

    with dist.stop_signals():
        with closing(tracker):
            complete = trainer.train(tracker, listen)
        note(f"{'done' if complete else 'stopped by a signal; go on with --resume auto'}: {config.folder}")
        dist.close()


if __name__ == "__main__":
    run_command(main)
