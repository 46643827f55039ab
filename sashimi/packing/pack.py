"""Sources to shards: the plan, the parallel and restartable packing of it, and what became of each file.

The plan (which recording has which key and lies in which shard) follows from the sorted sources and their headers.
A bad file keeps its place in it and leaves it empty, so neither bad files nor processes nor restarts move a clip.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile as sf
import soxr
from tqdm import tqdm

from sashimi.atomic import MANIFEST, UNFINISHED, read_json, write_json
from sashimi.audio import AudioFault, Header, channels_cancel, iter_audio, read_header, to_int16
from sashimi.errors import InputError
from sashimi.lock import lock
from sashimi.packing.parallel import run_jobs
from sashimi.packing.sources import Source, SourceConfig, find_sources, other_formats, parent_name
from sashimi.shard_writer import ShardWriter
from sashimi.shards import SPLITS, STATE, read_manifest, seal

SILENT_PEAK = 3  # of 32768, or -81 dB of full scale
BYTES_PER_SAMPLE = 2
PROCESSING = {
    "mix-down": "mean of the channels in float32",
    "resampling": "soxr VHQ in float32; none if the rate is right",
    "rounding": "32768 x to nearest, ties to even",
    "clipping": "to [-32768, 32767]",
    "flac": "fixed predictors, frames of whole fractions of a second, seek tables of all frames",
    "left out": f"unreadable, empty, truncated, not finite, or nowhere over {SILENT_PEAK}/32768 from a constant",
}


@dataclass(frozen=True)
class PackConfig(SourceConfig):
    """Recordings, and the shards that they become."""

    out: str = ""
    """Folder for the shards, such as shards/NAME."""
    sample_rate: int = 16000
    """Samples per second (Hz) in the shards; recordings at other rates are resampled."""
    chunk_seconds: float = 60.0
    """Longer recordings become consecutive clips of this many seconds, so that any place in them is quick to read."""
    shard_megabytes: float = 128.0
    """A shard is full before its audio exceeds this many million bytes as 16-bit samples; as flac it takes about half.
    A recording is never divided over shards, however long it is."""
    processes: int = 0
    """Worker processes; 0 takes one for each CPU. Their number does not change the shards."""
    strict: bool = False
    """Stop at a bad file rather than leave it out and report it at the end."""
    dry_run: bool = False
    """Print files, hours and bytes per split, and stop. With --strict, fail if a file's header is bad."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out and not self.dry_run:
            raise InputError("out: say where the shards go, with --out shards/NAME")
        if not 1 <= self.sample_rate <= 655350:
            raise InputError(f"sample_rate={self.sample_rate}: choose from 1 to 655350 Hz, such as 16000")
        if not 0.1 <= self.chunk_seconds <= 3600:
            raise InputError(f"chunk_seconds={self.chunk_seconds}: choose from 0.1 to 3600 seconds")
        if round(self.chunk_seconds * self.sample_rate) < 1:
            raise InputError(f"chunk_seconds={self.chunk_seconds}: is less than one sample at {self.sample_rate} Hz")
        if not self.shard_megabytes > 0:
            raise InputError(f"shard_megabytes={self.shard_megabytes}: must be more than 0")
        if not 0 <= self.processes <= 1024:
            raise InputError(f"processes={self.processes}: give 1 to 1024, or 0 for one for each CPU")


class Recording(NamedTuple):
    """A source's place in the plan."""

    source: Source
    key: str
    header: Header | str
    """What the file's header says, or why it cannot be packed."""
    samples: int
    """Length at the target rate by the header; 0 without one."""


class Shard(NamedTuple):
    """A tar of the plan."""

    name: str
    split: str
    recordings: list[Recording]


class Plan(NamedTuple):
    """All shards to be, and a checksum of everything that they follow from."""

    shards: list[Shard]
    checksum: str
    other_formats: str
    """A line about files that are not in it for their format; or none."""


def make_plan(config: PackConfig) -> Plan:
    """Finds the sources, reads their headers and fills shards with them in order."""
    sources = find_sources(config)
    with ThreadPoolExecutor(16) as pool:  # on a network disk this is waiting, mostly
        headers = list(pool.map(_header, sources))
    shards: list[Shard] = []
    for split in SPLITS:
        found = [pair for pair in zip(sources, headers, strict=True) if pair[0].split == split]
        recordings = [_recording(number, *pair, config.sample_rate) for number, pair in enumerate(found)]
        shards += _fill(split, recordings, config.shard_megabytes * 1e6 / BYTES_PER_SAMPLE)
    basis = [[shard.name, [(r.source.name, r.key, r.header) for r in shard.recordings]] for shard in shards]
    checksum = hashlib.sha256(json.dumps([_settings(config), basis]).encode()).hexdigest()
    return Plan(shards, checksum, other_formats(config))


def _header(source: Source) -> Header | str:
    try:
        return read_header(source.path)
    except AudioFault as fault:
        return fault.reason


def _recording(number: int, source: Source, header: Header | str, sample_rate: int) -> Recording:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", source.name.rpartition(".")[0])[-64:].strip("-")
    samples = 0 if isinstance(header, str) else round(header.frames * sample_rate / header.sample_rate)
    return Recording(source, f"{number:07d}-{stem}".rstrip("-"), header, samples)


def _fill(split: str, recordings: list[Recording], limit: float) -> list[Shard]:
    """Shards of at most `limit` samples, or of one recording."""
    shards: list[Shard] = []
    room = 0.0
    for recording in recordings:
        if not shards or recording.samples > room:
            shards.append(Shard(f"{split}-{len(shards):06d}.tar", split, []))
            room = limit
        shards[-1].recordings.append(recording)
        room -= recording.samples
    return shards


def _settings(config: PackConfig) -> dict[str, Any]:
    """What shards follow from beside the files: not where they are, nor how many processes work."""
    settings = asdict(config)
    for name in ("source", "out", "processes", "strict", "dry_run"):
        del settings[name]
    packages = {
        "av": av.__version__,
        "libsndfile": sf.__libsndfile_version__,
        "soundfile": sf.__version__,
        "soxr": soxr.__version__,
    }
    return {"settings": settings, "processing": PROCESSING, "packages": packages}


def is_packed(config: PackConfig) -> bool:
    """Whether OUT was packed to the end, be it from this plan or another."""
    return (Path(config.out) / MANIFEST).exists()


def newer_sources(config: PackConfig, plan: Plan) -> list[str]:
    """Names of the sources that were changed after OUT was packed to the end."""
    packed = (Path(config.out) / MANIFEST).stat().st_mtime_ns
    files = {r.source.name: _changed(r.source.path) for shard in plan.shards for r in shard.recordings}
    return [name for name, changed in files.items() if changed and changed[1] > packed]


def pack(config: PackConfig, plan: Plan) -> dict[str, Any]:
    """Packs what is not packed yet and returns the manifest; its "faults" are the files that were left out.

    As long as packing is not done, files may be mended, added or removed in between: what that changes is packed anew.
    InputError if OUT holds other shards, the disk is full, every file of a split is bad or, if strict, any file is.
    Whatever ends it, no part of a shard has a shard's name, and the same call goes on from there.
    """
    out = Path(config.out)
    state = out / STATE
    if is_packed(config):
        manifest = read_manifest(out)
        _refuse_others(out, manifest.get("plan"), plan.checksum)
        return manifest
    refuse_bad_headers(config, plan)
    known = {r.source.name: r.header for s in plan.shards for r in s.recordings if isinstance(r.header, str)}
    _refuse_empty(out, plan, known)  # before anything is written
    with _mendable(out):
        if (state / MANIFEST).exists():
            _refuse_others(out, read_json(state / MANIFEST).get("work"), _work(config))
        elif out.is_dir() and any(path.name != STATE for path in out.iterdir()):
            raise InputError(f"{out}: is not empty and holds no shards to go on with: choose another --out")
        state.mkdir(parents=True, exist_ok=True)
        refusal = f"{out}: another process packs into it: wait for it, or choose another --out"
        with lock(state / ".lock", refusal, partial(warnings.warn, stacklevel=2)):
            write_json(state / MANIFEST, {"work": _work(config)})
            _pack_shards(config, plan)
            outcomes = [read_json(state / f"{shard.name}.json") for shard in plan.shards]
            faults = {name: reason for outcome in outcomes for name, reason in outcome["faults"].items()}
            _refuse_empty(out, plan, faults)
            about = {
                "plan": plan.checksum,
                **_settings(config),
                "clipped_samples": sum(outcome["clipped_samples"] for outcome in outcomes),
                "most_clipped": max((one.get("most_clipped", (0, "")) for one in outcomes), key=itemgetter(0))[1],
                "faults": faults,
            }
            with ThreadPoolExecutor() as pool:
                manifest = seal(out, about, pool.map)
        shutil.rmtree(state)
    return manifest


def _refuse_others(out: Path, own: Any, these: str) -> None:
    if own != these:
        raise InputError(f"{out}: holds shards of other files or settings: choose another --out, or delete it first")


def refuse_bad_headers(config: PackConfig, plan: Plan) -> None:
    """AudioFault if, when strict, the plan knows of a bad file already."""
    faults = [(r.source.path, r.header) for shard in plan.shards for r in shard.recordings if isinstance(r.header, str)]
    if config.strict and faults:
        raise AudioFault(*faults[0])


def _refuse_empty(out: Path, plan: Plan, faults: dict[str, str]) -> None:
    for split in SPLITS:
        names = [r.source.name for shard in plan.shards if shard.split == split for r in shard.recordings]
        if names and all(name in faults for name in names):
            raise InputError(
                f"{out}: no file of {split} can be packed; {names[0]}: {faults[names[0]]}; mend or replace the files, "
                "and the same command goes on"
            )


def _pack_shards(config: PackConfig, plan: Plan) -> None:
    """Packs the shards that are not there yet, or not of these files, and removes those of an earlier plan."""
    out = Path(config.out)
    todo = [shard for shard in plan.shards if not _is_done(out, shard)]
    for name in {path.name for path in out.glob("*.tar")} - {shard.name for shard in plan.shards}:
        (out / name).unlink()
    files, left = (sum(len(shard.recordings) for shard in shards) for shards in (plan.shards, todo))
    samples = 0

    def count(more: int) -> None:
        nonlocal samples
        samples += more
        bar.set_postfix_str(f"{samples / config.sample_rate / 3600:.2f} h packed", refresh=False)
        bar.update()

    with tqdm(total=files, initial=files - left, unit=" files") as bar:
        try:
            for _ in run_jobs(partial(pack_shard, config), todo, config.processes or _cpus(), count):
                pass
        finally:
            for unfinished in out.glob(f"{UNFINISHED}*"):
                unfinished.unlink(missing_ok=True)


def _work(config: PackConfig) -> str:
    """Tells one packing from another: the same source and settings, whatever the files are at the moment."""
    return hashlib.sha256(json.dumps([str(Path(config.source).resolve()), _settings(config)]).encode()).hexdigest()


def _is_done(out: Path, shard: Shard) -> bool:
    note = out / STATE / f"{shard.name}.json"
    return note.exists() and (out / shard.name).exists() and read_json(note).get("of") == _content(shard)


def _content(shard: Shard) -> str:
    """A checksum of what a shard is made of: its recordings, and when their files were last changed."""
    files = [(r.source.name, r.key, r.header, _changed(r.source.path)) for r in shard.recordings]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _cpus() -> int:
    """CPUs that this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Outcome:
    """What became of the files of one shard."""

    faults: dict[str, str] = field(default_factory=dict)
    clipped_samples: int = 0
    most_clipped: tuple[int, str] = (0, "")
    """Clipped samples of the file that has most, and its name."""


def pack_shard(config: PackConfig, shard: Shard, report: Callable[[int], None]) -> None:
    """Writes one tar, then a note of its outcome. Reports the samples of each file, 0 for a bad one."""
    out, content = Path(config.out), _content(shard)
    outcome = Outcome()
    with _mendable(out):
        chunk_samples = round(config.chunk_seconds * config.sample_rate)
        with ShardWriter(out / shard.name, config.sample_rate, chunk_samples) as writer:
            for recording in shard.recordings:
                name = recording.source.name
                fields: dict[str, Any] = {"source": name}
                if config.label_names:
                    label = parent_name(name)
                    fields |= {"label": label, "label_id": config.label_names.index(label)}
                try:
                    blocks = _blocks(recording, config.sample_rate, outcome)
                    report(writer.add(recording.key, blocks, **fields))
                except AudioFault as fault:
                    if config.strict:
                        raise
                    outcome.faults[name] = fault.reason
                    report(0)
        write_json(out / STATE / f"{shard.name}.json", {**asdict(outcome), "of": content})


def _blocks(recording: Recording, sample_rate: int, outcome: Outcome) -> Iterator[np.ndarray]:
    """A recording as blocks of int16. AudioFault, at the end at the latest, if it must not be packed."""
    path = recording.source.path
    if isinstance(recording.header, str):
        raise AudioFault(path, recording.header)
    low, high, clipped = 32767, -32768, 0
    for audio in iter_audio(path, sample_rate):
        block = to_int16(audio)
        low, high = int(block.min(initial=low)), int(block.max(initial=high))
        clipped += int(np.count_nonzero(np.abs(audio) > 1))
        yield block
    if high - low <= 2 * SILENT_PEAK:
        cancel = channels_cancel(path, sample_rate, 2 * SILENT_PEAK)
        raise AudioFault(path, "silent when mixed down: its channels cancel" if cancel else "silent")
    outcome.clipped_samples += clipped
    outcome.most_clipped = max(outcome.most_clipped, (clipped, recording.source.name), key=itemgetter(0))


@contextlib.contextmanager
def _mendable(out: Path) -> Iterator[None]:
    """Makes an InputError of what hinders writing and the user can mend."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    try:
        yield
    except OSError as error:
        if error.errno not in known:
            raise
        raise InputError(f"{out}: {error.strerror}: make room or choose another --out, and run it again") from error
