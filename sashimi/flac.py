"""Part of a FLAC stream (RFC 9639): only the frames that hold it are read and decoded, by a decoder that is kept.

A stream is metadata, the first of which is STREAMINFO, and frames of one length, but for the last. All but the last
begin with the same four bytes and go on with their number, so they are found by their bytes, and each can be decoded
by itself. libsndfile starts a decoder for each read, and seeks by decoding: for a second of audio, half of its time.

A place that is found is a guess: the decoder checks the two checksums of each frame, and the samples are counted.
"""

import re
import struct
import threading
from array import array
from bisect import bisect_left
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext

_HEAD = 1 << 12  # bytes that hold all metadata, where they are as this project writes them
_MARGINS = (2, 4, 16, 64, 256, 1024)  # frames read in addition on both sides, where frames should lie, try by try
_MOST_HEADER = 64  # bytes of a frame beside its samples, or more
_PADDING = 64  # bytes of memory that must follow those to be decoded: AV_INPUT_BUFFER_PADDING_SIZE
_MOST = 0x110000  # frames whose numbers are coded as Unicode's characters are
_MOST_REMEMBERED = 1 << 12  # frames of a stream whose places are remembered


class File(Protocol):
    """What is asked of a file."""

    def seek(self, offset: int, /) -> int: ...
    def readinto(self, buffer: Any, /) -> int: ...


class Stream(NamedTuple):
    """What a stream says of itself, and what was seen of it."""

    frames_at: int  # byte where the first frame begins
    header: bytes  # the four bytes with which all frames begin but perhaps the last
    block: int  # samples a frame, in all but the last
    samples: int
    sample_rate: int  # Hz
    places: "array[int]"  # of its frames, the byte where each begins, or 0; of a long stream's, none

    @property
    def frames(self) -> int:
        return -(-self.samples // self.block)

    def remember(self, number: int, place: int) -> None:
        """Where a frame begins."""
        if number < len(self.places):
            self.places[number] = place


def read_flac(
    file: File, size: int, start: int, samples: int, seen: list[Stream] | None = None
) -> tuple[np.ndarray, int] | None:
    """Samples start .. start + samples of a mono 16-bit stream of `size` bytes, int16 (samples,), and its rate in Hz.

    None if the stream is of another kind, damaged where it is read, or too short; another decoder may tell which.
    `seen`, an empty list at first, spares the search to those who read the same stream with it again.
    """
    seen = [] if seen is None else seen
    found = _read_flac(file, size, start, samples, seen)
    if found is None:
        seen.clear()  # it may be another stream's
    return found


def _read_flac(file: File, size: int, start: int, samples: int, seen: list[Stream]) -> tuple[np.ndarray, int] | None:
    stream = next(iter(seen), None)  # other threads may empty it
    if stream is None:
        stream = _about(_read(file, 0, min(size, _HEAD)))
        if stream is None:
            return None
        seen.append(stream)
    if start + samples > stream.samples:
        return None
    # The last frame may begin otherwise, so it is not looked for, but follows the one before.
    first = min(start // stream.block, max(0, stream.frames - 2))
    after = -(-(start + samples) // stream.block)
    after = after if after < stream.frames - 1 else stream.frames
    encoded = _find(file, size, stream, first, after)
    if encoded is None:
        return None
    decoder = _decoder(stream.block, stream.sample_rate, threading.get_ident())
    try:
        frames = decoder.decode(av.Packet(encoded))  # type: ignore[arg-type]  # it takes any buffer
    except av.FFmpegError:
        frames = []
    begin, end = first * stream.block, min(after * stream.block, stream.samples)
    if sum(frame.samples for frame in frames) != end - begin:
        _decoder.cache_clear()  # there may be something left in it
        return None
    audio = np.concatenate([np.frombuffer(cast(Any, frame.planes[0]), np.int16, frame.samples) for frame in frames])
    return audio[start - begin : start - begin + samples], stream.sample_rate


def _read(file: File, begin: int, end: int) -> bytearray:
    """Bytes begin .. end, and padding."""
    data = bytearray(end - begin + _PADDING)
    file.seek(begin)
    file.readinto(memoryview(data)[: end - begin])
    return data


def _about(head: bytearray) -> Stream | None:
    """What a stream that begins so says of itself; None if it is not mono, 16-bit and of frames of one length."""
    at, last = 4, False
    while not last:
        if at + 8 > len(head):
            return None
        last, length = head[at] >= 128, int.from_bytes(head[at + 1 : at + 4])
        at += 4 + length
    least, most, numbers = struct.unpack_from(">8xHH6xQ", head)
    header, samples = bytes(head[at : at + 4]), numbers & (1 << 36) - 1
    begins_well = head.startswith((b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"))
    if not begins_well or header[:2] != b"\xff\xf8" or header[3:] != b"\x08":  # numbered frames; mono, 16 bits
        return None
    if least != most or most < samples / _MOST:
        return None
    frames = -(-samples // most) if most else 0
    places = array("Q", bytes(8 * frames if frames <= _MOST_REMEMBERED else 0))
    return Stream(at, header, most, samples, numbers >> 44, places)


def _find(file: File, size: int, stream: Stream, first: int, after: int) -> memoryview | None:
    """The bytes of frames first .. after, up to the end if there is no frame `after`; None if they are not found.

    Interpolates between the nearest frames whose places are known, and reads ever more around the guess.
    """
    wanted = stream.header + _coded(first)
    if after <= len(stream.places):
        begin, end = stream.places[first], size if after == stream.frames else stream.places[after]
        if 0 < begin < end <= size:
            data = _read(file, begin, end)
            if data.startswith(wanted):
                return memoryview(data)[: end - begin]
    known = [(0, stream.frames_at), (stream.frames, size)]  # frames, and where they begin
    for margin in _MARGINS:
        begin, end = _guess(known, first, -margin), _guess(known, after, margin)
        if not 0 < end - begin <= (after - first + 2 * margin) * (2 * stream.block + _MOST_HEADER):
            return None
        data = _read(file, begin, min(size, end + _MOST_HEADER))
        at = data.find(wanted)
        stop = data.rfind(stream.header + _coded(after)) if after < stream.frames else size - begin
        if 0 <= at < stop:
            stream.remember(first, begin + at)
            stream.remember(after, begin + stop)
            return memoryview(data)[at:stop]
        found = re.compile(re.escape(stream.header)).finditer(data, 0, end - begin)
        places = ((_number(data[match.end() : match.end() + 4]), begin + match.start()) for match in found)
        known = sorted({*known, *(place for place in places if 0 < place[0] < stream.frames)})
    return None


def _guess(known: list[tuple[int, int]], number: int, more: int) -> int:
    """The byte where a frame begins; if that is unknown, where the one so many frames later may, between neighbours."""
    at = bisect_left(known, (number,))
    (low, begin), (high, end) = known[max(0, at - 1)], known[at]
    if high == number:
        return end
    return int(min(max(begin + (number + more - low) * (end - begin) / (high - low), begin), end))


def _coded(number: int) -> bytes:
    """A frame's number as its header has it."""
    return chr(number).encode("utf-8", "surrogatepass")


def _number(coded: bytearray) -> int:
    """The number that `_coded` turns into the first of these bytes."""
    ones = 8 - (coded[0] ^ 0xFF).bit_length()
    number = coded[0] & 0x7F >> ones
    for byte in coded[1:ones]:
        number = number << 6 | byte & 0x3F
    return number


@lru_cache(16)
def _decoder(block: int, sample_rate: int, thread: int) -> AudioCodecContext:
    """A decoder that is kept, one for each thread: it must not be used by two at once."""
    decoder = AudioCodecContext.create("flac", "r")
    numbers = sample_rate << 12 | 15 << 4  # mono, 16 bits
    decoder.extradata = struct.pack(">HH6xI20x", block, block, numbers)
    decoder.thread_count = 1
    decoder.options = {"err_detect": "crccheck+explode"}
    return decoder
