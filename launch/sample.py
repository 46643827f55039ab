"""Sample: accelerate launch launch/sample.py MODEL_OR_RUN --clips 64 --seconds 4 --seed 0 (--help lists the rest)."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sashimi.clips import Progress, SampleConfig, sample_to_folder
from sashimi.distributed import Distributed, run_command
from sashimi.model_folder import find_model_folder, load_model, read_audio_config
from sashimi.parsing import parse


@dataclass(frozen=True)
class Source:
    """What to sample."""

    model: str
    """Model folder, checkpoint, or run (its best one)."""


@dataclass(frozen=True)
class Command(SampleConfig, Source):
    """What to sample, how, and where to."""

    out: str | None = None
    """Folder of the clips; left out: RUN/samples, or samples if there is no run."""


def main() -> None:
    """Load, generate on all ranks, report on one."""
    about = "Generate clips of audio into a folder. A command that was cut short goes on when repeated."
    config = parse(Command, sys.argv[1:], "sample.py", about)
    dist = Distributed(timeout_minutes=7 * 24 * 60)  # a rank may have a whole batch less to do than another
    folder = dist.from_main(find_model_folder(Path(config.model)) if dist.is_main else None)
    model = load_model(folder, dist.device)
    audio = read_audio_config(folder)
    run = folder.parents[1] if folder.parent.name == "checkpoints" else Path()
    out = Path(config.out) if config.out else run / "samples"
    if dist.is_main and (idle := dist.world_size - config.batches) > 0:
        print(f"{idle} of {dist.world_size} processes will have no batch; lower --batch-size", file=sys.stderr)

    def speed(rate: float) -> str:
        return f"{rate:,.0f} samples/s, {rate / audio.sample_rate:.2f} x real time"

    def show(progress: Progress) -> None:
        bar.set_postfix_str(f"{progress.clips} clips, {speed(progress.samples_per_second)}", refresh=False)
        bar.update(progress.done - bar.n)

    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    pause = 0.1 if sys.stderr.isatty() else 30
    with tqdm(total=1, bar_format=form, mininterval=pause, miniters=0, delay=1, disable=not dist.is_main) as bar:
        done = sample_to_folder(
            model, str(folder), audio, out, config, dist.rank, dist.world_size, dist.barrier, on_progress=show
        )
    if done is not None:
        kept = "" if done.kept is None else f", {done.kept} of them in kept.jsonl"
        print(f"{out}: {done.clips} clips{kept}; {done.new_clips} are new, {speed(done.samples_per_second)}")
    dist.close()


if __name__ == "__main__":
    run_command(main)
