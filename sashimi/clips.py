"""A folder of generated clips: who computes which, what it takes to go on after an interruption, which to keep.

    clip-00000.wav ...  16 bits at the model's rate: the prompt, if any, as the model heard it, then the new audio
    samples.jsonl       a line a clip, in their order: clip, file, seed, bits_per_sample, seconds, model, settings
    settings.json       everything that determines the audio; the folder takes no clips of other settings
    kept.jsonl          the lines of the clips between two ranks of likelihood, if that was asked for

Bits per sample are of the new audio alone, under the model as it is, whatever the temperature. A clip is finished when
its wav and then its line are written; until all ranks are done, lines are in .parts/, a file a clip.
"""

import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sashimi import atomic
from sashimi.audio import AudioConfig, Quantizer, iter_audio, read_header, wav_bytes, write_wav
from sashimi.errors import InputError
from sashimi.lock import lock
from sashimi.model import Sashimi
from sashimi.sampler import Drawing, Generator, batches_of, make_engine

LOCK = ".lock"  # locked by rank 0 while a command runs
PARTS = ".parts"  # folder of finished clips' lines meanwhile
_PROVENANCE = ("model", "prompt")  # settings that only say where something came from; checksums say what it is


@dataclass(frozen=True)
class SampleConfig(Drawing):
    """A folder of clips: how many, how long, going on from what."""

    clips: int = 16
    """Number of clips; a folder can be continued with more."""
    seconds: float = 1.0
    """New audio a clip, in seconds; a prompt comes on top."""
    prompt: str | None = None
    """Audio file that every clip goes on from, at the model's sample rate; the wavs begin with it."""
    prompt_seconds: float | None = None
    """Length of the prompt in seconds, from the file's beginning; by default all of it."""
    resample_prompt: bool = False
    """Convert a prompt at another sample rate."""
    keep_likelihood: tuple[float, float] | None = None
    """Ranks to list in kept.jsonl, from 0 (the least likely clip) to 1; the paper keeps 0.4 to 0.95."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.clips <= 10_000_000:
            raise InputError(f"clips={self.clips}: must be 1 to 10 million")
        if not 0 < self.seconds <= 86400:
            raise InputError(f"seconds={self.seconds}: must be above 0 and at most 86400, a day")
        if self.prompt is None and self.resample_prompt:
            raise InputError("resample_prompt: there is no prompt; name its audio file with --prompt")
        if self.prompt is None and self.prompt_seconds is not None:
            raise InputError(
                f"prompt_seconds={self.prompt_seconds}: there is no prompt; name its audio file with --prompt"
            )
        if self.prompt_seconds is not None and not 0 < self.prompt_seconds <= 86400:
            raise InputError(
                f"prompt_seconds={self.prompt_seconds}: must be above 0 and at most 86400, a day; "
                "leave it out for the whole file"
            )
        if self.keep_likelihood is not None:
            low, high = self.keep_likelihood
            if not 0 <= low < high <= 1:
                raise InputError(f"keep_likelihood={low} {high}: need 0 <= low < high <= 1, such as 0.4 0.95")

    @property
    def batches(self) -> int:
        """Batches that the clips fill; more ranks than that have nothing to do."""
        return -(-self.clips // self.batch_size)


class Progress(NamedTuple):
    """Where a command is, as one rank sees it."""

    done: float  # share of this rank's work; rank 0 never has less to do than another
    clips: int  # wavs in the folder, by all ranks, when this one last finished a batch
    samples_per_second: float  # new audio of all ranks, if they are as fast as this one


class Summary(NamedTuple):
    """What a command has done."""

    clips: int  # in the folder
    new_clips: int  # of these, missing before
    kept: int | None  # in kept.jsonl
    samples_per_second: float  # new audio of all ranks


def sample_to_folder(
    model: Sashimi,
    model_name: str,
    audio: AudioConfig,
    folder: Path,
    config: SampleConfig,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary | None:
    """Make those of clips 0 … config.clips − 1 that `folder` lacks. Every rank calls it; rank 0 gets the summary.

    Repeating a command that was cut short completes it, and the files are then the same. `model_name` tells a reader
    where the model comes from. InputError, before anything is written, if a setting does not fit the model, the prompt
    cannot be used, the folder holds clips of other settings or anything else, or another command is at work there.
    """
    if model.config.levels != 1 << audio.bits:
        raise InputError(f"{model_name}: has {model.config.levels} levels, but its audio {audio.bits} bits")
    n_samples = round(config.seconds * audio.sample_rate)
    if n_samples < 1:
        raise InputError(f"seconds={config.seconds}: is less than one sample at {audio.sample_rate} Hz")
    quantizer = Quantizer(audio)
    prompt = torch.empty(0, dtype=torch.int64)
    if config.prompt is not None:
        sound = read_prompt(Path(config.prompt), config.prompt_seconds, audio.sample_rate, config.resample_prompt)
        prompt = quantizer.encode(sound)
    engine = make_engine(model, config)
    own = settings_of(model, model_name, audio, config, prompt, engine.name)
    agree(folder, own)
    generator = Generator(model, config, engine, prompt)
    barrier()

    with alone_in(folder) if rank == 0 else nullcontext():
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        if rank == 0:
            atomic.write_json(folder / "settings.json", agree(folder, own))
        finished = read_finished(folder, own)
        missing = [clip for clip in range(config.clips) if clip not in finished]
        barrier()  # nobody adds a clip before everybody has seen which are missing
        settings = agree(folder, own)  # in a new folder, with rank 0: another machine may have another engine

        work = batches_of(missing, config.batch_size)[rank::world_size]
        began, steps, there = time.perf_counter(), 0, len(finished)

        def report(new_steps: int) -> None:
            nonlocal steps
            steps += new_steps
            done = steps / (len(work) * n_samples)
            rate = done * len(missing) * n_samples / (time.perf_counter() - began)
            on_progress(Progress(done, there, rate))

        for batch, clips in work:
            ids, nats = generator.batch(batch, n_samples, report)
            for clip in clips:
                row = clip % config.batch_size
                whole = quantizer.decode(torch.cat((prompt, ids[row])))
                bits = float(nats[row].numpy().mean()) / math.log(2)  # torch would split the sum by its threads
                write_clip(folder, clip, whole, bits, settings)
            there = len(list(folder.glob("clip-*.wav")))
            report(0)
        barrier()

        summary = None
        if rank == 0:
            rate = len(missing) * n_samples / (time.perf_counter() - began)
            clips_there, kept = collect(folder, missing, settings, config.keep_likelihood)
            summary = Summary(clips_there, len(missing), kept, rate)
    barrier()
    return summary


def keep_likelihood(lines: Sequence[dict[str, Any]], low: float, high: float) -> list[dict[str, Any]]:
    """Of n lines ranked from the least likely clip, those of ranks low·n to high·n (rounded), in the order given.

    The paper (arXiv 2202.09729) discards the 40 % least likely and the 5 % likeliest: low = 0.4, high = 0.95.
    """
    ranked = sorted(range(len(lines)), key=lambda i: -lines[i]["bits_per_sample"])
    return [lines[i] for i in sorted(ranked[round(low * len(lines)) : round(high * len(lines))])]


def read_prompt(path: Path, seconds: float | None, sample_rate: int, resample: bool) -> Tensor:
    """The first `seconds` (None: all) of an audio file, mono float32 (P,) at `sample_rate`.

    InputError if the file cannot be read, is shorter, or is at another rate and `resample` is false.
    """
    rate = read_header(path).sample_rate
    if rate != sample_rate and not resample:
        raise InputError(f"{path}: is at {rate} Hz, the model at {sample_rate} Hz; add --resample-prompt to convert it")
    blocks, length = [], 0
    wanted = math.inf if seconds is None else max(1, round(seconds * sample_rate))
    for block in iter_audio(path, sample_rate):
        blocks.append(block)
        length += len(block)
        if length >= wanted:
            break
    if seconds is None:
        return torch.from_numpy(np.concatenate(blocks))
    if length < wanted:
        raise InputError(
            f"{path}: has {length / sample_rate:.3f} s, less than prompt_seconds={seconds}; give at most that"
        )
    return torch.from_numpy(np.concatenate(blocks)[:wanted])


# --- the folder's files ----------------------------------------------------------------------------------------


def settings_of(
    model: Sashimi, model_name: str, audio: AudioConfig, config: SampleConfig, prompt: Tensor, engine: str
) -> dict[str, Any]:
    """What determines the audio, as JSON. `prompt`: ids (P,), P = 0 without one."""
    device = next(model.parameters()).device
    return {
        "model": model_name,
        "model_sha256": _model_checksum(model),
        "audio": asdict(audio),
        "seconds": config.seconds,
        **{field.name: getattr(config, field.name) for field in fields(Drawing)},
        "prompt": config.prompt,
        "prompt_samples": len(prompt),
        "prompt_sha256": hashlib.sha256(prompt.numpy().tobytes()).hexdigest(),
        "engine": engine,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
    }


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within: no other process samples into `folder`, which is made. InputError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder}: another process samples into it; wait for it, or give another --out"
    with lock(folder / LOCK, refusal, partial(warnings.warn, stacklevel=3)):
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def agree(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that `folder` goes on with: its own if they amount to these, or these if it is new.

    InputError naming what differs, or if the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give another folder with --out")
    if not (folder / "settings.json").exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(
                f"{folder}: is not empty and holds no samples to go on with; give another folder with --out"
            )
        return settings
    own = atomic.read_json(folder / "settings.json")
    names = [name for name in own.keys() | settings.keys() if name not in _PROVENANCE]
    differing = sorted(name for name in names if own.get(name) != settings.get(name))
    if differing:
        listed = ", ".join(f"{_shown(own, name)} (now {_shown(settings, name)})" for name in differing)
        raise InputError(f"{folder}: its clips have {listed}; give another folder with --out, or the same settings")
    read_finished(folder, own)  # for its error, before anything is written
    return own


def _shown(settings: dict[str, Any], name: str) -> str:
    """A setting for a message: "seed=0", or "model=runs/x [1f0c9a2b]" for a checksum of what a name stands for."""
    value, of = settings.get(name), name.removesuffix("_sha256")
    return f"{name}={value}" if of == name else f"{of}={settings.get(of)} [{str(value)[:8]}]"


def write_clip(folder: Path, clip: int, sound: Tensor, bits: float, settings: dict[str, Any]) -> None:
    """Write a clip's wav, then its line, which makes it finished. sound: (L,) float in [-1, 1]."""
    name = f"clip-{clip:05d}"
    head = {field: settings[field] for field in ("seed", "seconds", "model")}
    rest = {field: value for field, value in settings.items() if field not in head}
    line = {"clip": clip, "file": f"{name}.wav", "bits_per_sample": bits, **head, "settings": rest}
    write_wav(folder / f"{name}.wav", sound, settings["audio"]["sample_rate"])
    atomic.write_file(folder / PARTS / f"{name}.jsonl", to_lines([line]))


def read_finished(folder: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The lines of the finished clips by number, in order. A clip whose wav has another length is not finished."""
    n_samples = settings["prompt_samples"] + round(settings["seconds"] * settings["audio"]["sample_rate"])
    lines = {}
    for file in (folder / "samples.jsonl", *(folder / PARTS).glob("clip-*.jsonl")):
        try:
            found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for line in found:
                if line["file"] != f"clip-{line['clip']:05d}.wav" or not math.isfinite(line["bits_per_sample"]):
                    raise ValueError(f"clip {line['clip']} is called {line['file']}")
                wav = folder / line["file"]
                if wav.exists() and wav.stat().st_size == wav_bytes(n_samples):
                    lines[line["clip"]] = line
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
            raise InputError(f"{file}: not as it was written ({error}); delete it to make its clips again") from None
    return dict(sorted(lines.items()))


def collect(
    folder: Path, new_clips: Sequence[int], settings: dict[str, Any], likelihood: tuple[float, float] | None
) -> tuple[int, int | None]:
    """When all ranks are done: write samples.jsonl and kept.jsonl. -> clips in the folder, clips kept."""
    lines = read_finished(folder, settings)
    if unseen := [clip for clip in new_clips if clip not in lines]:
        raise InputError(
            f"{folder}: {len(unseen)} new clips are not there, such as {unseen[0]}; "
            "give an --out folder that all machines share, and repeat the command"
        )
    atomic.write_file(folder / "samples.jsonl", to_lines(lines.values()))
    (folder / "kept.jsonl").unlink(missing_ok=True)
    kept = None
    if likelihood is not None:
        kept = keep_likelihood(list(lines.values()), *likelihood)
        atomic.write_file(folder / "kept.jsonl", to_lines(kept))
    shutil.rmtree(folder / PARTS)
    return len(lines), None if kept is None else len(kept)


def to_lines(values: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode()


def _model_checksum(model: Sashimi) -> str:
    digest = hashlib.sha256(f"{type(model).__name__} {model.config}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
