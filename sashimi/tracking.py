"""What a run shows of itself: TensorBoard and metrics.jsonl side by side, a progress bar, and messages.

`RunTracker` belongs to the main process. Every other rank, and a run that shall leave nothing behind, has a `Tracker`,
which keeps nothing.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torchaudio
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sashimi import atomic
from sashimi.errors import InputError, one_line
from sashimi.lock import lock


@dataclass(frozen=True)
class TrackConfig:
    """What is logged, and how often."""

    log_every: int = 10
    """Steps between lines of scalars in TensorBoard and metrics.jsonl."""
    audio_every: int = 5000
    """Steps between generated clips in TensorBoard, made one sample at a time while training waits; 0 is never."""
    audio_clips: int = 4
    """Number of clips generated each time, divided over the ranks."""
    audio_seconds: float = 1.0
    """Length of these clips in seconds; their cost grows with it."""
    progress_seconds: float = 30.0
    """Seconds between progress lines where there is no terminal for a progress bar."""

    def __post_init__(self) -> None:
        for name in ("log_every", "audio_clips"):
            if getattr(self, name) < 1:
                raise InputError(f"track.{name}={getattr(self, name)}: must be at least 1")
        for name in ("audio_every", "progress_seconds"):
            if not getattr(self, name) >= 0:
                raise InputError(f"track.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.audio_seconds <= 3600:
            raise InputError(
                f"track.audio_seconds={self.audio_seconds}: must be above 0 and at most 3600; audio_every=0 is no audio"
            )


class Tracker:
    """The interface; by itself it keeps nothing, and only messages get out."""

    def note(self, text: str) -> None:
        """Show one line now, if there is anywhere to; a terminal may be closed."""
        with suppress(OSError):
            tqdm.write("\n".join(map(one_line, text.split("\n"))), file=sys.stderr)

    def step(self, step: int, scalars: Mapping[str, float], samples: int, position: int) -> None:
        """An optimizer step is done; it scored `samples` samples over all ranks and left the stream at `position`."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keep scalars now, under names such as "valid/bits"."""

    def audio(self, step: int, clips: Sequence[Tensor], sample_rate: int) -> None:
        """Keep generated clips, each (L,) float in [-1, 1], and their spectrograms."""

    def text(self, name: str, text: str) -> None:
        """Keep a text, such as the config."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within: time that does not count as training in the throughput."""
        yield

    def close(self) -> None:
        """Finish the files."""


class RunTracker(Tracker):
    """Tracks a run in its folder, from `start_step` finished steps to `total_steps`.

    What the folder holds of later steps, from a run that was killed after its last checkpoint, is taken back.
    Throughput is in scored samples a second of training time; ETA goes by all the time that passed.
    """

    def __init__(
        self, folder: Path, config: TrackConfig, start_step: int, total_steps: int, segments_per_epoch: int
    ) -> None:
        self.config, self.total_steps, self.segments_per_epoch = config, total_steps, segments_per_epoch
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        refusal = f"{folder}: another process trains this run; stop it, or take another --name"
        self._lock = lock(folder / ".lock", refusal, self.note)
        self._in_gap = False
        self._valid = ""  # the last validation, as progress shows it
        cut_back(folder / "metrics.jsonl", start_step)
        self._metrics = (folder / "metrics.jsonl").open("a")
        purge = start_step + 1 if start_step else 0
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=purge)
        self._throughput = Throughput()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), smoothing=0.1
        )
        self._start = self._last_line = time.monotonic()
        self._start_step = start_step

    def step(self, step: int, scalars: Mapping[str, float], samples: int, position: int) -> None:
        """Count it; every `log_every` steps and at the last one, log its scalars, epoch and samples a second."""
        self._throughput.add(samples)
        with suppress(OSError):
            self._bar.update(1)
        if step % self.config.log_every and step != self.total_steps:
            return
        rate = self._throughput.read()
        epoch = position / self.segments_per_epoch
        self.log(step, {**scalars, "epoch": epoch, "samples_per_second": rate})
        shown = f"{scalars.get('train/bits', math.nan):.3f} bits{self._valid}, {rate:.3g} samples/s"
        self._bar.set_postfix_str(shown, refresh=False)
        now = time.monotonic()
        due = now - self._last_line >= self.config.progress_seconds or step == self.total_steps
        if self._bar.disable and due:
            self._last_line = now
            left = (now - self._start) / (step - self._start_step) * (self.total_steps - step)
            eta = tqdm.format_interval(left)
            self.note(f"step {step}/{self.total_steps}: {shown}, epoch {epoch:.2f}, ETA {eta}")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and as many TensorBoard scalars. What is not finite is null in JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        if "valid/bits" in scalars:
            self._valid = f" (validation {scalars['valid/bits']:.3f})"
        with self._or_gap(f"step {step}"):
            self._metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._metrics.flush()
            with self._tensorboard() as writer:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)

    def audio(self, step: int, clips: Sequence[Tensor], sample_rate: int) -> None:
        """TensorBoard's audio and image tabs, one entry a clip."""
        with self._or_gap(f"the audio of step {step}"), self._tensorboard() as writer:
            for i, clip in enumerate(clips):
                writer.add_audio(f"generated/{i}", clip[None], step, sample_rate)
                writer.add_image(f"spectrogram/{i}", spectrogram_image(clip), step)

    def text(self, name: str, text: str) -> None:
        """TensorBoard's text tab, as it is."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        with self._or_gap(name), self._tensorboard() as writer:
            writer.add_text(name, indented)

    @contextmanager
    def _or_gap(self, what: str) -> Iterator[None]:
        """Within: where the disk is full, the log has a gap, whose beginning is shown, and training goes on."""
        try:
            yield
            self._in_gap = False
        except OSError as error:
            if not self._in_gap:
                self.note(f"{what} is NOT LOGGED, nor is what follows until that can be written: {error}")
            self._in_gap = True

    @contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        """Its writer; another one after an OSError, which the same one would raise for ever."""
        writer, self._writer = self._writer or SummaryWriter(str(self._folder)), None
        yield writer
        writer.flush()
        self._writer = writer

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within: time that does not count as training in the throughput."""
        with self._throughput.pause():
            yield

    def close(self) -> None:
        """Finish the files and the bar."""
        for file in (self._bar, self._writer, self._metrics, self._lock):
            if file is not None:
                with suppress(OSError):  # a disk that is full, which was said, or a terminal that was closed
                    file.close()


class Throughput:
    """Samples a second since the last reading, by a clock that stands still in pauses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since, self._samples = clock(), 0

    def add(self, samples: int) -> None:
        """Count samples as done."""
        self._samples += samples

    def read(self) -> float:
        """The rate since the last reading, which starts anew."""
        now = self._clock()
        rate = self._samples / max(now - self._since, 1e-9)
        self._since, self._samples = now, 0
        return rate

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within: time that is not counted."""
        start = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - start


def cut_back(metrics: Path, step: int) -> None:
    """Take the lines of later steps, and one that a kill left torn, out of a metrics.jsonl; step 0 empties it.

    What is logged at a step comes before its checkpoint, so a resumed run logs from step + 1 on.
    """
    if not metrics.exists():
        return
    kept = [line for line in metrics.read_bytes().splitlines(keepends=True) if 0 <= _step_of(line) <= step]
    atomic.write_file(metrics, b"".join(kept) if step else b"")


def _step_of(line: bytes) -> int:
    """The step of a whole line of metrics, -1 for any other."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else -1
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return -1


MAGMA = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # dark to bright, RGB


def spectrogram_image(clip: Tensor, window: int = 512, width: int = 512) -> Tensor:
    """A picture of `clip`, (L,) float in [-1, 1]: (3, window / 2, about `width`) uint8, low notes below.

    Colours run from -80 dB (dark) to 0 dB, a full-scale sine (bright), so pictures of different steps compare.
    """
    hop = max(1, math.ceil(len(clip) / width))
    spectrogram = torchaudio.transforms.Spectrogram(window, hop_length=hop, power=1, pad_mode="constant")
    amplitude = spectrogram(clip)[1:].flip(0) / (window / 4)  # a Hann window halves the sum, and a sine its amplitude
    level = 20 * torch.log10(amplitude + 1e-10)
    place = (level / 80 + 1).clamp(0, 1) * (len(MAGMA) - 1)
    below = place.floor().clamp(max=len(MAGMA) - 2).long()
    colours = torch.tensor(MAGMA, dtype=torch.float32)
    rgb = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])
    return rgb.round().to(torch.uint8).permute(2, 0, 1)
