"""DeepSpeed's ZeRO in real processes (gloo): DDP's curves, resume, precision, refusals; and the launchers' files.

Every run goes through what may befall a step, see SCRIPT, so that equal curves are equal also there.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, TINY, command, curve, launch, metrics
from test_compile import small_run

from sashimi import atomic
from sashimi.checkpoint import compare_engines, load_checkpoint
from sashimi.distributed import Distributed
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.optim import OptimConfig
from sashimi.stream import AudioConfig, DataConfig, TrainingData
from sashimi.trainer import TrainConfig, Trainer
from sashimi.zero import Zero, join, read_config

# launch/train.py, where on rank 1 the loss of step 3 is NaN with a finite gradient, the gradient of step 5 is NaN with
# a finite loss, and no file can be written after step 8; and where no rank has anything to score in step 7. The ranks
# leave behind what the arithmetic's dtypes were in step 2.
SCRIPT = """
import os, resource, runpy, sys
from contextlib import nullcontext
sys.path.insert(0, TESTS)
import torch
from precision import watched
from sashimi import objective, trainer, zero

objective._PIECE = int(os.environ.get("PIECE", objective._PIECE))
zero.FIRST_SCALE, zero.GROWTH_STEPS = 2.0**24, 3
step, second = trainer.Trainer.step, os.environ.get("RANK") == "1"
HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

class Poisoned(trainer.Objective):
    step = 0

    def forward(self, inputs, targets, mask):
        nats = super().forward(inputs, targets, mask)
        if self.training and second and self.step == 3:
            return nats + float("nan")
        if self.training and second and self.step == 5:
            return nats + (0 * nats).sqrt()
        return nats

def poisoned_step(self, micro_batches, count):
    Poisoned.step = self.state.step + 1
    if Poisoned.step == 7:
        micro_batches, count = [b._replace(samples=0 * b.samples) for b in micro_batches], 0
    with watched(self.model) if Poisoned.step == 2 else nullcontext() as precision:
        step(self, micro_batches, count)
    if precision:
        dtypes = {str(p.dtype) for p in self.model.parameters()}
        torch.save((precision.products, precision.faults, dtypes), self.folder.parent / f"rank-{self.dist.rank}.pt")
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999 if Poisoned.step == 8 else HARD, HARD))

trainer.Objective, trainer.Trainer.step = Poisoned, poisoned_step
runpy.run_path(TRAIN, run_name="__main__")
"""

pytestmark = pytest.mark.timeout(1200)  # the first test to ask for several runs waits for them all

PLATEAU = (
    "--optim.schedule plateau --optim.plateau_patience 1 --optim.plateau_threshold 0.5 --train.valid_every 2".split()
)
LAUNCHED = [*sorted((ROOT / "launch/accelerate").glob("*.yaml")), ROOT / "accelerate_config.yaml"]
ZERO = sorted((ROOT / "launch/deepspeed").glob("*.json"))


class Runs:
    """Runs of this module's script, in one folder, each started when a test first asks for it."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.script = folder / "script.py"
        names = {"TESTS": str(ROOT / "tests"), "TRAIN": str(ROOT / "launch/train.py")}
        self.script.write_text(SCRIPT.replace("TESTS", repr(names["TESTS"])).replace("TRAIN", repr(names["TRAIN"])))
        self.errors: dict[str, str] = {}

    def arguments(self, name: str, *more: str) -> list[str]:
        own = ["--data.shards", str(self.shards), "--runs", str(self.folder), "--name", name]
        return [
            *TINY,
            *PLATEAU,
            *own,
            "--train.micro_batch",
            "1",
            "--train.keep_last",
            "10",
            "--optim.clip",
            "0.2",
            *more,
        ]

    def start(self, name: str, options: Sequence[str], *more: str) -> list[dict]:
        done = launch(2, str(self.script), self.arguments(name, *more), timeout=480, options=options)
        assert done.returncode == 0, done.stderr
        self.errors[name] = done.stderr
        return metrics(self.folder / name)

    def get(self, stage: int, precision: str = "no") -> list[dict]:
        """The lines of a run of a ZeRO stage, or of DDP (0), on two ranks."""
        name = f"{stage}-{precision}"
        if name not in self.errors:
            self.start(name, self.options(stage, precision))
        return metrics(self.folder / name)

    def options(self, stage: int, precision: str, **settings: int) -> list[str]:
        """The launcher's: a file of launch/deepspeed, but in this precision and with every parameter divided.

        `settings` are more of `zero_optimization`.
        """
        if not stage:
            name = "accelerate_config.yaml" if precision == "bf16" else "launch/accelerate/cpu.yaml"
            return ["--config_file", str(ROOT / name)]
        config = json.loads((ROOT / f"launch/deepspeed/zero{stage}.json").read_text())
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **settings}
        config["torch_autocast"]["enabled"] = precision != "no"
        config["torch_autocast"]["dtype"] = "float16" if precision == "fp16" else "bfloat16"
        file = self.folder / f"zero{stage}-{precision}{''.join(settings)}.json"
        file.write_text(json.dumps(config))
        launched = str(ROOT / f"launch/accelerate/zero{stage}.yaml")
        return ["--config_file", launched, "--deepspeed_config_file", str(file)]


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("deepspeed"), tiny_shards)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed imports torch's compiler, which takes seconds in each process; one test alone needs it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def column(lines: list[dict], name: str) -> list[float | None]:
    return [line[name] for line in lines if name in line]


def same(actual: list[dict], expected: list[dict], rel: float) -> None:
    """Every loss and gradient norm within `rel`, or missing in both."""
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for name in ("train/bits", "valid/bits", "train/grad_norm"):
        for one, other in zip(column(actual, name), column(expected, name), strict=True):
            assert (one is None) == (other is None)
            assert one is None or one == pytest.approx(other, rel=rel)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_ddp(runs: Runs, stage: int) -> None:
    """Law 13, with two micro-batches of unequal masks on each rank, clipping, and steps without a finite loss or
    gradient or without a sample: losses and norms to 1e-6.

    Mutations, all in zero.py: drop `* self.world_size`; `set_gradient_accumulation_boundary(True)`; leave out
    `clip_grad = max_norm`; drop the NaN in `discard_gradients` (its step would be one).
    """
    lines = runs.get(stage)
    same(lines, runs.get(0), rel=1e-6)
    norms, skipped = column(lines, "train/grad_norm"), column(lines, "train/skipped_steps")
    assert column(lines, "train/bits")[2] is None
    assert norms[4] is None
    assert skipped[-1] == 3
    assert norms[0] > 0.2  # so clipping acts


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 3])
def test_recomputation_changes_no_loss(runs: Runs, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.recompute` and a loss in three pieces: the losses and norms of DDP without either.

    A small model's weights would not be released between uses; here they are, so that what is computed once more must
    gather them anew. Mutations: `early_stop=False` in `Tier._run`, so that the end of a recomputation releases weights
    in use (stage 3); in `_nats`, `pieces[1:]`.
    """
    expected = [line for line in runs.get(0) if line["step"] <= 4]
    monkeypatch.setenv("PIECE", "200")
    released = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    more = ["--train.recompute", "true", "--train.steps", "4"]
    lines = runs.start(f"recompute-{stage}", runs.options(stage, "no", **released), *more)
    same(lines, expected, rel=1e-6)


@pytest.mark.deepspeed
def test_kernels_made_together_are_of_whole_weights(runs: Runs) -> None:
    """A tier makes its layers' kernels, whose weights stage 3 divides: DDP's losses and norms.

    Mutation: in `s4.make`, `stack([part.data for part in parts])`.
    """
    diagonal = ["--model.mode", "diag", "--model.kernel", "vandermonde", "--model.n_layers", "2", "--train.steps", "4"]
    released = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    expected = runs.start("diagonal-0", runs.options(0, "no"), *diagonal)
    same(runs.start("diagonal-3", runs.options(3, "no", **released), *diagonal), expected, rel=1e-6)


@pytest.mark.deepspeed
def test_compiling_changes_no_loss(
    runs: Runs, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train.compile` at stage 2: DDP's losses without it. Mutation: in `Trainer.__init__`, drop `compile_layers`."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    for stage, compiled in ((0, False), (2, True)):
        argv = small_run(tiny_shards, tmp_path, f"stage-{stage}", compiled)
        done = launch(2, "launch/train.py", argv, options=runs.options(stage, "no"))
        assert done.returncode == 0, done.stderr
    plain, zero = (curve(metrics(tmp_path / f"stage-{stage}")) for stage in (0, 2))
    assert [bits for *_, bits in zero] == pytest.approx([bits for *_, bits in plain], rel=1e-5)
    assert len(plain) == 5
    assert list(cache.rglob("*.so"))  # by which it was compiled


@pytest.mark.deepspeed
def test_learning_rates_do_not_depend_on_the_engine(
    runs: Runs, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both groups' rates at every step, warm-up and plateau included: one rank, two ranks of DDP, and of each stage.

    Mutations: give DDP or the engine the scheduler; `if self.dist.is_main` around `plateau_step`.
    """
    command("launch/train.py", runs.arguments("alone"), monkeypatch)
    alone = metrics(runs.folder / "alone")
    main, ssm = column(alone, "lr/main"), column(alone, "lr/ssm")
    assert main[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert main[-1] == pytest.approx(0.01 * 0.2**2)
    assert ssm == pytest.approx([rate / 10 for rate in main if rate is not None])
    for stage in (0, 1, 2, 3):
        assert column(runs.get(stage), "lr/main") == main
        assert column(runs.get(stage), "lr/ssm") == ssm


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "precision"), [(3, "no"), (2, "fp16")])
def test_resume_is_no_interruption(runs: Runs, stage: int, precision: str) -> None:
    """Law 12 at one world size: from step 6, losses, weights and the loss scale are bit-equal; hyperparameters are the
    command's.

    Mutations, in zero.py: leave out `load_state_dict`, `update_lp_params`, or the loop over `settings`; in saver.py:
    do not restore `loss_scale`.
    """
    unbroken, name = runs.get(stage, precision), f"{stage}-{precision}"
    folder, last = runs.folder / name / "checkpoints", "step-00000012"
    first, state = load_checkpoint(folder / last), atomic.read_json(folder / last / "state.json")
    resumed = runs.start(name, runs.options(stage, precision), "--resume", str(folder / "step-00000006"))
    assert curve(resumed) == curve(unbroken)
    second = load_checkpoint(folder / last)
    assert all(first.model[key].equal(second.model[key]) for key in first.model)
    assert second.state == first.state
    if precision == "no":
        longer = ["--train.steps", "13", "--optim.lr", "0.02"]
        last_line = runs.start(name, runs.options(stage, precision), *longer)[-2]
        assert last_line["lr/main"] == pytest.approx(0.02 * 0.2**2)
    else:
        assert 1 < state["loss_scale"]["scale"] < 2.0**24
        scales = [load_checkpoint(path).state["loss_scale"]["scale"] for path in sorted(folder.glob("step-*"))]
        assert len(set(scales)) > 1


@pytest.mark.deepspeed
def test_weights_divided_otherwise(runs: Runs) -> None:
    """DeepSpeed would take a part of them for the whole. Mutation: drop the comparison of `shapes`."""
    runs.get(3)
    options = runs.options(3, "no")
    file = Path(options[-1])
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"zero_optimization": config["zero_optimization"] | {"sub_group_size": 2000}}))
    done = launch(2, str(runs.script), runs.arguments("3-no", "--train.steps", "20"), timeout=480, options=options)
    assert done.returncode != 0
    # Each rank finds it out by itself, and the first to end may take the other with it.
    lines = re.findall(r"^error(?: \(rank 1\))?: .*", done.stderr, re.MULTILINE)
    assert lines
    for line in lines:
        assert re.search(r"zero-0000[01]\.pt: zero_optimization divided the weights otherwise; put its settings", line)
        assert "--init-from" in line


@pytest.mark.deepspeed
def test_fp16_loses_little(runs: Runs) -> None:
    """With a loss scale that overflows at first, the later losses are those of float32 to 2 %."""
    half, single = (column(runs.get(*which), "valid/bits") for which in ((2, "fp16"), (0, "no")))
    assert half[-1] == pytest.approx(single[-1], rel=0.02)
    assert half[-1] < half[0]


@pytest.mark.deepspeed
def test_bfloat16_spares_the_state_spaces(runs: Runs) -> None:
    """Law 5 under `torch_autocast`, and DDP's curve in the same precision, to 1e-3.

    Mutation: in launch/deepspeed/zero3.json, `bf16.enabled` instead of `torch_autocast`.
    """
    same(runs.get(3, "bf16"), runs.get(0, "bf16"), rel=1e-3)
    assert column(runs.get(3, "bf16"), "valid/bits") != column(runs.get(3), "valid/bits")
    for run in ("3-bf16", "0-bf16"):
        for rank in (0, 1):
            products, faults, dtypes = torch.load(runs.folder / run / f"rank-{rank}.pt")
            assert products > 0
            assert not faults
            assert dtypes == {"torch.float32"}


@pytest.mark.deepspeed
def test_a_rank_that_cannot_write(runs: Runs) -> None:
    """Law 14: the save of step 8, where rank 1 could not write, is said to be none and leaves nothing; others stand.

    Mutation: in `Saver.save`, let `on_all` look at this rank's own failure alone.
    """
    runs.get(1)
    assert "step 8 is NOT SAVED: " in runs.errors["1-no"]
    names = sorted(path.name for path in (runs.folder / "1-no/checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 4, 6, 10, 12)]
    for name in names:
        assert not atomic.faults(runs.folder / "1-no/checkpoints" / name)


@pytest.mark.deepspeed
def test_a_zero_run_is_a_model_folder(
    runs: Runs, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are evaluated and fine-tuned without DeepSpeed, and are those that validation saw.

    Mutation: save `self.model.state_dict()` of stage 3, whose parameters are empty.
    """
    run = runs.folder / "3-no"
    valid = column(runs.get(3), "valid/bits")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with monkeypatch.context() as launched_for_deepspeed:
        launched_for_deepspeed.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        command("launch/evaluate.py", [str(run), "--split", "valid"], monkeypatch)
    assert json.loads(capsys.readouterr().out)["bits_per_sample"] == pytest.approx(min(valid), rel=1e-6)
    command("launch/train.py", [*runs.arguments("tuned"), "--init_from", str(run), "--train.steps", "1"], monkeypatch)
    assert column(metrics(runs.folder / "tuned"), "valid/bits")[0] == pytest.approx(min(valid), rel=1e-6)


@pytest.mark.deepspeed
def test_other_engines_are_refused(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ZeRO checkpoint by DDP, in one line; and a damaged part, before anything is unpickled.

    Mutation: no `compare_engines` in `Saver.restore`.
    """
    runs.get(1)
    with pytest.raises(SystemExit):
        command("launch/train.py", runs.arguments("1-no"), monkeypatch)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the checkpoint to resume from is of ZeRO stage 1 on 2 processes, and this is DDP")
    assert "--init-from" in error
    damaged = shutil.copytree(runs.folder / "1-no/checkpoints/step-00000012", runs.folder / "damaged/step-00000012")
    part = damaged / "zero-00001.pt"
    part.write_bytes(part.read_bytes()[:-9] + bytes(9))
    with pytest.raises(InputError, match=r"zero-00001\.pt: SHA-256 differs"):
        load_checkpoint(damaged)


@pytest.mark.parametrize(
    ("saved", "now"), [((0, 2), (2, 2)), ((2, 2), (0, 2)), ((2, 2), (1, 2)), ((2, 2), (2, 4)), ((3, 4), (3, 2))]
)
def test_what_may_not_change(saved: tuple[int, int], now: tuple[int, int]) -> None:
    """Engine, stage, and ZeRO's number of processes. Mutation: leave `world_size` out of `saved`."""
    with pytest.raises(
        InputError, match=r"^the checkpoint to resume from is of (ZeRO|DDP).* with --init-from and a new"
    ):
        compare_engines({"zero_stage": saved[0], "world_size": saved[1]}, *now)
    compare_engines({"zero_stage": saved[0], "world_size": saved[1]}, *saved)
    compare_engines({"world_size": 2}, 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is not"),
        ({"bf16": {"enabled": True}}, "bf16.enabled casts the state spaces"),
        ({"fp16": {"enabled": True}}, "fp16.enabled casts the state spaces"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0: set it to 0.0; optim.clip decides"),
        ({"communication_data_type": "bf16"}, "communication_data_type left out, or gradients are exchanged in lower"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided by optim of the run"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is decided by train.micro_batch"),
        ({"torch_autocast": {"enabled": True, "dtype": "float64"}}, "torch_autocast.dtype=float64"),
        ({"torch_autocast": []}, "torch_autocast must be an object"),
    ],
)
def test_configurations_that_will_not_do(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """What would break a law or act against the run's own fields. Mutation: drop any of `read_config`'s checks."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(json.loads(ZERO[0].read_text()) | change))
    with pytest.raises(InputError, match=f"^{file}: ") as error:
        read_config(str(file))
    assert message in str(error.value)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            None,
            "^DeepSpeed without a configuration: start with accelerate launch --config_file launch/accelerate/zero2",
        ),
        ("nothing.json", "^nothing.json: no such file"),
        (str(ZERO[0]), "^ZeRO divides over processes, and this is the only one; start without DeepSpeed"),
        ("typo.json", "typo.json: DeepSpeed does not take it: .* stge Extra inputs"),
    ],
)
def test_starts_that_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, message: str
) -> None:
    """One line each. Mutation: drop the check of `world_size`, or that of DeepSpeed itself."""
    if file == "typo.json":
        file = str(tmp_path / file)
        config = json.loads(ZERO[0].read_text())
        Path(file).write_text(json.dumps(config | {"zero_optimization": {"stage": 1, "stge": 1}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if file is not None:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    with pytest.raises(InputError, match=message):
        join()


@pytest.mark.deepspeed
def test_two_precisions(tiny_shards: Path, tmp_path: Path) -> None:
    """The launcher's beside the configuration's: one line, and no run. Mutation: drop the check in `Zero.__init__`."""
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO[0])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "--runs", str(tmp_path), "--data.shards", str(tiny_shards)],
        env=os.environ | asked | {"ACCELERATE_MIXED_PRECISION": "bf16", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    line = (
        f"error: mixed_precision=bf16: DeepSpeed's precision is torch_autocast of {ZERO[0]}; set mixed_precision to no"
    )
    assert done.stderr.splitlines()[-1] == line
    assert not list(tmp_path.iterdir())


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said what to install. Mutation: drop `find_spec`."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"^DeepSpeed is not installed: pip install 'sashimi\[deepspeed\]'"):
        Zero(str(ZERO[0]))


@pytest.mark.parametrize(
    ("train", "optim", "field"),
    [
        (TrainConfig(), OptimConfig(ema=0.9), "optim.ema=0.9"),
        (TrainConfig(compile=True), OptimConfig(), "train.compile=true"),
    ],
)
def test_what_needs_whole_weights(
    train: TrainConfig, optim: OptimConfig, field: str, tiny_shards: Path, tmp_path: Path
) -> None:
    """It is refused with stage 3. Mutation: drop either check in `Trainer.__init__`."""
    dist, model = Distributed(), Sashimi(ModelConfig(d_model=8, n_layers=1))
    dist.zero_stage = 3
    data = TrainingData(DataConfig(str(tiny_shards), segment=512, workers=0), AudioConfig(8000), 0, 4, 4)
    with pytest.raises(InputError, match=f"^{field}: ZeRO stage 3 divides the weights; use stage 1 or 2"):
        Trainer(dist, model, data, train, optim, 0, {}, tmp_path)


# ---- the launchers' files


def test_one_gpus_file(runs: Runs) -> None:
    """Without a GPU it is one process in bfloat16: the losses of two, to 1e-3, until rank 1 spoils one.

    Mutation: `mixed_precision: "no"` there.
    """
    options = ["--config_file", str(ROOT / "launch/accelerate/single-gpu.yaml")]
    done = launch(1, str(runs.script), runs.arguments("single"), timeout=480, options=options)
    assert done.returncode == 0, done.stderr
    assert "1 x cpu, precision bf16" in done.stderr
    single, pair = metrics(runs.folder / "single"), runs.get(0, "bf16")
    assert column(single, "train/bits")[:2] == pytest.approx(column(pair, "train/bits")[:2], rel=1e-3)


def test_several_machines_file(runs: Runs) -> None:
    """Two launchers, one process each, as on two machines: the curve of one launcher's two processes.

    Mutation: leave `main_process_port` out of both it and the commands.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(rank: int) -> subprocess.CompletedProcess[str]:
        file = ["--config_file", str(ROOT / "launch/accelerate/multi-node.yaml"), "--machine_rank", str(rank)]
        place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        return launch(2, str(runs.script), runs.arguments("machines"), timeout=480, options=[*file, *place])

    with ThreadPoolExecutor() as pool:
        for done in pool.map(machine, (0, 1)):
            assert done.returncode == 0, done.stderr
    same(metrics(runs.folder / "machines"), runs.get(0, "bf16"), rel=1e-6)


@pytest.mark.deepspeed
def test_state_is_carried_under_zero(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 13 where rows carry state: stage 3 on two ranks gives one process's losses, resumed in mid-passage too.

    Mutation: in `Saver.restore`, leave out `rows.carried = part`.
    """
    carry = ["--data.carry", "3", "--train.steps", "8", "--train.save_every", "4"]
    command("launch/train.py", runs.arguments("carry-alone", *carry), monkeypatch)
    options = runs.options(3, "no")
    for more in ([], ["--resume", str(runs.folder / "carry-zero/checkpoints/step-00000004")]):
        done = launch(2, "launch/train.py", runs.arguments("carry-zero", *carry, *more), timeout=480, options=options)
        assert done.returncode == 0, done.stderr
        same(metrics(runs.folder / "carry-zero"), metrics(runs.folder / "carry-alone"), rel=1e-6)


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.stem)
def test_the_launcher_takes_each_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for machines that are not here too: Accelerate reads them, and they say what their comments do.

    Mutation: `mixed_precision: bf16` in a zero*.yaml; another stage's .json.
    """
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(file))
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "launch/train.py"])
    )
    assert file.read_text().startswith("# ")
    stage = file.stem.removeprefix("zero") if file.stem.startswith("zero") else ""
    assert arguments.use_deepspeed == bool(stage)
    assert arguments.multi_gpu == (file.stem in {"accelerate_config", "multi-node", "cpu"})
    assert arguments.mixed_precision == config.mixed_precision == ("no" if stage or file.stem == "cpu" else "bf16")
    assert arguments.num_machines == (2 if file.stem == "multi-node" else 1)
    assert not arguments.cpu  # or the launcher would start one process
    if stage:
        assert arguments.deepspeed_config_file == f"launch/deepspeed/zero{stage}.json"
        assert arguments.deepspeed_multinode_launcher == "standard"
        assert Path(arguments.deepspeed_config_file).exists()


@pytest.mark.parametrize("file", ZERO, ids=lambda file: file.stem)
def test_each_configuration_says_what_it_means(file: Path) -> None:
    """Stage by name; bfloat16 by autocast alone, all that travels in float32; no clipping but the run's.

    Mutation: `lower_precision_safe_modules` of Linear, so that gradients of linear layers travel in bfloat16.
    """
    config = read_config(str(file))
    assert config["zero_optimization"]["stage"] == int(file.stem.removeprefix("zero"))
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["torch_autocast"] == autocast
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert config["gradient_clipping"] == 0.0
    assert {file.stem for file in ZERO} == {"zero1", "zero2", "zero3"}
