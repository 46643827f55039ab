"""Everything that a user can get wrong, once each: the one line that answers it, and that nothing is left behind.

A row: the command, its arguments, how a world of good files is spoilt before it, and how the answer begins. The world
has `shards`, `audio`, `model`, `runs/old` (a finished run of 1 step) and `v4.pt` (a checkpoint of other code).
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import soundfile as sf
import torch
from conftest import NOTES, RATE, ROOT, TINY, Call, command, contents

import sashimi
from sashimi.audio import AudioConfig, read_audio
from sashimi.clips import SampleConfig
from sashimi.config import RunConfig
from sashimi.errors import InputError, one_line
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import save_model
from sashimi.optim import OptimConfig
from sashimi.packing.pack import PackConfig
from sashimi.parsing import to_dict
from sashimi.split import open_split
from sashimi.stream import DataConfig
from sashimi.tracking import TrackConfig
from sashimi.trainer import TrainConfig

Spoil = Callable[[Path], Any]
CHECKPOINT = "runs/old/checkpoints/step-00000001"
SCRIPTS = {
    "make": "tools/make_shards.py",
    "check": "tools/check_shards.py",
    "import": "tools/import_checkpoint.py",
    "train": "launch/train.py",
    "evaluate": "launch/evaluate.py",
    "sample": "launch/sample.py",
}
# What comes before the arguments of a row.
RUN = [*TINY, "--train.steps", "1", "--data.shards", "shards"]
PREFIX = {
    "make": "audio --out out --fractions 60 20 20 --sample-rate 8000 --processes 1".split(),
    "train": [*RUN, "--name", "new"],
    "resume": [*RUN, "--name", "old", "--train.steps", "2"],
    "evaluate": "model --data shards --segment 512".split(),
    "sample": "model --out clips --clips 1 --seconds 0.01".split(),
    "import": "v4.pt --out imported".split(),
}


class Row(NamedTuple):
    """A wrong command. `command` is one of SCRIPTS; after a "!" its arguments are all there is."""

    command: str
    arguments: str | list[str]
    message: str
    spoil: Spoil = lambda world: None


# ---- what spoils a world


def write(name: str, content: bytes | str) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda world: (world / name).write_bytes(data)


def link(name: str, target: str) -> Spoil:
    return lambda world: os.symlink(target, world / name)


def copied(name: str, to: str) -> Spoil:
    return lambda world: shutil.copytree(world / name, world / to)


def pipe(name: str) -> Spoil:
    return lambda world: ((world / name).unlink(missing_ok=True), os.mkfifo(world / name))


def folder(name: str) -> Spoil:
    return lambda world: ((world / name).unlink(missing_ok=True), (world / name).mkdir(parents=True))


def sound(name: str, audio: Any, rate: int = RATE) -> Spoil:
    return lambda world: sf.write(world / name, np.asarray(audio), rate, "FLOAT")


def seal(path: Path) -> None:
    """Make a folder's manifest fit what is in it, so that what was spoilt is found by its own check."""
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    entries = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    (path / "manifest.json").write_text(json.dumps({"files": entries}))


def edited(name: str, change: Callable[[Any], Any], sealed: bool = True) -> Spoil:
    """Change the object in a JSON file."""

    def spoil(world: Path) -> None:
        path, value = world / name, json.loads((world / name).read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))
        if sealed:
            seal(path.parent)

    return spoil


def put(*keys: Any) -> Callable[[Any], None]:
    """put("a", "b", 3) sets ["a"]["b"] = 3."""

    def change(value: Any) -> None:
        for key in keys[:-2]:
            value = value[key]
        value[keys[-2]] = keys[-1]

    return change


def drop(key: str) -> Callable[[dict], dict]:
    return lambda value: {name: one for name, one in value.items() if name != key}


def manifest(*keys: Any) -> Spoil:
    return edited("shards/manifest.json", put(*keys), sealed=False)


def tensors(name: str, change: Callable[[dict], dict]) -> Spoil:
    def spoil(world: Path) -> None:
        safetensors.torch.save_file(change(safetensors.torch.load_file(world / name)), world / name)
        seal((world / name).parent)

    return spoil


def index(change: Callable[[np.ndarray], Any]) -> Spoil:
    def spoil(world: Path) -> None:
        rows = np.load(world / "shards/train.npy")
        changed = change(rows)
        np.save(world / "shards/train.npy", rows if changed is None else changed, allow_pickle=True)

    return spoil


def row(field: str, place: int, value: int) -> Spoil:
    return index(lambda rows: rows[field].__setitem__(place, value))


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


def tar(about: bytes = b"{}", **header: Any) -> Spoil:
    """In place of the only test shard one of a flac and this JSON, the flac perhaps a link or the like."""

    def spoil(world: Path) -> None:
        flac = io.BytesIO()
        sf.write(flac, np.arange(500, dtype=np.int16), RATE, format="FLAC")
        with tarfile.open(world / "shards/test-000000.tar", "w") as file:
            for name, data in (("r.flac", flac.getvalue()), ("r.json", about)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for field, value in header.items() if name == "r.flac" else ():
                    setattr(info, field, value)
                file.addfile(info, io.BytesIO(data))

    return spoil


def clip(**fields: Any) -> Spoil:
    about = {"recording": "r", "start": 0, "samples": 500, "sample_rate": RATE} | fields
    return tar(json.dumps(about).encode())


def state_dict(key: str, value: Any) -> Spoil:
    return lambda world: torch.save({**torch.load(world / "v4.pt", weights_only=True), key: value}, world / "v4.pt")


def saved(value: Any) -> Spoil:
    return lambda world: torch.save(value, world / "v4.pt")


def made_clips(spoil: Spoil) -> Spoil:
    """A folder of clips, and then something else in it."""

    def both(world: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            command("launch/sample.py", PREFIX["sample"], patch)
        spoil(world / "clips")

    return both


def all_of(*spoils: Spoil) -> Spoil:
    return lambda world: [spoil(world) for spoil in spoils]


NAN, INF = math.nan, math.inf
C, D = "model.c_layers.0.layer.layer.kernel.C", "model.c_layers.0.layer.layer.D"
DEEP = b"[" * 100_000
LONG = b'{"format": ' + b"9" * 5000 + b"}"
BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg", "gh")
)

CONFIGS = {  # what is in c.yaml -> how the answer goes on after its name
    "": "expected lines of the form `field: value`",
    "- 1": "expected lines of the form",
    "hello": "expected lines of the form",
    "model:\n\td_model: 8": r"line 2: not YAML: found character '\\t'",
    "seed: 1\nmodel: {d_model: 8}\nmodel: {n_layers: 1}": "line 3: model is there twice; remove one",
    "model:\n  ff: 1\n  ff: 2": "line 3: ff is there twice",
    BOMB: "line .: more than 10000 values; write it without aliases",
    "model: &a {pool: *a}": "line 1: more than 10000 values",
    "seed: !!python/object/apply:os.mkdir [unpickled]": "Problems parsing config: could not determine a constructor",
    "seed: 1\n---\nseed: 2": "line .: not YAML: but found another document",
    "seed: 2024-01-01": "seed=2024-01-01: expected a whole number",
    "seed: true": "seed=True: expected a whole number",
    "seed: {a: 1}": r"seed=\{'a': 1\}: expected a whole number",
    "seed: " + "9" * 5000: "not YAML that can be read",
    "train: {steps: 2.0}": "train.steps=2.0: expected a whole number",
    "data: {crop: 1}": "data.crop=1: expected true or false",
    "name: [a]": r"name=\['a'\]: expected text",
    "3: 4": "Key must be a string",
    "model: {foo: {bar: 1}}": "model.foo.bar: no such field; did you mean",
    "[" * 3000: "not YAML that can be read",
    b"seed: 1\0": "not YAML that can be read: unacceptable character",
    "caf\u00e9: 1".encode("latin-1"): "is not a text file; give a YAML file such as",
}
VALUES = {  # without the file's name, for they may be the command line's
    'name: "a\\0b"': "name=a\\\\x00b: holds a NUL character",
    'name: "a\\nb"': r"name='a\\nb': must be a plain folder name",
    "optim: {lr: .inf}": "optim.lr=inf: must be finite",
    "model: [1]": r"model=\[1\]: a section; write its fields below it or leave it out",
    "name: x\nmodel:": "model=None: a section",
    "seed: null": "seed: null is not a value for it",
}

ROWS = [
    # ---- command lines
    Row("train", "--data.crop maybe", "data.crop=maybe: expected true or false"),
    Row("train", "--data.tail cut", "data.tail=cut: choose drop or pad"),
    Row("train", "--model.kernel fft", "model.kernel=fft: choose krylov, vandermonde, cauchy or cauchy_keops"),
    Row("train", "--model.pool four", r"model.pool=four: expected a list of whole numbers such as \[4, 4\]"),
    Row("train", "--optim.betas 0.9", r"optim.betas=0.9: expected a list of 2 numbers such as \[0.9, 0.999\]"),
    Row("train", "--optim.clip .inf", "optim.clip=inf: must be finite"),
    Row("train", "--optim.lr nan", "optim.lr=nan: expected a number"),
    Row("train", "--seed=", "seed=: expected a whole number"),
    Row("train", "--model 3", "model=3: a section; give its fields, such as --model.field value"),
    Row("train", "--train.stesp 3", "train.stesp: no such field; did you mean train.steps?"),
    Row("train", "--train.steps many", "train.steps=many: expected a whole number"),
    Row("train", "--train.steps", "argument --train.steps: expected one argument"),
    Row("train", "stray", "stray: was not expected; names with spaces need quotes"),
    Row("train", ["--name", ""], "name='': is empty; give a value, or leave it out for the default"),
    Row("train", ["--init-from", ""], "init_from='': is empty"),
    Row("train", "--config none.yaml", "none.yaml: no such config file"),
    Row("train", "--config audio", "audio: no such config file"),
    Row("train", "--config pipe", "pipe: no such config file", pipe("pipe")),
    *(Row("train", "--config c.yaml", f"c.yaml: (?:{answer})", write("c.yaml", t)) for t, answer in CONFIGS.items()),
    *(Row("train!", "--config c.yaml", answer, write("c.yaml", text)) for text, answer in VALUES.items()),
    Row("evaluate", "--batch_size x", "batch_size=x: expected a whole number"),
    Row("evaluate", "--splt test", "splt: no such field; did you mean split?"),
    Row("evaluate!", "", ".*required: model"),
    Row("sample!", ["model", "--out", ""], "out='': is empty"),
    Row("sample", "--clip 3", "clip: no such field; did you mean clips?"),
    Row("sample", "--keep-likelihood 0.5", "keep_likelihood=0.5: expected a list of 2 numbers, or null"),
    Row("make!", "", ".*required: source"),
    Row("make!", ["", "--out", "out"], "source='': is empty"),
    Row("make!", "audio", "out: say where the shards go"),
    Row("make!", "my recordings --out out", "recordings: was not expected; names with spaces need quotes"),
    Row("make", "--chunk-second 3", "chunk_second: no such field; did you mean chunk_seconds?"),
    Row(
        "make!",
        "audio --out o --fractions 88",
        r"fractions=88: expected a list of 3 numbers such as \[88.0, 6.0, 6.0\]",
    ),
    Row("make!", "audio --out o --fractions [.nan,50,50]", r"fractions=\[?\(?nan, 50.0, 50.0\)?\]?: must be finite"),
    Row("make", "--split random", "split=random: choose fractions, lists or folders"),
    Row("check!", "", ".*required: folder"),
    Row("check!", "shards --rebuild-index maybe", "maybe: was not expected"),
    Row("import!", "v4.pt", "--out is missing"),
    Row("import", "--quantizer alaw", "quantizer=alaw: choose mu-law, linear, mu-law-minmax or linear-minmax, or null"),
    # ---- files of audio, and lists of them
    Row("make!", "nowhere --out out", "nowhere: No such file or directory: give an existing folder"),
    Row("make!", "empty --out out", "empty: there are no .wav, .flac, .ogg, .mp3 files in it", folder("empty")),
    Row("make!", "v4.pt --out out", "v4.pt: not a text file"),
    Row("make!", "l --out out", "l: not a text file", write("l", "audio/1.wav\0\n")),
    Row("make!", "l --out out", "l: names audio/1.wav twice", write("l", "audio/1.wav\n./audio/1.wav\n")),
    Row("make!", "l --out out --split lists", "validation_list.txt: No such file", write("l", "audio/1.wav\n")),
    Row("make", "--strict", "audio/x.wav: unreadable: not a wav, flac, ogg or mp3 file", write("audio/x.wav", "text")),
    Row("make", "--strict --dry-run", "audio/x.wav: unreadable: not a wav", write("audio/x.wav", "text")),
    Row("make", "--strict", "audio/x.wav: unreadable: No such file or directory", link("audio/x.wav", "gone.wav")),
    Row("make", "--strict", "audio/x.wav: unreadable: Too many levels", link("audio/x.wav", "x.wav")),
    Row("make", "--strict", r"audio/a\\nb.wav: empty: 0 bytes", write("audio/a\nb.wav", b"")),
    Row("make", "--strict", r"audio/caf\\udce9.wav: empty: 0 bytes", write(os.fsdecode(b"audio/caf\xe9.wav"), b"")),
    Row(
        "make!",
        "l --out out --strict --fractions 100 0 0",
        "p: unreadable: not a file",
        all_of(pipe("p"), write("l", "p")),
    ),
    Row(
        "make",
        "",
        "out: no file of test can be packed; 16.wav: empty: 0 bytes; mend",
        lambda world: [(world / f"audio/{n}.wav").write_bytes(b"") for n in range(16, 20)],
    ),
    Row("make!", "audio/1.wav --out out", "audio/1.wav: not a text file"),
    Row("make!", "audio --out audio/1.wav --fractions 60 20 20", "audio/1.wav: Not a directory: make room"),
    Row("make!", "audio --out audio --fractions 60 20 20", "audio: is not empty and holds no shards to go on with"),
    Row("make!", "audio --out shards --fractions 60 20 20", "shards: holds shards of other files or settings"),
    Row("make!", "audio --out model --fractions 60 20 20", "model/manifest.json: format=None .* no folder of shards"),
    Row(
        "make!",
        "audio --out loop --fractions 60 20 20",
        "loop.*: Too many levels of symbolic links",
        link("loop", "loop"),
    ),
    # ---- shards: manifests, indexes, tars
    *(
        Row(which, {"check!": "shards"}.get(which, ""), f"shards/manifest.json: {answer}", spoil)
        for which in ("check!", "evaluate")
        for answer, spoil in (
            (r"sample_rate=0: must be 1 to 655350 Hz: run `python tools/check_shards.py", manifest("sample_rate", 0)),
            ("labels=None: must be a list of names", manifest("labels", None)),
            ("splits=None: must have train, valid, test", manifest("splits", None)),
            ("splits.train.clips=-1: must be 0 or more", manifest("splits", "train", "clips", -1)),
            ("splits.train.samples=True: must be", manifest("splits", "train", "samples", True)),
            (r"splits.train.shards=\[3\]: must be a list", manifest("splits", "train", "shards", [3])),
            (
                "splits.train.shards=.*must be a list",
                manifest("splits", "train", "shards", 0, "name", "../train-0.tar"),
            ),
            ("splits.train.shards=.*must be a list", manifest("splits", "train", "shards", 0, "bytes", -1)),
            ("format='old' is not 'sashimi-shards-1'", manifest("format", "old")),
            ("not JSON", write("shards/manifest.json", DEEP)),
            ("not JSON", write("shards/manifest.json", LONG)),
            ("must hold a JSON object, not list", write("shards/manifest.json", "[]")),
        )
    ),
    *(
        Row("train", "", f"shards/train.npy(: | ){answer}", spoil)
        for answer, spoil in (
            ("is missing or damaged: run", index(lambda rows: np.array([Bomb()] * len(rows), object))),
            ("is missing or damaged: run", write("shards/train.npy", b"junk")),
            ("does not agree with the manifest", index(lambda rows: rows[:-1])),
            ("does not agree with the manifest", index(lambda rows: rows[:, None])),
            ("does not agree with the manifest", index(lambda rows: np.zeros(len(rows)))),
            ("row 0: its shard is not in the manifest", row("shard", 0, 99)),
            ("row 11: its shard is before that of the row before", row("shard", 11, 0)),
            ("row 3: its recording does not follow", row("recording", 3, 0)),
            ("row 2: it does not start where", row("start", 2, 5)),
            ("row 2: it has no samples", row("samples", 2, 0)),
            ("row 2: it is not within its shard", row("offset", 2, 2**64 - 1)),
            ("row 2: it is not within its shard", row("bytes", 2, 2**32 - 1)),
            ("row 2: its label is not in the manifest", row("label", 2, 7)),
            (r"has \d+ samples, not \d+", row("samples", 2, 1)),
        )
    ),
    *(
        Row("check!", "shards --rebuild-index", f"shards/test-000000.tar: {answer}", spoil)
        for answer, spoil in (
            ("r.flac: it or its json is not a plain file", tar(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)),
            ("r.flac: JSONDecodeError", tar(b"junk")),
            ("r.flac: RecursionError", tar(DEEP)),
            ("r.json: must hold a JSON object", tar(b"[]")),
            ("r.json: recording=3: must be a name", clip(recording=3)),
            ("r.json: samples=nan: must be", clip(samples=NAN)),
            ("r.json: samples='500': must be", clip(samples="500")),
            ("r.json: start=-1: must be", clip(start=-1)),
            ("r.json: sample_rate=0: must be", clip(sample_rate=0)),
            ("r.json: label_id=1000000000: must be", clip(label_id=10**9, label="x")),
            ("r.json: label=None: must be a name", clip(label_id=0)),
            ("the tar: no such file", pipe("shards/test-000000.tar")),
        )
    ),
    Row("check!", "nowhere", "nowhere: no such folder of shards: make it with"),
    Row("check!", "audio --rebuild-index", "audio: there are no shards in it"),
    Row(
        "check!",
        "shards --rebuild-index",
        "shards/manifest.json is missing, so packing did not finish: run `python tools/make_shards.py SOURCE --out",
        lambda world: ((world / "shards/manifest.json").unlink(), (world / "shards/.packing").mkdir()),
    ),
    Row(
        "check!",
        "shards --rebuild-index",
        "shards: lacks train-000001.tar, which .*: restore what is missing, or delete shards/manifest.json to go on",
        lambda world: (world / "shards/train-000001.tar").unlink(),
    ),
    Row("train", "--data.shards nowhere", "nowhere: no such folder of shards: make it with"),
    Row("train", "--data.shards audio", "audio: is not a folder of shards: make one .* `.*make_shards.py audio --out"),
    Row("train", "--data.shards .", r"\.: is not a folder of shards, but has some in it: give shards, say"),
    Row("train", "--data.shards o", "o/manifest.json is missing, so packing did not finish", folder("o/.packing")),
    Row("train", "", "shards/train-000001.tar: has 0 of", lambda world: (world / "shards/train-000001.tar").unlink()),
    Row(
        "train",
        "",
        "shards has no clips in split 'valid': splits with clips are train, test, and training needs valid: pack again",
        lambda world: empty_split(world, "valid"),
    ),
    Row("evaluate", "--data nowhere", "nowhere: no such folder of shards"),
    Row("evaluate", "--split dev", ".* has no clips in split 'dev': .* are train, valid, test"),
    # ---- numbers, and settings that do not go together
    Row("train", "--data.carry 1", "data.carry=1: give 2 to 1048576 segments, or 0"),
    Row("train", "--data.carry -2", "data.carry=-2: give 2 to"),
    Row("train", "--data.segment 510", "data.segment=510: must be a multiple of 16"),
    Row("train", "--train.batch_size 5 --train.micro_batch 2", ".*batch_size=5"),
    Row("train", "--audio.sample_rate 16000", "audio.sample_rate=16000: .* was packed at 8000 Hz"),
    Row("train", "--train.timeout_minutes 0", "train.timeout_minutes=0.*: must be above 0"),
    Row("train", "--audio.bits 9", "model.levels=256: audio.bits=9 needs 512"),
    Row("evaluate", "--carry true --segment 504", "segment=504: with carry it must be a multiple of 16"),
    Row("evaluate", "--carry 2", "carry=2: expected true or false, or null"),
    Row("evaluate", "--batch_size 0", "batch_size=0: give 1 to"),
    Row("evaluate", "--segment -1", "data.segment=-1: give 1 to"),
    Row("sample", "--clips 0", "clips=0: must be 1 to 10 million"),
    Row("sample", "--clips three", "clips=three: expected a whole number"),
    Row("sample", "--seconds -1", "seconds=-1.0: must be above 0 and at most 86400, a day"),
    Row("sample", "--seconds 0.00001", "seconds=1e-05: is less than one sample at 8000 Hz"),
    Row("sample", "--batch-size 0", "batch_size=0: must be 1 to 1048576"),
    Row("sample", "--top-p 1.5", "top_p=1.5: must be 1e-09 to 1, which draws from all levels"),
    Row("sample", "--top-p 1e-310", "top_p=1e-310: must be 1e-09 to 1"),
    Row("sample", "--temperature 1e-310", "temperature=1e-310: must be at least 1e-06, and finite; top_k=1 always"),
    Row("sample", "--top-k 300", "top_k=300: the model has 256 levels"),
    Row("sample", "--seed -1", "seed=-1: must be from 0 to"),
    Row("sample", "--keep-likelihood 0.9 0.4", "keep_likelihood=0.9 0.4: need 0 <= low < high <= 1"),
    Row("sample", "--prompt-seconds 1", "prompt_seconds=1.0: there is no prompt"),
    Row("sample", "--prompt-seconds -1 --prompt a.wav", "prompt_seconds=-1.0: must be above 0"),
    Row(
        "sample", "--prompt-seconds 1e308 --prompt a.wav", "prompt_seconds=1e[+]308: must be above 0 and at most 86400"
    ),
    Row("sample", "--resample-prompt", "resample_prompt: there is no prompt; name its audio file with --prompt"),
    Row("make", "--sample-rate 0", "sample_rate=0: choose from 1"),
    Row("make", "--chunk-seconds 0", "chunk_seconds=0.0: choose from 0.1"),
    Row("make", "--sample-rate 4 --chunk-seconds 0.1", "chunk_seconds=0.1: is less than one sample at 4 Hz"),
    Row("make", "--shard-megabytes 0", "shard_megabytes=0.0: must be more than 0"),
    Row("make", "--shard-megabytes .inf", "shard_megabytes=inf: must be finite"),
    Row("make", "--processes -1", "processes=-1: give 1 to 1024"),
    # ---- prompts
    Row("sample", "--prompt nothing.wav", "nothing.wav: unreadable: No such file"),
    Row("sample", "--prompt v4.pt", "v4.pt: unreadable: not a wav, flac, ogg or mp3 file, whatever its name"),
    Row("sample", "--prompt audio", "audio: unreadable: not a file"),
    Row("sample", "--prompt p", "p: unreadable: not a file", pipe("p")),
    Row(
        "sample",
        "--prompt p.wav",
        "p.wav: is at 16000 Hz, the model at 8000 Hz; add --resample-prompt",
        sound("p.wav", np.ones(99) / 9, 16000),
    ),
    Row("sample", "--prompt p.wav", "p.wav: empty: no samples", sound("p.wav", np.zeros(0))),
    Row("sample", "--prompt p.wav", "p.wav: NaN or infinite samples", sound("p.wav", [NAN] * 9)),
    Row(
        "sample",
        "--prompt p.wav --prompt-seconds 9",
        r"p.wav: has 0.012 s, less than prompt_seconds=9.0",
        sound("p.wav", np.ones(99) / 9),
    ),
    # ---- checkpoints and runs
    Row("train", "--runs v4.pt", "v4.pt"),
    Row(
        "train!",
        "--config runs/new/config.yaml --train.steps 2",
        "runs/new/config.yaml: is of the run in runs/new, but names runs/old; to go on",
        lambda world: (world / "runs/old").rename(world / "runs/new"),
    ),
    Row("train", "--name a/b", "name='a/b': must be a plain folder name"),
    Row("train", "--resume nowhere", "resume=nowhere: is not a checkpoint of this run"),
    Row("train", f"--resume {CHECKPOINT}", f"resume={CHECKPOINT}: is not a checkpoint of this run"),
    Row("resume", "--resume loop", "resume=loop: is not a checkpoint of this run", link("loop", "loop")),
    Row("resume", "--resume never", "runs/old/checkpoints: has checkpoints up to step 1"),
    Row("resume", "--data.carry 2", "data.carry=2: the checkpoint to resume from has 0"),
    Row(
        "resume",
        "--data.carry 2",
        "carried.safetensors: does not fit the model; start another run",
        edited(f"{CHECKPOINT}/config.json", put("data", "carry", 2)),
    ),
    Row("resume", "--seed 1", "seed=1: the checkpoint to resume from has 0"),
    Row("resume", "--init-from model", "init_from=model: this run exists and did not start there"),
    Row(
        "resume",
        "",
        "runs/old/checkpoints: is a file",
        lambda world: (shutil.rmtree(world / "runs/old/checkpoints"), write("runs/old/checkpoints", "")(world)),
    ),
    Row(
        "resume",
        f"--resume {CHECKPOINT}",
        f"not a whole checkpoint: {CHECKPOINT}/manifest.json: names no files",
        write(f"{CHECKPOINT}/manifest.json", '{"files": {}}'),
    ),
    Row(
        "resume",
        f"--resume {CHECKPOINT}",
        "not a whole checkpoint: .*manifest.json: not a manifest",
        write(f"{CHECKPOINT}/manifest.json", '{"files": {"../../config.yaml": {"bytes": 1, "sha256": ""}}}'),
    ),
    Row(
        "resume",
        f"--resume {CHECKPOINT}",
        "not a whole checkpoint: .*manifest.json: not JSON",
        write(f"{CHECKPOINT}/manifest.json", DEEP),
    ),
    *(
        Row("resume", "", f"the checkpoint's state.json: {answer}: not what this version saves", spoil)
        for answer, spoil in (
            (
                "ema_updates=missing",
                edited(f"{CHECKPOINT}/state.json", drop("ema_updates")),
            ),
            ("position=-1", edited(f"{CHECKPOINT}/state.json", put("position", -1))),
            ("best_bits=x", edited(f"{CHECKPOINT}/state.json", put("best_bits", "x"))),
            ("plateau.bad=missing", edited(f"{CHECKPOINT}/state.json", put("plateau", None))),
        )
    ),
    Row(
        "resume",
        "",
        ".*state.json: step=7: not that of the folder's name",
        edited(f"{CHECKPOINT}/state.json", put("step", 7)),
    ),
    Row(
        "resume",
        "",
        "model.d_model=8: the checkpoint to resume from has None",
        edited(f"{CHECKPOINT}/config.json", put("model", {})),
    ),
    Row(
        "resume",
        "",
        "checkpoint: NaN or infinity in ",
        tensors(f"{CHECKPOINT}/model.safetensors", lambda t: {name: value * NAN for name, value in t.items()}),
    ),
    Row(
        "resume",
        "",
        "optimizer state .*: torch.bool, or not finite; use another checkpoint",
        tensors(f"{CHECKPOINT}/optimizer.safetensors", lambda t: {name: value.bool() for name, value in t.items()}),
    ),
    Row(
        "resume",
        "",
        "runs/old/best.json: step=x: must be a number; delete the file",
        write("runs/old/best.json", '{"step": "x"}'),
    ),
    *(
        Row(
            which,
            arguments,
            f"runs/old: its best checkpoint is not whole: {CHECKPOINT}/{damaged}: .*; restore it from a copy, "
            "or give runs/old/checkpoints/step-00000000, the newest whole one",
            all_of(copied(CHECKPOINT, "runs/old/checkpoints/step-00000000"), write(f"{CHECKPOINT}/{damaged}", "{}")),
        )
        for which, arguments, damaged in (
            ("evaluate!", "runs/old", "config.json"),
            ("sample!", "runs/old", "manifest.json"),
            ("train", "--init-from runs/old", "model.safetensors"),
        )
    ),
    # ---- model folders
    *(
        Row(which, arguments, "nowhere: no such folder; give a model folder")
        for which, arguments in (("evaluate!", "nowhere"), ("sample!", "nowhere"), ("train", "--init-from nowhere"))
    ),
    Row("train", "--init-from audio", "audio: no config.json and no checkpoints"),
    Row("sample!", "v4.pt", "v4.pt: is a file; give a model folder, which tools/import_checkpoint.py makes"),
    Row("evaluate!", "model", "model: does not say what it was trained on; name the shards with --data"),
    Row("evaluate", "--out nowhere/a.json", "out=nowhere/a.json: is a folder, or in a folder that does not exist"),
    Row("evaluate", "--out audio", "out=audio: is a folder, or in"),
    *(
        Row("sample", "", answer, edited("model/config.json", put(*keys)))
        for answer, keys in (
            ('model/config.json: "model" is missing or not an object', ("model", None)),
            ("model, model: d_model=x: expected a whole number", ("model", "d_model", "x")),
            ("model, model: model.n_layers=1000000: must be at most 1000", ("model", "n_layers", 10**6)),
            ("model: its weights do not fit the model: embedding.weight is .* instead of", ("model", "d_model", 1024)),
            ("model: its weights do not fit the model: tier.* is missing instead of", ("model", "n_layers", 900)),
            ("model: model.levels=256, but audio.bits=9 needs 512", ("audio", "bits", 9)),
            ("model, audio: audio.sample_rate=0: give a rate", ("audio", "sample_rate", 0)),
            ("format='other'", ("format", "other")),
        )
    ),
    Row(
        "sample",
        "",
        "model/config.json: not JSON",
        all_of(write("model/config.json", DEEP), lambda world: seal(world / "model")),
    ),
    Row(
        "sample",
        "",
        "model: its weights do not fit the model: .* is torch.int64",
        tensors("model/model.safetensors", lambda t: {name: value.long() for name, value in t.items()}),
    ),
    Row(
        "evaluate",
        "",
        "model: its output is not finite: its weights have diverged",
        tensors("model/model.safetensors", lambda t: {name: value * 1e30 for name, value in t.items()}),
    ),
    Row(
        "sample",
        "",
        "model/model.safetensors: not a whole safetensors file",
        all_of(write("model/model.safetensors", b"\xff" * 99), lambda world: seal(world / "model")),
    ),
    Row(
        "evaluate!",
        "wide --data shards",
        "audio.sample_rate=16000: .* was packed at 8000 Hz",
        lambda world: export(world / "wide", 16000),
    ),
    # ---- folders of clips
    Row("sample!", "model --out v4.pt", "v4.pt: is a file; give another folder with --out"),
    Row("sample!", "model --out audio", "audio: is not empty and holds no samples to go on with"),
    Row("sample", "--seed 1", "clips: its clips have seed=0", made_clips(lambda clips: None)),
    Row("sample", "", "clips/settings.json: not JSON", made_clips(write("settings.json", "junk"))),
    Row(
        "sample",
        "",
        "clips/samples.jsonl: not as it was written",
        made_clips(write("samples.jsonl", '{"clip": [1]}\n')),
    ),
    Row(
        "sample",
        "",
        "clips/samples.jsonl: not as it was written",
        made_clips(write("samples.jsonl", '{"clip": 0, "file": "../model/config.json", "bits_per_sample": 1}\n')),
    ),
    Row(
        "sample",
        "",
        "clips/samples.jsonl: not as it was written",
        made_clips(
            write("samples.jsonl", '{"clip": 0, "file": "clip-00000.wav", "bits_per_sample": 1%s}\n' % ("0" * 400))
        ),
    ),
    # ---- checkpoints of other code
    Row("import!", "missing.pt --out imported", "missing.pt: no such file"),
    Row("import!", "audio --out imported", "audio: no such file"),
    Row("import", "--out audio", ".*audio: exists and is not empty"),
    Row("import", "--sample-rate 0", "audio.sample_rate=0: give a rate"),
    Row("import", "", "v4.pt: holds posix.mkdir objects, which could run code", saved({"x": Bomb()})),
    Row("import", "", "v4.pt: not a checkpoint of torch.save, or damaged", write("v4.pt", "PK\x03\x04")),
    Row("import", "", "v4.pt: no tensors at its top level", saved([1, 2])),
    Row("import", "", f"v4.pt: {D} is .*expected real", state_dict(D, torch.ones(1, 31))),
    Row("import", "", f"v4.pt: {C} is .*torch.bool, expected real", state_dict(C, torch.ones(1, 32, 32, 2).bool())),
    Row("import", "", f"v4.pt: {C} holds NaN or infinity", state_dict(C, torch.full((1, 32, 32, 2), NAN))),
    Row(
        "import",
        "",
        f"v4.pt: {C} is a nested, quantized, sparse or empty tensor",
        state_dict(C, torch.zeros(2, 2).to_sparse()),
    ),
    Row("import", "", "v4.pt: .*l_kernel is -5: must be a length", state_dict(C[:-1] + "l_kernel", torch.tensor(-5))),
    Row(
        "import",
        "",
        "v4.pt: its 300 levels are no power of two",
        all_of(
            state_dict("encoder.0.weight", torch.ones(300, 8)),
            state_dict("decoder.0.output_transform.bias", torch.ones(300)),
            state_dict("decoder.0.output_transform.weight", torch.ones(300, 8)),
        ),
    ),
]


# ---- the world


def export(folder: Path, rate: int) -> None:
    config = ModelConfig(d_model=8, n_layers=1)
    torch.manual_seed(0)
    save_model(folder, Sashimi(config).state_dict(), to_dict(config), to_dict(AudioConfig(rate)))


def empty_split(world: Path, split: str) -> None:
    """As if nothing had been packed for it."""
    nothing = {"recordings": 0, "clips": 0, "samples": 0, "hours": 0, "shards": []}
    manifest("splits", split, nothing)(world)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Everything as it should be."""
    world = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_shards, world / "shards")
    (world / "audio").mkdir()
    for number in range(20):
        sf.write(world / f"audio/{number}.wav", np.random.default_rng(number).normal(0, 0.1, 900), RATE)
    export(world / "model", RATE)
    shutil.copy(ROOT / "tests/reference/s4_v4_sc09/checkpoint.pt", world / "v4.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        command("launch/train.py", [*RUN, "--name", "old"], patch)
    return world


@pytest.fixture
def world(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the commands run."""
    shutil.copytree(good, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def argv(row: Row) -> list[str]:
    own = row.arguments.split() if isinstance(row.arguments, str) else row.arguments
    return own if row.command.endswith("!") else [*PREFIX[row.command], *own]


def script(row: Row) -> str:
    return SCRIPTS["train" if row.command == "resume" else row.command.removesuffix("!")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.message}"[:90])
def test_a_wrong_command_is_one_line_and_leaves_nothing(world: Path, call: Call, row: Row) -> None:
    """Exit code 2, the line that the row says, and every file as it was. Mutation: drop the check that answers."""
    row.spoil(world)
    before = contents(world)
    answer = call(script(row), *argv(row))
    assert answer.code == 2, answer.err
    assert re.match(f"error: {row.message}", answer.error), answer.error
    assert contents(world) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_command_as_a_process(world: Path, name: str) -> None:
    """The same as a shell sees it: exit code 2 and one line on stderr. Mutation: print the line to stdout."""
    row = next(row for row in ROWS if row.command.removesuffix("!") == name)
    done = subprocess.run(
        [sys.executable, str(ROOT / script(row)), *argv(row)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if not NOTES.search(line)]) == 1, done.stderr
    assert re.match(f"error: {row.message}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RANK", "x", "RANK=x: must be 0 to"),
        ("RANK", "5", "RANK=5: must be below WORLD_SIZE=1"),
        ("WORLD_SIZE", "-1", "WORLD_SIZE=-1: must be 0 to"),
        ("LOCAL_RANK", "", "LOCAL_RANK=: must be 0 to"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: must be 0 to 65535"),
        ("ACCELERATE_MIXED_PRECISION", "half", "ACCELERATE_MIXED_PRECISION=half: choose no, bf16 or fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR: set dynamo_backend to no, and"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP=true: take it out of Accelerate's configuration"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "ACCELERATE_USE_MEGATRON_LM=true: take it out"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ACCELERATE_USE_PARALLELISM_CONFIG=true: take it out"),
        ("ACCELERATE_USE_CPU", "maybe", "the launcher's options or environment: invalid truth value maybe"),
    ],
)
def test_a_wrong_environment_is_one_line(
    world: Path, call: Call, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """Of all that a launcher sets. Mutation: drop `_check_environment`, or `except ValueError` after it."""
    monkeypatch.setenv(variable, value)
    before = contents(world)
    answer = call("launch/train.py", *PREFIX["train"])
    assert (answer.code, contents(world)) == (2, before)
    assert answer.error.startswith(f"error: {message}") or answer.error.startswith(f"error (rank {value}): {message}")


def test_more_processes_than_gpus_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one GPU, where NCCL would fail without a reason. Mutation: `gpus < local_rank`."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    error = call("launch/train.py", *PREFIX["train"]).error
    assert error.startswith("error (rank 1): LOCAL_RANK=1: more processes than the 1 GPUs here: lower num_processes")


MODEL = ModelConfig(d_model=4, n_layers=1, pool=(2,), d_state=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: RunConfig(seed=1 << 63), "seed=9223372036854775808: must be from 0"),
        (lambda: RunConfig(name="a\nb"), "name='a.nb': must be a plain folder name"),
        (lambda: ModelConfig(d_model=(1 << 16) + 1), "model.d_model=65537: must be at most 65536"),
        (lambda: ModelConfig(n_layers=1001), "model.n_layers=1001: must be at most 1000"),
        (lambda: ModelConfig(d_state=1026), "model.d_state=1026: must be at most 1024"),
        (lambda: ModelConfig(expand=10**6), "model.pool=.*, expand=1000000: the innermost tier would be wider"),
        (lambda: ModelConfig(pool=(2,) * 17, expand=1), "model.pool=.* more than 16 tiers"),
        (lambda: ModelConfig(pool=(1,)), "model.pool=.1.: every factor must be at least 2"),
        (lambda: DataConfig(segment=(1 << 31) + 1), "data.segment=2147483649: give 1 to 2"),
        (lambda: DataConfig(workers=257), "data.workers=257: give 0 to 256"),
        (lambda: DataConfig(prefetch=1001), "data.prefetch=1001: give 1 to 1000"),
        (lambda: TrainConfig(steps=1 << 62, batch_size=2), "train.steps=4611686018427387904: with batch_size=2"),
        (lambda: TrainConfig(batch_size=(1 << 24) + 1), "train.batch_size=16777217: must be at most"),
        (lambda: TrackConfig(audio_seconds=3601), "track.audio_seconds=3601: must be above 0 and at most 3600"),
        (lambda: OptimConfig(lr=NAN), "optim.lr=nan: must be above 0"),
        (lambda: SampleConfig(clips=10**7 + 1), "clips=10000001: must be 1 to 10 million"),
        (lambda: SampleConfig(seconds=86401), "seconds=86401: must be above 0 and at most 86400"),
        (lambda: SampleConfig(batch_size=(1 << 20) + 1), "batch_size=1048577: must be 1 to"),
        (lambda: SampleConfig(temperature=0.9e-6), "temperature=9e-07: must be at least 1e-06"),
        (lambda: SampleConfig(top_p=0.9e-9), "top_p=9e-10: must be 1e-09 to 1"),
        (lambda: SampleConfig(temperature=INF), "temperature=inf: must be at least 1e-06, and finite"),
        (lambda: PackConfig("in", out="out", fractions=(NAN, 50, 50)), "fractions=.nan, 50, 50.: give three"),
        (lambda: PackConfig("in", out="out", processes=1025), "processes=1025: give 1 to 1024"),
        (lambda: sashimi.AudioConfig(bits=17), "audio.bits=17: choose from 8 to 16"),
        (lambda: sashimi.generate(Sashimi(MODEL), 0), "n_samples=0: must be at least 1"),
        (lambda: sashimi.generate(Sashimi(MODEL), 1, clips=[]), "clips=..: give at least one"),
        (lambda: sashimi.generate(Sashimi(MODEL), 1, top_k=257), "top_k=257: the model has 256 levels"),
        (lambda: sashimi.generate(Sashimi(MODEL), 1, prompt=torch.tensor([0.5])), "prompt: must be ids"),
        (lambda: sashimi.load_model("nowhere"), "nowhere: no such folder"),
        (lambda: sashimi.read_audio_config("nowhere"), "nowhere: no such folder"),
        (lambda: sashimi.write_wav("x.wav", torch.zeros(2, 2, 2), 8000), "x.wav: audio of shape"),
        (lambda: sashimi.write_wav("x.wav", torch.tensor([NAN]), 8000), "x.wav: NaN"),
        (lambda: sashimi.write_wav("x.wav", torch.zeros(2), 0), "x.wav: sample_rate=0"),
        (lambda: sashimi.Quantizer(AudioConfig()).decode(torch.tensor([256])), "ids: must be integers from 0 to 255"),
        (lambda: sashimi.Quantizer(AudioConfig()).decode(torch.tensor([-1])), "ids: must be integers from 0 to 255"),
        (lambda: sashimi.Quantizer(AudioConfig()).encode(torch.tensor([NAN])), "audio: NaN or infinite"),
        (lambda: sashimi.Quantizer(AudioConfig()).encode(torch.tensor([1])), "audio: must be floating point"),
        (lambda: open_split("nowhere", "train"), "nowhere: no such folder of shards"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: Callable[[], object], message: str) -> None:
    """Of configs and of what `import sashimi` offers, just past each bound. Mutation: drop the check that answers."""
    with pytest.raises(InputError, match=f"^{message}") as error:
        wrong()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rate", "channels", "bits", "reason"),
    [
        (0, 1, 16, "unreadable: its header makes no sense"),
        (2**31 - 1, 1, 16, "unreadable: its header says 2147483647 Hz"),
        (8000, 0, 16, "unreadable: Channel count is zero"),
        (8000, 65535, 16, "unreadable: Too many channels"),
        (8000, 1, 0, "unreadable: File contains data in an unimplemented format"),
    ],
)
def test_a_wav_with_a_wild_header_is_refused(tmp_path: Path, rate: int, channels: int, bits: int, reason: str) -> None:
    """Before memory is asked for by it. Mutation: drop the check of MAX_RATE."""
    step = channels * bits // 8
    about = struct.pack("<HHIIHH", 1, channels, rate, rate * step % 2**32, step % 2**16, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + about + b"data" + struct.pack("<I", 8000) + bytes(8000)
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    with pytest.raises(InputError, match=rf"x\.wav: {reason}"):
        read_audio(tmp_path / "x.wav", RATE)


def test_a_corrected_command_goes_on(world: Path, call: Call) -> None:
    """After packing was stopped by bad files, mending them is all it takes: what holds them is packed, nothing else.

    Mutations: in `_is_done`, do not compare `_content`; in `_content`, leave out `_changed`.
    """
    bad = (5, 12, 13, 14, 15)  # one of train, all of valid
    for number in bad:
        sf.write(world / f"audio/{number}.wav", np.full(900, NAN), RATE, "FLOAT")
    pack = [SCRIPTS["make"], *PREFIX["make"], "--shard-megabytes", "0.004"]
    answer = call(*pack)
    assert answer.code == 2
    assert re.match("error: out: no file of valid can be packed; 12.wav: NaN .*mend or replace the files", answer.error)
    before = {path.name: path.stat().st_ino for path in (world / "out").glob("train-*.tar")}
    for number in bad:
        sf.write(world / f"audio/{number}.wav", np.random.default_rng(number).normal(0, 0.1, 900), RATE, "FLOAT")
    assert call(*pack, "--strict").code == 0
    assert not (world / "out/.packing").exists()
    same = [name for name in before if (world / "out" / name).stat().st_ino == before[name]]
    assert len(same) == len(before) - 1 == 5
    assert open_split(world / "out", "train").n_recordings == 12
    assert call(SCRIPTS["check"], "out").code == 0


def test_a_finished_run_says_so(world: Path, call: Call) -> None:
    """And is left as it is. Mutation: drop `or trainer.finished` in launch/train.py."""
    before = contents(world)
    answer = call("launch/train.py", *RUN, "--name", "old")
    assert (answer.code, contents(world)) == (0, before)
    assert answer.error == "runs/old: finished at step 1; to go on, give train.steps more than that (now 1)"


def test_one_line() -> None:
    """Names from strangers reach a terminal without their control characters. Mutation: return text."""
    assert one_line("a\nb\x1b[31m\udce9 caf\u00e9") == "a\\nb\\x1b[31m\\udce9 caf\u00e9"
    assert len(one_line("x" * 10**6)) < 1010
