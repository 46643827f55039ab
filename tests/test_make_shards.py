"""The tools for shards, run as commands (law 10): nothing is lost, moved or made up on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import ROOT, command, recording_lengths

from sashimi.packing.pack import Plan
from sashimi.packing.report import census_report, manifest_report
from sashimi.packing.verify import Census
from sashimi.split import open_split

RATE = 16000
COMMAND = [sys.executable, str(ROOT / "tools/make_shards.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """make(*arguments) runs tools/make_shards.py and returns what it printed."""

    def run(*arguments: object) -> str:
        command("tools/make_shards.py", [str(argument) for argument in arguments], monkeypatch)
        return capsys.readouterr().out

    return run


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """check(*arguments) runs tools/check_shards.py and returns its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            command("tools/check_shards.py", [str(argument) for argument in arguments], monkeypatch)
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def noise(samples: int, seed: int) -> np.ndarray:
    """int16 of full scale."""
    return np.random.default_rng(seed).integers(-32768, 32768, samples).astype(np.int16)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 recordings of 0.1 to 4 s, of four formats, three rates, one or two channels, in folders of four."""
    root = tmp_path / "corpus"
    for number in range(40):
        name = root / f"speaker{number // 4}/take {number}.{('wav', 'flac', 'ogg', 'mp3')[number % 4]}"
        name.parent.mkdir(parents=True, exist_ok=True)
        rate = (16000, 8000, 44100)[number % 3]
        samples = int(rate * (0.1 + 0.1 * number))
        audio = noise(2 * samples, number).reshape(-1, 2) if number % 5 == 0 else noise(samples, number)
        sf.write(name, audio, rate)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of shards."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recordings(folder: Path) -> dict[str, np.ndarray]:
    """Every recording of all splits, by source name."""
    found = {}
    for split in ("train", "valid", "test"):
        opened = open_split(folder, split)
        for number, samples in enumerate(recording_lengths(opened)):
            found[f"{split} {opened.recording_name(number)}"] = opened.read(number, 0, samples)
    return found


def test_same_bytes_for_any_number_of_processes(tmp_path: Path, corpus: Path, make: Callable[..., str]) -> None:
    """Law 10, manifest and index included. Mutation: `_settings` keeps "processes", or a clock in a tar header."""
    for processes in (1, 2, 5):
        options = ("--shard-megabytes", 0.5, "--chunk-seconds", 2.5, "--processes", processes)
        make(corpus, "--out", tmp_path / f"out{processes}", *options)
    first = contents(tmp_path / "out1")
    assert sum(name.endswith(".tar") for name in first) >= 6
    assert contents(tmp_path / "out2") == first
    assert contents(tmp_path / "out5") == first


def test_16_bit_mono_is_packed_exactly(tmp_path: Path, make: Callable[..., str]) -> None:
    """Law 10, across chunks. Mutation: `32768` -> `32767` in `to_int16`."""
    sources = {
        f"{split}/{n}.{kind}": noise(n, n)
        for split in ("train", "valid", "test")
        for n, kind in ((1600, "wav"), (70_001, "flac"))
    }
    for name, audio in sources.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "in" / name, audio, RATE)
    make(tmp_path / "in", "--out", tmp_path / "out", "--split", "folders", "--chunk-seconds", 1)
    packed = recordings(tmp_path / "out")
    assert sorted(packed) == [
        f"{split} 000000{i}-{split}-{n}" for split in ("test", "train", "valid") for i, n in ((0, 1600), (1, 70001))
    ]
    for name, audio in packed.items():
        assert np.array_equal(audio, noise(len(audio), len(audio))), name


def test_one_packing_at_a_time(tmp_path: Path, corpus: Path, make: Callable[..., str]) -> None:
    """Another one is refused while it is at work, and then goes on. Mutation: no `lock` in `pack`."""
    out = tmp_path / "out"
    (out / ".packing").mkdir(parents=True)
    other = "import fcntl; f = open('.lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", other], cwd=out / ".packing", **pipes) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(SystemExit) as exit:
            make(corpus, "--out", out)
        assert exit.value.code == 2
        assert [path.name for path in out.iterdir()] == [".packing"]
        holder.stdin.close()
    make(corpus, "--out", out)
    assert "manifest.json" in [path.name for path in out.iterdir()]


def test_a_split_too_short_to_judge_by_is_said() -> None:
    """Below ten seconds. Mutations: `<=` for `<`; no `short` in what is returned; `samples` without `/ rate`."""
    about = {"shards": [], "recordings": 1, "clips": 1, "hours": 0.0}
    splits = {split: about | {"samples": samples} for split, samples in (("train", 1), ("valid", 78), ("test", 80))}
    printed = manifest_report({"sample_rate": 8, "splits": splits}, Plan([], "", ""))
    (line,) = [line for line in printed.splitlines() if "too little" in line]
    assert line.startswith("valid has 9.8 s of audio, too little to judge a model by")


def test_manifest_states_what_was_done(tmp_path: Path, make: Callable[..., str]) -> None:
    """Settings, processing, versions, clipped samples. Mutations: `+= clipped` -> `= clipped`; `max` -> `min`."""
    loud = np.array([0.5, 1.5, -2.0, 0.25] * 1000, np.float32)
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        sf.write(tmp_path / f"in/{number}.wav", np.tile(loud, 1 + number % 2), RATE, "FLOAT")
    arguments = (tmp_path / "in", "--out", tmp_path / "out", "--fractions", "[100,0,0]", "--shard-megabytes", 0.03)
    printed = make(*arguments)
    assert "8,000 samples were louder than full scale and are clipped, most of one file in 1.wav\n" in printed
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["clipped_samples"] == 4 * 2000
    assert manifest["most_clipped"] == "1.wav"
    assert manifest["settings"]["fractions"] == [100, 0, 0]
    assert {"mix-down", "resampling", "rounding", "clipping"} <= set(manifest["processing"])
    assert manifest["packages"]["soundfile"] == sf.__version__
    split = open_split(tmp_path / "out", "train")
    assert split.read(0, 0, 4).tolist() == [16384, 32767, -32768, 8192]


def test_labels_are_the_folders(tmp_path: Path, corpus: Path, make: Callable[..., str]) -> None:
    """In the order given, in index, manifest and members. Mutation: label by `sorted(config.label_names)`."""
    labels = "speaker7,speaker0"
    make(corpus, "--out", tmp_path / "out", "--labels", labels, "--fractions", "[100,0,0]", "--processes", 1)
    split = open_split(tmp_path / "out", "train")
    assert split.labels == ["speaker7", "speaker0"]
    assert split.index["label"].tolist() == [1] * 4 + [0] * 4


def damage(path: Path, kind: str) -> None:
    """Makes a good wav bad."""
    content = path.read_bytes()
    if kind == "unreadable":
        path.write_bytes(b"ID4" + content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "silent":
        sf.write(path, np.full(40_000, 300, np.int16), RATE)
    elif kind == "NaN":
        audio = np.ones(40_000, np.float32)
        audio[30_000] = np.nan
        sf.write(path, audio, RATE, "FLOAT")


@pytest.mark.parametrize("kind", ["unreadable", "empty", "truncated", "silent", "NaN"])
def test_bad_file_is_left_out_and_moves_no_other(
    tmp_path: Path, corpus: Path, make: Callable[..., str], check: Callable[..., tuple[int, str]], kind: str
) -> None:
    """It is named with its reason; packing goes on, unless strict. Mutation: number only sources with a header."""
    options = ("--shard-megabytes", 0.2, "--processes", 2)
    make(corpus, "--out", tmp_path / "good", *options)
    damage(corpus / "speaker2/take 8.wav", kind)
    printed = make(corpus, "--out", tmp_path / "bad", *options)
    assert f"1 files left out:\n  speaker2/take 8.wav: {kind}" in printed
    good, bad = recordings(tmp_path / "good"), recordings(tmp_path / "bad")
    assert set(good) - set(bad) == {"train 0000008-speaker2-take-8"}
    assert all(np.array_equal(bad[key], good[key]) for key in bad)
    shards = {key: json.loads((tmp_path / key / "manifest.json").read_text())["splits"] for key in ("good", "bad")}
    names = {
        key: [shard["name"] for split in splits.values() for shard in split["shards"]] for key, splits in shards.items()
    }
    if kind in ("silent", "NaN"):  # the others shorten the header's length, which the plan follows
        assert names["good"] == names["bad"]
    assert check(tmp_path / "bad")[0] == 0

    with pytest.raises(SystemExit):
        make(corpus, "--out", tmp_path / "strict", "--strict", *options)
    assert not (tmp_path / "strict/manifest.json").exists()
    assert not list((tmp_path / "strict").glob(".tmp-*"))


def test_files_of_other_formats_are_counted(tmp_path: Path, make: Callable[..., str]) -> None:
    """In one line, before packing and after it; other files are not. Mutations: drop `not labels or`, `.lower()`."""
    for name in ("one/a.m4a", "one/B.M4A", "one/c.opus", "one/d.txt", "one/.e.m4a", "two/f.aac", ".old/g.aac"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    sf.write(tmp_path / "in/one/h.wav", noise(1600, 0), RATE)
    arguments = (tmp_path / "in", "--out", tmp_path / "out", "--fractions", "[100,0,0]")
    expected = "\n4 files of other formats are left out (.m4a 2, .opus 1, .aac 1): convert them to flac or wav\n"
    assert expected in make(*arguments, "--dry-run")
    assert expected in make(*arguments)
    assert expected in make(*arguments)
    labelled = make(*arguments, "--dry-run", "--labels", "one")
    assert "\n3 files of other formats are left out (.m4a 2, .opus 1): convert" in labelled


def test_channels_that_cancel_are_told_from_silence(tmp_path: Path, make: Callable[..., str]) -> None:
    """Whichever channels they are. Mutations: `channel=channel` -> `channel=0`; no `* channels`."""
    (tmp_path / "in").mkdir()
    audio, faint = noise(20_000, 0) // 2, np.tile(np.repeat([-5, 5], 100), 100).astype(np.int16)
    for name, columns in {
        "cancel": [0 * audio, audio, -audio],
        "faint": [faint, 0 * faint],
        "good": [audio, 0 * audio],
        "silent": [0 * audio, 0 * audio],
    }.items():
        sf.write(tmp_path / f"in/{name}.wav", np.stack(columns, 1), 44100)
    printed = make(tmp_path / "in", "--out", tmp_path / "out", "--fractions", "[100,0,0]")
    left_out = printed.partition("3 files left out:\n")[2].splitlines()
    assert left_out == [
        "  cancel.wav: silent when mixed down: its channels cancel",
        "  faint.wav: silent",
        "  silent.wav: silent",
    ]


def test_bad_file_late_in_a_recording_leaves_nothing(tmp_path: Path, make: Callable[..., str]) -> None:
    """Though its first chunks were written already. Mutation: drop `seek` in `ShardWriter.add`."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        sf.write(tmp_path / f"in/{number}.flac", noise(20 * RATE, number), RATE)
    content = (tmp_path / "in/1.flac").read_bytes()
    (tmp_path / "in/1.flac").write_bytes(content[: int(0.9 * len(content))])
    printed = make(tmp_path / "in", "--out", tmp_path / "out", "--fractions", "[100,0,0]", "--chunk-seconds", 1)
    assert "1.flac: truncated" in printed
    split = open_split(tmp_path / "out", "train")
    assert recording_lengths(split) == [20 * RATE] * 2
    assert split.recording_name(1) == "0000002-2"


def test_killed_packing_goes_on_where_it_was(tmp_path: Path, make: Callable[..., str]) -> None:
    """Finished shards stay as they are, none is half, the end is the same. Mutation: `todo = plan.shards`."""
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in/0.wav", noise(44100 * 20, 0).reshape(-1, 2), 44100)
    for number in range(1, 40):
        os.link(tmp_path / "in/0.wav", tmp_path / f"in/{number}.wav")
    options = ["--shard-megabytes", "0.5", "--chunk-seconds", "3", "--processes", "2"]
    make(tmp_path / "in", "--out", tmp_path / "whole", *options)

    out = tmp_path / "out"
    packing = subprocess.Popen(
        [*COMMAND, str(tmp_path / "in"), "--out", str(out), *options],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list(out.glob(".packing/train-*.json"))) < 3:
        assert packing.poll() is None
        time.sleep(0.001)
    os.killpg(packing.pid, signal.SIGKILL)
    packing.wait()
    done = [out / note.stem for note in out.glob(".packing/train-*.json")]
    before = {path.name: path.stat().st_ino for path in done}
    assert len(before) >= 3
    assert not (out / "manifest.json").exists()
    whole = contents(tmp_path / "whole")
    assert all(path.read_bytes() == whole[path.name] for path in out.glob("train-*.tar"))

    make(tmp_path / "in", "--out", out, *options)
    assert contents(out) == whole
    assert {name: (out / name).stat().st_ino for name in before} == before

    make(tmp_path / "in", "--out", out, *options)
    assert {name: (out / name).stat().st_ino for name in before} == before


def test_full_disk_leaves_no_half_shard(tmp_path: Path, corpus: Path, make: Callable[..., str]) -> None:
    """One line; the same command goes on when there is room. Mutation: drop `unlink` in `__exit__` and packing."""
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash"]  # KiB a file: the disk is full after 0.3 MB
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--shard-megabytes", "0.5", "--processes", "2"]
    stopped = subprocess.run(
        [*limited, *COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 2
    assert stopped.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: File too large: make room")
    assert "Traceback" not in stopped.stderr
    left = contents_of_tree(tmp_path / "out")
    make(*arguments)
    whole = contents(tmp_path / "out")
    assert {name: whole[name] for name in left if name.endswith(".tar")} == {
        name: content for name, content in left.items() if name.endswith(".tar")
    }
    assert not [name for name in left if name.startswith(".tmp-")]


def contents_of_tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_writes_nothing(tmp_path: Path, corpus: Path, make: Callable[..., str]) -> None:
    """Files, hours and bytes per split. Mutation: drop the `return` after it in tools/make_shards.py."""
    damage(corpus / "speaker2/take 8.wav", "empty")
    printed = make(corpus, "--dry-run", "--out", tmp_path / "out").split("\n")
    assert printed[0].split() == ["split", "shards", "files", "hours", "MB", "(uncompressed)"]
    assert [line.split()[:3] for line in printed[1:4]] == [
        ["train", "1", "35"],
        ["valid", "1", "2"],
        ["test", "1", "3"],
    ]
    seconds = sum(sf.info(path).duration for path in corpus.rglob("*.*") if path.stat().st_size)
    assert sum(float(line.split()[3]) for line in printed[1:4]) == pytest.approx(seconds / 3600, abs=2e-3)
    assert sum(float(line.split()[4]) for line in printed[1:4]) == pytest.approx(seconds * RATE * 2 / 1e6, abs=0.2)
    assert "1 files left out:" in printed
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_measured_is_a_dash() -> None:
    """Mutation: no `isnan`."""
    assert census_report({"test": Census()}, 8000).split()[-2:] == ["-", "-"]


def test_check_reports_and_rebuilds(
    tmp_path: Path, corpus: Path, make: Callable[..., str], check: Callable[..., tuple[int, str]]
) -> None:
    """Table and exit code; a list of faults. Mutation: drop `sys.exit(1)` in tools/check_shards.py."""
    out = tmp_path / "out"
    make(corpus, "--out", out, "--processes", 1)
    before = contents(out)
    code, printed = check(out)
    assert code == 0
    assert "train       1          35     35  0.01" in printed
    (out / "valid.npy").unlink()
    code, printed = check(out)
    assert (code, "valid.npy" in printed) == (1, True)
    assert check(out, "--rebuild-index")[0] == 0
    assert contents(out) == before
    damaged = bytearray(before["test-000000.tar"])
    damaged[3000] ^= 1
    (out / "test-000000.tar").write_bytes(damaged)
    code, printed = check(out)
    assert code == 1
    assert f"{out / 'test-000000.tar'}: size or SHA-256 differ" in printed
    assert "0000000-speaker9-take-37-00000.flac" in printed


def test_shipped_corpus_is_whole(check: Callable[..., tuple[int, str]]) -> None:
    """It is what `launch/demo.sh` trains on. Mutation: change a byte of a shard."""
    code, printed = check(ROOT / "shards/demo")
    assert code == 0, printed


@pytest.mark.parametrize("listed", [False, True])
def test_sources_that_were_changed_after_packing_are_told(
    tmp_path: Path, corpus: Path, make: Callable[..., str], listed: bool
) -> None:
    """Though their headers are as they were; only then. Mutations: `changed[1] > packed` -> `False`, or `True`."""
    names = sorted(str(path.relative_to(tmp_path)) for path in corpus.rglob("*.*"))
    (tmp_path / "list.txt").write_text("\n".join(names))
    arguments = (tmp_path / "list.txt" if listed else corpus, "--out", tmp_path / "out", "--processes", 1)
    complete = f"{tmp_path / 'out'} was complete already"
    assert complete not in make(*arguments)
    assert make(*arguments).endswith(f"{complete}; to pack it anew, delete it\n")
    before = contents(tmp_path / "out")
    later = (tmp_path / "out/manifest.json").stat().st_mtime_ns + 10**9
    for name in ("speaker7/take 30.ogg", "speaker2/take 8.wav"):
        os.utime(corpus / name, ns=(later, later))
    name = f"{'corpus/' if listed else ''}speaker2/take 8.wav"
    newer = f"; 2 files are newer than it, such as {name}; to pack it anew, delete it\n"
    assert make(*arguments).endswith(complete + newer)
    assert contents(tmp_path / "out") == before


def test_other_settings_need_another_folder(
    tmp_path: Path, corpus: Path, make: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rather than mix shards of two plans. Mutation: drop `_settings` from the plan's checksum."""
    make(corpus, "--out", tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.copytree(corpus, tmp_path / "moved")
    make(tmp_path / "moved", "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        make(corpus, "--out", tmp_path / "out", "--chunk-seconds", 30)
    assert "holds shards of other files or settings" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
