"""Sample: accelerate launch launch/sample.py MODEL_OR_RUN --clips 64 --seconds 4 --seed 0 (--help lists the rest)."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from sashimi.atomic import read_json
from sashimi.audio import AudioConfig
from sashimi.checkpoint import find_model_folder, load_model
from sashimi.clips import Progress, SampleConfig, sample_to_folder
from sashimi.distributed import Distributed, run_command
from sashimi.errors import InputError
from sashimi.parsing import build


class CommandLine(ArgumentParser):
    """The fields of SampleConfig as options; errors are InputErrors."""

    def __init__(self) -> None:
        about = "Generate clips of audio into a folder. A command that was cut short goes on when repeated."
        super().__init__("sample.py", None, about, allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter)
        option = self.add_argument
        option("model", type=Path, metavar="MODEL_OR_RUN", help="model folder, checkpoint, or run (its best one)")
        option("--out", type=Path, help="folder of the clips; None: RUN/samples, or samples if there is no run")
        option("--clips", type=int, help="number of clips; a folder can be continued with more")
        option("--seconds", type=float, help="new audio a clip")
        option("--seed", type=int, help="clip i of another seed is another clip")
        option("--temperature", type=float, help="below 1 likelier and duller, above 1 noisier")
        option("--top-k", type=int, help="draw from so many likeliest levels only; None: from all")
        option("--top-p", type=float, help="draw from the fewest levels with this share of the probability")
        option("--prompt", metavar="FILE", help="audio that every clip goes on from; the wavs begin with it")
        option("--prompt-seconds", type=float, help="length of the prompt, from the beginning of FILE; None: all of it")
        option("--resample-prompt", action="store_true", help="convert a FILE at another sample rate than the model's")
        option("--batch-size", type=int, help="clips computed together; ranks divide whole batches between them")
        option("--keep-likelihood", type=float, nargs=2, help="list the clips of these ranks (0 to 1) in kept.jsonl")
        self.set_defaults(**asdict(SampleConfig()))

    def error(self, message: str) -> NoReturn:
        """argparse calls this."""
        raise InputError(f"{message}; --help lists the options")


def main() -> None:
    """Load, generate on all ranks, report on one."""
    options = vars(CommandLine().parse_args())
    source, out = options.pop("model"), options.pop("out")
    config = SampleConfig(**options)
    dist = Distributed()
    folder = find_model_folder(source)
    model = load_model(folder, dist.device)
    audio = build(AudioConfig, read_json(folder / "config.json")["audio"], str(folder))
    out = out or (folder.parents[1] if folder.parent.name == "checkpoints" else Path()) / "samples"
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
        command = model, str(folder), audio, out, config
        done = sample_to_folder(*command, dist.rank, dist.world_size, dist.barrier, on_progress=show)
    if done is not None:
        kept = "" if done.kept is None else f", {done.kept} of them in kept.jsonl"
        print(f"{out}: {done.clips} clips{kept}; {done.new_clips} are new, {speed(done.samples_per_second)}")
    dist.close()


if __name__ == "__main__":
    run_command(main)
