"""Check shards: python tools/check_shards.py shards/NAME [--rebuild-index]. Exit code 1 if anything is wrong.

Reads every byte: checksums against the manifest, the index against the tars, and each clip is decoded. Prints shards,
clips, hours, loudness and share of silence (20 ms below -60 dBFS) for each split, and then the faults.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from sashimi.distributed import run_command
from sashimi.errors import InputError
from sashimi.packing.report import census_report
from sashimi.packing.verify import verify
from sashimi.parsing import parse
from sashimi.shards import read_manifest, rebuild
from sashimi.store import locate


@dataclass(frozen=True)
class CheckConfig:
    """What to check."""

    folder: str
    """Folder of shards, such as shards/demo."""
    rebuild_index: bool = False
    """First write index, counts and checksums anew from the tars."""


def main() -> None:
    """Rebuild if asked to, verify, print."""
    config = parse(CheckConfig, sys.argv[1:], "check_shards.py", __doc__ or "")
    folder = locate(config.folder)
    if not isinstance(folder, Path):
        raise InputError(f"{folder}: every byte is read several times; copy the folder here and check the copy")
    if config.rebuild_index:
        rebuild(folder)
    found = verify(folder)
    print(census_report(found, read_manifest(folder)["sample_rate"]))
    if any(census.faults for census in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
