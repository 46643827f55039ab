"""What the tools for shards print: tables of a plan, of what was packed, of what was found, and the files left out."""

import math
from collections.abc import Mapping
from typing import Any

from sashimi.errors import one_line
from sashimi.packing.pack import BYTES_PER_SAMPLE, Plan
from sashimi.packing.verify import Census
from sashimi.shards import SPLITS

SHORT_SECONDS = 10  # of audio: a validation on less says little


def plan_report(plan: Plan, sample_rate: int) -> str:
    """Files, hours and bytes per split of what would be packed, and the files that would not."""
    rows = []
    faults: dict[str, str] = {}
    for split in SPLITS:
        shards = [shard for shard in plan.shards if shard.split == split]
        recordings = [recording for shard in shards for recording in shard.recordings]
        samples = sum(recording.samples for recording in recordings)
        faults |= {r.source.name: r.header for r in recordings if isinstance(r.header, str)}
        megabytes = samples * BYTES_PER_SAMPLE / 1e6
        rows.append([split, len(shards), len(recordings), f"{samples / sample_rate / 3600:.3f}", f"{megabytes:.1f}"])
    return _table(["split", "shards", "files", "hours", "MB (uncompressed)"], rows) + _left_out(faults, plan)


def manifest_report(manifest: Mapping[str, Any], plan: Plan) -> str:
    """What was packed and what was left out, from a folder's manifest and its plan."""
    rows = []
    for split, about in manifest["splits"].items():
        megabytes = sum(shard["bytes"] for shard in about["shards"]) / 1e6
        row = [split, len(about["shards"]), about["recordings"], about["clips"], f"{about['hours']:.3f}"]
        rows.append([*row, f"{megabytes:.1f}"])
    head = ["split", "shards", "recordings", "clips", "hours", "MB"]
    clipped = manifest.get("clipped_samples", 0)
    loud = f"\n{clipped:,} samples were louder than full scale and are clipped" if clipped else ""
    if loud and manifest.get("most_clipped"):
        loud += f", most of one file in {one_line(manifest['most_clipped'])}"
    rate, splits = manifest["sample_rate"], manifest["splits"]
    seconds = {split: splits[split]["samples"] / rate for split in ("valid", "test") if splits[split]["clips"]}
    short = "".join(
        f"\n{split} has {length:.1f} s of audio, too little to judge a model by: add files, or divide them otherwise"
        for split, length in seconds.items()
        if length < SHORT_SECONDS
    )
    return _table(head, rows) + loud + short + _left_out(manifest.get("faults", {}), plan)


def census_report(found: Mapping[str, Census], sample_rate: int) -> str:
    """What `verify` found."""
    head = ["split", "shards", "recordings", "clips", "hours", "loudness (dBFS RMS)", "silence (%)"]
    rows = []
    for split, census in found.items():
        row = [split, census.shards, census.recordings, census.clips, f"{census.samples / sample_rate / 3600:.3f}"]
        measured = (census.loudness, 100 * census.silence)
        rows.append([*row, *("-" if math.isnan(value) else f"{value:.1f}" for value in measured)])
    faults = [fault for census in found.values() for fault in census.faults]
    return _table(head, rows) + "".join(f"\n{one_line(fault)}" for fault in faults)


def _left_out(faults: Mapping[str, str], plan: Plan) -> str:
    others = f"\n{plan.other_formats}" if plan.other_formats else ""
    head = f"\n{len(faults)} files left out:" if faults else ""
    return others + head + "".join(f"\n  {one_line(f'{name}: {reason}')}" for name, reason in faults.items())


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """Columns as wide as they need; the first one flush left."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)
