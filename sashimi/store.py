"""Where a folder of shards lies: here, or at an http://, https:// or s3:// address.

Here it is a `pathlib.Path`, read as ever. Elsewhere it is a `RemoteFolder`:

- Its manifest and index are copied once to each node, into a folder of the user's in the system's temporary one
  (`TMPDIR`), under a lock, and memory-mapped from there. A copy is good while the server names the same version of
  the file and its own SHA-256 is right.
- Members of a shard are read by ranges, one request each; or, with a cache folder, from whole shards that are kept
  there. A shard's name in the cache is its SHA-256. It is written under another name, verified and then renamed, so
  that any number of processes and nodes may share the folder; the processes of one node wait for each other's
  downloads. Nothing is ever deleted from it but what is unfinished or damaged.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from sashimi.atomic import UNFINISHED, read_json, write_file, write_json
from sashimi.errors import InputError
from sashimi.remote import SCHEMES, Client, Unreachable

REQUESTS = 32  # sizes asked for at once
CHECKED_SECONDS = 600  # sizes of shards found right by one process are right for the others of its node this long
LOCK_SECONDS = 600  # longest wait for another process of this node
STALE_SECONDS = 3600  # an unfinished file of the cache that nobody has written to for so long is deleted


class Entry(NamedTuple):
    """What a manifest says of a shard."""

    name: str
    bytes: int
    sha256: str


class RemoteFolder:
    """A folder of shards at an address. It may be forked and pickled freely; `str` is its address."""

    def __init__(self, url: str, cache: Path | None = None, ask: bool = True) -> None:
        """Args:
        url: without a slash at its end.
        cache: folder for whole shards, made where it is missing. InputError if it cannot be.
        ask: whether this node's copies are compared with the server's files, and sizes of shards with the manifest.
        """
        self.url = url
        self.cache = cache
        self.ask = ask
        self.client = Client(url.partition("://")[0])
        self.refused: set[str] = set()  # SHA-256 of shards that this process does not try to cache again
        self.full = False
        if cache is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"data.cache={cache}: {error.strerror}; give another folder") from error

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type["RemoteFolder"], tuple[str, Path | None, bool]]:
        return RemoteFolder, (self.url, self.cache, False)  # to a worker, after its trainer has asked

    def file(self, entry: Entry) -> "RemoteFile":
        """One of its shards."""
        return RemoteFile(self, entry)

    def copy(self, name: str) -> Path:
        """This node's copy of a small file, as the server has it now. InputError if that cannot be had."""
        url = f"{self.url}/{name}"
        place = _node_folder()
        key = hashlib.sha256(url.encode()).hexdigest()[:32]
        copy, record = place / f"{key}-{name}", place / f"{key}.json"
        if not self.ask and copy.exists():
            return copy
        try:
            with _locked(place, key):
                size, version = self.client.about(url)
                if version is None or not _is_copy(copy, record, version):
                    if size is None:
                        raise Unreachable(errno.EIO, "the server does not say how long it is", url)
                    content = b"".join(self.client.pieces(url, size))
                    write_file(copy, content)
                    digest = hashlib.sha256(content).hexdigest()
                    write_json(record, {"url": url, "version": version, "sha256": digest})
        except Unreachable as error:
            missing = "; a folder of shards has manifest.json, SPLIT.npy and tars" * (error.errno == errno.ENOENT)
            raise InputError(f"{url}: {error.strerror}{missing}") from error
        except OSError as error:
            raise InputError(f"{copy}: {error.strerror}; set TMPDIR to a folder with room") from error
        return copy

    def wrong_size(self, entries: Sequence[Entry]) -> tuple[str, int, int] | None:
        """Name, size (0: it is missing) and promised size of the first shard that has another size, or None.

        One request a shard, `REQUESTS` at once, and by one process of a node only (see `CHECKED_SECONDS`). InputError
        if the server does not answer.
        """
        if not self.ask:
            return None
        place = _node_folder()
        key = hashlib.sha256(json.dumps([self.url, *entries]).encode()).hexdigest()[:32]
        stamp = place / f"{key}.checked"
        with _locked(place, key), ThreadPoolExecutor(REQUESTS) as pool:
            if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < CHECKED_SECONDS:
                return None
            try:
                for entry, size in zip(entries, pool.map(self._size, entries), strict=True):
                    if size is not None and size != entry.bytes:
                        return entry.name, size, entry.bytes
            except Unreachable as error:
                raise InputError(f"{error.filename}: {error.strerror}") from error
            finally:
                pool.shutdown(cancel_futures=True)
            stamp.touch()
        return None

    def _size(self, entry: Entry) -> int | None:
        try:
            return self.client.about(f"{self.url}/{entry.name}").bytes
        except Unreachable as error:
            if error.errno == errno.ENOENT:
                return 0
            raise


class RemoteFile(NamedTuple):
    """A shard of a `RemoteFolder`; `str` is its address."""

    folder: RemoteFolder
    entry: Entry

    def __str__(self) -> str:
        return f"{self.folder.url}/{self.entry.name}"

    def open(self, offset: int, size: int) -> "Stretch | io.BytesIO":
        """`size` bytes from `offset` on, as a file: from the cache if there is one, else by one request, at once.

        Raises Unreachable.
        """
        path = self._cached()
        if path is None:
            return io.BytesIO(self.folder.client.read(str(self), offset, size, self.entry.bytes))
        return Stretch(path, offset)

    def mend(self) -> bool:
        """After bytes that make no sense: whether it is worthwhile to read them once more.

        A reply may have been garbled. A cached shard is verified, and if it is damaged it is deleted.
        """
        path = self._path()
        if path is None:
            return True
        try:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == self.entry.sha256
        except FileNotFoundError:  # another process has found it damaged
            return True
        if not whole:
            path.unlink(missing_ok=True)
        return not whole

    def _path(self) -> Path | None:
        cache = self.folder.cache
        return None if cache is None else cache / f"{self.entry.sha256}.tar"

    def _cached(self) -> Path | None:
        """The whole shard in the cache, downloaded if need be; None if there is no cache or no room in it."""
        path, folder = self._path(), self.folder
        if path is None or _has_size(path, self.entry.bytes):
            return path
        if folder.full or self.entry.sha256 in folder.refused:
            return None
        try:
            with _locked(_node_folder(), self.entry.sha256):
                if _has_size(path, self.entry.bytes) or self._download(path) or self._download(path):
                    return path
            reason = "the SHA-256 of what the server sends is not the manifest's"
        except InputError as error:
            reason = str(error)
        except Unreachable:
            raise
        except OSError as error:
            folder.full = True
            warnings.warn(
                f"data.cache={folder.cache}: {error.strerror}; shards that are not in it yet are read by ranges",
                stacklevel=2,
            )
            return None
        folder.refused.add(self.entry.sha256)
        warnings.warn(f"{self}: {reason}; it is not cached, but read by ranges", stacklevel=2)
        return None

    def _download(self, path: Path) -> bool:
        """Puts the shard into the cache. False if its checksum is wrong; OSError if there is no room."""
        for stale in path.parent.glob(f"{UNFINISHED}{path.name}-*"):
            with suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    stale.unlink()
        if shutil.disk_usage(path.parent).free < self.entry.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        unfinished = path.with_name(f"{UNFINISHED}{path.name}-{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with unfinished.open("xb") as file:
                for piece in self.folder.client.pieces(str(self), self.entry.bytes):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != self.entry.sha256:
                return False
            os.replace(unfinished, path)
            return True
        finally:
            unfinished.unlink(missing_ok=True)


def locate(place: str | Path, cache: str | None = None) -> Path | RemoteFolder:
    """The folder of shards at a path, or at an address; a cache is for the latter. InputError if it is neither."""
    scheme, separator, _ = str(place).partition("://")
    if isinstance(place, Path) or not separator:
        return Path(place)
    if scheme not in SCHEMES:
        raise InputError(f"{place}: shards lie in a folder, or at an address such as https://HOST/FOLDER or s3://...")
    parts = urlsplit(place)
    if not parts.netloc or parts.query or parts.fragment:
        raise InputError(f"{place}: give the address of the folder itself, such as https://HOST/FOLDER, without ? or #")
    if "@" in parts.netloc:
        raise InputError(f"{scheme}://...@{parts.hostname}: passwords in addresses get into logs; put it in ~/.netrc")
    return RemoteFolder(place.rstrip("/"), None if cache is None else Path(cache))


class Stretch:
    """A local file from `offset` on, to be opened by `with`; what nobody asks for is not read.

    OSError if the file is missing, ends too early for what is asked for, or cannot be read.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset, self.place = path, offset, 0

    def __enter__(self) -> Self:
        # Opened each time anew: cheap beside decoding, and safe to fork.
        self.descriptor = os.open(self.path, os.O_RDONLY)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def seek(self, place: int, /) -> None:
        self.place = place

    def readinto(self, buffer: bytearray | memoryview, /) -> None:
        """Fills the buffer from where the last `seek` led."""
        rest, place = memoryview(buffer), self.offset + self.place
        while rest:
            count = os.preadv(self.descriptor, [rest], place)
            if count == 0:
                raise OSError(f"the file ends {len(rest)} bytes too early")
            rest, place = rest[count:], place + count


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _is_copy(copy: Path, record: Path, version: str) -> bool:
    """Whether `copy` is there, whole, and of that version."""
    try:
        about = read_json(record)
        with copy.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, InputError):
        return False
    return (about.get("version"), about.get("sha256")) == (version, digest)


def _node_folder() -> Path:
    """This user's folder on this node, for copies and locks. InputError if it cannot be had."""
    folder = Path(tempfile.gettempdir()) / f"sashimi-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; set TMPDIR to a folder of your own") from error
    if owner != os.getuid():
        raise InputError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


@contextmanager
def _locked(place: Path, key: str) -> Iterator[None]:
    """Within: no other process of this node is within, for the same key. InputError after `LOCK_SECONDS` of waiting."""
    path = place / f"{key}.lock"
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{path}: another process has held this lock for {LOCK_SECONDS} seconds; end it, or set TMPDIR"
                    ) from None
                time.sleep(0.02)
        yield
