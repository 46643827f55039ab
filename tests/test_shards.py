"""The shard format, laws 10 and 11: what is packed is read back exactly, by us and by others; damage is named."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sashimi import shard_writer
from sashimi.errors import InputError
from sashimi.grid import Grid
from sashimi.packing.verify import verify
from sashimi.shard_rules import index_fault
from sashimi.shard_writer import ShardWriter, regroup, write_split
from sashimi.shards import INDEX_DTYPE, NO_LABEL, DamagedMember, rebuild, seal
from sashimi.split import Split, open_split

RATE = 8000
CHUNK = 1000
LENGTHS = (1, 999, 1000, 1001, 2500, 3000, 7, 4321)


def recording(length: int) -> np.ndarray:
    """Noise of full scale, different for each length."""
    return np.random.default_rng(length).integers(-32768, 32768, length).astype(np.int16)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Recordings of one to five chunks in three shards, and a small valid split."""
    folder = tmp_path / "noise"
    write_split(folder, "valid", {"only": recording(500)}, RATE, CHUNK)
    return write_split(folder, "train", {f"r{n}": recording(n) for n in LENGTHS}, RATE, CHUNK, shard_recordings=3)


def test_any_stretch_is_read_back(split: Split) -> None:
    """Law 10: sample for sample, across chunks and shards. Mutation: in `Split.read`, drop `place += 1`."""
    rows = [split.rows(number) for number in range(len(LENGTHS))]
    assert [int(chunks["samples"].sum()) for chunks in rows] == list(LENGTHS)
    assert [len(chunks) for chunks in rows] == [1, 1, 1, 2, 3, 3, 1, 5]
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        audio = recording(length)
        assert split.recording_name(number) == f"r{length}"
        for start in {
            0,
            length - 1,
            *(edge for edge in (999, 1000, 2000) if edge < length),
            *rng.integers(length, size=20),
        }:
            for samples in {1, length - start, int(rng.integers(1, length - start + 1))}:
                assert np.array_equal(split.read(number, int(start), int(samples)), audio[start : start + samples])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40)), st.integers(1, 30))
def test_regroup_keeps_every_sample(lengths: list[int], size: int) -> None:
    """In blocks of `size`, but for the last. Mutation: drop `if len(held)` and what it yields."""
    audio = np.arange(sum(lengths), dtype=np.int16)
    blocks = list(regroup(np.split(audio, np.cumsum(lengths)[:-1]), size)) if lengths else []
    assert np.array_equal(np.concatenate([audio[:0], *blocks]), audio)
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert all(0 < len(block) <= size for block in blocks[-1:])


def test_others_read_the_shards(split: Split) -> None:
    """Law 11: webdataset decodes them and tar lists them. Mutation: `-{number:05d}.json` -> `.{number:05d}.json`."""
    url = str(split.folder / "train-{000000..000002}.tar")
    clips = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [set(clip) >= {"flac", "json", "__key__"} for clip in clips] == [True] * len(split.index)
    for clip, row in zip(clips, split.index, strict=True):
        about = clip["json"]
        assert (about["recording"], about["start"]) == (f"r{LENGTHS[row['recording']]}", row["start"])
        assert (about["samples"], about["sample_rate"]) == (row["samples"], RATE)
        assert clip["__key__"] == f"{about['recording']}-{about['start'] // CHUNK:05d}"
    for shard in split.shard_names:
        listing = subprocess.run(["tar", "tf", split.folder / shard], capture_output=True, text=True, check=True)
        assert listing.stderr == ""
        with tarfile.open(split.folder / shard) as tar:
            assert listing.stdout.split() == tar.getnames()


def test_equal_recordings_give_equal_bytes(tmp_path: Path) -> None:
    """Law 10: nothing of the clock, the user or the number of writes. Mutation: `info.mtime = time.time_ns()`."""
    for name, blocks in (("a", [recording(2500)]), ("b", np.array_split(recording(2500), 7))):
        with ShardWriter(tmp_path / name, RATE, CHUNK) as writer:
            writer.add("key", blocks, zebra=1, ape=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    """An error keeps the recording out of the tar, or the tar out of the folder. Mutation: drop `truncate` in `add`."""

    def broken() -> object:
        yield recording(2500)
        raise RuntimeError("source broke")

    path, clean = tmp_path / "train-000000.tar", tmp_path / "clean.tar"
    with ShardWriter(path, RATE, CHUNK) as writer:
        writer.add("good", [recording(10)])
        for blocks in ([], [recording(0)], broken()):
            with pytest.raises((RuntimeError, ValueError)):
                writer.add("bad", blocks)
    with ShardWriter(clean, RATE, CHUNK) as writer:
        writer.add("good", [recording(10)])
    assert path.read_bytes() == clean.read_bytes()

    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "train-000001.tar", RATE, CHUNK) as writer:
        writer.add("bad", broken())
    assert {file.name for file in tmp_path.iterdir()} == {"train-000000.tar", "clean.tar"}


def test_split_is_small_to_send(split: Split) -> None:
    """To a worker: not the index, which may be large. Mutation: drop `Split.__reduce__`."""
    sent = pickle.dumps(split)
    assert len(sent) < 300
    assert np.array_equal(pickle.loads(sent).read(4, 900, 1500), recording(2500)[900:2400])
    assert isinstance(split.index.base, np.memmap)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named(split: Split, damage: str) -> None:
    """Shard, member and reason; never wrong samples. Mutation: in `Stretch.readinto`, end the loop without an error."""
    path = split.folder / split.shard_names[1]
    row = split.rows(4)[0]  # the second recording of the second shard: 2500 and then 3000 samples
    content = bytearray(path.read_bytes())
    middle = int(row["offset"]) + int(row["bytes"]) // 2
    if damage == "flip":
        content[middle] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:
        path.unlink()
    with pytest.raises(DamagedMember, match=rf"^{path}: .+: .+") as caught:
        split.read(4, 500, 1)
    member = "r2500-00000.flac: "
    reasons = {"flip": f"{member}damaged flac: ", "cut": member + r"the file ends \d+ bytes too early"}
    assert re.search(reasons.get(damage, "No such file"), str(caught.value))
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    if damage == "flip":
        assert np.array_equal(split.read(5, 0, 3000), recording(3000))
    found = verify(split.folder)
    assert found["valid"].faults == []
    assert all(str(path) in fault for fault in found["train"].faults)
    assert len(found["train"].faults) >= 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files as Linux tells them")
def test_no_file_stays_open(split: Split) -> None:
    """Whatever becomes of it. Mutation: drop `os.close`, or call it only if there is no error."""
    before = os.listdir("/proc/self/fd")
    split.read(4, 500, 2000)
    path = split.folder / split.shard_names[1]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DamagedMember, match="bytes too early"):
        split.read(4, 500, 2000)
    assert os.listdir("/proc/self/fd") == before


def test_short_reads_go_on(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of network file systems may be. Mutation: in `Stretch.readinto`, `while rest` -> `if rest`."""
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:100]], at))
    assert np.array_equal(split.read(4, 500, 2000), recording(2500)[500:])


def by_libsndfile(audio: np.ndarray, sample_rate: int) -> bytes:
    """As clips were written before."""
    file = io.BytesIO()
    sf.write(file, audio, sample_rate, "PCM_16", format="FLAC")
    return file.getvalue()


def test_clips_without_seek_tables_are_read_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others. Mutations: in `read_clip`, never warn; or whatever it read."""
    read = write_split(tmp_path / "new", "train", {"r": recording(9000)}, RATE).read
    with warnings.catch_warnings(action="error"):
        assert np.array_equal(read(0, 5000, 100), recording(9000)[5000:5100])
    monkeypatch.setattr(shard_writer, "write_flac", by_libsndfile)
    bare = write_split(tmp_path / "old", "train", {"r": recording(9000)}, RATE)
    with pytest.warns(
        UserWarning, match=r"train-000000\.tar: a clip has no whole seek table, .*: pack the audio again"
    ):
        assert np.array_equal(bare.read(0, 5000, 100), recording(9000)[5000:5100])


def test_a_disk_that_fails_is_named(
    split: Split, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Mutation: in `read_clip`, catch no OSError."""

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(DamagedMember, match=r"train-000001\.tar: the member at byte \d+: Input/output error"):
        split.read(4, 500, 1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("per_recording", [1, 10])
def test_memory_does_not_grow_with_the_clips(per_recording: int) -> None:
    """A rank and each of its workers keep an eighth of a byte a clip, and take little to get there.

    Mutations: `BLOCK = 1` in grid; `_PIECE = 1 << 20` in shard_rules; in `Split`, keep
    `np.arange(self.n_recordings)`.
    """
    clips = 400_000
    index = np.zeros(clips, INDEX_DTYPE)
    index["recording"], chunk = np.divmod(np.arange(clips), per_recording)
    index["start"], index["samples"], index["bytes"], index["label"] = chunk * 100, 100, 1, NO_LABEL
    about = {"recordings": clips // per_recording, "clips": clips, "samples": clips * 100, "shards": [{"bytes": 1}]}
    tracemalloc.start()
    assert index_fault(index, about, 0) is None
    split = Split(Path(), "train", RATE, [], [], index)
    grid = Grid(split.index, 64, "pad")
    cuts = grid.cut(np.arange(0, grid.n_segments, 10_007))
    assert len(split.rows(clips // per_recording - 1)) == per_recording
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cuts.samples.min() > 0
    assert kept < clips / 3
    assert peak < 5e6


@pytest.mark.parametrize("row", [1, 16383, 16384, 16385, 39_999])
@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("start", 7, "it does not start where"),
        ("recording", 5, "its recording does not follow"),
        ("shard", 1, "its recording goes on in another shard"),
        ("bytes", 99, "it is not within its shard"),
        ("label", -2, "its label is not in"),
    ],
)
def test_a_wrong_row_is_found_wherever_it_is(row: int, field: str, value: int, fault: str) -> None:
    """An index is looked at in pieces. Mutations: `rows = index[place : ...]` in `index_fault`; drop a rule."""
    index = np.zeros(40_000, INDEX_DTYPE)
    index["recording"], chunk = np.divmod(np.arange(len(index)), 20_000)
    index["start"], index["samples"], index["bytes"], index["label"] = chunk * 9, 9, 1, NO_LABEL
    about = {"recordings": 2, "clips": 40_000, "samples": 360_000, "shards": [{"bytes": 2}, {"bytes": 2}]}
    assert index_fault(index, about, 0) is None
    index[field][row : None if field == "shard" else row + 1] = value
    assert str(index_fault(index, about, 0)).startswith(f"row {row}: {fault}")


@pytest.mark.parametrize("first", [1, 2**32 - 1])
def test_the_first_recording_is_0(first: int) -> None:
    """Nor what wraps around to follow itself. Mutation: drop the check in `index_fault`."""
    index = np.zeros(1, INDEX_DTYPE)
    index["recording"], index["samples"], index["bytes"], index["label"] = first, 9, 1, NO_LABEL
    about = {"recordings": first + 1, "clips": 1, "samples": 9, "shards": [{"bytes": 2}]}
    assert index_fault(index, about, 0) == "row 0: its recording is not 0"


@pytest.mark.parametrize("corrupted", ["manifest.json", "train.npy", "both", "none"])
def test_index_is_rebuilt_from_the_tars(split: Split, corrupted: str) -> None:
    """Byte for byte; a readable manifest keeps its history. Mutation: `about = {}` in `rebuild`."""
    folder = split.folder
    seal(folder, {"settings": "as they were"} if corrupted in ("train.npy", "none") else {})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("manifest.json", "train.npy"):
        if corrupted in (name, "both"):
            (folder / name).write_bytes(b"{")
            with pytest.raises(InputError, match=r"--rebuild-index|not JSON"):
                open_split(folder, "train")
    rebuild(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_lost_shard_is_not_left_out_unasked(split: Split) -> None:
    """Nor what packing has not made yet. Mutations: drop either check in `rebuild`, or its `not` before MANIFEST."""
    folder = split.folder
    (folder / ".packing").mkdir()  # as a kill at the very end leaves it: all is there
    rebuild(folder)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(InputError, match=r"lacks train-000001\.tar, which"):
        rebuild(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"packing did not finish: run `python tools/make_shards\.py SOURCE"):
        rebuild(folder)
    (folder / ".packing").rmdir()
    assert len(rebuild(folder)["splits"]["train"]["shards"]) == 2
    assert open_split(folder, "train").n_recordings == len(LENGTHS) - 3


def test_verify_compares_index_and_tars(split: Split) -> None:
    """An index of other shards, a stray shard, a missing chunk. Mutation: drop any of these checks in `verify`."""
    path = split.folder / "train.npy"
    index = np.load(path)
    index["start"][3] += 1
    np.save(path, index)
    assert [re.search("index", fault) is not None for fault in verify(split.folder)["train"].faults] == [True]
    rebuild(split.folder)
    assert verify(split.folder)["train"].faults == []

    stray = split.folder / "train-000003.tar"
    with ShardWriter(stray, RATE, CHUNK) as writer:
        writer.add("gap", [recording(2500)])
    assert verify(split.folder)["train"].faults == [f"{stray}: not in the manifest"]

    with tarfile.open(stray) as tar:
        first_chunk = tar.getmember("gap-00001.flac").offset
    stray.write_bytes(stray.read_bytes()[first_chunk:])
    rebuild(split.folder)
    assert verify(split.folder)["train"].faults == [f"{stray}: gap-00001.flac: a chunk before it is missing"]


def test_verify_measures(tmp_path: Path) -> None:
    """A square wave of -40 dBFS, half of it silent. Mutation: `SILENCE**2` -> `SILENCE`."""
    wave = np.where(np.arange(RATE) % 2, 328, -328).astype(np.int16)
    write_split(tmp_path, "test", {"a": np.concatenate([wave, np.zeros(RATE, np.int16)])}, RATE)
    found = verify(tmp_path)["test"]
    assert found.loudness == pytest.approx(-40 - 10 * np.log10(2), abs=0.01)
    assert found.silence == 0.5
    assert (found.shards, found.recordings, found.clips, found.samples) == (1, 1, 1, 2 * RATE)


def test_manifest_counts(split: Split) -> None:
    """What a reader relies on. Mutation: `samples / sample_rate / 3600` -> `samples / 3600`."""
    manifest = json.loads((split.folder / "manifest.json").read_text())
    about = manifest["splits"]["train"]
    assert (manifest["sample_rate"], about["recordings"], about["clips"]) == (RATE, len(LENGTHS), 17)
    assert about["samples"] == sum(LENGTHS)
    assert about["hours"] == pytest.approx(sum(LENGTHS) / RATE / 3600, abs=1e-6)
    assert manifest["splits"]["test"]["shards"] == []
    assert split.index.dtype == INDEX_DTYPE


def test_opening_what_is_not_there(split: Split, tmp_path: Path) -> None:
    """One line that says what to run. Mutation: drop a check in `_without_manifest` or `open_split`, or a `quote`."""
    empty, quoted = tmp_path / "it's empty", f"'{tmp_path}/it'\"'\"'s empty'"
    empty.mkdir()
    (tmp_path / "begun/.packing").mkdir(parents=True)
    many = tmp_path / "many"
    for number in range(5):
        shutil.copytree(split.folder, many / str(number))
    (many / "0/train.npy").unlink()
    lost = shutil.copytree(split.folder, tmp_path / "lost it")
    (lost / "manifest.json").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"format": "something"}')
    for folder, name, message in (
        (tmp_path / "nowhere", "train", f"make_shards.py SOURCE --out {tmp_path}/nowhere`"),
        (
            empty,
            "train",
            f"make one of the recordings in it with `python tools/make_shards.py {quoted} --out shards/NAME`",
        ),
        (tmp_path / "begun", "train", "packing did not finish: run"),
        (lost, "train", f"is missing: restore it, or run `python tools/check_shards.py '{lost}' --rebuild-index`"),
        (many, "train", f"has some in it: give {many}/1, {many}/2, {many}/3, say"),
        (other, "train", "format='something'"),
        (split.folder, "test", "no clips in split 'test': splits with clips are train, valid"),
        (split.folder, "dev", "no clips in split 'dev'"),
    ):
        with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}[^\n]*{re.escape(message)}[^\n]*$"):
            open_split(folder, name)
    rebuild(lost)
    open_split(lost, "train")
    with pytest.raises(InputError, match="no shards in it"):
        rebuild(empty)


def test_one_rate_a_folder(split: Split) -> None:
    """Mutation: drop the check in `seal`."""
    with ShardWriter(split.folder / "test-000000.tar", 2 * RATE, CHUNK) as writer:
        writer.add("fast", [recording(10)])
    with pytest.raises(InputError, match=r"sample rates \[8000, 16000\]"):
        seal(split.folder, {})


def test_a_clip_at_another_rate_is_damaged(split: Split) -> None:
    """It would sound higher or lower, and nothing would say so. Mutation: drop the check in `read_clip`."""
    path = split.folder / "manifest.json"
    path.write_text(path.read_text().replace('"sample_rate": 8000', '"sample_rate": 8001'))
    with pytest.raises(DamagedMember, match=r"r1-00000\.flac: is at 8000 Hz, not 8001 Hz"):
        open_split(split.folder, "train").read(0, 0, 1)


@pytest.mark.parametrize("left", [None, 0, 1000])
def test_a_lost_or_cut_shard_is_refused_when_opened(split: Split, tmp_path: Path, left: int | None) -> None:
    """Before training could mask its segments one by one. Mutation: drop the loop over shards in `open_split`."""
    shutil.copytree(split.folder, tmp_path / "cut")
    shard = tmp_path / "cut/train-000001.tar"
    whole = shard.stat().st_size
    if left is None:
        shard.unlink()
    else:
        os.truncate(shard, left)
    with pytest.raises(InputError, match=rf"train-000001\.tar: has {left or 0} of {whole} bytes: restore it"):
        open_split(tmp_path / "cut", "train")
    open_split(tmp_path / "cut", "valid")
