"""The shard format: the tars of a folder, and the index and manifest that are made from them.

    shards/NAME/train-000000.tar    plain WebDataset: pairs KEY.flac (16-bit mono) and KEY.json
    shards/NAME/train.npy           the index: a record of INDEX_DTYPE for each flac, in the order of the tars
    shards/NAME/manifest.json       sample rate, labels, checksums, counts and settings; written last

A *recording* is one source file. It lies in one shard as one or more consecutive *chunks*, members of at most
`chunk_samples` samples. The tars are the truth: `seal` makes index and manifest from them at any time.
"""

import hashlib
import io
import itertools
import json
import shlex
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sashimi.atomic import MANIFEST, from_json, read_json, write_file, write_json
from sashimi.errors import InputError, one_line
from sashimi.shard_rules import clip_fault, manifest_fault
from sashimi.store import RemoteFile, RemoteFolder

FORMAT = "sashimi-shards-1"
SPLITS = ("train", "valid", "test")
NO_LABEL = -1
STATE = ".packing"  # folder within a folder of shards, as long as packing is not done
SEALED = ("format", "sample_rate", "labels", "splits")  # what the manifest says of the tars; the rest is their history

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # place of the tar among the split's sorted tars
        ("offset", "<u8"),  # of the flac's first byte within the tar
        ("bytes", "<u4"),  # length of the flac
        ("recording", "<u4"),  # 0, 1, 2, … within the split
        ("start", "<u8"),  # of the chunk within its recording, in samples
        ("samples", "<u4"),
        ("label", "<i4"),  # place in the manifest's labels, or NO_LABEL
    ]
)


class Row(NamedTuple):
    """A row of an index in Python's own numbers, which are faster than numpy's one by one: `Row(*index[0].item())`."""

    shard: int
    offset: int
    bytes: int
    recording: int
    start: int
    samples: int
    label: int


class DamagedMember(Exception):
    """A member of a shard cannot be read. The message names the shard's file, the member and the reason."""

    def __init__(self, shard: Path | RemoteFile, member: str, reason: str) -> None:
        super().__init__(str(shard), member, reason)

    def __str__(self) -> str:
        shard, member, reason = self.args
        return f"{shard}: {member}: {reason}"


def read_index(folder: Path | RemoteFolder, split: str, clips: int) -> np.ndarray:
    """The index of a split, memory-mapped (clips,) of INDEX_DTYPE. InputError if it is not that."""
    name, remedy = f"{split}.npy", f"run {check_command(folder, '--rebuild-index')}"
    try:
        index = np.load(folder / name if isinstance(folder, Path) else folder.copy(name), mmap_mode="r")
    except InputError:
        raise
    except Exception as error:  # a damaged header makes numpy raise almost anything
        raise InputError(f"{folder}/{name}: is missing or damaged: {remedy}") from error
    if not isinstance(index, np.ndarray) or index.dtype != INDEX_DTYPE or index.shape != (clips,):
        raise InputError(f"{folder}/{name} does not agree with the manifest: {remedy}")
    return index


def read_manifest(folder: Path | RemoteFolder) -> dict[str, Any]:
    """The manifest of a shard folder. InputError if the folder is missing, unfinished or of another kind."""
    where = f"{folder}/{MANIFEST}"
    if isinstance(folder, RemoteFolder):
        manifest = from_json(folder.copy(MANIFEST).read_bytes(), where)
    elif not (folder / MANIFEST).is_file():
        raise InputError(_without_manifest(folder))
    else:
        manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{where}: format={manifest.get('format')!r} is not {FORMAT!r}, so this is no folder of shards: "
            "give another folder, or pack the audio again"
        )
    if fault := manifest_fault(manifest, SPLITS):
        raise InputError(f"{where}: {one_line(fault, 200)}: run {check_command(folder, '--rebuild-index')}")
    return manifest


def _without_manifest(folder: Path) -> str:
    """What a folder without a manifest is, and what to do."""
    where, quoted = folder / MANIFEST, shlex.quote(str(folder))
    if not folder.is_dir():
        return f"{folder}: no such folder of shards: make it with `python tools/make_shards.py SOURCE --out {quoted}`"
    if (folder / STATE).exists():
        again = f"run `python tools/make_shards.py SOURCE --out {quoted}` again, as before"
        return f"{where} is missing, so packing did not finish: {again}"
    if any(path.name.startswith(SPLITS) for path in folder.glob("*-*.tar")):
        return f"{where} is missing: restore it, or run {check_command(folder, '--rebuild-index')}"
    inner = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}")) if (path.parent / "train.npy").exists()]
    if inner:
        return f"{folder}: is not a folder of shards, but has some in it: give {', '.join(map(str, inner[:3]))}, say"
    make = f"`python tools/make_shards.py {quoted} --out shards/NAME`"
    return f"{folder}: is not a folder of shards: make one of the recordings in it with {make}"


def check_command(folder: Path | RemoteFolder, option: str = "") -> str:
    """The command that checks a folder; of a remote one, where the shards were packed."""
    words = ("python tools/check_shards.py", shlex.quote(str(folder)) if isinstance(folder, Path) else "FOLDER", option)
    command = f"`{' '.join(filter(None, words))}`"
    return command if isinstance(folder, Path) else f"{command} on a copy of the folder"


class ShardScan(NamedTuple):
    """What one tar holds: index `rows` with shard 0 and recordings counted from 0, and what a manifest says."""

    name: str
    bytes: int
    sha256: str
    rows: np.ndarray
    labels: dict[int, str]
    sample_rates: set[int]


def scan_shard(path: Path) -> ShardScan:
    """Reads a tar's headers, JSON members and checksum. DamagedMember where they are not as `ShardWriter` writes."""
    rows: list[tuple[int, ...]] = []
    labels: dict[int, str] = {}
    rates: set[int] = set()
    recordings: dict[str, int] = {}
    name = "the tar"
    if not path.is_file():  # a pipe of that name would be waited for
        raise DamagedMember(path, name, "no such file")
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar)
            for flac, about in itertools.zip_longest(members, members):
                name = flac.name
                if about is None or about.name != name.removesuffix(".flac") + ".json":
                    raise DamagedMember(path, name, "is not followed by its json")
                stream = tar.extractfile(about) if about.isreg() and flac.isreg() else None
                if stream is None:
                    raise DamagedMember(path, name, "it or its json is not a plain file")
                fields = json.load(stream)
                if fault := clip_fault(fields):
                    raise DamagedMember(path, about.name, one_line(fault, 200))
                number = recordings.setdefault(fields["recording"], len(recordings))
                label = fields.get("label_id", NO_LABEL)
                place = (0, flac.offset_data, flac.size)
                rows.append((*place, number, fields["start"], fields["samples"], label))
                rates.add(fields["sample_rate"])
                if label != NO_LABEL:
                    labels[label] = fields["label"]
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedMember(path, name, f"{type(error).__name__}: {error}") from error
    size = path.stat().st_size
    return ShardScan(path.name, size, checksum, np.array(rows, INDEX_DTYPE), labels, rates)


def rebuild(folder: Path) -> dict[str, Any]:
    """Seals a folder anew from its tars. What a readable manifest says of how it was packed is kept.

    InputError if shards are damaged, or missing: by such a manifest, or because packing is not done.
    """
    if not any(folder.glob("*.tar")):
        raise InputError(f"{folder}: there are no shards in it to make an index from")
    if (folder / STATE).exists() and not (folder / MANIFEST).exists():
        raise InputError(_without_manifest(folder))
    try:
        old = read_manifest(folder)
    except InputError:
        old = {}
    named = [shard["name"] for split in SPLITS for shard in old["splits"][split]["shards"]] if old else []
    if lost := [name for name in named if not (folder / name).exists()]:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InputError(
            f"{folder}: lacks {', '.join(lost[:3])}{more}, which its manifest lists: restore what is missing, "
            f"or delete {folder / MANIFEST} to go on without"
        )
    about = {key: old[key] for key in old if key not in SEALED}
    try:
        return seal(folder, about)
    except DamagedMember as damage:
        raise InputError(f"{damage}: restore this shard, or delete it and {MANIFEST}, then rebuild") from damage


def seal(
    folder: Path,
    about: Mapping[str, Any],
    scan: Callable[[Callable[[Path], ShardScan], list[Path]], Iterable[ShardScan]] = map,
) -> dict[str, Any]:
    """Writes the indexes and the manifest of a folder of finished shards from its tars; returns the manifest.

    `about` (settings and the like) is added to the manifest; `scan` is `map` or that of a process pool.
    """
    paths = [path for split in SPLITS for path in sorted(folder.glob(f"{split}-*.tar"))]
    scans = list(scan(scan_shard, paths))
    rates = set[int]().union(*(one.sample_rates for one in scans))
    if len(rates) != 1:
        raise InputError(f"{folder}: clips have sample rates {sorted(rates)}: a folder of shards needs exactly one")
    sample_rate = rates.pop()
    names = {label: name for one in scans for label, name in one.labels.items()}
    labels = [names.get(label, f"label-{label}") for label in range(max(names, default=-1) + 1)]
    splits = {}
    for split in SPLITS:
        shards = [one for one in scans if one.name.startswith(f"{split}-")]
        index = _join(shards)
        buffer = io.BytesIO()
        np.save(buffer, index)
        samples = int(index["samples"].sum(dtype=np.int64))
        write_file(folder / f"{split}.npy", buffer.getvalue())
        splits[split] = {
            "recordings": len(np.unique(index["recording"])),
            "clips": len(index),
            "samples": samples,
            "hours": round(samples / sample_rate / 3600, 6),
            "shards": [{"name": one.name, "bytes": one.bytes, "sha256": one.sha256} for one in shards],
        }
    manifest = dict(zip(SEALED, (FORMAT, sample_rate, labels, splits), strict=True)) | dict(about)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _join(shards: list[ShardScan]) -> np.ndarray:
    """One index from those of a split's shards: shards and recordings numbered through."""
    parts = [np.empty(0, INDEX_DTYPE)]
    recordings = 0
    for number, shard in enumerate(shards):
        rows = shard.rows.copy()
        rows["shard"] = number
        rows["recording"] += np.uint32(recordings)
        recordings += len(np.unique(rows["recording"]))
        parts.append(rows)
    return np.concatenate(parts)
