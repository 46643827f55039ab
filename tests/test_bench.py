"""The bench measures what it says; how fast that is, is no test."""

import json
import math

import pytest
from conftest import command

SMALL = ["--repetitions", "1", "--n_layers", "1", "--length", "256", "--json"]


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        ("kernel", {"krylov_s", "cauchy_s", "krylov_error"}),
        ("train", {"step_s", "floor_s", "gflop", "peak_gib"}),
        ("generate", {"batch1_steps_per_s", "batch16_samples_per_s", "plain_batch1_steps_per_s"}),
        ("stream", {"samples_per_s", "webdataset_samples_per_s"}),
    ],
)
def test_each_part_prints_its_figures(
    part: str, figures: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of JSON, every figure a positive number. Mutation: leave a part out of `measure`."""
    command("tools/bench.py", [part, *SMALL], monkeypatch)
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert figures <= result.keys()
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in figures)
    if part == "train":
        # Two segments of 256 samples, six FLOP a multiply-add: 3 tiers, 4 poolings, the head.
        assert result["gflop"] == pytest.approx(6 * 2 * 256 * (3 * 24576 + 4 * 8192 + 64 * 256) / 1e9)
