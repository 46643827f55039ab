"""Levels <-> audio, and audio files <-> samples."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch

from sashimi.audio import (
    AudioConfig,
    AudioFault,
    Quantizer,
    QuantizerName,
    iter_audio,
    read_audio,
    read_header,
    write_wav,
)
from sashimi.errors import InputError

RATE = 16000
FIXED_SCALE = [(name, bits) for name in ("mu-law", "linear") for bits in range(8, 17)]


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """Clips, their levels, and decode tables, made by the original SaShiMi code."""
    return dict(np.load(Path(__file__).parent / "reference/quantizers.npz"))


@pytest.mark.parametrize("clip", ["speech", "noise", "quiet"])
@pytest.mark.parametrize(("quantizer", "original"), [("mu-law-minmax", "mu_law"), ("linear-minmax", "linear")])
def test_minmax_levels_are_the_originals(
    reference: dict[str, np.ndarray], clip: str, quantizer: str, original: str
) -> None:
    """Bit for bit, alone and as a row of a batch. Mutation: `- 0.01` -> `- 1` in `_encode_minmax`."""
    audio = torch.from_numpy(reference[f"{clip}.int16"]).float() / 32768
    levels = torch.from_numpy(reference[f"{clip}.{original}"]).long()
    encode = Quantizer(AudioConfig(quantizer=quantizer)).encode
    assert torch.equal(encode(audio), levels)
    assert torch.equal(encode(torch.stack([0.1 * audio.flip(0), audio]))[1], levels)


@pytest.mark.parametrize(("quantizer", "original"), [("mu-law", "mu_law"), ("linear", "linear")])
@pytest.mark.parametrize("kind", ["", "-minmax"])
def test_decoding_is_the_originals(reference: dict[str, np.ndarray], quantizer: str, kind: str, original: str) -> None:
    """Bit for bit. Mutation: `/ mu` -> `/ self.levels` in `Quantizer.__init__`."""
    table = Quantizer(AudioConfig(quantizer=quantizer + kind)).decode(torch.arange(256))
    assert torch.equal(table, torch.from_numpy(reference[f"{original}_decode.0..255"]))


@pytest.mark.parametrize(("name", "bits"), FIXED_SCALE)
def test_levels_survive_decoding(name: str, bits: int) -> None:
    """Every level, and silence is exactly 0. Mutation: drop `torch.round` in `encode`."""
    quantizer = Quantizer(AudioConfig(quantizer=name, bits=bits))
    levels = torch.arange(2**bits)
    assert torch.equal(quantizer.encode(quantizer.decode(levels)), levels)
    assert quantizer.levels == 2**bits
    assert quantizer.encode(torch.zeros(3)).tolist() == [quantizer.silence] * 3
    assert quantizer.decode(torch.tensor(quantizer.silence)) == 0


@pytest.mark.parametrize(("name", "bits"), FIXED_SCALE)
def test_fixed_scale_error_is_half_a_level(name: str, bits: int) -> None:
    """In the companded domain; louder than full scale is clipped. Mutation: drop the `clamp` in `encode`."""
    quantizer = Quantizer(AudioConfig(quantizer=name, bits=bits))
    x = torch.linspace(-1.2, 1.2, 10001, dtype=torch.float64)
    decoded = quantizer.decode(quantizer.encode(x)).double()
    mu = 2**bits - 1

    def compress(x: torch.Tensor) -> torch.Tensor:
        return x.sign() * torch.log1p(mu * x.abs()) / np.log1p(mu) if name == "mu-law" else x

    error = (compress(decoded) - compress(x.clamp(-1, 1))).abs()
    inside = x < quantizer.decode(torch.tensor(mu))
    assert error[inside].max() <= 0.501 / quantizer.silence
    assert error.max() <= 1.001 / quantizer.silence


def test_16_bit_linear_is_lossless() -> None:
    """Each of the 65,536 values. Mutation: `self.levels // 2` -> `self.levels // 2 - 1` for silence."""
    quantizer = Quantizer(AudioConfig(quantizer="linear", bits=16))
    audio = torch.arange(-32768, 32768) / 32768
    assert torch.equal(quantizer.decode(quantizer.encode(audio)), audio)


@pytest.mark.parametrize("bits", range(8, 17))
def test_minmax_levels_stay_in_range(bits: int) -> None:
    """More bits than the original had; constant segments too. Mutation: `self.levels - 0.01` -> `self.levels + 1`."""
    x = torch.stack([torch.linspace(-0.7, 0.9, 4001), torch.zeros(4001)])
    for name in ("mu-law-minmax", "linear-minmax"):
        levels = Quantizer(AudioConfig(quantizer=name, bits=bits)).encode(x)
        assert (levels.min(), levels[0].max()) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_rate": 0}, "audio.sample_rate=0"),
        ({"quantizer": "alaw"}, "audio.quantizer='alaw'"),
        ({"bits": 7}, "audio.bits=7"),
        ({"bits": 17}, "audio.bits=17"),
    ],
)
def test_config_refuses(fields: dict, message: str) -> None:
    """In one line that names the field. Mutation: drop the check in `AudioConfig.__post_init__`."""
    with pytest.raises(InputError, match=f"^{message}: .*$"):
        AudioConfig(**fields)


@pytest.mark.parametrize(
    ("name", "subtype"), [("x.wav", "PCM_16"), ("x.flac", "PCM_16"), ("x.wav", "FLOAT"), ("x.wav", "PCM_24")]
)
def test_16_bit_mono_is_read_exactly(tmp_path: Path, name: str, subtype: str) -> None:
    """Whatever the container, block by block. Mutation: `len(block) < size` -> `<=`."""
    audio = np.random.default_rng(0).integers(-32768, 32768, 12345)
    sf.write(tmp_path / name, (audio / 32768).astype(np.float32), RATE, subtype)
    blocks = list(iter_audio(tmp_path / name, RATE, block_seconds=0.1))
    assert len(blocks) == 8
    assert np.array_equal(np.concatenate(blocks) * 32768, audio)


def test_channels_are_averaged(tmp_path: Path) -> None:
    """Mutation: `block.mean(axis=1)` -> `block[:, 0]`."""
    audio = np.random.default_rng(0).integers(-32768, 32768, (1000, 2)).astype(np.int16)
    sf.write(tmp_path / "x.wav", audio, RATE)
    assert np.array_equal(read_audio(tmp_path / "x.wav", RATE).numpy() * 32768, audio.mean(axis=1))


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resampling_keeps_what_both_rates_can_hold(tmp_path: Path, rate: int) -> None:
    """A tone to -90 dB, noise as soxr does it in one piece. Mutation: quality "VHQ" -> "QQ"."""
    t = np.arange(5 * rate) / rate
    sf.write(tmp_path / "x.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate, "FLOAT")
    audio = read_audio(tmp_path / "x.wav", RATE).numpy()
    assert len(audio) == 5 * RATE
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(audio)) / RATE)
    middle = slice(RATE // 2, -RATE // 2)
    assert np.abs(audio - expected)[middle].max() < 0.5 * 10 ** (-90 / 20)

    noise = np.random.default_rng(0).uniform(-1, 1, 3 * rate).astype(np.float32)
    sf.write(tmp_path / "x.wav", noise, rate, "FLOAT")
    blocks = np.concatenate(list(iter_audio(tmp_path / "x.wav", RATE, block_seconds=0.37)))
    assert np.abs(blocks - soxr.resample(noise, rate, RATE, "VHQ")).max() < 1e-6


@pytest.mark.parametrize("name", ["x.ogg", "x.mp3"])
def test_lossy_files_are_read_to_their_end(tmp_path: Path, name: str) -> None:
    """In blocks as in one piece, which is what was written. Mutation: `_Stream(file)` -> `sf.SoundFile(file)`."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(50_000) / RATE)
    sf.write(tmp_path / name, tone, RATE)
    blocks = np.concatenate(list(iter_audio(tmp_path / name, RATE, block_seconds=0.1)))
    assert np.allclose(blocks, sf.read(tmp_path / name, dtype="float32")[0], rtol=0, atol=1e-6)
    assert np.array_equal(blocks, read_audio(tmp_path / name, RATE))
    assert np.corrcoef(blocks, tone)[0, 1] > 0.999


def test_memory_does_not_grow_with_a_recording(tmp_path: Path) -> None:
    """10 minutes of 44.1 kHz stereo (212 MB as float) in 16 MB. Mutation: `size` -> `header.frames`."""
    with sf.SoundFile(tmp_path / "x.wav", "w", 44100, 2, "PCM_16") as file:
        minute = np.random.default_rng(0).integers(-1000, 1000, (44100 * 60, 2)).astype(np.int16)
        for _ in range(10):
            file.write(minute)
    tracemalloc.start()
    samples = sum(len(block) for block in iter_audio(tmp_path / "x.wav", RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples == 600 * RATE
    assert peak < 16e6


def write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_nan(path: Path) -> None:
    audio = np.zeros(100_000, np.float32)
    audio[77_777] = np.nan
    sf.write(path, audio, RATE, "FLOAT")


def cut(share: float) -> Callable[[Path], None]:
    """A file of noise that ends too early."""

    def write(path: Path) -> None:
        sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(100_000), RATE)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return write


def write_rf64_cut(path: Path) -> None:
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(100_000), RATE, format="RF64")
    path.write_bytes(path.read_bytes()[:100_000])


def write_mp3_without_length(path: Path) -> None:
    """Loud, then quiet, at a variable bit rate and without its first frame, which says how long it is."""
    loudness = np.where(np.arange(480_000) < 16_000, 0.5, 1e-3)
    sf.write(path, loudness * np.random.default_rng(0).standard_normal(480_000), RATE, bitrate_mode="VARIABLE")
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xf3", 4) :])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("missing.wav", lambda path: None, "unreadable: No such file"),
        (
            "text.wav",
            lambda path: write_bytes(path, b"not audio" * 100),
            "unreadable: not a wav, flac, ogg or mp3 file",
        ),
        ("zero-bytes.wav", lambda path: write_bytes(path, b""), "empty: 0 bytes"),
        ("no-samples.wav", lambda path: sf.write(path, np.zeros(0), RATE), "empty: no samples"),
        ("too-short.wav", lambda path: sf.write(path, np.ones(1), 600_000), "empty: no sample is left at 16000 Hz"),
        ("nan.wav", write_nan, "NaN or infinite samples before 6.2 s"),
        ("cut.wav", cut(0.7), r"truncated: 139986 of 200000 bytes"),
        ("cut-rf64.wav", write_rf64_cut, r"truncated: \d+ of 100000 samples"),
        ("header-only.wav", cut(0.0003), "truncated: 16 of 200000 bytes"),
        ("cut.flac", cut(0.7), "truncated or damaged after .* s: .*lost sync"),
        ("cut.ogg", cut(0.7), "truncated: no last page"),
        ("cut.mp3", cut(0.7), r"truncated: \d+ of 100000 samples"),
        ("no-length.mp3", write_mp3_without_length, "unreadable: an mp3 of variable bit rate without a length"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, write: Callable[[Path], None], reason: str) -> None:
    """By name and reason; a decoder alone would read most of them in part. Mutation: drop the check of that reason."""
    path = tmp_path / name
    write(path)
    with pytest.raises(AudioFault, match=f"^{path}: {reason}"):
        read_audio(path, RATE)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_wav_from_a_pipe_is_whole(tmp_path: Path, size: int) -> None:
    """ffmpeg and sox put these for a size that they cannot know. Mutation: `piped = ()`."""
    path = tmp_path / "x.wav"
    sf.write(path, np.full(1000, 0.5), RATE)
    content = path.read_bytes()
    path.write_bytes(content[:40] + size.to_bytes(4, "little") + content[44:])
    assert read_header(path).frames == 1000
    assert read_audio(path, RATE).tolist() == [0.5] * 1000


def test_written_wav_is_read_back(tmp_path: Path) -> None:
    """Rounded to 16 bits and clipped. Mutation: drop the `clip` in `to_int16`."""
    audio = torch.tensor([0.0, 0.25, -1.0, 1.0, 3.0, -3.0, 0.6 / 32768])
    write_wav(tmp_path / "x.wav", audio, 8000)
    top = 32767 / 32768
    assert read_audio(tmp_path / "x.wav", 8000).tolist() == [0.0, 0.25, -1.0, top, top, -1.0, 1 / 32768]
    assert sf.info(tmp_path / "x.wav").subtype == "PCM_16"


@pytest.mark.parametrize("bits", [8, 11, 16])
@pytest.mark.parametrize("name", QuantizerName.__args__)
def test_int16_has_the_levels_of_the_formula(name: str, bits: int) -> None:
    """All 65,536 values, in segments of any length and range; so that a table is never a level off.

    Mutations: in `encode_int16`, `high - low > len(audio)` with `_int16_values(low, high - 1)`; `low = -32767`; divide
    by 32767 in `_int16_values`; `dtype` is uint8 for 11 bits.
    """
    quantizer = Quantizer(AudioConfig(quantizer=name, bits=bits))
    values = torch.arange(-32768, 32768).to(torch.int16)
    rng = np.random.default_rng(bits)
    segments = [values, values[[0]], values.repeat(2), values[::7], values[32768:32769].repeat(3)]
    for length in (2, 17, 1000, 20_000):
        loudest = int(rng.integers(1, 2 * length))
        segments.append(torch.from_numpy(rng.integers(-loudest, loudest, length).clip(-32768, 32767).astype(np.int16)))
    for segment in segments:
        levels = torch.from_numpy(quantizer.encode_int16(segment.numpy()))
        assert torch.equal(levels.long(), quantizer.encode(segment / 32768))
