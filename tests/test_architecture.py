"""Imports run one way: mathematics and I/O know nothing of configs, ranks or training; only launch/ composes."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each module of sashimi/ may import of sashimi/, beside `errors`; a new module needs its row.
ARROWS: dict[str, set[str]] = {
    # mathematics
    "keops": set(),
    "ssm": {"keops"},
    "order": set(),
    "loss": set(),
    # files and folders, command lines
    "atomic": set(),
    "parsing": set(),
    "parallel": set(),
    # audio and data
    "audio": {"atomic"},
    "shard_writer": {"atomic"},
    "shards": {"atomic", "shard_writer"},
    "sources": {"shards"},
    "packing": {"atomic", "audio", "parallel", "shard_writer", "shards", "sources"},
    "verifying": {"shards"},
    "reports": {"packing", "shards", "verifying"},
    "stream": {"audio", "order", "shards"},
    # the model
    "s4": {"ssm"},
    "layers": {"s4"},
    "model": {"layers", "s4"},
    "legacy": {"layers", "model", "s4", "ssm"},
    "translation": {"legacy", "model", "s4"},
    "importer": {"model", "translation"},
    # training and its records
    "optim": set(),
    "tracking": {"atomic"},
    "checkpoint": {"atomic", "legacy", "model", "parsing"},
    "distributed": set(),
    "trainer": {"checkpoint", "distributed", "loss", "optim", "stream", "tracking"},
    "config": {"atomic", "audio", "model", "optim", "parsing", "stream", "tracking", "trainer"},
    # sampling
    "sampler": {"model"},
    "clips": {"atomic", "audio", "model", "sampler"},
    # the public names
    "__init__": {"audio", "checkpoint", "model", "sampler"},
}

PROCESSES = {"accelerate", "deepspeed", "signal", "torch.distributed"}  # imported by distributed.py alone
QUESTIONS = {  # asked by distributed.py alone
    "os.environ",
    "os.getenv",
    "torch.distributed",
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.cuda.current_device",
}
EXCEPTIONS = {("keops", "os.environ")}  # where PyKeOps keeps what it has compiled


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` is a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def asked(path: Path) -> set[str]:
    """Dotted names of all attributes that a file reads."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def inside(names: set[str]) -> set[str]:
    """The modules of sashimi/ among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("sashimi.")} & (ARROWS.keys() | {"errors"})


@pytest.mark.parametrize("path", modules("sashimi"), ids=lambda path: path.stem)
def test_imports_run_along_the_arrows(path: Path) -> None:
    """No module imports more of ours than its row says, and none imports launch/ or tools/.

    Mutation: `import sashimi.config` anywhere in sashimi/, at the top or within a function.
    """
    if path.stem == "errors":
        assert not inside(imported(path))
        return
    assert path.stem in ARROWS, f"{path.name}: give it a row in ARROWS"
    assert inside(imported(path)) - {"errors"} <= ARROWS[path.stem]
    assert not {name.partition(".")[0] for name in imported(path)} & {"launch", "tools", "tests"}


@pytest.mark.parametrize("path", modules("sashimi"), ids=lambda path: path.stem)
def test_one_file_asks_about_processes(path: Path) -> None:
    """Ranks, devices, signals and the environment are the business of distributed.py; others are told.

    Mutation: `import signal` or `os.environ` anywhere else in sashimi/.
    """
    if path.stem != "distributed":
        about = {name for name in imported(path) for process in PROCESSES if f"{name}.".startswith(f"{process}.")}
        questions = (asked(path) | imported(path)) & QUESTIONS
        assert not about
        assert not {question for question in questions if (path.stem, question) not in EXCEPTIONS}


def test_the_arrows_have_no_cycle() -> None:
    """And they name modules that exist. Mutation: add "config" to the row of "optim"."""
    assert list(TopologicalSorter(ARROWS).static_order())
    assert {name for row in ARROWS.values() for name in row} <= ARROWS.keys()
    assert ARROWS.keys() | {"errors"} == {path.stem for path in modules("sashimi")}


def test_nothing_imports_a_launcher() -> None:
    """Launchers and tools compose; no file imports another of them. Mutation: `import launch.train` in a tool."""
    for path in modules("launch") + modules("tools"):
        ours = {file.stem for file in modules("launch") + modules("tools")}
        assert not {name.partition(".")[0] for name in imported(path)} & (ours | {"launch", "tools"}), path


@pytest.mark.parametrize("path", modules("sashimi"), ids=lambda path: path.stem)
def test_importing_does_nothing(path: Path) -> None:
    """No work and no print at import: a module's top level defines, and calls nothing for its effect.

    Mutation: print("hello") at the top of any module.
    """
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or not isinstance(node, ast.Expr | ast.For | ast.While | ast.With), ast.unparse(node)
