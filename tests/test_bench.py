"""The bench measures what it says; how fast that is, is no test."""

import json
import math
from pathlib import Path

import pytest
from conftest import Call, command

from sashimi.model import ModelConfig, Sashimi

SMALL = ["--repetitions", "1", "--n_layers", "1", "--length", "256", "--json"]


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        ("kernel", {"krylov_s", "cauchy_s", "krylov_floor_s", "krylov_error"}),
        ("train", {"step_s", "floor_s", "fft_floor_s", "memory_floor_s", "gflop", "moved_gb", "peak_gib"}),
        ("generate", {"batch1_steps_per_s", "batch16_samples_per_s", "plain_batch1_steps_per_s", "batch1_of_floor"}),
        ("stream", {"samples_per_s", "webdataset_samples_per_s", "floor_samples_per_s", "of_floor"}),
    ],
)
def test_each_part_prints_its_figures(
    part: str, figures: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of JSON, every figure a positive number. Mutations: leave a part out of `PARTS`; in
    `moved_numbers`, count an input twice."""
    command("tools/bench.py", [part, *SMALL], monkeypatch)
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert figures <= result.keys()
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in figures)
    if part == "train":
        # Two segments of 256 samples, six FLOP a multiply-add: 3 tiers, 4 poolings, the head.
        assert result["gflop"] == pytest.approx(6 * 2 * 256 * (3 * 24576 + 4 * 8192 + 64 * 256) / 1e9)
        # A sample's share of 3 inputs and 2 outputs: two residual branches a tier, two poolings each way, the head.
        residual, down, up, head = 2 * 5 * (64 + 32 + 16), 256 + 128, 224 + 112, 3 * 64 + 2 * 256
        weights = sum(p.numel() for p in Sashimi(ModelConfig(n_layers=1)).parameters())
        numbers = 2 * 256 * (residual + down + up + head) + 10 * weights
        assert result["moved_gb"] == pytest.approx(4 * numbers / 1e9)


def test_compare_shows_what_has_changed(call: Call, tmp_path: Path) -> None:
    """New over old for each figure, from the last line of the same part and settings; unlike places are warned of.

    Mutations: swap old and new in `changes`; take `records[0]`; leave "threads" out of PLACE.
    """
    record = tmp_path / "record.json"
    small = ["kernel", "--repetitions", "1", "--length", "64", "--kernels", "[krylov]"]
    line = json.loads(call("tools/bench.py", *small, "--json").out)
    error = line["krylov_error"]  # the one figure that is not a time
    lines = [line | {"krylov_error": error * 8}, line | {"krylov_error": error / 2}, line | {"part": "train"}]
    record.write_text("\n".join(map(json.dumps, lines)))

    answer = call("tools/bench.py", *small, "--compare", str(record))
    (row,) = [row.split() for row in answer.out.splitlines()[-2:] if row.startswith("krylov_error")]
    assert float(row[-1]) == 2
    assert float(row[1]) == pytest.approx(error / 2, rel=1e-3)
    assert "warning" not in answer.out

    record.write_text(json.dumps(line | {"threads": 99, "device": "abacus"}))
    answer = call("tools/bench.py", *small, "--compare", str(record), "--json")
    assert json.loads(answer.out)["krylov_error"] == error
    warnings = [row for row in answer.err.splitlines() if row.startswith("warning")]
    assert [row.split()[1] for row in warnings] == ["device", "threads"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe", "is not a text file"),
        (b'{"part": "kernel"}\nkrylov_s 0.1', "line 2 is not JSON"),
        (b"[1, 2]", "line 1 is not a record of figures"),
        (b'{"part": "train", "step_s": 1}', "has no line of part kernel"),
        (b"", "has no line of part kernel"),
    ],
)
def test_compare_refuses_a_wrong_file(call: Call, tmp_path: Path, content: bytes | None, says: str) -> None:
    """One line that names the file and the remedy, before anything is measured.

    Mutation: read the file after `measure` (each case would take as long as the measurement and print its figures).
    """
    record = tmp_path / "record.json"
    if content is not None:
        record.write_bytes(content)
    answer = call("tools/bench.py", "kernel", "--compare", str(record))
    assert (answer.code, answer.out) == (2, "")
    assert f"compare={record}: {says}" in answer.error
    assert "bench.py kernel --json" in answer.error


def test_a_part_that_is_not_there(call: Call) -> None:
    """One line with the parts. Mutation: index PARTS without asking."""
    for argv in ([], ["kernels"]):
        answer = call("tools/bench.py", *argv)
        assert answer.code == 2
        assert "kernel, train, generate, stream" in answer.error
