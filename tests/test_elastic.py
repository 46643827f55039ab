"""Real processes are killed, and others go on, also with other numbers of ranks: no step is lost or double."""

import json
import os
import random
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY, curve, launcher, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sashimi.order import segment_at
from sashimi.split import open_split
from sashimi.stream import DataConfig, n_segments

STEPS = 30
BATCH = 8


def arguments(folder: Path, shards: Path, name: str, workers: int, *more: str) -> list[str]:
    """A run of more than an epoch, in batches that the epoch is no multiple of."""
    run = ["--data.shards", str(shards), "--runs", str(folder), "--name", name, "--data.workers", str(workers)]
    return [
        *TINY,
        *run,
        "--train.steps",
        f"{STEPS}",
        "--train.batch_size",
        f"{BATCH}",
        "--train.valid_every",
        "6",
        *more,
    ]


def start(ranks: int, argv: list[str], record: Path, attempt: int = 0, doom: str = "") -> subprocess.Popen[str]:
    """tests/doomed.py on several processes."""
    record.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RECORD": str(record), "ATTEMPT": str(attempt)}
    return subprocess.Popen(
        [*launcher(ranks), str(ROOT / "tests/doomed.py"), *argv],
        env=os.environ | environment | {"DOOM": doom},
        stderr=subprocess.PIPE,
        text=True,
    )


def consumed(record: Path) -> list[list[int]]:
    """The segments of every step from 1 on, over all ranks, sorted; of a step that was done again, the last time."""
    attempts: defaultdict[int, Counter[int]] = defaultdict(Counter)  # of each step
    ids: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for file in record.glob("rank-*.jsonl"):
        for attempt, step, segments in map(json.loads, file.read_text().splitlines()):
            attempts[step][attempt] += 1
            ids[step, attempt] += segments
    assert sorted(attempts) == list(range(1, len(attempts) + 1))
    return [sorted(ids[step, max(attempts[step])]) for step in sorted(attempts)]


def assert_one_history(run: Path, expected: list[dict], rel: float) -> None:
    """The run's log and TensorBoard hold each step of an uninterrupted run once, with its losses."""
    lines = metrics(run)
    assert [entry[:2] for entry in curve(lines)] == [entry[:2] for entry in curve(expected)]
    assert [entry[2] for entry in curve(lines)] == pytest.approx([entry[2] for entry in curve(expected)], rel=rel)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("train/bits", "valid/bits"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(step, pytest.approx(bits, rel=1e-6)) for step, key, bits in curve(lines) if key == name]
        assert shown == logged


def test_killed_resumed_on_other_ranks_killed_again(tiny_shards: Path, tmp_path: Path) -> None:
    """Laws 7, 8, 9, 12 and 14 together: a run loses a rank in a step, all of its processes half-way through a save,
    and its only rank in validation, and goes on each time with other ranks and more loaders than there are shards.
    The trainer has consumed each segment of an epoch once; the curve is the uninterrupted run's.

    Mutations: `rank_positions(start, ...)` with `start + 1` from step 20 on; `saved.position` 4 segments less;
    no `cut_back`; no `purge_step`; `_is_lost_peer` is always False.
    """
    whole = start(1, arguments(tmp_path, tiny_shards, "whole", 0), tmp_path / "of-whole")
    stderr = whole.communicate(timeout=240)[1]
    assert whole.returncode == 0, stderr

    record = tmp_path / "record"
    for attempt, (ranks, workers, doom) in enumerate(
        [(2, 1, "step 7 1"), (4, 1, "save 2 all"), (1, 3, "valid 9 0"), (2, 0, "")]
    ):
        process = start(ranks, arguments(tmp_path, tiny_shards, "run", workers), record, attempt, doom)
        stderr = process.communicate(timeout=240)[1]
        assert (process.returncode == 0) == (not doom), stderr
        assert "forcefully exiting" not in stderr  # survivors leave by themselves
        assert ("error: lost another process" in stderr) == doom.endswith("1")
    assert not list((tmp_path / "run/checkpoints").glob(".tmp-*"))
    assert_one_history(tmp_path / "run", metrics(tmp_path / "whole"), rel=1e-5)

    n = n_segments(open_split(tiny_shards, "train"), DataConfig(segment=512))
    assert n % BATCH  # a batch straddles two epochs
    steps = consumed(record)
    positions = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    assert steps == np.sort(segment_at(positions, n, seed=0)).tolist()
    first_epoch = [i for step in steps[: n // BATCH] for i in step]
    assert len(set(first_epoch)) == len(first_epoch)
    assert set(range(n)) <= {i for step in steps[: n // BATCH + 1] for i in step}


def test_carried_state_survives(tiny_shards: Path, tmp_path: Path, train: Callable[..., list[dict]]) -> None:
    """Law 12 where rows carry state: killed in mid-passage on two ranks, and on one, a run ends on two with the losses
    of one that was never interrupted. Each row of a rank's micro-batches finds what it had carried.

    Mutations: in `Saver.restore`, `division` of rank 0; in `join_rows`, no `order`.
    """
    carry = ["--data.carry", "5", "--train.steps", "14", "--train.batch_size", "8"]
    whole = train("whole", *carry)
    for attempt, (ranks, doom) in enumerate([(2, "step 13 1"), (1, "step 19 0"), (2, "")]):
        argv = arguments(tmp_path / "runs", tiny_shards, "run", 0, "--train.micro_batch", "2", *carry)
        process = start(ranks, [*argv, "--train.valid_every", "4"], tmp_path / "record", attempt, doom)
        stderr = process.communicate(timeout=240)[1]
        assert (process.returncode == 0) == (not doom), stderr
    steps = {step for file in (tmp_path / "record").iterdir() for _, step, _ in map(json.loads, file.open())}
    assert steps == set(range(1, 15))
    assert_one_history(tmp_path / "runs/run", whole, rel=1e-5)


def test_an_error_of_ours_ends_the_process(tiny_shards: Path, tmp_path: Path) -> None:
    """With its traceback, and without waiting for the loaders' workers. Mutation: in `_end_workers`, no `kill`."""
    argv = arguments(tmp_path, tiny_shards, "run", 1)
    process = start(1, argv, tmp_path / "record", doom="bug 3 0")
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert "ArithmeticError: a bug" in stderr
    assert "Traceback" in stderr


def lines_of(log: Path) -> int:
    return len(log.read_bytes().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
def test_killed_at_random_moments(tiny_shards: Path, tmp_path: Path, kills: int) -> None:
    """Laws 12 and 14: whatever is killed and whenever, a run of two ranks ends as if nothing had been.

    Mutations: in `write_folder`, the final name first; no `cut_back`.
    """
    draw = random.Random(kills)
    often = ["--train.steps", str(20 * kills), "--train.save_every", "3", "--train.valid_every", "5"]
    record = tmp_path / "record"
    whole = start(2, arguments(tmp_path, tiny_shards, "whole", 0, *often), record)
    stderr = whole.communicate(timeout=600)[1]
    assert whole.returncode == 0, stderr
    log = tmp_path / "run/metrics.jsonl"
    for kill in range(kills):
        process = start(2, arguments(tmp_path, tiny_shards, "run", kill % 2, *often), record)
        target = lines_of(log) + draw.randrange(3, 18)
        deadline = time.monotonic() + 120
        while lines_of(log) < target:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in family if child.ppid() == process.pid]
        for victim in [draw.choice(ranks)] if ranks and draw.random() < 0.5 else [psutil.Process(process.pid), *family]:
            victim.kill()
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode != 0
        assert "forcefully exiting" not in stderr
    last = start(2, arguments(tmp_path, tiny_shards, "run", 0, *often), record)
    stderr = last.communicate(timeout=600)[1]
    assert last.returncode == 0, stderr
    assert_one_history(tmp_path / "run", metrics(tmp_path / "whole"), rel=0)
