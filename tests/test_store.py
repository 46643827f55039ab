"""Shards at http:// and s3:// addresses: laws 7 to 9 from there, faults of servers and disks, and what is fetched.

Real servers on this machine answer, with faults on demand (`faulty`); S3 is moto's server behind the same faults.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY, command, curve, launch, metrics, recording_lengths
from faulty import Server, folder_source, forward_source, serve
from test_atomic import disk_of

from sashimi import remote, store
from sashimi.audio import AudioConfig
from sashimi.errors import InputError
from sashimi.shard_writer import write_split
from sashimi.split import Split, open_split
from sashimi.stream import Batch, DataConfig, Segments, n_segments, train_batches

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
for package in ("aiohttp", "s3fs"):
    pytest.importorskip(package)

AUDIO = AudioConfig(sample_rate=8000, quantizer="linear", bits=16)  # level = sample + 32768, exactly
DATA = DataConfig(segment=256, workers=0, crop=True)
LENGTHS = (100, 1000, 2304, 4000, 700, 257, 1500, 3000)  # of the recordings, in samples
FAULTS = ("drop", "503", "cut", "short", "whole", "garbled")
TARS = r"GET .*\.tar"


class Served(NamedTuple):
    """The shards of `noise` behind a server with faults."""

    server: Server
    url: str
    folder: Path | None
    """What is served, to be changed at will; for S3, nothing."""


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of recordings of several chunks, and a small valid split."""
    folder = tmp_path_factory.mktemp("remote") / "noise"
    draw = np.random.default_rng(0)
    clips = {f"{i:03d}": draw.integers(-30000, 30000, length).astype(np.int16) for i, length in enumerate(LENGTHS)}
    write_split(folder, "train", clips, 8000, chunk_samples=900, shard_recordings=3)
    write_split(folder, "valid", {"only": clips["003"]}, 8000, chunk_samples=900)
    return folder


@pytest.fixture(scope="session")
def bucket(noise: Path) -> Iterator[Server]:
    """An S3-compatible server that has the shards as s3://shards/noise."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    keys = {"aws_access_key_id": "some", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
    client.create_bucket(Bucket="shards")
    for file in noise.iterdir():
        client.upload_file(str(file), "shards", f"noise/{file.name}")
    with serve(forward_source(port)) as proxy:
        yield proxy
    server.stop()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own for what a node keeps, and no pause that a test would notice."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=3, pause=0.01, rest=0.2))
    return folder


@pytest.fixture
def http(node: Path, noise: Path, tmp_path: Path) -> Iterator[Served]:
    folder = Path(shutil.copytree(noise, tmp_path / "served/noise"))
    with serve(folder_source(tmp_path / "served")) as server:
        yield Served(server, f"http://127.0.0.1:{server.port}/noise", folder)


@pytest.fixture
def s3(node: Path, bucket: Server, monkeypatch: pytest.MonkeyPatch) -> Served:
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket.port}",
        "AWS_ACCESS_KEY_ID": "some",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket.requests.clear()
    bucket.fault = lambda request: None
    return Served(bucket, "s3://shards/noise", None)


@pytest.fixture(params=["http", "s3"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[False, True], ids=["ranges", "cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return str(tmp_path / "cache") if request.param else None


class Reader(NamedTuple):
    """Where shards are, and a cache or none."""

    served: Served
    cache: str | None


@pytest.fixture(params=["http", "http-cache", "s3"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    scheme, _, cached = request.param.partition("-")
    return Reader(request.getfixturevalue(scheme), str(tmp_path / "cache") if cached else None)


def batches(split: Split, workers: int = 0, position: int = 0) -> list[Batch]:
    """More than an epoch of training batches."""
    train = train_batches(split, replace(DATA, workers=workers), AUDIO, 3, position, 8, None)
    return list(itertools.islice(train, n_segments(split, DATA) // 8 + 2))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.faults == other.faults
        for name, x, y in zip(Batch._fields[:4], one, other, strict=False):
            assert torch.equal(x, y), name


def whole_split(split: Split) -> Batch:
    """Every segment, uncropped."""
    segments = Segments(split, replace(DATA, crop=False), AUDIO, seed=None)
    return segments[np.arange(segments.grid.n_segments)]


def segments_of(split: Split, shard: int) -> np.ndarray:
    """Which rows of `whole_split` lie in that shard: bool (segments,)."""
    grid = Segments(split, DATA, AUDIO, seed=None).grid
    shards = np.array([split.rows(recording)["shard"][0] for recording in range(split.n_recordings)])
    return shards[grid.cut(np.arange(grid.n_segments)).recordings] == shard


# ---- the same batches


@pytest.mark.parametrize("workers", [0, 2])
def test_laws_7_to_9_from_an_address(reader: Reader, noise: Path, workers: int) -> None:
    """The batches of the local folder, bit for bit, from any position; the workers of a process that reads, too.

    Mutations: `offset + 1` in `Client._range`; in `Client._connection`, one connection for all processes.
    """
    split = open_split(reader.served.url, "train", reader.cache)
    assert_same([whole_split(split)], [whole_split(open_split(noise, "train"))])
    for position in (10_000_003, 0)[: 1 if workers else 2]:
        assert_same(batches(split, workers, position), batches(open_split(noise, "train"), 0, position))


def test_ranges_ask_once_for_each_chunk(http: Served) -> None:
    """And for no more bytes than its flac has. Mutation: in `read_clip`, read to the end of the shard."""
    split = open_split(http.url, "train")
    before = len(http.server.requests)
    split.read(2, 700, 1400)  # of three chunks of 900 samples
    first, *_ = rows = split.rows(2)
    ranges = [f"bytes={row['offset']}-{row['offset'] + row['bytes'] - 1}" for row in rows]
    assert [request.range for request in http.server.requests[before:]] == ranges
    assert first["bytes"] < 900 * 3


def test_cache_asks_once_for_each_shard(served: Served, noise: Path, tmp_path: Path) -> None:
    """Whole, in pieces, whoever reads it later; other addresses of the same shards included.

    Mutation: in `RemoteFile._cached`, return None after a download.
    """
    split = open_split(served.url, "train", str(tmp_path / "cache"))
    assert_same([whole_split(split)], [whole_split(open_split(noise, "train"))])
    assert served.server.count(TARS) == 3
    whole_split(pickle.loads(pickle.dumps(split)))
    whole_split(open_split(f"{served.url}/", "train", str(tmp_path / "cache")))
    assert served.server.count(TARS) == 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(f"{c}.tar" for c in split.checksums)


# ---- faults of servers


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:.*sends whole files for parts of them:UserWarning")
def test_a_fault_that_passes_changes_nothing(reader: Reader, noise: Path, fault: str) -> None:
    """Each file's first answer is bad, manifest, index and size included; what is read is not.

    Mutations: `tries = 1` in `Patience`; drop the check of the length in `Client._range`; drop `mend` in `read_clip`.
    """
    reader.served.server.first(1, fault, {"garbled": TARS, "short": "GET"}.get(fault, "."))
    read = whole_split(open_split(reader.served.url, "train", reader.cache))
    assert_same([read], [whole_split(open_split(noise, "train"))])


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*sends whole files for parts of them:UserWarning")
@pytest.mark.parametrize("seed", range(10))
def test_random_faults_change_nothing(
    reader: Reader, noise: Path, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three in ten answers are bad, of any kind and to any request; with workers. Mutation: `tries = 1`."""
    draw = random.Random(seed)
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=20, pause=0.001))
    faults = ("drop", "503", "cut", "whole")
    reader.served.server.fault = lambda request: draw.choice(faults) if draw.random() < 0.3 else None
    read = batches(open_split(reader.served.url, "train", reader.cache), workers=2, position=seed * 1000)
    assert_same(read, batches(open_split(noise, "train"), position=seed * 1000))


def test_servers_without_ranges(http: Served, noise: Path, cache: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are cut to what was asked for, with a warning that names the remedy; a cache needs each once.

    Mutation: `yield data` in `Client.pieces` without leaving.
    """
    monkeypatch.setattr(remote, "PIECE", 1000)
    http.server.first(10**9, "whole", TARS)
    split = open_split(http.url, "train", cache)
    if cache is None:
        with pytest.warns(UserWarning, match="sends whole files for parts of them; set data.cache"):
            read = whole_split(split)
    else:
        read = whole_split(split)
        assert http.server.count(TARS) == 3
    assert_same([read], [whole_split(open_split(noise, "train"))])


@pytest.mark.parametrize("fault", ["drop", "503", "404", "403", "cut", "slow"])
def test_law_8_a_shard_that_cannot_be_read_is_masked_and_named(
    reader: Reader, noise: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its segments alone, whatever keeps it away for good, and in bounded time.

    Mutations: drop `sock_read` in `_http`; rest `self.scheme` for every failure.
    """
    served = reader.served
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=2, pause=0.01, silence=1.0, rest=300.0))
    split, local = open_split(served.url, "train", reader.cache), open_split(noise, "train")
    served.server.first(10**9, fault, r"GET .*train-000001\.tar")
    hit = segments_of(local, 1)
    # Without any answer the whole store counts as away, so those segments come last.
    ids = np.argsort(hit if fault in ("drop", "slow") else ~hit, kind="stable")
    read, expected = (Segments(one, replace(DATA, crop=False), AUDIO, seed=None)[ids] for one in (split, local))
    lost = torch.from_numpy(hit[ids])
    assert torch.equal(read.mask, expected.mask & ~lost[:, None])
    assert torch.equal(read.targets[~lost], expected.targets[~lost])
    reason = {"404": "no such file", "503": "503|reduce your request rate", "403": "403|Forbidden"}.get(fault, ".")
    assert len(read.faults) == int(hit.sum())
    for line in read.faults:
        assert re.match(rf"{served.url}/train-000001\.tar: the member at byte \d+: .*({reason})", line), line
        assert "\n" not in line


def test_a_store_that_is_away_costs_one_wait(http: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each segment. Mutation: drop the check of `_resting` in `Client._try`."""
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=3, pause=0.01, rest=300.0))
    split = open_split(http.url, "train")
    http.server.first(10**9, "drop", ".")
    before = len(http.server.requests)
    assert len(whole_split(split).faults) == n_segments(split, DATA)
    assert len(http.server.requests) - before <= 6  # a client may repeat a request by itself


def test_law_8_a_damaged_member_is_masked_and_named(http: Served, noise: Path, cache: str | None) -> None:
    """Damaged after packing, at the same size: by ranges and, as it is not what the manifest says, past the cache.

    Mutations: in `RemoteFile._cached`, return `path` whatever its checksum; in `_download`, drop the check of it.
    """
    local = open_split(noise, "train")
    row = local.rows(3)[0]  # the first recording of the second shard
    assert http.folder is not None
    with open(http.folder / local.shard_names[row["shard"]], "r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["bytes"]) // 2)
        tar.write(b"\xaa" * 20)
    split = open_split(http.url, "train", cache)
    if cache is None:
        read = whole_split(split)
    else:
        with pytest.warns(UserWarning, match=r"train-000001\.tar: the SHA-256 of what .* but read by ranges"):
            read = whole_split(split)
    expected = whole_split(local)
    hit = (read.mask != expected.mask).any(dim=1)
    assert 0 < int(hit.sum()) == len(read.faults) <= 4  # segments of its first 900 samples
    assert torch.equal(read.targets[~hit], expected.targets[~hit])
    for line in read.faults:
        assert re.match(rf"{http.url}/train-000001\.tar: 003-00000\.flac: damaged flac: .*recording 003, samples", line)


# ---- the cache


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[-1000:]
    else:
        content[1000:-3000] = bytes(len(content) - 4000)
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "zeros"])
def test_a_damaged_file_of_the_cache_is_fetched_again(http: Served, noise: Path, tmp_path: Path, how: str) -> None:
    """Mutations: `_has_size` is `path.exists()`; `RemoteFile.mend` leaves the file."""
    cache = tmp_path / "cache"
    split = open_split(http.url, "train", str(cache))
    whole_split(split)
    for checksum in split.checksums:
        damage(cache / f"{checksum}.tar", how)
    assert_same([whole_split(split)], [whole_split(open_split(noise, "train"))])
    assert http.server.count(TARS) == 6
    assert all(isinstance(file, store.RemoteFile) and file.mend() is False for file in split.files)  # they are whole


def fill(url: str, cache: str) -> None:
    """Read everything once."""
    whole_split(open_split(url, "train", cache))


def test_a_kill_leaves_whole_files_in_the_cache(
    http: Served, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at several moments of filling it; later, what was left unfinished is cleared away.

    Mutations: download under the final name; keep stale files in `_download`.
    """
    monkeypatch.setattr(remote, "PIECE", 1000)  # a dozen requests a shard
    cache, finished = tmp_path / "cache", 0
    contents = {path.read_bytes() for path in noise.glob("*.tar")}
    for trial in range(6):
        before = http.server.count(TARS)
        process = multiprocessing.get_context("fork").Process(target=fill, args=(http.url, str(cache)))
        process.start()
        while http.server.count(TARS) < before + 5 + 6 * trial and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        for path in cache.glob("[!.]*"):
            assert path.read_bytes() in contents
            path.unlink()
            finished += 1
    assert finished
    stale = cache / f".tmp-{open_split(http.url, 'train').checksums[0]}.tar-killed"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    fill(http.url, str(cache))
    assert not stale.exists()


def test_a_full_disk_falls_back_to_ranges(http: Served, noise: Path, tmp_path: Path) -> None:
    """With one warning; what is in the cache already is used. Mutation: let `_cached` pass the OSError on."""
    cache = tmp_path / "cache"
    split = open_split(http.url, "train", str(cache))
    split.read(0, 0, 1)
    assert len(list(cache.iterdir())) == 1
    with disk_of(4000), pytest.warns(UserWarning, match=rf"data.cache={cache}: File too large; shards that") as caught:
        read = whole_split(split)
    assert len(caught) == 1
    assert_same([read], [whole_split(open_split(noise, "train"))])
    assert [path.name for path in cache.iterdir()] == [f"{split.checksums[0]}.tar"]


def read_all(url: str, cache: str | None, out: Path, node: Path) -> None:
    """What one rank on a node does."""
    node.mkdir(exist_ok=True)
    tempfile.tempdir = str(node)
    read = whole_split(open_split(url, "train", cache))
    assert read.faults == ()
    torch.save(read.targets, out / f"{os.getpid()}.pt")


@pytest.mark.parametrize("nodes", [1, 2])
def test_processes_of_a_node_fetch_once(
    http: Served, noise: Path, cache: str | None, tmp_path: Path, nodes: int
) -> None:
    """Manifest, index, size of each shard: once a node for six processes that start together; a cached shard, too.

    Nodes know nothing of each other and share the cache. Mutations: drop `_locked` in `copy`, in `wrong_size` or in
    `_cached`; in `_download`, write to one name for all.
    """
    out = tmp_path / "out"
    out.mkdir()
    http.server.first(10**9, "late", "HEAD")
    start = multiprocessing.get_context("fork").Process
    places = [(http.url, cache, out, tmp_path / f"node-{rank % nodes}") for rank in range(6)]
    ranks = [start(target=read_all, args=place) for place in places]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    expected = whole_split(open_split(noise, "train")).targets
    assert all(torch.equal(torch.load(path), expected) for path in out.iterdir())
    assert [http.server.count(f"GET .*{name}") for name in ("manifest.json", "train.npy")] == [nodes, nodes]
    assert http.server.count(r"HEAD .*\.tar") == 3 * nodes
    if cache is not None:
        assert 3 <= http.server.count(TARS) <= 3 * nodes
        assert len(list(Path(cache).iterdir())) == 3


# ---- what a node keeps


def test_copies_are_of_what_the_server_has_now(http: Served, noise: Path, node: Path) -> None:
    """New shards at the same address are seen at once; a damaged copy is fetched again; workers ask nothing.

    Mutations: `_is_copy` without `version`, without the SHA-256, or as `True`; `RemoteFolder.__reduce__` with True.
    """
    assert http.folder is not None
    split = open_split(http.url, "train")
    assert isinstance(split.index.base, np.memmap)
    assert http.server.count("GET") == 2
    open_split(http.url, "train")
    assert http.server.count("GET") == 2

    (copy,) = node.glob("*/*-train.npy")
    damage(copy, "cut")
    open_split(http.url, "train")
    assert http.server.count("GET") == 3

    before = len(http.server.requests)
    sent = pickle.loads(pickle.dumps(split))
    assert len(pickle.dumps(split)) < 300
    assert len(http.server.requests) == before
    assert_same([whole_split(sent)], [whole_split(open_split(noise, "train"))])

    write_split(http.folder, "train", {"new": np.arange(1000, dtype=np.int16)}, 8000)
    assert recording_lengths(open_split(http.url, "train")) == [1000, *LENGTHS[3:]]


@pytest.mark.parametrize("left", [None, 0, 1000])
def test_a_lost_or_cut_shard_is_refused_when_opened(http: Served, left: int | None) -> None:
    """As in a local folder. Mutation: `return None` in `RemoteFolder.wrong_size`."""
    assert http.folder is not None
    shard = http.folder / "train-000001.tar"
    whole = shard.stat().st_size
    shard.unlink() if left is None else os.truncate(shard, left)
    with pytest.raises(
        InputError, match=rf"^{http.url}/train-000001\.tar: has {left or 0} of {whole} bytes: restore it"
    ):
        open_split(http.url, "train")
    open_split(http.url, "valid")


def test_a_lost_object_is_refused_when_opened(s3: Served) -> None:
    """Mutation: in `RemoteFolder._size`, always `raise`."""
    s3.server.first(10**9, "404", "train-000002")
    with pytest.raises(InputError, match=r"^s3://shards/noise/train-000002\.tar: has 0 of \d+ bytes"):
        open_split(s3.url, "train")


# ---- what a user can mend


def test_addresses_that_cannot_be_opened(http: Served, s3: Served, tmp_path: Path) -> None:
    """One line that begins with the address and says why. Mutation: drop any of these checks."""
    (http.folder / "../text").resolve().mkdir()
    (http.folder / "../text/manifest.json").resolve().write_text("hello")
    base = http.url.removesuffix("/noise")
    (tmp_path / "file").write_text("")
    for place, cache, message in (
        (f"{base}/nowhere", None, rf"{base}/nowhere/manifest.json: no such file; a folder of shards has"),
        (f"{base}/text", None, rf"{base}/text/manifest.json: not JSON"),
        ("http://127.0.0.1:1/noise", None, r"http://127.0.0.1:1/noise/manifest.json: .*Connect call failed.*3 times"),
        ("http:///noise", None, "http:///noise: give the address of the folder itself"),
        (f"{http.url}?token=1", None, r".*\?token=1: give the address of the folder itself"),
        ("https://me:secret@host/noise", None, r"https://...@host: passwords in addresses get into logs"),
        ("gs://bucket/noise", None, "gs://bucket/noise: shards lie in a folder, or at an address such as"),
        ("s3://shards/nowhere", None, "s3://shards/nowhere/manifest.json: no such file"),
        ("s3://nobody/noise", None, "s3://nobody/noise/manifest.json: "),
        (http.url, str(tmp_path / "file"), f"data.cache={tmp_path}/file: File exists; give another folder"),
        (http.url, str(tmp_path / "file/below"), f"data.cache={tmp_path}/file/below: Not a directory"),
    ):
        with pytest.raises(InputError, match=rf"^{message}[^\n]*$") as caught:
            open_split(place, "train", cache)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("fault", "message"), [("503", "503"), ("drop", ""), ("403", "403"), ("cut", "")])
def test_a_server_that_fails_at_the_start(served: Served, fault: str, message: str) -> None:
    """One line names the address, the last reason and the tries. Mutation: `copy` lets Unreachable through."""
    served.server.first(10**9, fault, "manifest")
    tries = "" if fault == "403" else r"\(tried 3 times\)"
    with pytest.raises(InputError, match=rf"^{served.url}/manifest.json: .*{message}[^\n]*{tries}$"):
        open_split(served.url, "train")


@pytest.mark.parametrize("package", ["aiohttp", "botocore.exceptions"])
def test_missing_packages(package: str, http: Served, s3: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install. Mutation: drop `except ImportError` in `Client._connection`."""
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=4))  # as if this process had read nothing so far
    monkeypatch.setitem(sys.modules, package, None)
    url = http.url if package == "aiohttp" else s3.url
    with pytest.raises(InputError, match=rf"^{url}/manifest.json: .*pip install 'fsspec\[http\]' s3fs$"):
        open_split(url, "train")


def test_no_credentials(s3: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once: to try again would not help. Mutation: no `final` in `_s3`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(tries=5))  # as if this process had read nothing so far
    with pytest.raises(InputError, match=r"manifest.json: Unable to locate credentials$"):
        open_split(s3.url, "train")


def test_temporary_folders_of_others(http: Served, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that somebody else laid down is not trusted. Mutation: drop the check of the owner."""
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match=rf"^{node}/sashimi-12345: belongs to another user; set TMPDIR"):
        open_split(http.url, "train")


# ---- commands


@pytest.fixture
def tiny(tiny_shards: Path, node: Path) -> Iterator[Served]:
    with serve(folder_source(tiny_shards.parent)) as server:
        yield Served(server, f"http://127.0.0.1:{server.port}/{tiny_shards.name}", tiny_shards)


def test_a_run_may_move_between_folder_and_address(
    train: Callable[..., list[dict]], tiny: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 12: local, by ranges, then from a cache, the curve is one; and evaluation reads addresses as well.

    Mutations: drop "data.cache" from FREE_ON_RESUME; make `fingerprint` depend on the folder.
    """
    constant = ("--optim.schedule", "constant")
    whole = train("whole", *constant)
    cache = str(tmp_path / "cache")
    places: list[list[str]] = [[], ["--data.shards", tiny.url], ["--data.shards", tiny.url, "--data.cache", cache]]
    for steps, place in zip(("4", "8", "12"), places, strict=True):
        lines = train("moving", *constant, *place, "--train.steps", steps)
    assert curve(lines) == curve(whole)
    results = []
    for place in ([], ["--data", tiny.url], ["--data", tiny.url, "--cache", cache]):
        argv = [str(tmp_path / "runs/whole"), *place, "--out", str(tmp_path / "out.json")]
        command("launch/evaluate.py", argv, monkeypatch)
        results.append(json.loads((tmp_path / "out.json").read_text())["bits_per_sample"])
    assert results == [results[0]] * 3


def test_law_8_fatal_stops_a_run_from_an_address(
    train: Callable[..., list[dict]], tiny: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard that is away for good saves and stops the run, which goes on when it is back; `mask` goes on without.

    Mutation: let `read_clip` pass Unreachable on.
    """
    tiny.server.first(10**9, "503", r"GET .*train-000001\.tar")
    shards = ("--data.shards", tiny.url)
    assert len([line for line in train("masked", *shards) if "train/bits" in line]) == 12
    assert f"cannot decode {tiny.url}/train-000001.tar: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("fatal", *shards, "--data.on_damage", "fatal")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: data.on_damage=fatal stopped after step \d+: http.*503.*--resume auto$", error)
    tiny.server.fault = lambda request: None
    assert curve(train("fatal", *shards, "--data.on_damage", "fatal")) == curve(train("whole"))


def test_a_store_that_goes_away_ends_the_run(
    train: Callable[..., list[dict]], tiny: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not hang and does not "finish" on nothing; it goes on when the store is back.

    Mutation: in `Client._try`, never give up.
    """
    shards = ("--data.shards", tiny.url, "--train.max_bad_steps", "3")
    tiny.server.fault = lambda request: "drop" if tiny.server.count(TARS) > 40 else None
    with pytest.raises(SystemExit):
        train("away", *shards)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: no segment of 3 steps could be decoded, such as {tiny.url}/.*--resume auto$", error)
    tiny.server.fault = lambda request: None
    assert [line["step"] for line in train("away", *shards) if "train/bits" in line][-1] == 12


def test_two_ranks_with_workers_from_an_address(
    train: Callable[..., list[dict]], tiny: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ranks and workers, a cache that they share: the curve of one process, and everything fetched once.

    Mutation: drop `_locked` in `copy` or in `_cached`.
    """
    whole = train("whole")
    more = ["--data.shards", tiny.url, "--data.cache", str(tmp_path / "cache"), "--data.workers", "2"]
    argv = [*TINY, *more, "--runs", str(tmp_path / "runs"), "--name", "two", "--train.keep_last", "1"]
    done = launch(2, "launch/train.py", argv)
    assert done.returncode == 0, done.stderr
    pairs = list(zip(curve(metrics(tmp_path / "runs/two")), curve(whole), strict=True))
    assert all(a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-6) for a, b in pairs)
    assert [tiny.server.count(f"GET .*{name}") for name in ("manifest.json", "train.npy", "valid.npy")] == [1, 1, 1]
    assert tiny.server.count(TARS) == len(list((tmp_path / "cache").iterdir())) == 4
    assert "Traceback" not in done.stderr


def test_check_shards_wants_a_copy(
    http: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: `Path(config.folder)` in tools/check_shards.py, which says that there is no such folder."""
    with pytest.raises(SystemExit):
        command("tools/check_shards.py", [http.url], monkeypatch)
    assert f"error: {http.url}: every byte is read several times; copy" in capsys.readouterr().err
