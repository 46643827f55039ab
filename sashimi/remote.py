"""Bytes of files at http://, https:// and s3:// addresses, through fsspec, with time limits and retries.

Nothing here waits for ever: see `Patience`. What fails is tried again, with pauses that double, unless the server says
that the file is not there or not for us; in the end it is `Unreachable`, and for a while that is not asked again, so
that a store that is away costs its readers one wait and not one for each segment.

fsspec's connections live on an event loop in a thread, which does not survive a fork. So each process opens its own,
and keeps them to its end; those of the process that forked it are kept too, but not used: to close one would close it
there.
"""

import errno
import functools
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import fsspec

from sashimi.errors import InputError

T = TypeVar("T")

SCHEMES = ("http", "https", "s3")
PIECE = 8 * 2**20  # bytes of a whole file that are asked for at once
TRANSIENT = (408, 425, 429)  # statuses below 500 that are worth another try


class Patience(NamedTuple):
    """How long to wait, in seconds, and how often to try."""

    tries: int = 6
    pause: float = 0.5
    """Before the second try; doubled for each further one. A random part, up to a half, is left out each time."""
    connect: float = 10.0
    """Until a connection stands."""
    silence: float = 30.0
    """Without one byte."""
    reply: float = 120.0
    """Until a reply is whole: at most `PIECE` bytes, where the server knows ranges."""
    rest: float = 10.0
    """After the last try, before the same is asked again."""


PATIENCE = Patience()


class Unreachable(OSError):
    """What is at an address (`filename`) cannot be read; `strerror` says why. `errno` is ENOENT if nothing is there."""


class About(NamedTuple):
    """What a server says of a file."""

    bytes: int | None
    version: str | None
    """Changes when the file does; None if the server says nothing of the kind."""


class Client:
    """Reads from all addresses of one scheme. It may be forked and used by several threads."""

    def __init__(self, scheme: str) -> None:
        """Opens nothing. InputError, at the first read, if the packages for this scheme are not installed."""
        assert scheme in SCHEMES
        self.scheme = scheme
        self._resting: dict[str, tuple[float, str]] = {}
        self._warned = False

    def about(self, url: str) -> About:
        """Size and version of a file, without its content. Raises Unreachable."""

        def once(filesystem: Any) -> About:
            info = filesystem.info(url, timeout=PATIENCE.reply)
            version = [str(info[name]) for name in ("ETag", "Last-Modified", "LastModified") if info.get(name)]
            return About(info["size"], " ".join([*version, str(info["size"])]) if version else None)

        return self._try(url, once)

    def read(self, url: str, offset: int, size: int, whole: int) -> bytes:
        """`size` bytes from `offset` on of a file of `whole` bytes. Raises Unreachable."""
        data = self._range(url, offset, size, whole)
        if len(data) == size:
            return data
        if not self._warned:
            warnings.warn(f"{url}: this server sends whole files for parts of them; set data.cache", stacklevel=2)
        self._warned = True
        return data[offset : offset + size]

    def pieces(self, url: str, whole: int) -> Iterator[bytes]:
        """A file of `whole` bytes from its beginning to its end, in pieces. Raises Unreachable."""
        for offset in range(0, whole, PIECE):
            size = min(PIECE, whole - offset)
            data = self._range(url, offset, size, whole)
            if len(data) > size:
                yield data[offset:]
                return
            yield data

    def _range(self, url: str, offset: int, size: int, whole: int) -> bytes:
        """These bytes, or all `whole` bytes of the file if the server ignores ranges."""

        def once(filesystem: Any) -> bytes:
            data = filesystem.cat_file(url, start=offset, end=offset + size, timeout=PATIENCE.reply)
            if len(data) not in (size, whole):
                raise OSError(f"{len(data)} bytes came instead of {size}")
            return data

        return self._try(url, once)

    def _try(self, url: str, once: Callable[[Any], T]) -> T:
        for place in (url, self.scheme):
            until, reason = self._resting.get(place, (0.0, ""))
            if time.monotonic() < until:
                raise Unreachable(errno.EIO, reason, url)
        connection = self._connection(url)
        tries = 0
        while True:
            tries += 1
            try:
                return once(connection.filesystem)
            except connection.failures as error:
                status = _status(error)
                if status in (404, 410) or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
                    raise Unreachable(errno.ENOENT, "no such file", url) from error
                final = isinstance(error, connection.final) or ((status or 500) < 500 and status not in TRANSIENT)
                if final or tries == PATIENCE.tries:
                    reason = _reason(error) + (f" (tried {tries} times)" if tries > 1 else "")
                    # Without an answer it is the whole store that is away, not this file.
                    silent = status is None and isinstance(_cause(error), connection.silent)
                    self._resting[self.scheme if silent else url] = (time.monotonic() + PATIENCE.rest, reason)
                    raise Unreachable(errno.EIO, reason, url) from error
            time.sleep(PATIENCE.pause * 2 ** (tries - 1) * random.SystemRandom().uniform(0.5, 1))

    def _connection(self, url: str) -> "_Connection":
        try:
            return _s3(PATIENCE, os.getpid()) if self.scheme == "s3" else _http(PATIENCE, os.getpid())
        except ImportError as error:
            raise InputError(
                f"{url}: reading from {self.scheme}:// needs more packages ({error}): pip install 'fsspec[http]' s3fs"
            ) from error


class _Connection(NamedTuple):
    filesystem: Any
    failures: tuple[type[Exception], ...]
    """What it raises when a request fails."""
    final: tuple[type[Exception], ...]
    """Those that another try cannot mend."""
    silent: tuple[type[Exception], ...]
    """Those for which no server need have answered."""


@functools.cache
def _http(patience: Patience, process: int) -> _Connection:
    """The connection of this process, by its id."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect, sock_read=patience.silence)
    # Proxies and ~/.netrc as for other programs; compressed replies would have no ranges.
    client = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    filesystem = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)
    final = (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError)
    return _Connection(filesystem, (OSError, aiohttp.ClientError), final, (TimeoutError, aiohttp.ClientConnectionError))


@functools.cache
def _s3(patience: Patience, process: int) -> _Connection:
    """The connection of this process, by its id. Address and credentials are those of AWS's settings."""
    import aiohttp
    import botocore.exceptions as botocore
    from botocore.parsers import ResponseParserError

    config = {
        "connect_timeout": patience.connect,
        "read_timeout": patience.silence,
        "retries": {"total_max_attempts": 1},  # ours are enough
    }
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    filesystem.retries = 1
    failures = (OSError, botocore.BotoCoreError, botocore.ClientError, ResponseParserError, aiohttp.ClientError)
    final = (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.ProfileNotFound,
        botocore.ParamValidationError,
    )
    silent = (TimeoutError, botocore.ConnectionError, botocore.HTTPClientError)
    return _Connection(filesystem, failures, final, silent)


def _status(error: BaseException | None) -> int | None:
    """The server's answer, from aiohttp's or botocore's exception or what it caused."""
    while error is not None:
        response = getattr(error, "response", None)
        about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = getattr(error, "status", about.get("HTTPStatusCode"))
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _cause(error: Exception) -> BaseException:
    """fsspec raises FileNotFoundError from whatever kept it from asking for a size."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _reason(error: Exception) -> str:
    """One line."""
    cause = _cause(error)
    status, message = _status(cause), getattr(cause, "strerror", None) or getattr(cause, "message", None) or str(cause)
    if isinstance(cause, TimeoutError) and not str(cause):
        message = f"no whole answer within {PATIENCE.reply:g} seconds"
    line = " ".join(f"{status or ''} {message or type(cause).__name__}".split())
    return line if len(line) <= 200 else f"{line[:199]}…"
