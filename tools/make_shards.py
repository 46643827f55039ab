"""Pack recordings into shards: python tools/make_shards.py SOURCE --out shards/NAME [--dry-run] [--strict] [options].

SOURCE is a folder of wav, flac, ogg or mp3 files, or a list of them. After a kill the same command goes on.
"""

import sys

from sashimi.distributed import run_command
from sashimi.errors import InputError, one_line
from sashimi.packing.pack import PackConfig, is_packed, make_plan, newer_sources, pack, refuse_bad_headers
from sashimi.packing.report import manifest_report, plan_report
from sashimi.parsing import parse


def main() -> None:
    """Plan; then print the plan, or pack it and print what became of it."""
    config = parse(PackConfig, sys.argv[1:], "make_shards.py", __doc__ or "")
    plan = make_plan(config)
    if config.dry_run:
        refuse_bad_headers(config, plan)
        print(plan_report(plan, config.sample_rate))
        return
    packed_before = is_packed(config)
    try:
        manifest = pack(config, plan)
    except KeyboardInterrupt:
        raise InputError("interrupted: the same command goes on from here") from None
    print(manifest_report(manifest, plan))
    if packed_before:
        newer = newer_sources(config, plan)
        changed = f"; {len(newer)} files are newer than it, such as {one_line(newer[0])}" if newer else ""
        print(f"{config.out} was complete already{changed}; to pack it anew, delete it")


if __name__ == "__main__":
    run_command(main)
