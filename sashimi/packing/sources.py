"""From a folder or a list of audio files to sources: which files, in which order, and the split of each.

Everything here follows from names alone; no audio is opened.
"""

import itertools
import math
import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from sashimi.errors import InputError
from sashimi.shards import SPLITS

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")
OTHER_EXTENSIONS = (
    ".3gp .aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .m4a .m4b .mka .mp2 .mp4 .oga .opus .snd .sph .spx .tta .w64 "
    ".wave .webm .wma .wv"
).split()
SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class SourceConfig:
    """Which recordings are packed, and which of them train, validate and test."""

    source: str
    """Folder that is searched for wav, flac, ogg and mp3 files, but for hidden files and folders; or a text file that
    names one file a line, relative to its own folder."""
    split: Literal["fractions", "lists", "folders"] = "fractions"
    """How recordings are divided: by `fractions` of the naturally sorted files; by `lists` that name those of valid
    and of test; or by the `folders` train, valid (or validation, val, dev) and test in SOURCE."""
    fractions: tuple[float, float, float] = (88.0, 6.0, 6.0)
    """Percent of the files in train, valid and test, for --split fractions. 0 leaves a split out; training needs train
    and valid."""
    valid_list: str = "validation_list.txt"
    """File that names the recordings of valid, one a line, for --split lists. Its path is relative to SOURCE."""
    test_list: str = "testing_list.txt"
    """The same for test."""
    group_by: str | None = None
    """Keeps files that belong together in one split, for --split fractions: `parent` groups them by folder; anything
    else is a regular expression to be found in the path, and equal first brackets (or equal matches) are a group."""
    labels: str | None = None
    """Classes as zero,one,two: packs only files whose parent folder is one of them, labelled 0, 1, 2 in this order."""

    def __post_init__(self) -> None:
        if not (min(self.fractions) >= 0 and abs(sum(self.fractions) - 100) <= 1e-6):
            raise InputError(f"fractions={list(self.fractions)}: give three percentages that add up to 100")
        if self.group_by is not None and self.split != "fractions":
            raise InputError(f"group_by={self.group_by!r}: goes with split=fractions only; leave one of them out")
        try:
            re.compile(self.group_by or "")
        except re.error as error:
            raise InputError(f"group_by={self.group_by!r}: not a regular expression: {error}") from None
        if "" in self.label_names or len(set(self.label_names)) < len(self.label_names):
            raise InputError(f"labels={self.labels!r}: give different folder names with commas between them")

    @property
    def label_names(self) -> list[str]:
        """The classes in the order of their labels; empty if there are none."""
        return self.labels.split(",") if self.labels is not None else []


class Source(NamedTuple):
    """One recording to be packed."""

    path: Path
    name: str
    """Its path within SOURCE, with slashes: what lists, JSON members and messages say."""
    split: str


def find_sources(config: SourceConfig) -> list[Source]:
    """The recordings in natural order of their names. InputError if there are none, or none for some split."""
    root = Path(config.source)
    files = _search(root) if root.is_dir() else _read_list(root)
    names = sorted(files, key=natural_key)
    if not names:
        remedy = other_formats(config) or "give another folder or list"
        raise InputError(f"{root}: there are no {', '.join(EXTENSIONS)} files in it: {remedy}")
    names = _with_labels(names, config)
    if config.split == "fractions":
        splits = _by_fractions(names, config)
        expected = _expected(config.fractions)
    elif config.split == "lists":
        splits = _by_lists(names, config)
        expected = list(SPLITS)
    else:
        splits = _by_folders(names, root)
        expected = []
    for split in expected:
        if split not in splits.values():
            raise InputError(f"{root}: none of {len(names)} files is left for {split}: {_remedy(names, config)}")
    return [Source(files[name], name, splits[name]) for name in names]


def other_formats(config: SourceConfig) -> str:
    """One line about the audio files in a folder that are of other formats than those we read; "" without any."""
    root, labels = Path(config.source), config.label_names
    files = [path for path in _walk(root) if not labels or path.parent.name in labels] if root.is_dir() else []
    found = Counter(path.suffix.lower() for path in files if path.suffix.lower() in OTHER_EXTENSIONS)
    counts = ", ".join(f"{extension} {count}" for extension, count in found.most_common())
    what = f"{found.total()} files of other formats are left out ({counts}): convert them to flac or wav"
    return what if found else ""


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts "clip2" before "clip10": digits compare as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _search(root: Path) -> dict[str, Path]:
    """Audio files below a folder, by name within it.

    A link that leads nowhere is a file that cannot be read, which shall be said. Names that are not UTF-8 are escaped.
    """
    return {
        os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace"): path
        for path in _walk(root)
        if path.suffix.lower() in EXTENSIONS and (path.is_file() or (path.is_symlink() and not path.exists()))
    }


def _walk(root: Path) -> list[Path]:
    """Files below a folder, but for hidden ones (such as the ._x.wav of macOS) and those in hidden folders (such as
    .Trash-1000). Links are followed, but not to a folder that they lie in.
    """

    def stop(error: OSError) -> None:
        raise error  # what is in a folder that cannot be opened would be missing, and nobody would know

    paths: list[Path] = []
    above = {str(root): {os.path.realpath(root)}}  # of each folder on the way: itself and those that it lies in
    for folder, inner, names in os.walk(root, onerror=stop, followlinks=True):
        paths += [Path(folder) / name for name in names if not name.startswith(".")]
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in inner if not name.startswith(".")}
        inner[:] = [name for name in real if real[name] not in above[folder]]
        above |= {os.path.join(folder, name): above[folder] | {real[name]} for name in inner}
    return paths


def _read_list(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name in _names(path):
        if name in files:
            raise InputError(f"{path}: names {name} twice: remove one")
        files[name] = path.parent / name
    return files


def _names(path: Path) -> list[str]:
    """The lines of a list, `./a.wav` as a.wav, by which names are compared."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows programs put a mark before the first line
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give an existing folder or list file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: give a folder, or a list with one file name a line") from None
    if "\0" in text:
        raise InputError(f"{path}: not a text file: give a folder, or a list with one file name a line")
    return [posixpath.normpath(line.strip()) for line in text.splitlines() if line.strip()]


def _with_labels(names: list[str], config: SourceConfig) -> list[str]:
    if not config.label_names:
        return names
    parents = {parent_name(name) for name in names}
    missing = [label for label in config.label_names if label not in parents]
    if missing:
        raise InputError(
            f"labels: no files in a folder called {', '.join(missing)} in {config.source}: check the spelling"
        )
    return [name for name in names if parent_name(name) in config.label_names]


def parent_name(name: str) -> str:
    """Name of the folder a recording lies in, which is its class; "" at the top."""
    return PurePosixPath(name).parent.name


def _by_fractions(names: list[str], config: SourceConfig) -> dict[str, str]:
    """Cuts the sorted names as the original does, at ⌊88 %⌋ and ⌊94 %⌋; a group goes where its first file goes."""
    groups = _groups(names, config.group_by)
    splits: dict[str, str] = {}
    for members, split in zip(groups, _cut(list(map(len, groups)), config.fractions), strict=True):
        splits |= dict.fromkeys(members, split)
    return splits


def _cut(sizes: list[int], fractions: tuple[float, float, float]) -> list[str]:
    """The split of each group, by the numbers of their files."""
    train, valid, _ = fractions
    bounds = [int(sum(sizes) * percent / 100) for percent in (train, train + valid)]
    places = itertools.accumulate(sizes[:-1], initial=0)
    return [SPLITS[sum(place >= bound for bound in bounds)] for place in places]


def _expected(fractions: tuple[float, float, float]) -> list[str]:
    return [split for split, percent in zip(SPLITS, fractions, strict=True) if percent > 0]


def _remedy(names: list[str], config: SourceConfig) -> str:
    """How to leave no split without files. For groups: the fractions nearest to 60 20 20 that do, if any do."""
    if config.group_by is None:
        return "add files, or divide them otherwise, with --fractions 60 20 20, say, or another --split"
    sizes = list(map(len, _groups(names, config.group_by)))
    few = f"they are {len(sizes)} groups by group_by={config.group_by!r}"
    expected = _expected(config.fractions)
    whole = [(train, valid, 100 - train - valid) for train in range(101) for valid in range(101 - train)]
    for fractions in sorted(whole, key=lambda one: math.dist(one, (60, 20, 20))):
        if _expected(fractions) == expected and set(_cut(sizes, fractions)) == set(expected):
            return f"{few}: add groups, or divide them otherwise, with --fractions {' '.join(map(str, fractions))}, say"
    return f"{few}, which no fractions divide so: add groups, or leave --group-by out"


def _groups(names: list[str], group_by: str | None) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, group_by), []).append(name)
    return list(groups.values())


def _group(name: str, group_by: str | None) -> str:
    if group_by is None:
        return name
    if group_by == "parent":
        return str(PurePosixPath(name).parent)
    match = re.search(group_by, name)
    if match is None:
        raise InputError(f"group_by={group_by!r}: not found in {name}: widen the expression")
    return str(match[1] if match.re.groups else match[0])


def _by_lists(names: list[str], config: SourceConfig) -> dict[str, str]:
    """Official lists, as of Speech Commands; what they do not name is train."""
    root = Path(config.source)
    splits = dict.fromkeys(names, "train")
    for split, file in (("valid", config.valid_list), ("test", config.test_list)):
        path = (root if root.is_dir() else root.parent) / file
        for name in _names(path):
            if config.label_names and parent_name(name) not in config.label_names:
                continue
            if name not in splits:
                raise InputError(f"{path}: names {name}, which is not in {root}: complete the files or mend the list")
            if splits[name] != "train":
                raise InputError(f"{path}: names {name}, which is in {splits[name]} already: mend the lists")
            splits[name] = split
    return splits


def _by_folders(names: list[str], root: Path) -> dict[str, str]:
    splits = {}
    for name in names:
        folder = PurePosixPath(name).parts[0]
        if folder not in SPLIT_OF_FOLDER:
            raise InputError(f"{root}: {name} is in none of the folders {', '.join(SPLIT_OF_FOLDER)}: move it there")
        splits[name] = SPLIT_OF_FOLDER[folder]
    return splits
