"""FLAC streams: what libsndfile makes of them; their parts, sample for sample, or None; a decoder for each thread."""

import hashlib
import io
import struct
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile as sf
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from sashimi import flac
from sashimi.flac import read_flac, write_flac
from sashimi.shard_writer import write_split
from sashimi.shards import DamagedMember
from sashimi.split import Split

RATE, BLOCK = 8000, 2000
LONG = 150_000
PHASES = [Phase.explicit, Phase.generate]


def signals() -> dict[str, np.ndarray]:
    """LONG samples each, int16, of even and of very uneven bit rates."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-32768, 32768, LONG)
    return {
        name: audio.astype(np.int16)
        for name, audio in {
            "walk": rng.normal(0, 500, LONG).cumsum() % 20000 - 10000,
            "noise": noise,
            "silence": np.zeros(LONG),
            "silence, noise": noise * (np.arange(LONG) > LONG // 2),
            "noise, silence": noise * (np.arange(LONG) < LONG // 2),
            "bursts": noise * (np.arange(LONG) // 3000 % 9 == 4),
            "last samples": noise * (np.arange(LONG) >= LONG - 50),
            "ever louder": noise * np.exp(np.linspace(-10, 0, LONG)),
        }.items()
    }


SIGNALS = signals()


def encode(audio: np.ndarray) -> bytes:
    """As it is packed."""
    return write_flac(audio, RATE)


def sndfile(audio: np.ndarray, level: int = 8, kind: str = "PCM_16", container: str = "FLAC") -> bytes:
    file = io.BytesIO()
    options = {} if container == "WAV" else {"compression_level": level / 8}
    sf.write(file, audio, RATE, kind, format=container, **options)
    return file.getvalue()


def part(stream: bytes, start: int, samples: int) -> np.ndarray | None:
    """What `read_flac` makes of a stream; at the right rate."""
    found = read_flac(io.BytesIO(stream), len(stream), start, samples)
    assert found is None or found[1] == RATE
    return None if found is None else found[0]


def crc(data: bytes, bits: int, polynomial: int) -> bytes:
    """The checksums of a frame's header (8 bits) and of a frame (16 bits)."""
    value = 0
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
        value &= (1 << bits) - 1
    return value.to_bytes(bits // 8)


def plain_stream(frames: int, checked: Container[int], sync: bytes = b"\xff\xf8") -> bytes:
    """Frames of 16 samples that are the frame's number, and a table of them.

    Only the `checked` ones have checksums, which take long.
    """
    parts = []
    for number in range(frames):
        header = sync + b"\x60\x08" + utf8_like(number) + b"\x0f"
        header += crc(header, 8, 0x07) if number in checked else b"\0"
        sample = (number & 0xFFFF).to_bytes(2)
        frame = header + b"\0" + sample
        parts.append(frame + (crc(frame, 16, 0x8005) if number in checked else b"\0\0"))
    info = struct.pack(">HH6xQ16x", 16, 16, RATE << 44 | 15 << 36 | frames * 16)
    bytes_before = np.cumsum([0, *map(len, parts[:-1])]).tolist()
    table = b"".join(struct.pack(">QQH", number * 16, at, 16) for number, at in enumerate(bytes_before))
    return b"fLaC\0\0\0\x22" + info + b"\x83" + len(table).to_bytes(3) + table + b"".join(parts)


def with_table(stream: bytes, order: Any = slice(None), far: int = 0) -> bytes:
    """A stream of libsndfile's of any kind, with points for its frames, or those of them in such an order."""
    places, block = np.array(frames_of(stream)), int.from_bytes(stream[8:10])
    begins = (places - places[0])[:-1][order].tolist()
    points = b"".join(struct.pack(">QQH", number * block, at + far, block) for number, at in enumerate(begins))
    return stream[:42] + b"\3" + len(points).to_bytes(3) + points + stream[42:]


def utf8_like(number: int) -> bytes:
    """RFC 9639, 9.1.5: six bits in each byte but the first, which begins with as many ones as there are bytes."""
    if number < 0x80:
        return bytes([number])
    size = next(size for size in range(2, 8) if number < 1 << 5 * size + 1)
    rest = [0x80 | number >> 6 * place & 0x3F for place in reversed(range(size - 1))]
    return bytes([(0xFF00 >> size & 0xFF) | number >> 6 * (size - 1), *rest])


@pytest.mark.parametrize("level", [None, *range(9)])
def test_any_part_is_exact(level: int | None) -> None:
    """In frames of 2000, 1152 (libFLAC's levels 0 to 2) or 4096 samples, at any place, of any signal and length.

    Mutations, in `_read_flac`: `-(-stop // block)` -> `stop // block + 1`; in `_about`: `size - at` -> `size`.
    """
    rng = np.random.default_rng(level or 0)
    for name, audio in SIGNALS.items():
        lengths = [LONG, *rng.choice([1, 2, 15, 100, 1151, 1152, 1153, 4095, 4096, 4097, 8192, 8193, 30_000], 4)]
        for length in lengths:
            sound = audio[-length:]
            stream = encode(sound) if level is None else with_table(sndfile(sound, level))
            edges = [
                0,
                length - 1,
                *(edge for edge in (1151, 1152, BLOCK - 1, BLOCK, 4096, length // 4096 * 4096) if edge < length),
            ]
            for start in [*edges, *rng.integers(length, size=8)]:
                for samples in {1, length - start, rng.integers(1, length - start + 1)}:
                    found = part(stream, int(start), int(samples))
                    assert found is not None, (name, length, start, samples)
                    assert np.array_equal(found, sound[start : start + samples]), (name, length, start, samples)


def test_frames_have_numbers_of_any_size() -> None:
    """As libsndfile decodes them, and wherever a number takes one byte more; UTF-16's surrogates are numbers too.

    The table is larger than what is read at first. Mutations: drop "surrogatepass"; in `_about`, `_HEAD` for `2 * at`.
    """
    whole = plain_stream(1000, range(1000))
    expected = np.arange(1000, dtype=np.int16).repeat(16)
    assert np.array_equal(sf.read(io.BytesIO(whole), dtype="int16")[0], expected)
    numbers = (0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 0xFFFF, 0x10000)
    stream = plain_stream(0x10003, numbers)
    for number in numbers:
        assert np.array_equal(part(stream, number * 16, 16), np.full(16, number & 0xFFFF).astype(np.int16)), number


def test_only_what_holds_a_part_is_read() -> None:
    """Twice: the beginning, and a few frames. Mutations: `_read` from `stream.frames_at` on; `_HEAD` of 8 KiB."""
    stream = encode(SIGNALS["walk"])
    reads = []

    class Counted(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            reads.append(len(buffer))
            return super().readinto(buffer)

    for start in range(0, LONG, 1000):
        assert read_flac(Counted(stream), len(stream), start, 1000)
    assert len(reads) == 2 * LONG // 1000
    assert sum(reads) < len(reads) / 2 * len(stream) / 3
    minute = write_flac(np.zeros(960_000, np.int16), 16_000)
    reads.clear()
    assert read_flac(Counted(minute), len(minute), 900_000, 1000)
    assert len(reads) == 2


def test_what_was_seen_is_not_read_again() -> None:
    """The same samples, by one read of their frames alone; of whatever part is asked for next.

    Mutations, in `_read_flac`: append nothing to `seen`; `_read` one byte more.
    """
    stream, reads = encode(SIGNALS["bursts"]), []

    class Counted(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            reads.append(len(buffer))
            return super().readinto(buffer)

    seen: list[flac.Stream] = []
    for reads_in_all in (2, 3):
        assert read_flac(Counted(stream), len(stream), 30_000, 5000, seen)
        assert len(reads) == reads_in_all
    places = frames_of(stream)
    for start in range(0, LONG, 1000):
        reads.clear()
        found = read_flac(Counted(stream), len(stream), start, min(5000, LONG - start), seen)
        assert found is not None
        assert np.array_equal(found[0], SIGNALS["bursts"][start : start + 5000])
        assert reads == [places[-(-min(start + 5000, LONG) // BLOCK)] - places[start // BLOCK]]


def test_what_was_seen_may_be_another_stream() -> None:
    """Then nothing is found, or the right samples; next time its metadata are read.

    Mutations: in `read_flac`, no `clear`; in `_is_frame`, no `coded`; in `_read_flac`, no `end <= size`; any `places`
    are kept.
    """
    seen: list[flac.Stream] = []
    sounds = SIGNALS["walk"], SIGNALS["noise"], SIGNALS["walk"][:20_000]
    streams = [encode(sound) for sound in sounds]
    for sound, stream in [*zip(sounds, streams, strict=True)] * 2:
        for start in (0, 10_000, 0, 10_000):
            found = read_flac(io.BytesIO(stream), len(stream), start, 10_000, seen)
            if found is None:
                assert seen == []
                found = read_flac(io.BytesIO(stream), len(stream), start, 10_000, seen)
            assert found is not None
            assert np.array_equal(found[0], sound[start : start + 10_000])
    plain = plain_stream(100, range(100))
    frame = len(plain_stream(51, [])) - len(plain_stream(50, [])) - 18
    shifted = with_padding(plain, frame - 4)  # by which all is a frame farther on
    seen.clear()
    assert read_flac(io.BytesIO(plain), len(plain), 50 * 16, 16, seen)
    assert read_flac(io.BytesIO(shifted), len(shifted), 50 * 16, 16, seen) is None
    assert read_flac(io.BytesIO(plain), len(plain), 50 * 16, 16, seen)
    assert read_flac(io.BytesIO(plain), len(plain) // 2, 90 * 16, 16, seen) is None
    long = plain_stream(5000, range(5000))
    assert read_flac(io.BytesIO(long), len(long), 100, 16, seen)
    assert seen == []  # its table would take much memory


def with_padding(stream: bytes, size: int) -> bytes:
    """The same with that much more metadata."""
    assert stream[4] == 0, "STREAMINFO is not the last of the metadata"
    return stream[:42] + b"\1" + size.to_bytes(3) + bytes(size) + stream[42:]


def frames_of(stream: bytes) -> list[int]:
    """Where FFmpeg says that the frames of a stream begin, and its end."""
    with av.open(io.BytesIO(stream)) as container:
        return [*(packet.pos for packet in container.demux() if packet.pos is not None), len(stream)]


@pytest.mark.parametrize("length", [1, 16, BLOCK, BLOCK + 1, LONG])
def test_others_read_what_is_written(length: int) -> None:
    """libsndfile all of it, and from where it seeks to by the table, which has FFmpeg's places of the frames.

    Their checksum and sizes are said as the format has them. Mutations, in `write_flac`: `frames[:-1]` -> `frames[1:]`
    (then without its first); `points["samples"]` of whole blocks; `(min, max)` -> `(max, min)`; no `.astype("<i2")` but
    `">i2"`; `15 << 36` -> `23 << 36`.
    """
    for name, audio in SIGNALS.items():
        sound = audio[-length:]
        stream = encode(sound)
        places = frames_of(stream)
        points = np.frombuffer(stream, flac._POINT, int.from_bytes(stream[43:46]) // 18, 46)
        assert [*(points["byte"] + places[0]), len(stream)] == places, name
        assert points["sample"].tolist() == [*range(0, length, BLOCK)]
        assert np.array_equal(np.cumsum(points["samples"], dtype=int), [*range(BLOCK, length, BLOCK), length])
        sizes = np.diff(places).tolist()
        assert stream[12:18] == min(sizes).to_bytes(3) + max(sizes).to_bytes(3)
        assert stream[26:42] == hashlib.md5(sound.astype("<i2").tobytes()).digest()
        with sf.SoundFile(io.BytesIO(stream)) as file:
            assert (file.samplerate, file.channels, file.subtype) == (RATE, 1, "PCM_16")
            assert np.array_equal(file.read(dtype="int16"), sound), name
            file.seek(length // 2)
            assert np.array_equal(file.read(dtype="int16"), sound[length // 2 :]), name


@pytest.mark.parametrize(
    ("rate", "block"),
    [(8000, 2000), (16000, 2000), (48000, 2000), (2048, 2048), (44100, 2048), (7, 2048), (655350, 2048)],
)
def test_frames_begin_where_seconds_do(rate: int, block: int) -> None:
    """Where a fraction of one can be divided well; at any rate it can be written and read.

    Mutations: in `frame_length`, `-16` -> `-1`, or `_FRAME // 4` -> `_FRAME - 16`.
    """
    audio = SIGNALS["bursts"][:10_000]
    stream = write_flac(audio, rate)
    assert stream[8:12] == 2 * block.to_bytes(2)
    assert sf.info(io.BytesIO(stream)).samplerate == rate
    found = read_flac(io.BytesIO(stream), len(stream), 5000, 5000)
    assert found is not None
    assert found[1] == rate
    assert np.array_equal(found[0], audio[5000:])


def test_what_it_cannot_tell_is_left_to_others() -> None:
    """Other formats, rests of streams, and tables that are wrong are None; not an error, not other samples.

    Mutations: in `_about`, drop `least != most`, `not last`, or what is asked of the last point; in `_read_flac`, count
    no samples; in `_is_frame`, drop either of the two.
    """
    audio = SIGNALS["walk"][:20_000]
    bare = sndfile(audio)
    stream = with_table(bare)
    stereo, fine = with_table(sndfile(np.stack([audio, audio], 1))), with_table(sndfile(audio, kind="PCM_24"))
    others = {
        "stereo": stereo,
        "stereo that says mono": stereo[:20] + stream[20:26] + stereo[26:],
        "24 bits": fine,
        "24 bits that say 16": fine[:20] + stream[20:26] + fine[26:],
        "8 bits": with_table(sndfile(audio, kind="PCM_S8")),
        "wav": sndfile(audio, container="WAV"),
        "ogg": sndfile(audio, kind="VORBIS", container="OGG"),
        "no table": bare,
        "a table of some frames": with_table(bare, slice(1, None)),
        "a table of other frames": with_table(bare, [1, 0, 2, 3, 3]),
        "places far away": with_table(bare, far=1 << 20),
        "empty": b"",
        "a few bytes": stream[:30],
        "metadata alone": stream[:86],
        "cut": stream[: len(stream) // 2],
        "endless metadata": stream[:42] + b"\1\xff\xff\xff" + stream[42:],
        "another beginning": b"OggS" + stream[4:],
        "blocks of several lengths": stream[:8] + b"\0\x10" + stream[10:],
        "blocks of no length": stream[:8] + bytes(4) + stream[12:],
        "blocks of another length": stream[:8] + b"\x20\0\x20\0" + stream[12:],
        "numbers of samples": plain_stream(1250, range(1250), sync=b"\xff\xf9"),
        "of unknown length": stream[:21] + bytes([stream[21] & 0xF0]) + bytes(4) + stream[26:],
        "frames cut off": stream[:22] + (len(audio) * 100).to_bytes(4) + stream[26:],
    }
    for name, other in others.items():
        assert part(other, 19_000, 1000) is None, name
    assert part(stream, 19_000, 1001) is None
    longer = bytearray(with_table(sndfile(audio[:6000])))  # by a sample, and so are its blocks, it says
    for place in (9, 11, 25):
        longer[place] += 1
    assert part(bytes(longer), 5000, 500) is None
    endless = stream[:21] + b"\xff" * 5 + stream[26:]
    assert read_flac(io.BytesIO(endless), 1 << 30, 0x110000 * 4096, 16) is None
    for size in (1000, flac._HEAD - 48, 20_000):  # the second ends two bytes before what is read at first
        assert np.array_equal(part(with_padding(stream, size), 19_000, 1000), audio[19_000:])


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Recordings of one to five chunks, of noise and of music-like sound."""
    sounds = {
        name: SIGNALS[name][:n] for name, n in (("walk", LONG), ("bursts", 50_000), ("noise", 4097), ("silence", 9))
    }
    return write_split(tmp_path, "train", sounds, RATE, chunk_samples=40_000)


def test_our_own_shards_are_read_by_it(split: Split) -> None:
    """Each chunk, each time, or reading would take twice as long and nothing would say so.

    Mutations: in `read_clip`, `found = None`; in `write_flac`, `table = b""`.
    """
    flac._decoder.cache_clear()  # which each failure does, too
    calls = 0
    rng = np.random.default_rng(0)
    for recording, name in enumerate(("walk", "bursts", "noise", "silence")):
        rows = split.rows(recording)
        length = int(rows["samples"].sum())
        for start in rng.integers(length, size=30).tolist():
            samples = int(rng.integers(1, min(length - start, 20_000) + 1))
            assert np.array_equal(split.read(recording, start, samples), SIGNALS[name][start : start + samples])
            calls += (start + samples - 1) // 40_000 - start // 40_000 + 1
    info = flac._decoder.cache_info()
    assert info.hits + info.misses == calls


@pytest.mark.parametrize("examples", [150, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:.*seek table")
def test_damage_is_named_or_elsewhere(split: Split, examples: int, capfd: pytest.CaptureFixture) -> None:
    """Bits flipped anywhere in a member: never other samples, nor a word of the decoder's own; and what is whole is
    read as before.

    Mutations: drop "crccheck+explode"; in `read_clip`, seek to `start` and read from there.
    """
    path = split.folder / split.shard_names[0]
    content, row = path.read_bytes(), split.rows(0)[1]

    @settings(max_examples=examples, deadline=None, derandomize=examples < 1000, database=None, phases=PHASES)
    @given(
        st.lists(st.tuples(st.integers(0, int(row["bytes"]) - 1), st.integers(0, 7)), min_size=1, max_size=3),
        st.integers(0, 39_999),
        st.integers(1, 20_000),
    )
    @example([(11, 6)], 3910, 413)  # blocks of several lengths, it says: libsndfile would seek to another place
    def holds(flips: list[tuple[int, int]], start: int, samples: int) -> None:
        damaged = bytearray(content)
        for place, bit in flips:
            damaged[int(row["offset"]) + place] ^= 1 << bit
        path.write_bytes(damaged)
        start, samples = 40_000 + start, min(samples, 40_000 - start)
        try:
            found = split.read(0, start, samples)
        except DamagedMember:
            found = SIGNALS["walk"][start : start + samples]
        assert np.array_equal(found, SIGNALS["walk"][start : start + samples])
        assert np.array_equal(split.read(1, start - 40_000, 9000), SIGNALS["bursts"][start - 40_000 :][:9000])

    holds()
    assert capfd.readouterr().err == ""


def test_threads_have_their_own_decoders() -> None:
    """They decode at once. Mutation: `threading.get_ident()` -> `0`."""
    stream = encode(SIGNALS["walk"])

    def reads(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(LONG - 20_000, size=50).tolist()
        return all(np.array_equal(part(stream, at, 20_000), SIGNALS["walk"][at : at + 20_000]) for at in starts)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reads, range(8)))
