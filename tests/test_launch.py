"""The commands as a user types them: what they print, what they leave behind, and what they say to wrong ones."""

import ast
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, TINY, Call, contents, curve, metrics
from torch._dynamo.exc import InternalTorchDynamoError

import sashimi
from sashimi.audio import AudioConfig
from sashimi.config import parse_run_config
from sashimi.distributed import run_command
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import read_audio_config, save_model
from sashimi.order import accumulation_steps
from sashimi.parsing import to_dict
from sashimi.split import open_split
from sashimi.stream import DataConfig, n_segments

README = (ROOT / "README.md").read_text()


@pytest.fixture
def tiny(tiny_shards: Path, tmp_path: Path) -> list[str]:
    """The options of a tiny run below tmp_path."""
    return [*TINY, "--data.shards", str(tiny_shards), "--runs", str(tmp_path / "runs")]


def test_dry_run_tells_and_leaves_nothing(call: Call, tiny: list[str], tiny_shards: Path, tmp_path: Path) -> None:
    """Size, epoch, memory and time, for a new run and beside one that exists, which it does not even look at.

    Mutations: make the RunTracker before `return dist.close()`; drop `and not config.dry_run`.
    """
    segments = n_segments(open_split(tiny_shards, "train"), DataConfig(segment=512, crop=True))
    parameters = sum(p.numel() for p in Sashimi(ModelConfig(d_model=8, n_layers=1)).parameters())
    for seed in ("0", "1"):  # the seed of a run that goes on could not change
        before = contents(tmp_path)
        answer = call("launch/train.py", *tiny, "--seed", seed, "--dry-run")
        assert answer.code == 0, answer.err
        report = {line[:18].strip(): line[19:] for line in answer.err.splitlines()}
        assert report["parameters"] == f"{parameters:,}"
        assert report["segments per epoch"] == str(segments)
        assert report["steps per epoch"] == f"{segments / 4:.1f}"
        assert report["batch"] == "4 segments = 1 ranks x 1 micro-batches x 4"
        assert re.fullmatch(r"0\.\d\d GiB|\d\.\d\d GiB", report["memory per rank"])
        assert float(report["seconds per step"]) > 0
        assert contents(tmp_path) == before
        assert (tmp_path / "runs").exists() == bool(before)
        if not before:
            assert call("launch/train.py", *tiny, "--train.steps", "4").code == 0


def test_a_saved_config_is_all_that_a_run_needs(call: Call, tiny: list[str], tmp_path: Path) -> None:
    """runs/NAME/config.yaml goes on with the run, or under another name repeats it, bit for bit.

    Mutation: `save_config` only where there is no config.yaml yet, or with another field replaced.
    """
    run = tmp_path / "runs/run"
    call("launch/train.py", *tiny)
    saved = ["--config", str(run / "config.yaml")]
    assert call("launch/train.py", *saved, "--name", "again").code == 0
    assert curve(metrics(run.with_name("again"))) == curve(metrics(run))
    assert call("launch/train.py", *saved, "--train.steps", "14").code == 0
    assert [line["step"] for line in metrics(run) if "train/bits" in line] == list(range(1, 15))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 14


def test_a_renamed_run_goes_on_with_what_its_line_says(call: Call, tiny: list[str], tmp_path: Path) -> None:
    """And not in a new folder of the old name. Mutation: another `--name` in the line."""
    run = tmp_path / "runs/run"
    call("launch/train.py", *tiny)
    renamed = run.rename(run.with_name("renamed"))
    saved = ["--config", str(renamed / "config.yaml"), "--train.steps", "14"]
    answer = call("launch/train.py", *saved)
    assert answer.code == 2
    remedy = re.findall(r"--runs \S+|--name \w+", answer.error)
    assert call("launch/train.py", *saved, *" ".join(remedy).split()).code == 0
    assert [line["step"] for line in metrics(renamed) if "train/bits" in line] == list(range(1, 15))
    assert not run.exists()


def test_a_saved_config_goes_on_after_a_step_back(call: Call, tiny: list[str], tmp_path: Path) -> None:
    """Once a run has gone back with --resume PATH, its config does not go back again.

    Mutation: `save_config(config, ...)` without `resume="auto"` in launch/train.py.
    """
    run = tmp_path / "runs/run"
    call("launch/train.py", *tiny, "--train.keep_last", "10")
    back = str(run / "checkpoints/step-00000004")
    assert call("launch/train.py", *tiny, "--train.keep_last", "10", "--resume", back).code == 0
    before = contents(run / "checkpoints")
    answer = call("launch/train.py", "--config", str(run / "config.yaml"))
    assert answer.code == 0, answer.err
    assert contents(run / "checkpoints") == before
    assert "abandoned" not in answer.err


@pytest.mark.parametrize(
    ("script", "documented"),
    [
        ("train", r"--train\.steps STEPS Optimizer steps in all; .* \(type: int, default: 100000\)"),
        ("evaluate", r"--segment SEGMENT Length of a segment in samples; .* \(type: int, default: 0\)"),
        ("sample", r"--seconds SECONDS \w.*"),
    ],
)
def test_help(call: Call, script: str, documented: str) -> None:
    """Every command explains itself. Mutation: `run_command` catches SystemExit too."""
    answer = call(f"launch/{script}.py", "--help")
    assert answer.code == 0
    assert re.search(documented, " ".join(answer.out.split()))


def readme_commands() -> list[list[str]]:
    """The words of every command line in the README's code blocks, environment and comments left out."""
    blocks = [code for _, code in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)]
    lines = [re.split(r" && |#", line)[0].split() for block in blocks for line in block.splitlines()]
    return [words for words in lines if words and words[0] in ("python", "accelerate", "bash", "tensorboard")]


def test_readme_commands_exist(call: Call) -> None:
    """Each names a script that is there, its options and recipes too. Mutation: rename any of them."""
    commands = [words for words in readme_commands() if words[:2] != ["python", "-m"] and words[0] != "tensorboard"]
    assert len(commands) >= 10
    launcher = launch_command_parser()
    helps: dict[str, str] = {}
    for words in commands:
        (script,) = [word for word in words if re.search(r"\.(py|sh)$", word)]
        assert (ROOT / script).is_file(), script
        if words[0] == "accelerate":
            assert launcher.parse_args(words[2:]).training_script == script
        for word, value in zip(words, [*words[1:], ""], strict=True):
            if word in ("--config", "--config_file"):
                assert (ROOT / value).is_file(), value
            if word == "--config":
                assert parse_run_config(["--config", str(ROOT / value)]).name == Path(value).stem
            if word.startswith("--") and word != "--config_file":
                if script not in helps:
                    helps[script] = call(script, "--help").out
                assert documents(helps[script], word), words
    scripts = ("launch/train.py", "launch/evaluate.py", "launch/sample.py", "tools/check_shards.py")
    parts = [[script, "--help"] for script in scripts] + [["tools/bench.py", "train", "--help"]]
    every = " ".join([launcher.format_help(), *helps.values(), *(call(*words).out for words in parts)])
    for option in re.findall(r"`(--[a-z][\w.-]*)", README):
        assert documents(every, option), option


def test_readme_commands_leave_nothing_to_git() -> None:
    """Every folder that they make is ignored. Mutation: drop `/clips/` from .gitignore."""
    made = {
        Path(value).parts[0]
        for words in readme_commands()
        for word, value in itertools.pairwise(words)
        if word == "--out"
    }
    ignored = (ROOT / ".gitignore").read_text().split()
    assert made == {"clips", "continued", "models", "shards"}
    assert all({f"/{folder}/", f"{folder}/*"} & set(ignored) for folder in made)


def test_readme_recipes_fit_their_gpus() -> None:
    """As many processes as a command starts with a recipe can share its batch. Mutation: two nodes in train.slurm."""
    script = (ROOT / "launch/slurm/train.slurm").read_text()
    numbers = (int(n) for n in re.findall(r"^#SBATCH --(?:nodes|gpus-per-node)=(\d+)", script, re.MULTILINE))
    one_machine = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())["num_processes"]
    commands = re.findall(r"^(sbatch|accelerate).* --config (launch/recipes/\S+)", README, re.MULTILINE)
    assert {command for command, _ in commands} == {"sbatch", "accelerate"}
    on_cluster = math.prod(numbers)
    for command, recipe in commands:
        train = parse_run_config(["--config", str(ROOT / recipe)]).train
        processes = on_cluster if command == "sbatch" else one_machine
        assert accumulation_steps(train.batch_size, train.micro_batch, processes) >= 1


def documents(help: str, option: str) -> bool:
    """Whether a --help mentions an option; dashes and underscores are the same."""
    return re.search(rf"{option.replace('-', '_')}\b", help.replace("-", "_")) is not None


def test_readme_recipes_exist() -> None:
    """The table lists each recipe and no other. Mutation: rename one."""
    table = "".join(line.split("|")[1] for line in README.splitlines() if re.match(r"\| `\S+\.yaml", line))
    shorthand = re.findall(r"`(\S+?)`", table)
    first = next(name for name in shorthand if name.startswith("youtubemix"))
    names = {name.replace("-", f"{first[:-5]}-", 1) + ".yaml" if name[0] == "-" else name for name in shorthand}
    assert names == {path.name for path in (ROOT / "launch/recipes").glob("*.yaml")}


def test_readme_python_calls_what_exists() -> None:
    """Every name and keyword of the snippet. Mutation: rename `n_samples` of `generate`."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    ours = [c for c in calls if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "sashimi"]
    assert len(ours) >= 4
    for node in ours:
        assert isinstance(node.func, ast.Attribute)
        signature = inspect.signature(getattr(sashimi, node.func.attr))
        signature.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})


def test_a_slurm_controller_is_asked_again(tmp_path: Path) -> None:
    """One that does not answer at once does not cost the job its place. Mutation: `for _ in 1`."""
    commands = """
        . launch/slurm/common.sh
        sleep() { :; }
        scontrol() { echo "scontrol $*"; }
        squeue() { echo >>"$ASKED" && [ "$(wc -l <"$ASKED")" -eq 3 ] && echo RUNNING; }
        requeue
    """
    environment = os.environ | {"ASKED": str(tmp_path / "asked"), "SLURM_JOB_ID": "7", "MAX_RESTARTS": "1"}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["scontrol requeue 7", "stopped by a signal, queued again"]


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends a command without a traceback, with the shell's exit code. Mutation: do not catch it."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(interrupted)
    assert stop.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (OSError(20, "Not a directory", "a/b"), "a/b: Not a directory; give another path"),
        (OSError("no name"), "no name"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: lower train.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: lower train.micro_batch"),
        (RuntimeError("TritonMissing: no Triton"), "train.compile=true: cannot compile (TritonMissing): install a C++"),
    ],
)
def test_what_a_user_can_mend_is_one_line(raised: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And our own errors keep their traceback. Mutation: return str(error) for any error in `_mendable`."""

    def fails() -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        run_command(fails)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")

    for error in (RuntimeError("shapes do not match"), InternalTorchDynamoError("no such guard")):

        def breaks(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            run_command(breaks)


def test_a_lost_process_is_one_line_with_its_reason() -> None:
    """All lines of it, as NCCL has the cause on a later one. Mutation: `splitlines()[0]` of the reason."""
    program = """
import torch
from sashimi.distributed import run_command
def fails():
    raise torch.distributed.DistBackendError("NCCL error in: a.cpp:1\\nLast error:\\nno interface")
run_command(fails)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: lost another process (NCCL error in: a.cpp:1 Last error: no interface), see its own message; "
        "the same command goes on from what is saved"
    ]


def test_audio_config_comes_with_the_model(tmp_path: Path) -> None:
    """Of a model folder. Mutation: return AudioConfig()."""
    audio = AudioConfig(sample_rate=22050, quantizer="linear", bits=10)
    model = Sashimi(ModelConfig(levels=1024, d_model=4, n_layers=1))
    save_model(tmp_path / "model", model.state_dict(), to_dict(model.config), to_dict(audio))
    assert read_audio_config(tmp_path / "model") == audio
