"""Speed, with its floor: python tools/bench.py PART [--json] [--compare FILE] [options]; PART --help lists these.

  kernel    one layer's convolution kernel, by each algorithm
  train     a training step, beside the floors of products, FFTs and memory
  generate  sample by sample, for one clip and for sixteen
  stream    reading, decoding and quantizing
  long      scoring recordings of 2^14 to 2^20 samples with carried state: time a sample, memory
  batch     throughput over batch size, in training and generation
  scale     several ranks against one, and what they send
  project   the same calculated for many GPUs
  curve     bits per sample over seconds of training, by each kernel algorithm

Medians of several repetitions; what is compared takes turns in one process, and the floors are measured in it too, on
the same threads. Compare figures of one run, not of two; --compare shows what has changed since a recorded one.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch

from benchmarks.batch import BatchSettings, bench_batch
from benchmarks.compare import changes, differences, read_record
from benchmarks.curve import CurveSettings, bench_curve
from benchmarks.generate import GenerateSettings, bench_generate
from benchmarks.kernel import KernelSettings, bench_kernel
from benchmarks.long import LongSettings, bench_long
from benchmarks.project import ProjectSettings, bench_project
from benchmarks.scale import ScaleSettings, bench_scale
from benchmarks.settings import Settings, about
from benchmarks.stream import StreamSettings, bench_stream
from benchmarks.train import TrainSettings, bench_train
from sashimi.distributed import Distributed, run_command
from sashimi.errors import InputError, one_line
from sashimi.parsing import parse, to_dict

PARTS: dict[str, tuple[type[Settings], Callable[[Any, torch.device], dict[str, Any]]]] = {
    "kernel": (KernelSettings, bench_kernel),
    "train": (TrainSettings, bench_train),
    "generate": (GenerateSettings, bench_generate),
    "stream": (StreamSettings, bench_stream),
    "long": (LongSettings, bench_long),
    "batch": (BatchSettings, bench_batch),
    "scale": (ScaleSettings, bench_scale),
    "project": (ProjectSettings, bench_project),
    "curve": (CurveSettings, bench_curve),
}

OUTPUT = ("json", "compare", "plot")  # options that change no figure


def main() -> None:
    """Measure and print."""
    part, *argv = sys.argv[1:] or [""]
    if part in ("-h", "--help"):
        print(__doc__)
        return
    if part not in PARTS:
        raise InputError(f"part={one_line(part, 100)}: begin with one of {', '.join(PARTS)}")
    kind, measure = PARTS[part]
    config = parse(kind, argv, f"bench.py {part}", measure.__doc__ or "")
    if config.threads:
        torch.set_num_threads(config.threads)
    settings = {name: value for name, value in to_dict(config).items() if name not in OUTPUT}
    old = None if config.compare is None else read_record(config.compare, part, settings)
    device = Distributed().device
    with redirect_stdout(sys.stderr):  # libraries that compile say so, which is no part of the report
        figures = measure(config, device)
    report = {"part": part, **figures, **about(device), "settings": settings}
    if config.json:
        print(json.dumps(report))
    else:
        for label, value in report.items():
            print(f"{label:<30} {value:,.4g}" if isinstance(value, float) else f"{label:<30} {value}")
    if old is not None:
        print_changes(old, report, sys.stderr if config.json else sys.stdout)


def print_changes(old: dict[str, Any], new: dict[str, Any], to: Any) -> None:
    """Each figure's change as a line, after warnings of what makes them unlike."""
    for line in differences(old, new):
        print(f"warning: {line}", file=to)
    print(f"{'since ' + str(old.get('date')):<30} {'old':>12} {'new':>12} {'new/old':>8}", file=to)
    for name, (before, now, ratio) in changes(old, new).items():
        print(f"{name:<30} {before:>12,.4g} {now:>12,.4g} {ratio:>8.3f}", file=to)


if __name__ == "__main__":
    run_command(main)
