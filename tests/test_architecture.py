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
    "scan": {"ssm"},
    "order": set(),
    "loss": set(),
    # files and folders, command lines
    "atomic": set(),
    "lock": set(),
    "parsing": set(),
    "packing.parallel": set(),
    # audio and data
    "audio": {"atomic"},
    "shard_writer": {"atomic", "flac", "shards", "split"},
    "remote": set(),
    "store": {"atomic", "remote"},
    "shard_rules": set(),
    "flac": set(),
    "grid": {"order"},
    "shards": {"atomic", "shard_rules", "store"},
    "split": {"flac", "grid", "shard_rules", "shards", "store"},
    "packing.sources": {"shards"},
    "packing.pack": {"atomic", "audio", "lock", "packing.parallel", "packing.sources", "shard_writer", "shards"},
    "packing.verify": {"shards", "split"},
    "packing.report": {"packing.pack", "packing.verify", "shards"},
    "stream": {"audio", "grid", "order", "shards", "split"},
    # the model
    "native.library": {"atomic"},
    "native.activations": set(),
    "native.linear": {"native.activations", "native.library"},
    "native.scan": {"native.library", "ssm"},
    "s4": {"native.scan", "scan", "ssm"},
    "linear": {"native.linear"},
    "layers": {"linear", "s4"},
    "model": {"layers", "linear", "s4"},
    "foreign.legacy": {"layers", "linear", "model", "s4", "ssm"},
    "foreign.translation": {"foreign.legacy", "model", "s4"},
    "foreign.importer": {"foreign.translation", "model"},
    # training and its records
    "optim": set(),
    "tracking": {"atomic", "lock"},
    "model_folder": {"atomic", "audio", "foreign.legacy", "model", "parsing"},
    "checkpoint": {"atomic", "model_folder"},
    "distributed": set(),
    "zero": {"atomic", "distributed"},
    "run_state": {"optim"},
    "objective": {"loss", "model", "order", "s4", "stream"},
    "recording": {"objective"},
    "saver": {
        "atomic",
        "checkpoint",
        "distributed",
        "model",
        "model_folder",
        "objective",
        "optim",
        "run_state",
        "stream",
        "tracking",
        "zero",
    },
    "trainer": {
        "checkpoint",
        "distributed",
        "layers",
        "loss",
        "model",
        "objective",
        "optim",
        "recording",
        "run_state",
        "saver",
        "stream",
        "tracking",
    },
    "config": {"atomic", "audio", "model", "optim", "parsing", "stream", "tracking", "trainer"},
    # sampling
    "native.program": {"layers", "model", "s4"},
    "native.engine": {"model", "native.activations", "native.library", "native.program"},
    "graph": {"layers", "model"},
    "sampler": {"graph", "model", "native.engine"},
    "clips": {"atomic", "audio", "lock", "model", "sampler"},
    # the public names, and folders
    "packing": set(),
    "foreign": set(),
    "native": set(),
    "": {"audio", "model", "model_folder", "sampler"},
}

PROCESSES = {"accelerate", "signal", "torch.distributed"}  # imported by distributed.py alone
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


def name(path: Path) -> str:
    """Dotted name of a module of sashimi/ without "sashimi."; "" for the package itself."""
    return ".".join(path.relative_to(ROOT / "sashimi").with_suffix("").parts).removesuffix("__init__").rstrip(".")


def inside(names: set[str]) -> set[str]:
    """The modules of sashimi/ among dotted names."""
    ours = {dotted.removeprefix("sashimi.") for dotted in names if dotted.startswith("sashimi.")}
    return ours & (ARROWS.keys() | {"errors"}) - {"packing", "foreign", "native"}


@pytest.mark.parametrize("path", modules("sashimi"), ids=name)
def test_imports_run_along_the_arrows(path: Path) -> None:
    """No module imports more of ours than its row says, and none imports launch/ or tools/.

    Mutation: `import sashimi.config` anywhere in sashimi/, at the top or within a function.
    """
    if name(path) == "errors":
        assert not inside(imported(path))
        return
    assert name(path) in ARROWS, f"{path}: give it a row in ARROWS"
    assert inside(imported(path)) - {"errors"} <= ARROWS[name(path)]
    assert not {dotted.partition(".")[0] for dotted in imported(path)} & {"launch", "tools", "tests"}


@pytest.mark.parametrize("path", modules("sashimi"), ids=name)
def test_one_file_asks_about_processes(path: Path) -> None:
    """Ranks, devices, signals and the environment are the business of distributed.py; others are told.

    Mutation: `import signal` or `os.environ` anywhere else in sashimi/.
    """
    if path.stem != "distributed":
        about = {other for other in imported(path) for process in PROCESSES if f"{other}.".startswith(f"{process}.")}
        questions = (asked(path) | imported(path)) & QUESTIONS
        assert not about
        assert not {question for question in questions if (path.stem, question) not in EXCEPTIONS}


def test_deepspeed_is_optional() -> None:
    """One module imports it, where it is used: training with DDP, evaluation and sampling go without.

    Mutation: `import deepspeed` at the top of zero.py, or anywhere else.
    """
    for path in modules("sashimi") + modules("launch") + modules("tools"):
        uses = {dotted for dotted in imported(path) if dotted.partition(".")[0] == "deepspeed"}
        assert not uses or path.name == "zero.py"
        for node in ast.parse(path.read_text()).body:
            assert not isinstance(node, ast.Import | ast.ImportFrom) or "deepspeed" not in ast.unparse(node).split()


def test_the_arrows_have_no_cycle() -> None:
    """And they name modules that exist. Mutation: add "config" to the row of "optim"."""
    assert list(TopologicalSorter(ARROWS).static_order())
    assert {module for row in ARROWS.values() for module in row} <= ARROWS.keys()
    assert ARROWS.keys() | {"errors"} == {name(path) for path in modules("sashimi")}


def test_nothing_imports_a_launcher() -> None:
    """Launchers and tools compose; no file imports another of them, only bench.py its own parts, benchmarks.*.

    Mutation: `import launch.train` in a tool.
    """
    for path in modules("launch") + modules("tools"):
        ours = {file.stem for file in modules("launch") + modules("tools")}
        assert not {dotted.partition(".")[0] for dotted in imported(path)} & (ours | {"launch", "tools"}), path


@pytest.mark.parametrize("path", modules("sashimi"), ids=name)
def test_importing_does_nothing(path: Path) -> None:
    """No work and no print at import: a module's top level defines, and calls nothing for its effect.

    Mutation: print("hello") at the top of any module.
    """
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or not isinstance(node, ast.Expr | ast.For | ast.While | ast.With), ast.unparse(node)
