"""Folders of clips: the same files for any ranks and interruptions, and one line for whatever cannot be."""

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from conftest import command, contents, launch

from sashimi.audio import AudioConfig, Quantizer, read_audio, write_wav
from sashimi.clips import Progress, SampleConfig, Summary, keep_likelihood, sample_to_folder
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import save_model

RATE = 8000
AUDIO = AudioConfig(sample_rate=RATE)
FIVE = SampleConfig(clips=5, seconds=0.01, batch_size=2)  # 80 samples; batches of 2, 2 and 1


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def model() -> Sashimi:
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(d_model=8, n_layers=1, pool=(2, 2), d_state=8)).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
    return model


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """A fifth of a second of a tone."""
    path = tmp_path / "prompt.wav"
    write_wav(path, 0.5 * torch.sin(torch.arange(1600) / 5), RATE)
    return path


def sample(model: Sashimi, folder: Path, config: SampleConfig = FIVE, ranks: int = 1, kill_after: int = 0) -> Summary:
    """Ranks as threads with a real barrier; a single one is killed after so many reports if asked for."""
    barrier, reports = threading.Barrier(ranks), []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if len(reports) == kill_after:
            raise Killed

    def run(rank: int) -> Summary | None:
        def wait() -> None:
            barrier.wait(timeout=20)
            time.sleep(0.1 * rank)  # so that what is not behind a barrier does go wrong

        return sample_to_folder(model, "model", AUDIO, folder, config, rank, ranks, wait, on_progress=report)

    with ThreadPoolExecutor(ranks) as pool:
        summaries = list(pool.map(run, range(ranks)))
    assert summaries[0] is not None
    assert summaries[1:] == [None] * (ranks - 1)
    return summaries[0]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path, name: str = "samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- laws 16 and 17


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_do_not_mix_engines(model: Sashimi, tmp_path: Path, rank: int) -> None:
    """Law 16: in a folder that is new to both, a machine that has another engine than rank 0 stops.

    And so does rank 0, if another command has made the folder its own before it was locked.
    Mutations: no `agree` after the second barrier; or none behind the lock.
    """
    sample(model, tmp_path / "plain", replace(FIVE, engine="plain"))
    folder, settings = tmp_path / "new", (tmp_path / "plain/settings.json").read_bytes()
    waits = []

    def wait() -> None:
        waits.append(rank)
        if len(waits) == rank + 1:
            folder.mkdir(exist_ok=True)
            (folder / "settings.json").write_bytes(settings)

    with pytest.raises(InputError, match="engine"):
        sample_to_folder(model, "model", AUDIO, folder, replace(FIVE, engine="native"), rank, 2, wait)
    assert not list(folder.glob("*.wav"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_folder(model: Sashimi, tmp_path: Path, ranks: int) -> None:
    """Law 16. Mutations: in `missing`, `range(rank, config.clips)`; no barrier before the work, or none after it;
    no `unlink` in `alone_in`.
    """
    sample(model, tmp_path / "one")
    summary = sample(model, tmp_path / "many", ranks=ranks)
    assert summary.clips == summary.new_clips == 5
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert sorted(files(tmp_path / "one")) == [
        *(f"clip-{i:05d}.wav" for i in range(5)),
        "samples.jsonl",
        "settings.json",
    ]


@pytest.mark.parametrize("kill_after", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_sampling_ends_with_the_same_files(
    model: Sashimi, tmp_path: Path, kill_after: int, ranks: int
) -> None:
    """Law 17, with the rest made by the same or another number of ranks; finished clips are not made again.

    Mutations: `missing` is every clip; `write_clip` numbers clips by row; `collect` takes the new clips' lines only.
    """
    sample(model, tmp_path / "whole")
    with pytest.raises(Killed):
        sample(model, tmp_path / "cut", kill_after=kill_after)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("clip-*.wav")}
    assert len(finished) == {1: 0, 2: 2, 4: 4}[kill_after]
    summary = sample(model, tmp_path / "cut", ranks=ranks)
    assert summary.new_clips == 5 - len(finished)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_missing_wav_is_made_again(model: Sashimi, tmp_path: Path) -> None:
    """Law 17 at other moments: a wav lost later, or cut, one whose line was not written any more, a torn file beside.

    Mutations: `read_finished` does not look whether the wav exists, or how large it is.
    """
    folder = tmp_path / "clips"
    sample(model, folder)
    whole = files(folder)
    (folder / "clip-00003.wav").unlink()
    assert sample(model, folder).new_clips == 1
    assert files(folder) == whole

    (folder / "clip-00001.wav").write_bytes(whole["clip-00001.wav"][:-2])
    (folder / "clip-00002.wav").write_bytes(b"")
    assert sample(model, folder).new_clips == 2
    assert files(folder) == whole

    (folder / "samples.jsonl").unlink()
    (folder / ".parts").mkdir()
    (folder / ".tmp-clip-00001.wav").write_bytes(b"RIFF")
    assert sample(model, folder).new_clips == 5
    assert files(folder) == whole


def test_a_folder_can_be_continued_with_more_clips(model: Sashimi, tmp_path: Path) -> None:
    """Law 17: 3 clips and then 5 are 5 clips, though clip 3 shares a batch with clip 2. Fewer add nothing.

    Mutation: `settings_of` includes `clips`.
    """
    sample(model, tmp_path / "whole")
    sample(model, tmp_path / "grown", replace(FIVE, clips=3))
    assert sample(model, tmp_path / "grown").new_clips == 2
    assert sample(model, tmp_path / "grown", replace(FIVE, clips=1))[:2] == (5, 0)
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


@pytest.mark.parametrize("there", [False, True])
def test_one_command_at_a_time(model: Sashimi, tmp_path: Path, there: bool) -> None:
    """In a new folder or an old one: the other one is refused and touches nothing, then goes on.

    Mutation: no `lock` in `alone_in`.
    """
    folder = tmp_path / "clips"
    if there:
        sample(model, folder, replace(FIVE, clips=3))
    folder.mkdir(exist_ok=True)
    lock = "import fcntl; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lock], cwd=folder, stdin=PIPE, stdout=PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        before = contents(folder)
        with pytest.raises(InputError, match=f"^{folder}: another process samples into it; wait for it, or give"):
            sample(model, folder)
        assert contents(folder) == before
        other.stdin.close()
    sample(model, folder)
    sample(model, tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")


# --- settings


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"temperature": 0.9}, {"top_k": 9}, {"top_p": 0.9}, {"seconds": 0.02}, {"batch_size": 3}]
)
def test_other_settings_do_not_mix(model: Sashimi, tmp_path: Path, change: dict) -> None:
    """One line names the field and both values, and nothing is touched. Mutation: leave any out of `settings_of`."""
    folder = tmp_path / "clips"
    sample(model, folder)
    before = files(folder)
    ((field, value),) = change.items()
    with pytest.raises(
        InputError, match=rf"clips have {field}=.* \(now {field}={value}\); give another folder with --out"
    ) as caught:
        sample(model, folder, replace(FIVE, **change))
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def test_other_models_and_prompts_do_not_mix(model: Sashimi, prompt_file: Path, tmp_path: Path) -> None:
    """Their contents count, not their names. Mutations: leave model_sha256 or prompt_sha256 out of `settings_of`; in
    `read_finished`, leave out prompt_samples.
    """
    folder = tmp_path / "clips"
    config = replace(FIVE, prompt=str(prompt_file))
    sample(model, folder, config)
    shutil.copy(prompt_file, tmp_path / "copy.wav")
    assert sample(model, folder, replace(config, prompt=str(tmp_path / "copy.wav"))).new_clips == 0
    write_wav(prompt_file, read_audio(prompt_file, RATE).flip(0), RATE)
    with pytest.raises(InputError, match=r"clips have prompt=.* \[\w{8}\] \(now prompt="):
        sample(model, folder, config)
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"clips have model=model \[\w{8}\] \(now model="):
        sample(Sashimi(model.config), folder, replace(config, prompt=str(tmp_path / "copy.wav")))


def test_a_folder_of_something_else_is_left_alone(model: Sashimi, tmp_path: Path) -> None:
    """Mutation: `agree` only compares settings."""
    (tmp_path / "clip-00000.wav").write_bytes(b"mine")
    with pytest.raises(InputError, match="not empty and holds no samples"):
        sample(model, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        sample(model, tmp_path / "clip-00000.wav")
    assert files(tmp_path) == {"clip-00000.wav": b"mine"}


# --- what is written


def test_lines_tell_bits_of_the_new_audio_under_the_model(model: Sashimi, prompt_file: Path, tmp_path: Path) -> None:
    """A wav is prompt and continuation; forward on its ids gives the line's bits, whatever the temperature.

    Mutations: average over `nats[:, 1:]`; divide by log(10); write `ids[0]`; leave the prompt out of the wav.
    """
    config = replace(FIVE, temperature=0.7, top_k=40, prompt=str(prompt_file), prompt_seconds=0.1)
    sample(model, tmp_path / "clips", config)
    quantizer, wavs = Quantizer(AUDIO), set()
    for i, line in enumerate(lines(tmp_path / "clips")):
        audio = read_audio(tmp_path / "clips" / line["file"], RATE)
        assert len(audio) == 800 + 80
        ids = quantizer.encode(audio)
        assert torch.equal(ids[:800], quantizer.encode(read_audio(prompt_file, RATE)[:800]))
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor([quantizer.silence]), ids[:-1]))[None])[0]
        nats = torch.nn.functional.cross_entropy(logits[800:], ids[800:])
        assert line["bits_per_sample"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
        assert (line["clip"], line["seed"], line["seconds"], line["model"]) == (i, 0, 0.01, "model")
        assert line["settings"]["temperature"] == 0.7
        assert line["settings"]["audio"] == asdict(AUDIO)
        wavs.add(audio.numpy().tobytes())
    assert len(wavs) == 5


def test_likelihood_keeps_the_middle(model: Sashimi, tmp_path: Path) -> None:
    """The paper's rule drops the least likely 40 % and the likeliest 5 %. Mutation: rank without the minus sign."""
    bits = np.random.default_rng(0).permutation(20)
    kept = keep_likelihood([{"clip": i, "bits_per_sample": float(b)} for i, b in enumerate(bits)], 0.4, 0.95)
    assert [line["clip"] for line in kept] == [i for i, b in enumerate(bits) if 1 <= b < 12]

    folder = tmp_path / "clips"
    sample(model, folder)
    before = files(folder)
    assert sample(model, folder, replace(FIVE, keep_likelihood=(0.4, 1.0))).kept == 3
    likeliest = sorted(lines(folder), key=lambda line: line["bits_per_sample"])[:3]
    assert lines(folder, "kept.jsonl") == sorted(likeliest, key=lambda line: line["clip"])
    assert sample(model, folder).kept is None
    assert files(folder) == before


def test_progress_runs_to_its_end(model: Sashimi, tmp_path: Path) -> None:
    """Mutation: divide by all ranks' work."""
    told: list[Progress] = []
    sample_to_folder(model, "model", AUDIO, tmp_path / "clips", FIVE, on_progress=told.append)
    assert [progress.done for progress in told] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [progress.clips for progress in told] == [0, 2, 2, 4, 4, 5]


# --- prompts


def test_a_prompt_at_another_rate_needs_a_word(model: Sashimi, tmp_path: Path) -> None:
    """Both rates and the remedy are named; converted, it plays as long. Mutation: resample silently."""
    path = tmp_path / "prompt.wav"
    write_wav(path, 0.5 * torch.sin(torch.arange(4410) / 20), 44100)
    config = replace(FIVE, prompt=str(path))
    with pytest.raises(InputError, match="is at 44100 Hz, the model at 8000 Hz; add --resample-prompt"):
        sample(model, tmp_path / "clips", config)
    sample(model, tmp_path / "clips", replace(config, resample_prompt=True))
    assert len(read_audio(tmp_path / "clips/clip-00000.wav", RATE)) == 800 + 80


def test_a_prompt_that_is_too_short_is_named(model: Sashimi, prompt_file: Path, tmp_path: Path) -> None:
    """Mutation: `if length < 0`."""
    config = replace(FIVE, prompt=str(prompt_file), prompt_seconds=0.3)
    with pytest.raises(InputError, match=r"has 0.200 s, less than prompt_seconds=0.3"):
        sample(model, tmp_path / "clips", config)


# --- the command


@pytest.fixture
def model_folder(model: Sashimi, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(folder, model.state_dict(), asdict(model.config), asdict(AUDIO))
    return folder


def test_two_processes_write_what_one_does(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Laws 16 and 17 with the real command: two processes restore all but one of the wavs that one process wrote.

    Mutations: `sample_to_folder` is not given the rank; every rank asks for the lock.
    """
    monkeypatch.chdir(tmp_path)
    argv = f"{model_folder} --clips 5 --seconds 0.01 --batch-size 2 --keep-likelihood 0.4 0.95".split()
    command("launch/sample.py", argv, monkeypatch)
    assert "samples: 5 clips, 3 of them in kept.jsonl; 5 are new" in capfd.readouterr().out
    whole = files(tmp_path / "samples")
    for path in (tmp_path / "samples").glob("clip-*[0234].wav"):
        path.unlink()
    done = launch(2, "launch/sample.py", [*argv, "--out", str(tmp_path / "samples")])
    assert done.returncode == 0, done.stderr
    assert "4 are new" in done.stdout
    assert files(tmp_path / "samples") == whole


def test_a_runs_clips_go_into_its_folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a run and for one of its checkpoints. Mutation: always ./samples."""
    checkpoint = tmp_path / "runs/x/checkpoints/step-00000001"
    checkpoint.parent.mkdir(parents=True)
    model_folder.rename(checkpoint)
    monkeypatch.chdir(tmp_path)
    command("launch/sample.py", "runs/x --clips 1 --seconds 0.01".split(), monkeypatch)
    command("launch/sample.py", [str(checkpoint), *"--clips 2 --seconds 0.01".split()], monkeypatch)
    assert len(lines(tmp_path / "runs/x/samples")) == 2


def test_a_missing_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line. Mutation: `run_command` does not catch InputError."""
    with pytest.raises(SystemExit):
        command("launch/sample.py", [str(tmp_path / "nothing"), "--clips", "1"], monkeypatch)
    err = capfd.readouterr().err
    assert "nothing: no such folder" in err
    assert err.count("\n") == 1
