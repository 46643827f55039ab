"""What a manifest, an index and a clip's JSON must be before anybody reads audio by them. Pure checks, no I/O.

A folder of shards may come from anywhere and be damaged anywhere, so each check names the first thing that is wrong.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_RATE = 655350  # Hz; of flac
MAX_LABELS = 1 << 16
_PIECE = 1 << 20  # rows of an index looked at together
_COUNTS = ("recordings", "clips", "samples")


def manifest_fault(manifest: Mapping[str, Any], splits: tuple[str, ...]) -> str | None:
    """What is wrong with a manifest's fields of which readers make use, "field=value: what"; None if nothing is."""
    rate, labels, about = (manifest.get(name) for name in ("sample_rate", "labels", "splits"))
    if not _whole(rate, 1, MAX_RATE):
        return f"sample_rate={rate!r}: must be 1 to {MAX_RATE} Hz"
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return f"labels={labels!r}: must be a list of names"
    if not isinstance(about, dict) or not all(isinstance(about.get(split), dict) for split in splits):
        return f"splits={about!r}: must have {', '.join(splits)}"
    for split in splits:
        for name in _COUNTS:
            if not _whole(about[split].get(name), 0, 1 << 62):
                return f"splits.{split}.{name}={about[split].get(name)!r}: must be 0 or more"
        shards = about[split].get("shards")
        if not isinstance(shards, list) or not all(_is_shard(shard, split) for shard in shards):
            return f"splits.{split}.shards={shards!r}: must be a list of name, bytes and sha256"
        if len({shard["name"] for shard in shards}) < len(shards):
            return f"splits.{split}.shards: one is there twice"
    return None


def _is_shard(value: Any, split: str) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(name := value.get("name"), str)
        and name.startswith(f"{split}-")
        and name.endswith(".tar")
        and name.isprintable()
        and "/" not in name
        and _whole(value.get("bytes"), 0, 1 << 62)
        and re.fullmatch("[0-9a-f]{64}", str(value.get("sha256"))) is not None
    )


def index_fault(index: np.ndarray, about: Mapping[str, Any], labels: int) -> str | None:
    """The first row of an index (rows,) that cannot be, and why; None if none. `about`: its split in the manifest.

    Rows are those of the tars in order: each within its tar, recordings and their chunks without a gap. It is looked at
    in pieces, so that a memory-mapped one stays where it is.
    """
    sizes = np.array([shard["bytes"] for shard in about["shards"]], np.uint64)
    found = {"recordings": 0, "clips": len(index), "samples": 0}
    before = np.zeros((), index.dtype)
    for place in range(0, len(index), _PIECE):
        rows = index[place : place + _PIECE]
        recordings = np.diff(rows["recording"].astype(np.int64), prepend=int(before["recording"]) if place else -1)
        for what, wrong in _rules(rows, before, recordings, sizes, labels).items():
            if wrong.any():
                return f"row {place + int(np.argmax(wrong))}: {what}"
        found["recordings"] += int(recordings.sum())
        found["samples"] += int(rows["samples"].sum(dtype=np.int64))
        before = rows[-1]
    different = [f"{found[name]} {name}, not {about[name]}" for name in _COUNTS if found[name] != about[name]]
    return f"has {', '.join(different)}" if different else None


def _rules(
    rows: np.ndarray, before: np.void | np.ndarray, recordings: np.ndarray, sizes: np.ndarray, labels: int
) -> dict[str, np.ndarray]:
    """Which rows break which rule; `before` is the row before them, `recordings` how many each is after that."""
    shard, first = rows["shard"].astype(np.int64), recordings != 0
    shards = np.diff(shard, prepend=int(before["shard"]))
    known = shard < len(sizes)
    size = np.append(sizes, np.uint64(0))[np.where(known, shard, -1)]
    last = np.array([before["start"]], np.uint64) + np.array([before["samples"]], np.uint64)
    ends = np.concatenate([last, rows["start"] + rows["samples"].astype(np.uint64)])  # of the clip before each
    return {
        "its shard is not in the manifest": ~known,
        "its shard is before that of the row before": shards < 0,
        "its recording does not follow that of the row before": (recordings != 0) & (recordings != 1),
        "its recording goes on in another shard": ~first & (shards != 0),
        "it does not start where the clip before it ends": rows["start"] != np.where(first, 0, ends[:-1]),
        "it has no samples": rows["samples"] == 0,
        "it is not within its shard": (rows["bytes"] == 0)
        | (rows["offset"] > size)
        | (rows["bytes"] > size - np.minimum(rows["offset"], size)),
        "its label is not in the manifest": (rows["label"] < -1) | (rows["label"] >= labels),
    }


def clip_fault(about: Any) -> str | None:
    """What is wrong with the JSON of a clip, "field=value: what"; None if nothing is."""
    if not isinstance(about, dict):
        return "must hold a JSON object"
    if not isinstance(about.get("recording"), str):
        return f"recording={about.get('recording')!r}: must be a name"
    bounds = {"start": (0, 1 << 62), "samples": (1, (1 << 32) - 1), "sample_rate": (1, MAX_RATE)}
    if "label_id" in about:
        bounds["label_id"] = (0, MAX_LABELS - 1)
        if not isinstance(about.get("label"), str):
            return f"label={about.get('label')!r}: must be a name"
    for name, (low, high) in bounds.items():
        if not _whole(about.get(name), low, high):
            return f"{name}={about.get(name)!r}: must be {low} to {high}"
    return None


def _whole(value: Any, low: int, high: int) -> bool:
    """True and False are ints to Python."""
    return type(value) is int and low <= value <= high
