"""A web server for tests: files of a folder, or another server's answers, with faults on demand."""

import http.client
import http.server
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SLOW_SECONDS = 30  # far beyond every limit that a test sets; the waiting thread ends with the server
LATE_SECONDS = 0.3


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    """Of the whole answer; for HEAD, too."""


Source = Callable[[Request, dict[str, str]], Answer]
Fault = Callable[[Request], str | None]


def folder_source(folder: Path) -> Source:
    """Files of a folder, with ranges, lengths and ETags."""

    def answer(request: Request, headers: dict[str, str]) -> Answer:
        file = folder / request.path.lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"not here")
        about = file.stat()
        tag = {"ETag": f'"{about.st_mtime_ns:x}-{about.st_size:x}"', "Accept-Ranges": "bytes"}
        if request.range is None:
            return Answer(200, tag, file.read_bytes())
        first, last = (int(number) for number in re.findall(r"\d+", request.range))
        if first >= about.st_size:
            return Answer(416, tag, b"")
        with file.open("rb") as content:
            content.seek(first)
            body = content.read(last + 1 - first)
        return Answer(206, {**tag, "Content-Range": f"bytes {first}-{first + len(body) - 1}/{about.st_size}"}, body)

    return answer


def forward_source(port: int) -> Source:
    """What the server at a port of this machine answers."""

    def answer(request: Request, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(request.method, request.path, headers=headers)
        reply = connection.getresponse()
        body = reply.read()
        kept = {name: value for name, value in reply.headers.items() if name.lower() not in ("connection", "date")}
        if request.method == "HEAD":
            return Answer(reply.status, kept, bytes(int(kept.pop("Content-Length", "0"))))
        kept.pop("Content-Length", None)
        kept.pop("Transfer-Encoding", None)
        connection.close()
        return Answer(reply.status, kept, body)

    return answer


class Server:
    """A running server. `fault(request)` names what goes wrong with a request: None, or one of

    drop (the connection, before an answer), 503, 404, 403, slow (no byte for long), cut (half of the body, then the
    connection is dropped), short (half of the body, as if that were all), whole (the range is ignored) or garbled (the
    right number of wrong bytes), or late (nothing goes wrong, but others come in between).
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[Request] = []
        self.fault: Fault = lambda request: None

    def count(self, pattern: str) -> int:
        """Requests "METHOD PATH" that match so far."""
        return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in list(self.requests))

    def first(self, times: int, fault: str, pattern: str) -> None:
        """From now on, this goes wrong with the first requests of each path and range that match."""
        seen: dict[Request, int] = {}

        def choose(request: Request) -> str | None:
            if not re.search(pattern, f"{request.method} {request.path}"):
                return None
            seen[request] = seen.get(request, 0) + 1
            return fault if seen[request] <= times else None

        self.fault = choose


@contextmanager
def serve(source: Source) -> Iterator[Server]:
    """A server on a free port of this machine, until the end of the block."""
    ending = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            request = Request(self.command, self.path, self.headers.get("Range"))
            server.requests.append(request)
            fault = server.fault(request)
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if fault == "slow":
                ending.wait(SLOW_SECONDS)
                self.close_connection = True
                return
            if fault == "late":
                ending.wait(LATE_SECONDS)
            headers = {name: value for name, value in self.headers.items() if fault != "whole" or name != "Range"}
            reply = source(request._replace(range=headers.get("Range")), headers)
            if fault in ("503", "404", "403"):
                reply = Answer(int(fault), {}, b"<html>an error page</html>")
            body = bytes(byte ^ 0xFF for byte in reply.body) if fault == "garbled" else reply.body
            body = body[: len(body) // 2] if fault == "short" else body
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Threads(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that have given up

    threads = Threads(("127.0.0.1", 0), Handler)
    server = Server(threads.server_address[1])
    thread = threading.Thread(target=threads.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        ending.set()
        threads.shutdown()
        threads.server_close()
        thread.join()
