"""Tracking: metrics and TensorBoard agree, also across a kill and a resume; pictures and rates are right."""

import errno
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disk_of, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sashimi.tracking import RunTracker, Throughput, TrackConfig, Tracker, cut_back, spectrogram_image

RATE = 16000


def run(folder: Path, start: int, stop: int, total: int = 100, **config: Any) -> None:
    """Track steps start + 1 ... stop, with a validation at every tenth."""
    tracker = RunTracker(folder, TrackConfig(**config), start, total, segments_per_epoch=40)
    for step in range(start + 1, stop + 1):
        tracker.step(step, {"train/bits": 8 - step / 100}, samples=1000, position=8 * step)
        if step % 10 == 0:
            tracker.log(step, {"valid/bits": float(step)})
    tracker.close()


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_metrics_and_tensorboard_say_the_same(tmp_path: Path) -> None:
    """Every log_every steps and at the last one, with the epoch. Mutation: log at step 1, 6, 11, ... instead."""
    run(tmp_path, 0, 12, total=12, log_every=5)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 10, 12]
    assert lines[0]["train/bits"] == 8 - 5 / 100
    assert lines[1]["epoch"] == 2.0
    assert lines[2] == {"step": 10, "valid/bits": 10.0}
    assert lines[0]["samples_per_second"] > 0
    bits = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events(tmp_path).Scalars("train/bits")]
    assert bits == [(line["step"], line["train/bits"]) for line in lines if "train/bits" in line]


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step": 41, "train/b', b'{"step": 3}', b'{"step": 3', b"\xff\n", b"3\n{}\n", b'{"step": Infinity}\n'],
)
def test_a_resumed_run_has_each_step_once(tmp_path: Path, torn: bytes) -> None:
    """Killed at step 40 after a checkpoint at 20, maybe within a line: the resumed run's records are seamless.

    Mutation: `< step` or no cut in `cut_back`, no check of the line's end.
    """
    run(tmp_path, 0, 40, log_every=10)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run(tmp_path, 20, 50, log_every=10)
    assert [line["step"] for line in metrics(tmp_path) if "train/bits" in line] == [10, 20, 30, 40, 50]
    assert [line["step"] for line in metrics(tmp_path) if "valid/bits" in line] == [10, 20, 30, 40, 50]


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """Killed at step 40 after a checkpoint at 20. Mutation: drop purge_step, or its + 1."""
    for start, stop in ((0, 40), (20, 30)):
        run(tmp_path, start, stop, log_every=10)
        time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    assert [event.step for event in events(tmp_path).Scalars("valid/bits")] == [10, 20, 30]


def test_a_run_from_scratch_takes_everything_back(tmp_path: Path) -> None:
    """Killed before its first checkpoint, and started again: what it logged at step 0 goes too.

    Mutation: drop `if step else b""`.
    """
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "valid/bits": 8}\n{"step": 1}\n')
    cut_back(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    cut_back(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """metrics.jsonl is JSON for any reader, which NaN is not. Mutation: write the value as it is."""
    tracker = RunTracker(tmp_path, TrackConfig(), 0, 10, 1)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": 1.5})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 1.5}\n'


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    """A killed run keeps its records. Mutation: drop either flush."""
    tracker = RunTracker(tmp_path, TrackConfig(), 0, 10, 1)
    for step in range(1, 4):
        tracker.log(step, {"a": 0.5 * step})
        assert metrics(tmp_path)[-1] == {"step": step, "a": 0.5 * step}
        assert events(tmp_path).Scalars("a")[-1].value == 0.5 * step
    tracker.close()


def test_a_terminal_that_is_closed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar and messages have no place any more, and the run may save. Mutations: drop any `suppress`."""

    class Terminal(io.StringIO):
        closed_by_user = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.closed_by_user:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Terminal())
    tracker = RunTracker(tmp_path, TrackConfig(), 0, 10, 1)
    monkeypatch.setattr(Terminal, "closed_by_user", True)
    time.sleep(0.2)  # the bar is not shown more often
    tracker.step(1, {"train/bits": 8.0}, samples=1, position=1)
    tracker.note("saved")
    tracker.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_after_a_full_disk_the_log_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has a gap, said once, whether scalars or clips were the first that had no room; and its end is no error.

    Mutations: drop `_or_gap` in `audio` or in `log`, or `suppress` in `close`; in `_tensorboard`, keep the writer; in
    `_or_gap`, no `= False`.
    """
    for first in ("scalars", "clips"):
        tracker = RunTracker(tmp_path / first, TrackConfig(), 0, 10, 1)
        for start in (1, 4):
            tracker.log(start, {"a": 0.5 * start})
            with disk_of(0):
                if first == "clips":
                    tracker.audio(start, [torch.zeros(RATE)], RATE)
                for step in (start + 1, start + 2):
                    tracker.log(step, {"a": 0.5 * step})
            what = "the audio of step" if first == "clips" else "step"
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"{what} {start + (first == 'scalars')} is NOT LOGGED, nor is what follows until")
        tracker.audio(7, [torch.zeros(RATE)], RATE)
        with disk_of(0):
            tracker.log(8, {"a": 4.0})
            tracker.close()
        capsys.readouterr()
        files = [events(path) for path in (tmp_path / first).glob("events.*")]
        seen = [event.step for file in files if "a" in file.Tags()["scalars"] for event in file.Scalars("a")]
        assert sorted(seen) == [1, 4]
        assert [line["step"] for line in metrics(tmp_path / first)][:2] == [1, 2]


def test_clips_can_be_heard_and_seen(tmp_path: Path) -> None:
    """Each clip is a mono wav at its rate and a picture; the config is a text. Mutation: log clips[:1] only."""
    tracker = RunTracker(tmp_path, TrackConfig(), 0, 10, 1)
    tracker.audio(5, torch.sin(torch.arange(2 * RATE) * 0.1).reshape(2, RATE), RATE)
    tracker.text("config", "name: x\nmodel:\n  d_model: 64")
    tracker.close()
    seen = events(tmp_path)
    for i in range(2):
        (clip,) = seen.Audio(f"generated/{i}")
        assert (clip.step, clip.sample_rate, clip.content_type) == (5, RATE, "audio/wav")
        assert len(clip.encoded_audio_string) == 44 + 2 * RATE
        assert seen.Images(f"spectrogram/{i}")[0].height == 256
    text = seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    name: x\n    model:\n      d_model: 64\n"


def test_spectrogram_shows_a_tone_where_it_is() -> None:
    """A 1 kHz sine of full scale is the brightest colour in its row alone, counted from the bottom; silence is dark.

    Mutation: drop the flip, or the division by the window's sum.
    """
    seconds = torch.arange(RATE) / RATE
    picture = spectrogram_image(torch.sin(2 * math.pi * 1000 * seconds))
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 256, 1 + RATE // 32)
    column = picture[:, :, 250].int().sum(0)
    assert 256 - int(column.argmax()) == 1000 * 512 // RATE
    assert picture[:, int(column.argmax()), 250].tolist() == [252, 253, 191]
    assert (column[:200] == 4).all()
    assert (spectrogram_image(torch.zeros(10)).sum(0) == 4).all()
    assert spectrogram_image(torch.zeros(100 * RATE)).shape[2] <= 513


def test_throughput_leaves_pauses_out() -> None:
    """Samples per second of training since the last reading, by a clock that is given.

    Mutation: drop `_since +=` in `pause`, or the reset in `read`.
    """
    now = 0.0
    meter = Throughput(lambda: now)
    now += 2
    meter.add(100)
    with meter.pause():
        now += 1000
    meter.add(300)
    now += 2
    assert meter.read() == 100
    meter.add(10)
    now += 1
    assert meter.read() == 10


def test_progress_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines with an ETA, no bar, at most every progress_seconds and at the end. Mutation: bar always on."""
    run(tmp_path / "a", 0, 30, total=30, log_every=10, progress_seconds=3600)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 30/30: 7.700 bits (validation 20.000), ")
    assert line.endswith("epoch 6.00, ETA 00:00")
    run(tmp_path / "b", 10, 30, total=100, log_every=10, progress_seconds=0)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["step 20/100", "step 30/100"]


def test_other_ranks_keep_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The same calls without a trace, but messages get out. Mutation: an empty `note`."""
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()
    tracker.step(1, {"train/bits": 1.0}, samples=1, position=1)
    tracker.log(1, {"valid/bits": 1.0})
    tracker.audio(1, torch.zeros(1, 10), RATE)
    tracker.text("config", "x")
    with tracker.pause():
        tracker.note("cannot decode x")
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == "cannot decode x\n"
