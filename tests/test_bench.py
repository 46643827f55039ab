"""The bench measures what it says; how fast that is, is no test."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Call, command

from sashimi.linear import Linear
from sashimi.model import ModelConfig, Sashimi
from sashimi.native import scan as native
from sashimi.s4 import S4
from sashimi.scan import Chunks

SMALL = ["--repetitions", "1", "--n_layers", "1", "--length", "256", "--json"]
OWN = {"batch": ["--largest", "2"], "long": ["--longest", "4"], "stream": ["--clips", "20000"]}


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        ("kernel", {"krylov_s", "cauchy_s", "krylov_floor_s", "krylov_error"}),
        ("train", {"step_s", "floor_s", "fft_floor_s", "memory_floor_s", "gflop", "moved_gb", "peak_gib"}),
        ("generate", {"batch1_steps_per_s", "batch16_samples_per_s", "plain_batch1_steps_per_s", "batch1_of_floor"}),
        (
            "stream",
            {"samples_per_s", "of_webdataset", "floor_samples_per_s", "of_floor", "long_of_webdataset", "open_s"},
        ),
        ("long", {"256_us_per_sample", "1024_us_per_sample"}),
        ("scale", {"alone_step_s", "apart_step_s", "together_step_s", "speedup", "small_reduce_s"}),
        ("batch", {"train_batch1_samples_per_s", "generate_batch2_samples_per_s", "train_saturated_at"}),
        ("project", {"8_gpus_speedup", "64_gpus_same_batch_speedup", "512_gpus_read_mb_per_s"}),
    ],
)
def test_each_part_prints_its_figures(
    part: str, figures: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of JSON, every figure a positive number.

    Mutations: leave a part out of `PARTS`; in `moved_numbers`, count an input twice.
    """
    command("tools/bench.py", [part, *SMALL, *OWN.get(part, [])], monkeypatch)
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
        assert result["products_floor_s"] > result["floor_s"]  # of one rate: the Linear layers' and the S4 layers'
        assert result["moved_gb"] == pytest.approx(4 * numbers / 1e9)
    if part == "scale" and "sent_mb_per_rank" in result:
        # In a ring of two each rank sends its gradients once; others may use the network meanwhile.
        assert result["ring_mb_per_rank"] == result["gradient_mb"]
        assert result["sent_mb_per_rank"] >= result["gradient_mb"]


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

    other = line["settings"] | {"length": 65}
    record.write_text(json.dumps(line | {"threads": 99, "device": "abacus", "settings": other}))
    answer = call("tools/bench.py", *small, "--compare", str(record), "--json")
    assert json.loads(answer.out)["krylov_error"] == error
    warnings = [row for row in answer.err.splitlines() if row.startswith("warning")]
    assert {row.split()[1] for row in warnings} == {"length", "device", "threads"}


def test_all_products_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the recurrence in chunks, forward and backward, as counted by hand. Mutation: no `custom_mapping`."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    counted_flop = importlib.import_module("benchmarks.floors").counted_flop
    R, H, S, T, N = 3, 2, 4, 8, 6

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    square, after, outs, direct = tensor(H, N, N), tensor(H, T, N), tensor(H, T, N), tensor(H, T, T)
    inputs = (tensor(R, H, S, T), torch.zeros(H, 1, N), square, after, outs, direct)
    each_way = (
        R * S * T * (2 * N + T) + 2 * (R - 1) * S * N * N + S * N * N
    )  # of chunks, steps in runs, from run to run
    once = 2 * N**3  # M to the power 3
    gradients = R * S * (2 * T * N + N * N + T * T)
    counted = counted_flop(lambda: Chunks.apply(*inputs)[0].sum().backward())
    assert counted == 2 * H * (2 * each_way + once + gradients)


def test_compiled_products_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of scan.cpp, as counted by hand: 3 chunks of 2 signals of 5 channels with 32 states, vectors being full.
    And 3 chunks of the kernel, which is outputs and states alone; and those of linear.cpp, once forward and twice back.

    Mutation: leave `scan_backward`, `response_backward` or `linear_backward` out of `left_out`.
    """
    monkeypatch.syspath_prepend(ROOT / "tools")
    counted_flop = importlib.import_module("benchmarks.floors").counted_flop
    s4, u = S4(5, 32), torch.randn(2, 130, 5)
    r = s4.recurrence()
    inputs_outputs, states, direct = 64 * 32, 32 * 32, 64 * 64
    once = 4 * 64 * 32 * 32  # A^64 forward, and once more backward, where it has two gradients
    chunk = 2 * inputs_outputs + states + direct  # forward
    back = 4 * inputs_outputs + 2 * states + 2 * direct
    counted = counted_flop(lambda: native.scan(r, s4.D, u)[0].sum().backward())
    assert counted == 2 * 5 * (once + 2 * 3 * (chunk + back))
    counted = counted_flop(lambda: native.kernel(s4.recurrence(), 131).sum().backward())
    assert counted == 2 * 5 * (once + 3 * (3 * inputs_outputs + 3 * states))
    counted = counted_flop(lambda: Linear(64, 32)(torch.randn(2, 1500, 64), gelu=True).sum().backward())
    assert counted == 3 * 2 * 3000 * 64 * 32


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe", "is not a text file"),
        (b'{"part": "train"}\nstep_s 0.1', "line 2 is not JSON"),
        (b"[1, 2]", "line 1 is not a record of figures"),
        (b'{"part": "kernel", "krylov_s": 1}', "has no line of part train"),
        (b"", "has no line of part train"),
    ],
)
def test_compare_refuses_a_wrong_file(call: Call, tmp_path: Path, content: bytes | None, says: str) -> None:
    """One line that names the file and the remedy, before anything is measured.

    Mutation: read the file after `measure` (this step has no room in any memory, and would be what is complained of).
    """
    record = tmp_path / "record.json"
    if content is not None:
        record.write_bytes(content)
    answer = call("tools/bench.py", "train", "--length", str(10**13), "--compare", str(record))
    assert (answer.code, answer.out) == (2, "")
    assert f"compare={record}: {says}" in answer.error
    assert "bench.py train --json" in answer.error


def test_a_part_that_is_not_there(call: Call) -> None:
    """One line with the parts. Mutation: index PARTS without asking."""
    for argv in ([], ["kernels"]):
        answer = call("tools/bench.py", *argv)
        assert answer.code == 2
        assert "kernel, train, generate, stream" in answer.error


@pytest.mark.parametrize("threads", ["-1", "1025"])
def test_threads_have_bounds(call: Call, threads: str) -> None:
    """A hundred thousand of them would be a segmentation fault. Mutation: drop the check in `Settings`."""
    answer = call("tools/bench.py", "kernel", "--threads", threads)
    assert (answer.code, answer.out) == (2, "")
    assert answer.error == f"error: threads={threads}: give 1 to 1024, or 0 for as many as are set"


def test_projection_by_hand(call: Call) -> None:
    """4 GPUs of one node and 16 of two, with round numbers: each term of `step_time` as its docstring says.

    Mutations: W − 1 without the factor 2; `math.log2(gpus)` without it; the network's bandwidth within a node.
    """
    assumed = {
        "n_layers": 8,
        "batch_size": 2,
        "length": 10_000,
        "global_batch": 8,
        "gpus": [4, 16],
        "gpus_per_node": 4,
        "samples_per_s": 1e5,
        "launch_s": 0.1,
        "nvlink_gb_per_s": 1,
        "network_gb_per_s": 0.1,
        "hop_s": 0.001,
        "sync_s": 0.01,
        "jitter": 0.1,
    }
    options = [f"--{name}={value}" for name, value in assumed.items()]
    result = json.loads(call("tools/bench.py", "project", *options, "--json").out)
    assert result["parameters"] == 4_764_160
    gradients = 4 * 4_764_160  # a small bucket and a large one
    for gpus, bandwidth in ((4, 1e9), (16, 1e8)):
        compute = 0.2
        wait = 0.02 * math.sqrt(2 * math.log(gpus))
        transfer = 2 * (gpus - 1) / gpus * gradients / bandwidth
        latency = 4 * 2 * math.log2(gpus) * 0.001 + 0.02
        total = compute + wait + transfer + latency
        assert result[f"{gpus}_gpus_step_ms"] == pytest.approx(1e3 * total)
        assert result[f"{gpus}_gpus_transfer_share"] == pytest.approx(transfer / total)
        assert result[f"{gpus}_gpus_speedup"] == pytest.approx(gpus * compute / total)
        assert result[f"{gpus}_gpus_read_mb_per_s"] == pytest.approx(1.1 * gpus * 2 * 10_000 / total / 1e6)
    # 8 segments on 4 GPUs are 2 each; 16 GPUs have 8 at work, whose step the launches bound.
    assert result["4_gpus_same_batch_speedup"] == pytest.approx(0.8 / (result["4_gpus_step_ms"] / 1e3))
    wait, transfer, latency = 0.01 * math.sqrt(2 * math.log(8)), 1.75 * gradients / 1e8, 4 * 2 * 3 * 0.001 + 0.02
    assert result["16_gpus_same_batch_speedup"] == pytest.approx(0.8 / (0.1 + wait + transfer + latency))


def test_curve(call: Call, tiny_shards: Path, tmp_path: Path) -> None:
    """Both kernels from the same weights, evaluated at the start and at each mark; a plot with a line for each.

    Mutation: leave out `load_state_dict` in `Racer`.
    """
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.svg"
    small = "--length 256 --batch_size 4 --n_layers 1 --d_model 4 --seconds 0.3 --every 0.15".split()
    answer = call("tools/bench.py", "curve", *small, "--data", str(tiny_shards), "--plot", str(plot), "--json")
    result = json.loads(answer.out)
    for kernel in ("krylov", "cauchy"):
        assert result[f"{kernel}_steps"] * result[f"{kernel}_step_s"] >= 0.3
        assert result[f"{kernel}_bits_after_0.3_s"] < result[f"{kernel}_bits_after_0_s"]
    assert result["krylov_bits_after_0_s"] == result["cauchy_bits_after_0_s"]
    assert b"</svg>" in plot.read_bytes()


@pytest.mark.parametrize(
    ("plot", "says"), [("figure.gif", "ends in .png or .svg"), ("nowhere/figure.png", "there is no folder")]
)
def test_a_plot_that_cannot_be(call: Call, tmp_path: Path, plot: str, says: str) -> None:
    """One line, before anything is measured (which no memory is large enough for).

    Mutation: no `check_plot` in BatchSettings.
    """
    pytest.importorskip("matplotlib")
    answer = call("tools/bench.py", "batch", "--length", str(10**13), "--plot", str(tmp_path / plot))
    assert (answer.code, answer.out) == (2, "")
    assert f"plot={tmp_path / plot}" in answer.error
    assert says in answer.error


def test_matplotlib_is_optional(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it everything but --plot works, and that is one line. Mutation: import it at the top of plots.py."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = call("tools/bench.py", "batch", "--plot", "figure.png")
    assert (answer.code, answer.out) == (2, "")
    assert "pip install matplotlib" in answer.error
    assert call("tools/bench.py", "batch", "--repetitions", "1", "--length", "64", "--largest", "1").code == 0
