"""Random access to a split of a shard folder, here or at an address: any stretch of any recording."""

import io
import tarfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile as sf

from sashimi.errors import InputError
from sashimi.flac import Stream, read_flac
from sashimi.grid import first_rows
from sashimi.shard_rules import index_fault
from sashimi.shards import DamagedMember, Row, check_command, read_index, read_manifest
from sashimi.store import Entry, RemoteFile, RemoteFolder, Stretch, locate


class Split:
    """Random access to one split of a shard folder; made by `open_split`.

    It holds no open file and no connection that others would use, so it may be pickled and forked freely. `index` is
    a memory map (rows,) of INDEX_DTYPE, for a remote folder of this node's copy; `checksums` are the shards' SHA-256.
    """

    def __init__(
        self,
        folder: Path | RemoteFolder,
        name: str,
        sample_rate: int,
        shards: list[Entry],
        labels: list[str],
        index: np.ndarray,
    ) -> None:
        self.folder = folder
        self.name = name
        self.sample_rate = sample_rate
        self.shard_names = [shard.name for shard in shards]
        self.files = [folder / one.name if isinstance(folder, Path) else folder.file(one) for one in shards]
        self.checksums = [shard.sha256 for shard in shards]
        self.labels = labels
        self.index = np.asarray(index)  # each of a memmap's own fields and rows would be a memmap, which is slow
        self.n_recordings = int(index["recording"][-1]) + 1

    def __reduce__(self) -> tuple[Callable[..., "Split"], tuple[Path | RemoteFolder, str]]:
        return open_split, (self.folder, self.name)  # a memory map would be pickled as a full copy

    def rows(self, recording: int) -> np.ndarray:
        """The index rows of a recording."""
        return self.index[slice(*first_rows(self.index, np.array([recording, recording + 1])))]

    def read(self, recording: int, start: int, samples: int, place: int | None = None) -> np.ndarray:
        """Samples start .. start + samples of a recording, int16 (samples,), across its chunks.

        `place`, where it is known, is the row of the index that holds the first one, or a row of the recording before.
        Raises DamagedMember if a chunk it needs is missing, cut or damaged (flac frames carry checksums).
        """
        stop = start + samples
        if place is None:
            place = int(first_rows(self.index, np.array(recording)))
        parts = []
        while start < stop:
            row = Row(*self.index[place].item())
            first = start - row.start
            assert (row.recording, max(first, 0)) == (recording, first), (recording, start, samples, place)
            count = min(stop - start, row.samples - first)
            if count > 0:
                parts.append(read_clip(self.files[row.shard], row, first, count, self.sample_rate))
                start += count
            place += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int16)])

    def recording_name(self, recording: int) -> str:
        """Key of a recording, for messages: its number in the plan and the stem of its source file."""
        row = Row(*self.rows(recording)[0].item())
        name = member_name(self.files[row.shard], row)
        return name.rpartition("-")[0] if name.endswith(".flac") else f"number {recording}"


def open_split(place: str | Path | RemoteFolder, split: str, cache: str | None = None) -> Split:
    """Opens a split ("train", "valid" or "test") of the shards at a path or address, `cache` as in `store.locate`.

    InputError if there is nothing to read, or if a shard is missing or has another size than the manifest says.
    """
    folder = place if isinstance(place, RemoteFolder) else locate(place, cache)
    manifest = read_manifest(folder)
    splits = manifest["splits"]
    if split not in splits or splits[split]["clips"] == 0:
        filled = ", ".join(name for name in splits if splits[name]["clips"]) or "none"
        again = ", and training needs valid: pack again with --fractions 88 6 6, say" if split == "valid" else ""
        raise InputError(f"{folder} has no clips in split {split!r}: splits with clips are {filled}{again}")
    shards = [Entry(shard["name"], shard["bytes"], shard["sha256"]) for shard in splits[split]["shards"]]
    if wrong := _wrong_size(folder, shards):
        name, size, expected = wrong
        raise InputError(
            f"{folder}/{name}: has {size} of {expected} bytes: restore it, or pack the audio again "
            f"({check_command(folder)} lists all that is wrong)"
        )
    index = read_index(folder, split, splits[split]["clips"])
    if fault := index_fault(index, splits[split], len(manifest["labels"])):
        rebuild = check_command(folder, "--rebuild-index")
        raise InputError(f"{folder}/{split}.npy: {fault}: run {rebuild}, or restore what it names")
    return Split(folder, split, manifest["sample_rate"], shards, manifest["labels"], index)


def _wrong_size(folder: Path | RemoteFolder, shards: list[Entry]) -> tuple[str, int, int] | None:
    """Name, size and promised size of a shard that is missing or has another size, if there is one."""
    if isinstance(folder, RemoteFolder):
        return folder.wrong_size(shards)
    for name, expected, _ in shards:
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            return name, size, expected
    return None


class _Clip(sf.SoundFile):
    """A flac that is read from its beginning. Else soundfile seeks after it, which decodes another frame."""

    def seekable(self) -> bool:
        return False


def read_clip(shard: Path | RemoteFile, row: Row, start: int, samples: int, sample_rate: int) -> np.ndarray:
    """Samples start .. start + samples of the clip of one index row, int16 (samples,).

    DamagedMember if it cannot be read, or is not at `sample_rate` (Hz).
    """

    def read() -> tuple[np.ndarray, int]:
        with open_bytes(shard, row.offset, row.bytes) as file:
            found = read_flac(file, row.bytes, start, samples, _seen(str(shard), row.offset))
            if found is not None:
                return found
            whole = bytearray(row.bytes)
            file.seek(0)
            file.readinto(whole)
        with _Clip(io.BytesIO(whole)) as flac:
            # All from its beginning: a damaged head would be believed when seeking.
            audio = flac.read(start + samples, dtype="int16")[start:]
        if len(audio) == samples:
            slow = "a clip has no whole seek table, so it is read from its beginning, slowly: pack the audio again"
            warnings.warn(f"{shard}: {slow}", stacklevel=4)
        return audio, flac.samplerate

    try:
        try:
            audio, rate = read()
        except sf.LibsndfileError:
            if isinstance(shard, Path) or not shard.mend():
                raise
            audio, rate = read()
    except OSError as error:
        raise DamagedMember(shard, member_name(shard, row), error.strerror or str(error)) from error
    except sf.LibsndfileError as error:
        raise DamagedMember(shard, member_name(shard, row), f"damaged flac: {error.error_string}") from error
    if rate != sample_rate:
        raise DamagedMember(shard, member_name(shard, row), f"is at {rate} Hz, not {sample_rate} Hz")
    if audio.shape != (samples,):
        reason = f"decoded to shape {audio.shape}, wanted ({samples},)"
        raise DamagedMember(shard, member_name(shard, row), reason)
    return audio


@lru_cache(1 << 12)
def _seen(shard: str, offset: int) -> list[Stream]:
    """What this process has seen of a member."""
    return []


def forget_streams() -> None:
    """What this process has seen of any."""
    _seen.cache_clear()


def member_name(shard: Path | RemoteFile, row: Row) -> str:
    """Name of the flac of one index row, from the tar header before it; for messages, so it never fails."""
    header, header_at = bytearray(tarfile.BLOCKSIZE), row.offset - tarfile.BLOCKSIZE
    try:
        with open_bytes(shard, header_at, tarfile.BLOCKSIZE) as file:
            file.readinto(header)
            return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except (OSError, tarfile.HeaderError):
        return f"the member at byte {header_at}"


def open_bytes(shard: Path | RemoteFile, offset: int, size: int) -> Stretch | io.BytesIO:
    """`size` bytes of a shard from `offset` on, as a file. All random reading is done here. OSError if it cannot."""
    return Stretch(shard, offset) if isinstance(shard, Path) else shard.open(offset, size)
