"""Which files are packed, in which order, and into which split."""

import os
import random
import re
from pathlib import Path

import pytest
from conftest import powerless

from sashimi.errors import InputError
from sashimi.packing.sources import SourceConfig, find_sources, natural_key


def touch(root: Path, *names: str) -> None:
    """Empty files: no audio is opened here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def splits(root: Path, **fields: object) -> dict[str, list[str]]:
    """Names by split, in order."""
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for source in find_sources(SourceConfig(str(root), **fields)):  # type: ignore[arg-type]
        assert source.path == root / source.name or root.suffix
        found[source.split].append(source.name)
    return found


def test_natural_order() -> None:
    """Digits compare as numbers, wherever they are. Mutation: `int(part)` -> `part`."""
    expected = "9.wav 10.wav a09b1.wav a9b10.wav a10b2.wav a10b10.wav a.wav a/9.wav a/10.wav b/1.wav".split()
    assert sorted(random.Random(0).sample(expected, len(expected)), key=natural_key) == expected


@pytest.mark.parametrize("count", [50, 100, 133])
def test_fractions_cut_the_sorted_files(tmp_path: Path, count: int) -> None:
    """At ⌊88 %⌋ and ⌊94 %⌋ as in the original. Mutation: `key=natural_key` -> no key."""
    touch(tmp_path, *(f"out{i}.wav" for i in range(count)))
    found = splits(tmp_path)
    bounds = (count * 88 // 100, count * 94 // 100)
    assert found["train"] == [f"out{i}.wav" for i in range(bounds[0])]
    assert found["valid"] == [f"out{i}.wav" for i in range(*bounds)]
    assert found["test"] == [f"out{i}.wav" for i in range(bounds[1], count)]


@pytest.mark.parametrize(
    ("group_by", "group"),
    [
        ("parent", lambda name: name.split("/")[0]),
        (r"take(\d)", lambda name: name.split("take")[1][0]),
        (r"take\d", lambda name: name.split("take")[1][0]),
    ],
)
def test_groups_stay_together(tmp_path: Path, group_by: str, group: object) -> None:
    """In one split, and every file once. Mutation: `return str(match[1] ...)` -> `return name`."""
    touch(tmp_path, *(f"voice{v}/take{t}-{i}.wav" for v in range(8) for t in range(9) for i in range(3)))
    found = splits(tmp_path, group_by=group_by, fractions=(50, 25, 25))
    assert sum(map(len, found.values())) == 8 * 9 * 3
    groups = [{group(name) for name in names} for names in found.values()]  # type: ignore[operator]
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups))
    share = len(found["train"]) / (8 * 9 * 3)
    assert 0.4 < share < 0.7


@pytest.mark.parametrize(
    ("sizes", "fractions"),
    [((10, 10, 10), (60, 20, 20)), ((1, 2, 80, 3), (88, 6, 6)), ((5, 5, 5), (0, 88, 12)), ((1, 9), (95, 5, 0))],
)
def test_groups_that_do_not_fit_the_fractions(tmp_path: Path, sizes: tuple, fractions: tuple) -> None:
    """The fractions that the message proposes fill the splits. Mutations: drop a side of `and` in `_remedy`."""
    touch(tmp_path, *(f"voice{v}/{i}.wav" for v, size in enumerate(sizes) for i in range(size)))
    with pytest.raises(InputError, match=f"they are {len(sizes)} groups by group_by='parent': add groups") as caught:
        splits(tmp_path, group_by="parent", fractions=fractions)
    proposed = re.search(r"with --fractions (\d+) (\d+) (\d+), say$", str(caught.value))
    assert proposed is not None
    found = splits(tmp_path, group_by="parent", fractions=tuple(map(float, proposed.groups())))
    assert [bool(names) for names in found.values()] == [percent > 0 for percent in fractions]


def test_lists_as_of_speech_commands(tmp_path: Path) -> None:
    """Named files; all others train; other classes neither. Mutations: swap the two lists' splits; no `normpath`."""
    touch(tmp_path, "two/a.wav", "two/b.wav", "one/a.wav", "one/b.wav", "one/c.wav", "_noise_/hum.wav")
    (tmp_path / "validation_list.txt").write_text("one/a.wav\n")
    (tmp_path / "testing_list.txt").write_text("./two/b.wav\none//c.wav\n\n")
    train = ["one/b.wav", "two/a.wav"]
    assert splits(tmp_path, split="lists", labels="two,one") == {
        "train": train,
        "valid": ["one/a.wav"],
        "test": ["one/c.wav", "two/b.wav"],
    }
    assert splits(tmp_path, split="lists")["train"] == ["_noise_/hum.wav", *train]


def test_folders(tmp_path: Path) -> None:
    """By the first folder, whatever is below it. Mutation: `parts[0]` -> `parts[-2]`."""
    touch(tmp_path, "train/x/a.wav", "train/b.FLAC", "dev/c.ogg", "test/d.mp3")
    assert splits(tmp_path, split="folders") == {
        "train": ["train/b.FLAC", "train/x/a.wav"],
        "valid": ["dev/c.ogg"],
        "test": ["test/d.mp3"],
    }


def test_what_is_no_audio_is_no_source(tmp_path: Path) -> None:
    """Other and hidden files, hidden folders, folders called x.wav. Mutations: drop either `startswith(".")`."""
    root = tmp_path / ".hidden itself"
    touch(root, "a.wav", "b.txt", "._a.wav", "d.wav/inside.wav", ".Trash-1000/files/gone.wav", "d.wav/.cache/old.wav")
    assert splits(root, fractions=(100, 0, 0))["train"] == ["a.wav", "d.wav/inside.wav"]


def test_names_and_links_that_cannot_be_read(tmp_path: Path) -> None:
    """Are sources too, so that what becomes of them is told. Mutation: only `path.is_file()`; `as_posix()` as it is."""
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).touch()
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    sources = find_sources(SourceConfig(str(tmp_path), fractions=(100, 0, 0)))
    assert [source.name for source in sources] == ["caf\\xe9.wav", "gone.wav"]
    assert sources[0].path.exists()


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """Each way to a file counts once. Mutations: no `followlinks`; no `above` (the walk has no end)."""
    touch(tmp_path, "elsewhere/a.wav", "elsewhere/deep/b.wav", "audio/c.wav")
    (tmp_path / "audio/link").symlink_to("../elsewhere")
    (tmp_path / "audio/self").symlink_to(".")
    (tmp_path / "elsewhere/deep/back").symlink_to("../../audio")
    (tmp_path / "elsewhere/deep/up").symlink_to("..")
    sources = find_sources(SourceConfig(str(tmp_path / "audio"), fractions=(100, 0, 0)))
    assert [source.name for source in sources] == ["c.wav", "link/a.wav", "link/deep/b.wav"]


def test_a_folder_that_cannot_be_opened_is_named(shut_folder: Path) -> None:
    """Rather than go without what is in it. Mutation: no `onerror`."""
    touch(shut_folder.parent, "open/a.wav", "shut/b.wav")
    with powerless(shut_folder), pytest.raises(PermissionError, match="shut"):
        splits(shut_folder.parent)


def test_list_file_as_source(tmp_path: Path) -> None:
    """Paths are relative to the list; its order does not matter. Mutation: `path.parent / name` -> `Path(name)`."""
    touch(tmp_path / "audio", "2.wav", "10.wav", "unlisted.wav")
    (tmp_path / "list.txt").write_text("audio/10.wav\naudio/2.wav\n\n")
    sources = find_sources(SourceConfig(str(tmp_path / "list.txt"), fractions=(100, 0, 0)))
    assert [source.name for source in sources] == ["audio/2.wav", "audio/10.wav"]
    assert all(source.path.exists() for source in sources)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fractions": (90, 6, 6)}, "fractions=[90, 6, 6]: give three percentages"),
        ({"fractions": (88, 6, 6)}, "none of 4 files is left for valid"),
        (
            {"fractions": (60, 20, 20), "group_by": "parent"},
            "they are 2 groups by group_by='parent', which no fractions",
        ),
        ({"group_by": "parent", "split": "folders"}, "group_by='parent': goes with split=fractions only"),
        ({"group_by": "("}, "group_by='(': not a regular expression"),
        ({"group_by": "voice"}, "group_by='voice': not found in one/a.wav"),
        ({"labels": "one,,two"}, "labels='one,,two': give different folder names"),
        ({"labels": "one,tow"}, "no files in a folder called tow"),
        ({"split": "lists"}, "validation_list.txt: No such file or directory"),
        ({"split": "lists", "valid_list": "wrong.txt"}, "wrong.txt: names one/zzz.wav, which is not in"),
        (
            {"split": "lists", "valid_list": "ok.txt", "test_list": "ok.txt"},
            "names one/a.wav, which is in valid already",
        ),
        ({"split": "folders"}, "one/a.wav is in none of the folders train"),
        ({"source": "nowhere"}, "nowhere: No such file or directory"),
        ({"source": "bare"}, "bare: there are no .wav, .flac, .ogg, .mp3 files in it"),
        ({"source": "lossy"}, "lossy: there are no .wav, .flac, .ogg, .mp3 files in it: 1 files of other formats"),
        ({"source": "twice.txt"}, "twice.txt: names one/a.wav twice"),
        ({"source": "binary.txt"}, "binary.txt: not a text file"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, fields: dict, message: str) -> None:
    """That says what to do. Mutation: drop the check."""
    touch(tmp_path, "one/a.wav", "one/b.wav", "two/c.wav", "two/d.wav", "bare/readme.txt", "lossy/a.m4a")
    (tmp_path / "wrong.txt").write_text("one/zzz.wav\n")
    (tmp_path / "ok.txt").write_text("one/a.wav\n")
    (tmp_path / "twice.txt").write_text("one/a.wav\none/a.wav\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    source = str(tmp_path / fields.pop("source", "."))
    with pytest.raises(InputError) as caught:
        find_sources(SourceConfig(source, **fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
