"""Audio files to float samples, float samples to the integers the model predicts, and both ways back.

A *level* (or id) is one of V = 2**bits integers. `Quantizer` maps audio in [-1, 1] to levels and back; the rest moves
audio between files and memory.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile as sf
import soxr
import torch
from torch import Tensor

from sashimi.atomic import write_file
from sashimi.errors import InputError

MAX_RATE = 10_000_000  # Hz; no sound card's, and a bound for what a damaged header makes us allocate
MAX_BLOCK = 1 << 24  # values read at once, over all channels

QuantizerName = Literal["mu-law", "linear", "mu-law-minmax", "linear-minmax"]


@dataclass(frozen=True)
class AudioConfig:
    """What one model level means as sound; stored in every model folder."""

    sample_rate: int = 16000
    """Samples per second (Hz) of the audio that the model reads and writes."""
    quantizer: QuantizerName = "mu-law"
    """Map from amplitude to level: `mu-law` and `linear` have a fixed scale. The two `-minmax` ones stretch each
    segment to full scale first, as the original SaShiMi code did; use them to compare with its published numbers."""
    bits: int = 8
    """Bits per sample, 8 to 16; the model predicts one of 2**bits levels."""

    def __post_init__(self) -> None:
        if not 1 <= self.sample_rate <= 655350:
            raise InputError(f"audio.sample_rate={self.sample_rate}: give a rate from 1 to 655350 Hz, e.g. 16000")
        names = QuantizerName.__args__  # type: ignore[attr-defined]
        if self.quantizer not in names:
            raise InputError(f"audio.quantizer={self.quantizer!r}: choose one of {', '.join(names)}")
        if not 8 <= self.bits <= 16:
            raise InputError(f"audio.bits={self.bits}: choose from 8 to 16 bits")


class Quantizer:
    """Maps audio in [-1, 1] to levels in [0, V) and back.

    Fixed scale (`mu-law`, `linear`): level = round(f(x) V/2) + V/2, limited to V - 1, with f the identity or the
    mu-law compression sign(x) log(1 + mu|x|) / log(1 + mu), mu = V - 1. Silence is level V/2 and decodes to exactly
    0; 16-bit `linear` is lossless for 16-bit audio.

    `-minmax`: bit-exact to `mu_law_encode` and `linear_encode` of the original (github.com/state-spaces/s4). Minimum
    and maximum are those of the last dimension, so the levels depend on where a segment was cut.
    """

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self.levels = 2**config.bits
        self.silence = self.levels // 2
        self.mu_law = config.quantizer.startswith("mu-law")
        self.minmax = config.quantizer.endswith("-minmax")
        y = torch.arange(self.levels, dtype=torch.float32) / self.silence - 1
        mu = self.levels - 1
        self.amplitudes = y.sign() * (torch.pow(self.levels, y.abs()) - 1) / mu if self.mu_law else y
        self.dtype = np.uint8 if config.bits == 8 else np.int32  # the least that holds a level
        self.fixed = None if self.minmax else self.encode(_int16_values(-32768, 32767)).numpy().astype(self.dtype)

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (..., L), floating point in [-1, 1], to levels (..., L), int64; louder audio is clipped.

        InputError if audio is of another type, or not finite.
        """
        if not audio.is_floating_point():
            raise InputError(f"audio: must be floating point in [-1, 1], not {audio.dtype}")
        if not audio.isfinite().all():
            raise InputError("audio: NaN or infinite samples have no level; leave the recording out")
        if self.minmax:
            return self._encode_minmax(audio)
        y = self._compress(audio) if self.mu_law else audio
        return (torch.round(y * self.silence) + self.silence).clamp(0, self.levels - 1).long()

    def encode_int16(self, audio: np.ndarray) -> np.ndarray:
        """The levels of one segment (L,) of int16, taken as x / 32768, L >= 1; mostly much faster. (L,) of `dtype`."""
        low, table = -32768, self.fixed
        if table is None:
            low, high = int(audio.min()), int(audio.max())
            if high - low >= len(audio):
                return self._encode_minmax(torch.from_numpy(audio) / 32768).numpy().astype(self.dtype)
            table = self._encode_minmax(_int16_values(low, high)).numpy().astype(self.dtype)
        places = (audio - np.int16(low)).view(np.uint16)  # what overflows comes out right
        return table.take(places, mode="wrap")  # all are in range, and this mode checks nothing

    def decode(self, ids: Tensor) -> Tensor:
        """Levels (..., L), integers in [0, V), to audio (..., L), float32 in [-1, 1]. InputError for any others."""
        if ids.is_floating_point() or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.levels):
            raise InputError(
                f"ids: must be integers from 0 to {self.levels - 1}, the levels of {self.config.bits} bits"
            )
        return self.amplitudes.to(ids.device)[ids]

    def _compress(self, x: Tensor) -> Tensor:
        mu = torch.tensor(self.levels - 1, dtype=x.dtype, device=x.device)
        return x.sign() * torch.log1p(mu * x.abs()) / torch.log1p(mu)

    def _encode_minmax(self, audio: Tensor) -> Tensor:
        low, high = audio.amin(-1, keepdim=True), audio.amax(-1, keepdim=True)
        unit = (audio - low) / (high - low + 1e-6)
        if self.mu_law:
            x = 2 * unit - 1
            mu = torch.tensor(self.levels - 1, dtype=x.dtype, device=x.device)
            unit = (x.sign() * (torch.log1p(mu * (x + 1e-8).abs()) / torch.log1p(mu)) + 1) / 2
        return (unit * (self.levels - 0.01) + 0.005).long()


def _int16_values(low: int, high: int) -> Tensor:
    """The 16-bit samples from `low` to `high` as floating point audio (high - low + 1,)."""
    return torch.arange(low, high + 1, dtype=torch.int16) / 32768


class AudioFault(InputError):
    """An audio file that cannot be used; `reason` says why, the message names the file too."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.reason}"


class Header(NamedTuple):
    """What a file's header says: `frames` samples of `channels` channels at `sample_rate` Hz."""

    sample_rate: int
    channels: int
    frames: int


def read_header(path: Path) -> Header:
    """The header of a wav, flac, ogg or mp3 file. AudioFault if it is unreadable or empty, or cut short already.

    The length is exact but for an mp3 without a Xing or Info frame, where it is an estimate.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise AudioFault(path, "unreadable: not a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise AudioFault(path, "empty: 0 bytes")
        info = sf.info(os.fsencode(path))  # as bytes, for names that are not UTF-8
    except (OSError, sf.LibsndfileError) as error:
        raise AudioFault(path, f"unreadable: {_short(error)}") from error
    cut = _cut_short(info.extra_info)
    if cut:
        raise AudioFault(path, f"truncated: {cut}")
    if info.frames == 0:
        raise AudioFault(path, "empty: no samples")
    if info.samplerate > MAX_RATE:
        raise AudioFault(path, f"unreadable: its header says {info.samplerate} Hz, more than {MAX_RATE}")
    if info.frames > 2**48:  # libsndfile's stand-in for an unknown length, which it then fails to read to the end
        raise AudioFault(path, "unreadable: its header does not say how long it is; encode it anew")
    return Header(info.samplerate, info.channels, info.frames)


def _short(error: OSError | sf.LibsndfileError) -> str:
    """The reason in an error, without the path that we name ourselves."""
    if not isinstance(error, sf.LibsndfileError):
        return str(error.strerror)
    text = error.error_string
    if text.startswith("Format not recognised"):
        return "not a wav, flac, ogg or mp3 file, whatever its name"
    return "its header makes no sense" if text.startswith("Internal error") else text


def _cut_short(log: str) -> str:
    """What in libsndfile's log shows that the file has less audio than its header promises; "" if nothing does.

    A program that writes a wav into a pipe cannot know its size and puts one of two constants there: no fault.
    """
    piped = (0xFFFFFFFF, 0x7FFFF000)
    for promised, found in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", log):
        if int(found) < int(promised) not in piped:
            return f"{found} of {promised} bytes"
    for found, promised in re.findall(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)", log):
        if int(found) < int(promised):
            return f"{found} of {promised} samples"
    return "no last page" if "Last page lacks an end-of-stream bit" in log else ""


class _Stream(sf.SoundFile):
    """A file read front to end. Else soundfile seeks after each read, and an mp3 decoder starts anew, with noise."""

    def seekable(self) -> bool:
        return False


def iter_audio(
    path: Path, sample_rate: int, block_seconds: float = 10.0, channel: int | None = None
) -> Iterator[np.ndarray]:
    """A file as blocks of mono float32 samples (n,) at `sample_rate`; memory does not grow with its length.

    Channels are averaged, or one `channel` is taken; other rates go through soxr (VHQ); 16-bit mono at `sample_rate`
    comes through exactly. AudioFault if the file is unreadable, empty, truncated, or holds NaN or infinity; a cut may
    only show at the end.
    """
    header = read_header(path)
    resampler = None
    if header.sample_rate != sample_rate:
        resampler = soxr.ResampleStream(header.sample_rate, sample_rate, 1, dtype="float32", quality="VHQ")
    size = max(1, min(round(block_seconds * header.sample_rate), MAX_BLOCK // header.channels))
    frames = samples = 0
    try:
        with open(path, "rb") as file, _Stream(file) as source:
            while frames < header.frames:
                block = source.read(size, dtype="float32", always_2d=True)
                frames += len(block)
                if not np.isfinite(block).all():
                    raise AudioFault(path, f"NaN or infinite samples before {frames / header.sample_rate:.1f} s")
                last = len(block) < size or frames == header.frames
                mono = block.mean(axis=1) if channel is None else block[:, channel]
                if resampler is not None:
                    mono = resampler.resample_chunk(mono, last=last)
                if not np.isfinite(mono).all():  # finite samples near the largest float add up to more
                    raise AudioFault(path, f"too loud for a float before {frames / header.sample_rate:.1f} s")
                samples += len(mono)
                yield mono
                if last:
                    break
            unread = path.stat().st_size - file.tell() if source.format == "MP3" else 0
    except (OSError, sf.LibsndfileError) as error:
        where = f"after {frames / header.sample_rate:.1f} s"
        raise AudioFault(path, f"truncated or damaged {where}: {_short(error)}") from error
    tolerance = header.frames // 20 if source.format == "MP3" else 0  # its length may be an estimate
    if frames < header.frames - tolerance:
        raise AudioFault(path, f"truncated: {frames} of {header.frames} samples")
    if unread > path.stat().st_size // 10:  # libsndfile stops at its estimate, however much follows
        raise AudioFault(path, "unreadable: an mp3 of variable bit rate without a length; convert it to flac")
    if samples == 0:
        raise AudioFault(path, f"empty: no sample is left at {sample_rate} Hz")


def read_audio(path: str | Path, sample_rate: int) -> Tensor:
    """A whole file as mono float32 (samples,) at `sample_rate`; see `iter_audio`."""
    return torch.from_numpy(np.concatenate(list(iter_audio(Path(path), sample_rate))))


def channels_cancel(path: Path, sample_rate: int, silence: int) -> bool:
    """Of a file whose mean is silent, of at most `silence` steps of 16 bits: whether its channels are not."""
    channels = read_header(path).channels
    return channels > 1 and any(
        len(audio) and np.ptp(audio) * 32768 > silence * channels  # else one of them could be heard alone
        for channel in range(channels)
        for audio in iter_audio(path, sample_rate, channel=channel)
    )


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Float audio, full scale 1, to 16 bits: rounded to nearest, limited to the range."""
    return np.rint(audio * 32768).clip(-32768, 32767).astype(np.int16)


def wav_bytes(samples: int) -> int:
    """Size of a file by `write_wav`."""
    return 44 + 2 * samples  # a canonical header: RIFF, fmt, data


def write_wav(path: str | Path, audio: Tensor, sample_rate: int) -> None:
    """Writes float audio (samples,) in [-1, 1] as a 16-bit wav, whole or not at all.

    InputError if it has another shape, or holds NaN or infinity.
    """
    if audio.dim() != 1:
        raise InputError(f"{path}: audio of shape {list(audio.shape)}: give one clip, (samples,)")
    if not audio.isfinite().all():
        raise InputError(f"{path}: NaN or infinite samples cannot be written")
    if not 1 <= sample_rate <= MAX_RATE:
        raise InputError(f"{path}: sample_rate={sample_rate}: give 1 to {MAX_RATE} Hz")
    buffer = io.BytesIO()
    sf.write(buffer, to_int16(audio.detach().cpu().float().numpy()), sample_rate, "PCM_16", format="WAV")
    write_file(Path(path), buffer.getvalue())
