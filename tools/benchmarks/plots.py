"""Figures as plots, by matplotlib, which only this needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sashimi.errors import InputError

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) of each line, by its name."""


def check_plot(file: str | None) -> None:
    """InputError now, and not after minutes, if this file cannot be plotted into."""
    if file is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f"plot={file}: needs matplotlib, which is not here: pip install matplotlib") from None
    if Path(file).suffix not in (".png", ".svg"):
        raise InputError(f"plot={file}: give a name that ends in .png or .svg")
    if not Path(file).parent.is_dir():
        raise InputError(f"plot={file}: there is no folder {Path(file).parent}; make it first")


def plot(
    file: str, panels: Mapping[str, Lines], x: str, y: str, *, log_x: bool = False, from_zero: bool = False
) -> None:
    """Panels side by side, by their titles. Needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(title=title, xlabel=x, ylabel=y)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    figure.savefig(file, dpi=100, metadata={"Date": None} if file.endswith(".svg") else None)
