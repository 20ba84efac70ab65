"""Pictures: fractions of the machine's limits, curves of losses, and bits per byte by method."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.safetensors.writer import replacing
from .progress import EXTRA_HINT
from .table import Row, counted
from .terminal import one_line

__all__ = ["can_draw", "check_plot", "draw_bits", "draw_course", "draw_loss", "draw_plot"]

_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Make sure, before anything takes time, that `draw_plot` will be able to.

    Raises
    ------
    ValueError
        A kind of file that is not drawn.
    FileNotFoundError
        The directory is not there.
    RuntimeError
        Matplotlib is not installed; says how to get it.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--plot: got {path!r}, expected a file ending in {', '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot: the directory of {path!r} does not exist")
    _figure_module()


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure_module() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise RuntimeError(f"--plot: needs matplotlib: {EXTRA_HINT}") from None


def draw_plot(path: str, rows: Sequence[Row], cpu: str) -> None:
    """Draw a group of bars for each instruction set, a bar for each batch size.

    Parameters
    ----------
    path : str
        The file; its ending says of which kind.
    rows : sequence of Row
        Those without a time are left out.
    cpu : str
        The CPU's name, for the title.
    """
    timed = [row for row in rows if row.of_limit is not None]
    isas = list(dict.fromkeys(row.isa for row in timed))
    sizes = sorted({row.tokens for row in timed})
    figure = _figure_module().Figure(figsize=(1.8 + 1.9 * len(isas), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sizes)
    colors = ("#9ecae1", "#4292c6", "#08519c")
    for i, size in enumerate(sizes):
        found = {row.isa: row for row in timed if row.tokens == size}
        at = [isas.index(isa) + (i - (len(sizes) - 1) / 2) * width for isa in found]
        values = [100.0 * (row.of_limit or 0.0) for row in found.values()]
        label = counted(size, "token")
        bars = axes.bar(at, values, width * 0.92, label=label, color=colors[i % len(colors)])
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=8, bbox=_LABEL_BOX)
    axes.axhline(100.0, color="0.3", linewidth=1.0, linestyle="--", zorder=0)
    axes.set_xticks(range(len(isas)), isas)
    axes.set_ylabel("% of the limit")
    axes.set_ylim(0, max(115.0, *(115.0 * (row.of_limit or 0.0) for row in timed)))
    _set_title(axes, f"How close to the limit of memory or arithmetic: {cpu}")
    axes.legend(frameon=False, ncols=len(sizes), loc="upper left", bbox_to_anchor=(0, -0.08))
    _save(path, figure, axes)


def draw_loss(path: str, losses: Sequence[float], reference_losses: Sequence[float]) -> None:
    """Draw losses by step, on a logarithmic scale, and the first ones as the reference has them.

    Parameters
    ----------
    path : str
        The file; its ending says of which kind.
    losses, reference_losses : sequence of float
        From step 1 on.
    """
    figure = _figure_module().Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, len(losses) + 1), losses, color="#08519c", label="engine")
    at = range(1, len(reference_losses) + 1)
    axes.semilogy(at, reference_losses, "o", color="#e6550d", markersize=4, label="NumPy reference")
    _save_curves(path, figure, axes, "loss", "Adapters learn what a teacher's do")


def draw_course(path: str | Path, losses: Sequence[float], held_out: Mapping[int, float], title: str) -> None:
    """Draw bits per byte by step: of each batch before the step, and of a held-out text after some steps.

    Parameters
    ----------
    path : str or path-like
        The file; its ending says of which kind.
    losses : sequence of float
        From step 1 on.
    held_out : mapping of int to float
        Number of steps -> bits per byte.
    title : str
    """
    figure = _figure_module().Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(losses)), losses, color="#9ecae1", linewidth=1.0, label="batches")
    axes.plot(held_out.keys(), held_out.values(), "o-", color="#08519c", markersize=4, label="held-out text")
    for step, bits in (min(held_out.items()), max(held_out.items())):
        axes.annotate(
            f"{bits:.2f}", (step, bits), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    _save_curves(path, figure, axes, "bits per byte", title)


def draw_bits(path: str, bits: Mapping[str, float], title: str) -> None:
    """Draw how many bits per byte each method takes more or fewer than the first.

    Parameters
    ----------
    path : str
        The file; its ending says of which kind.
    bits : mapping of str to float
        Name of a method -> bits per byte.
    title : str
    """
    first, reference = next(iter(bits.items()))
    figure = _figure_module().Figure(figsize=(7.0, 1.2 + 0.4 * len(bits)), layout="constrained")
    axes = figure.subplots()
    excess = [value - reference for value in bits.values()]
    colors = ["#e6550d" if value > 0 else "#4292c6" for value in excess]
    bars = axes.barh(range(len(bits)), excess, color=colors)
    axes.bar_label(bars, [f"{value:.4f}" for value in bits.values()], padding=4, fontsize=8, bbox=_LABEL_BOX)
    axes.axvline(0.0, color="0.3", linewidth=1.0)
    axes.margins(x=0.2)
    axes.set_yticks(range(len(bits)), bits)
    axes.invert_yaxis()
    axes.set_xlabel(f"bits per byte more than with {first}")
    _set_title(axes, title)
    _save(path, figure, axes)


def _save_curves(path: str | Path, figure: Any, axes: Any, what: str, title: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    _set_title(axes, title)
    axes.legend(frameon=False)
    _save(path, figure, axes)


def _set_title(axes: Any, title: str) -> None:
    """Set it as it is: a name in it may have the letters that begin formulas, or no letters at all."""
    axes.set_title(one_line(title), fontsize=11, parse_math=False)


def _save(path: str | Path, figure: Any, axes: Any) -> None:
    """Write the picture, all at once."""
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font does not have are boxes
        figure.savefig(drawn, dpi=150, format=Path(path).suffix[1:].lower())
    with replacing(path) as file:
        file.write(drawn.getbuffer())
