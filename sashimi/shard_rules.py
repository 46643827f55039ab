"""What a manifest, an index and a clip's JSON must be before anybody reads audio by them. Pure checks, no I/O.

A folder of shards may come from anywhere and be damaged anywhere, so each check names the first thing that is wrong.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_RATE = 655350  # Hz; of flac
MAX_LABELS = 1 << 16
_PIECE = 1 << 14  # rows of an index looked at together: what is made of them fits a processor's cache
_COUNTS = ("recordings", "clips", "samples")
_FIELDS = ("shard", "recording", "start", "samples", "offset", "bytes", "label")


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
    if len(index) and index["recording"][0]:
        return "row 0: its recording is not 0"
    sizes = np.array([shard["bytes"] for shard in about["shards"]], np.uint64)
    found = {"recordings": 0, "clips": len(index), "samples": 0}
    nothing = np.zeros(1, index.dtype)
    nothing["recording"] = -1 % 2**32  # what 0 follows
    for place in range(0, len(index), _PIECE):
        rows = index[max(0, place - 1) : place + _PIECE]  # the last one of the piece before, too
        for what, wrong in _rules(rows if place else np.append(nothing, rows), sizes, labels).items():
            if wrong.any():
                return f"row {place + int(np.argmax(wrong))}: {what}"
        found["samples"] += int(index["samples"][place : place + _PIECE].sum(dtype=np.int64))
    found["recordings"] = int(index["recording"][-1]) + 1 if len(index) else 0
    different = [f"{found[name]} {name}, not {about[name]}" for name in _COUNTS if found[name] != about[name]]
    return f"has {', '.join(different)}" if different else None


def _rules(rows: np.ndarray, sizes: np.ndarray, labels: int) -> dict[str, np.ndarray]:
    """Which rows but the first one, which is only compared with, break which rule. `sizes` (uint64): of the shards."""
    shard, recording, start, samples, offset, size, label = (np.ascontiguousarray(rows[name]) for name in _FIELDS)
    ends = start + samples
    steps = np.diff(recording)  # 2^32 - 1 where it goes back
    same, moved = steps == 0, shard[1:] != shard[:-1]
    room = np.append(sizes, np.uint64(0))[np.minimum(shard, len(sizes))]
    wrong = {
        "its shard is not in the manifest": shard >= len(sizes),
        "its shard is before that of the row before": shard[1:] < shard[:-1],
        "its recording does not follow that of the row before": steps > 1,
        "its recording goes on in another shard": same & moved,
        "it does not start where the clip before it ends": start[1:] != ends[:-1] * same,
        "it has no samples": samples == 0,
        "it is not within its shard": (size == 0) | (offset > room) | (offset + size > room),
        "its label is not in the manifest": (label < -1) | (label >= labels),
    }
    return {what: rule[-len(rows) + 1 :] for what, rule in wrong.items()}


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
