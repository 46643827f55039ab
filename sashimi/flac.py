"""FLAC streams (RFC 9639) of which parts are read: only the frames that hold one, and by a decoder that is kept.

A stream is metadata, the first of which is STREAMINFO, and frames of one length, but for the last. Those that are
written here have a SEEKTABLE that says where each frame begins. libsndfile starts a decoder for each read, and decodes
where it seeks: for a second of audio, half of its time.

What a table says is a guess: it must fit STREAMINFO, the first frame's number must be right, the decoder checks the two
checksums of each frame, and the samples are counted.
"""

import hashlib
import struct
import threading
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from numpy.typing import NDArray

_HEAD = 9 << 10  # bytes that hold all metadata of a minute at 16 kHz
_SEEKTABLE = 3
_POINT = np.dtype([("sample", ">u8"), ("byte", ">u8"), ("samples", ">u2")])  # bytes count from the first frame on
_MOST_SEEN = 1 << 12  # frames of a stream whose table is kept
_FRAME = 2048  # samples, at most
_PADDING = 64  # bytes of memory that must follow those to be decoded: AV_INPUT_BUFFER_PADDING_SIZE


class File(Protocol):
    """What is asked of a file."""

    def seek(self, place: int, /) -> object: ...
    def readinto(self, buffer: bytearray | memoryview, /) -> object: ...


class Stream(NamedTuple):
    """What a stream of frames of one length says of itself."""

    block: int  # samples a frame, in all but the last
    samples: int
    sample_rate: int  # Hz
    frames_at: int  # byte where the first frame begins
    places: NDArray[np.uint32]  # bytes where all frames begin, and where the last one ends; or none


def read_flac(
    file: File, size: int, start: int, samples: int, seen: list[Stream] | None = None
) -> tuple[np.ndarray, int] | None:
    """Samples start .. start + samples of a mono 16-bit stream of `size` bytes, int16 (samples,), and its rate in Hz.

    None if the stream has no table of all its frames, is of another kind, damaged where it is read, or too short;
    another decoder may tell which. `seen`, an empty list at first, spares the metadata to those who read the same
    stream with it again.
    """
    seen = [] if seen is None else seen
    found = _read_flac(file, size, start, samples, seen)
    if found is None:
        seen.clear()  # it may be another stream's
    return found


def _read_flac(file: File, size: int, start: int, samples: int, seen: list[Stream]) -> tuple[np.ndarray, int] | None:
    stream = next(iter(seen), None)  # other threads may empty it
    if stream is None:
        stream = _about(file, size)
        if stream is None:
            return None
        if len(stream.places) <= _MOST_SEEN:
            seen.append(stream)
    block, stop = stream.block, start + samples
    if stop > stream.samples or not len(stream.places):
        return None
    first, after = start // block, -(-stop // block)
    begin, end = int(stream.places[first]), int(stream.places[after])
    if not begin < end <= size:
        return None
    data = _read(file, begin, end)
    if not _is_frame(data, 0, first):
        return None
    decoder = _decoder(block, stream.sample_rate, threading.get_ident())
    packet: Any = memoryview(data)[: end - begin]
    try:
        frames = decoder.decode(av.Packet(packet))
    except av.FFmpegError:
        frames = []
    if sum(frame.samples for frame in frames) != min(after * block, stream.samples) - first * block:
        _decoder.cache_clear()  # there may be something left in it
        return None
    planes: Any = ((frame.planes[0], frame.samples) for frame in frames)
    audio = np.concatenate([np.frombuffer(plane, np.int16, count) for plane, count in planes])
    return audio[start - first * block :][:samples], stream.sample_rate


def _read(file: File, begin: int, end: int) -> bytearray:
    """Bytes begin .. end, and padding."""
    data = bytearray(end - begin + _PADDING)
    file.seek(begin)
    file.readinto(memoryview(data)[: end - begin])
    return data


def _is_frame(data: bytes | bytearray, at: int, number: int) -> bool:
    """Whether a frame of that number seems to begin there, mono and of 16 bits, in a stream of frames of one length."""
    coded = chr(number).encode("utf-8", "surrogatepass")  # a table has no place for more frames than characters
    return data.startswith(b"\xff\xf8", at) and data.startswith(b"\x08" + coded, at + 3)


def _about(file: File, size: int, there: int = _HEAD) -> Stream | None:
    """What a stream says in its metadata, in the first bytes that are `there` or more; None if it is another kind."""
    there = min(size, there)
    head = _read(file, 0, there)
    least, most, numbers = struct.unpack_from(">8xHH6xQ", head)
    if head[:4] != b"fLaC" or least != most:
        return None
    at, last, points = 4, False, np.empty(0, _POINT)
    while not last and at + 4 <= there:
        last, kind, length = head[at] >= 0x80, head[at] & 0x7F, int.from_bytes(head[at + 1 : at + 4])
        at += 4 + length
        if kind == _SEEKTABLE and at <= there:
            points = np.frombuffer(head, _POINT, length // _POINT.itemsize, at - length)
    if not last or at > there:
        return _about(file, size, 2 * at) if there < size else None
    samples = numbers & (1 << 36) - 1
    before_last = (len(points) - 1) * most
    places = np.empty(0, np.uint32)
    if len(points) and points[-1]["sample"] == before_last and samples <= before_last + most:
        places = np.append(points["byte"].astype(np.uint32), np.uint32(size - at)) + np.uint32(at)
    return Stream(most, samples, numbers >> 44, at, places)


@lru_cache(16)
def _decoder(block: int, sample_rate: int, thread: int) -> AudioCodecContext:
    """A decoder that is kept, one for each thread: it must not be used by two at once."""
    decoder = AudioCodecContext.create("flac", "r")
    numbers = sample_rate << 12 | 15 << 4  # mono, 16 bits
    decoder.extradata = struct.pack(">HH6xI20x", block, block, numbers)
    decoder.thread_count = 1
    decoder.options = {"err_detect": "crccheck+explode"}
    return decoder


def write_flac(audio: NDArray[np.int16], sample_rate: int) -> bytes:
    """A stream of int16 samples (samples,), at least one, with a SEEKTABLE of all its frames.

    Predictors are fixed polynomials: they take 1 to 9 % more bytes than the best linear ones, and two thirds of the
    time to decode; and all arithmetic is of integers, so any CPU writes the same bytes.
    """
    block = frame_length(sample_rate)
    encoder = AudioCodecContext.create("flac", "w")
    encoder.sample_rate, encoder.format, encoder.layout = sample_rate, "s16", "mono"
    encoder.options = {"frame_size": f"{block}", "lpc_type": "fixed"}
    whole = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
    whole.sample_rate = sample_rate
    packets = *encoder.encode(whole), *encoder.encode(None)
    frames = [bytes(packet) for packet in packets if packet.size]  # the last has only what FFmpeg says of the stream
    points = np.zeros(len(frames), _POINT)
    points["sample"] = np.arange(len(frames)) * block
    points["byte"] = np.cumsum([0, *map(len, frames[:-1])])
    points["samples"] = np.minimum(block, len(audio) - points["sample"])
    least, most = (extreme(map(len, frames)).to_bytes(3) for extreme in (min, max))
    numbers = sample_rate << 44 | 15 << 36 | len(audio)  # mono, 16 bits
    checksum = hashlib.md5(audio.astype("<i2").tobytes(), usedforsecurity=False).digest()
    info = struct.pack(">HH3s3sQ16s", block, block, least, most, numbers, checksum)
    table = points.tobytes()
    metadata = b"\0" + len(info).to_bytes(3) + info + bytes([1 << 7 | _SEEKTABLE]) + len(table).to_bytes(3) + table
    return b"".join((b"fLaC", metadata, *frames))


def frame_length(sample_rate: int) -> int:
    """Samples a frame: the longest whole fraction of a second, so that frames begin where seconds do, or 2048.

    Of multiples of 16, as the encoder divides a frame into up to so many parts; there is none for 44,100 Hz.
    """
    return next((samples for samples in range(_FRAME, _FRAME // 4, -16) if sample_rate % samples == 0), _FRAME)
