"""Files that were damaged anywhere: each is read as it was written, or refused. Random damage, by hypothesis."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import recording_lengths
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sashimi import parsing
from sashimi.audio import AudioConfig, read_audio
from sashimi.checkpoint import load_checkpoint, save_checkpoint
from sashimi.clips import read_finished, to_lines, write_clip
from sashimi.config import RunConfig, parse_run_config, save_config
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import load_model, read_audio_config, save_model
from sashimi.packing.sources import SourceConfig, find_sources
from sashimi.run_state import RunState
from sashimi.shard_writer import write_split
from sashimi.shards import DamagedMember
from sashimi.split import open_split

RATE = 8000
MODEL = ModelConfig(d_model=4, n_layers=1, pool=(2,), d_state=4)
CLIPS = {"seed": 0, "seconds": 0.001, "model": "m", "audio": parsing.to_dict(AudioConfig(RATE)), "prompt_samples": 0}
Edit = tuple[str, float, int]

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "insert", "remove", "zero", "digit"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, edits: list[Edit]) -> bytes:
    """Bits flipped, the end cut off, bytes put in, taken out or zeroed, digits changed: what is hard to see."""
    for kind, share, value in edits:
        at = int(share * len(content))
        before, after = content[:at], content[at:]
        if kind == "digit":
            digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
            at = digits[int(share * len(digits))] if digits else at
            before, after = content[:at], b"%d" % (value % 10) + content[at + 1 :]
        elif kind == "flip" and after:
            after = bytes([after[0] ^ 1 << value % 8]) + after[1:]
        elif kind == "cut":
            after = b""
        elif kind == "insert":
            before += bytes([value]) * (1 + value % 3)
        elif kind == "remove":
            after = after[1 + value % 7 :]
        elif kind == "zero":
            after = bytes(min(value, len(after))) + after[value:]
        content = before + after
    return content


class Reader(NamedTuple):
    """Something that is read from a file of a folder."""

    file: str
    read: Callable[[Path], Any]  # comparable
    checked: bool = True  # by checksums: nothing else than what was written may come back


def read_split(folder: Path) -> Any:
    """All audio of a split."""
    return read_all(open_split(folder / "shards", "train"))


def read_all(split: Any) -> Any:
    return split.sample_rate, [split.read(r, 0, n).tobytes() for r, n in enumerate(recording_lengths(split))]


def read_checkpoint(folder: Path) -> Any:
    """Everything that a run goes on from."""
    found = load_checkpoint(folder / "checkpoints/step-00000003")
    tensors = {
        f"{kind} {name}": value.numpy().tobytes()
        for kind in ("model", "optimizer")
        for name, value in vars_of(found, kind)
    }
    return RunState.from_json(found.step, found.state), found.config, tensors


def vars_of(found: Any, kind: str) -> Any:
    return getattr(found, kind).items()


READERS = {
    "shard": Reader("shards/train-000000.tar", read_split),
    "index": Reader("shards/train.npy", read_split),
    "manifest": Reader("shards/manifest.json", read_split),
    "weights": Reader("checkpoints/step-00000003/model.safetensors", read_checkpoint),
    "optimizer": Reader("checkpoints/step-00000003/optimizer.safetensors", read_checkpoint),
    "state": Reader("checkpoints/step-00000003/state.json", read_checkpoint),
    "config": Reader("checkpoints/step-00000003/config.json", read_checkpoint),
    "checkpoint's manifest": Reader("checkpoints/step-00000003/manifest.json", read_checkpoint),
    "unchecked config": Reader(
        "model/config.json", lambda f: (load_model(f / "model"), read_audio_config(f / "model")), False
    ),
    "unchecked weights": Reader("model/model.safetensors", lambda f: load_model(f / "model"), False),
    "clips' lines": Reader("clips/samples.jsonl", lambda f: read_finished(f / "clips", CLIPS), False),
    "yaml": Reader("config.yaml", lambda f: parse_run_config(["--config", str(f / "config.yaml")]), False),
    "wav": Reader("in/a.wav", lambda f: read_audio(f / "in/a.wav", RATE), False),
    "flac": Reader("in/b.flac", lambda f: read_audio(f / "in/b.flac", RATE), False),
    "list": Reader("list.txt", lambda f: find_sources(SourceConfig(str(f / "list.txt"), fractions=(100, 0, 0))), False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind."""
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    recordings = {f"r{n}": rng.normal(0, 900, n).astype(np.int16) for n in (300, 700, 1)}
    write_split(folder / "shards", "train", recordings, RATE, chunk_samples=400)
    torch.manual_seed(0)
    weights, audio = Sashimi(MODEL).state_dict(), parsing.to_dict(AudioConfig(RATE))
    save_model(folder / "model", weights, parsing.to_dict(MODEL), audio)
    (folder / "model/manifest.json").unlink()  # as in folders that people make or edit by hand
    moments = {"norm.weight/exp_avg": torch.rand(4)}
    config = {"seed": 1, "model": parsing.to_dict(MODEL), "audio": audio}
    save_checkpoint(folder / "checkpoints", 3, weights, moments, RunState(3, 24, best_bits=4.5).to_json(), config)
    save_config(RunConfig(folder.name, runs=str(folder.parent)), folder / "config.yaml")
    (folder / "in").mkdir()
    for name in ("a.wav", "b.flac"):
        sf.write(folder / "in" / name, rng.normal(0, 0.1, 500), RATE)
    (folder / "list.txt").write_text("in/a.wav\nin/b.flac\n")
    (folder / "clips/.parts").mkdir(parents=True)
    for clip in range(2):
        write_clip(folder / "clips", clip, torch.zeros(8), 3.5, CLIPS)
    lines = read_finished(folder / "clips", CLIPS)
    assert len(lines) == 2
    (folder / "clips/samples.jsonl").write_bytes(to_lines(lines.values()))
    shutil.rmtree(folder / "clips/.parts")
    return folder


@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.timeout(3000)
def test_damage_is_refused_or_harmless(folder: Path, kind: str, examples: int) -> None:
    """Law 14 for checkpoints, law 8's premise for shards: never another exception, never other data where a checksum,
    a codec or another file tells; never a hang or all memory.

    Mutations: drop `_require_whole` in `load_checkpoint`; `except Exception` -> `ValueError` in
    `read_index`; ValueError from what `read_json` catches.
    """
    reader = READERS[kind]
    whole, path = reader.read(folder), folder / reader.file
    content = path.read_bytes()
    quick = settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )

    @quick
    @given(EDITS)
    def holds(edits: list[Edit]) -> None:
        path.write_bytes(damaged(content, edits))
        try:
            found = reader.read(folder)
        except (InputError, DamagedMember):
            return
        assert not reader.checked or found == whole

    try:
        holds()
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("examples", [100, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(3000)
def test_a_shard_damaged_while_it_is_read(folder: Path, examples: int) -> None:
    """Law 8: after it was opened, too, a recording is the one that was packed, or named as damaged.

    Mutation: drop `if audio.shape != (samples,)` in `read_clip`.
    """
    split, path = open_split(folder / "shards", "train"), folder / "shards/train-000000.tar"
    whole, content = read_all(split)[1], path.read_bytes()

    @settings(max_examples=examples, deadline=None, derandomize=examples < 1000, database=None, phases=[Phase.generate])
    @given(EDITS)
    def holds(edits: list[Edit]) -> None:
        path.write_bytes(damaged(content, edits))
        for recording, audio in enumerate(whole):
            with contextlib.suppress(DamagedMember):
                assert split.read(recording, 0, len(audio) // 2).tobytes() == audio

    try:
        holds()
    finally:
        path.write_bytes(content)
