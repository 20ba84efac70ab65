"""Charts of the records, in colors for light and for dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no display

import matplotlib.pyplot as plt

from .records import Run, compared

__all__ = ["CHARTS", "draw"]

#: Name of a file -> machine (the start of it), kind, method, and what the page says of it.
CHARTS = {
    "emerald-rapids-bf16": ("Emerald Rapids", "moe", "BF16"),
    "emerald-rapids-int8": ("Emerald Rapids", "moe", "AMXINT8"),
    "emerald-rapids-q4k": ("Emerald Rapids", "moe", "LLAMAFILE-Q4_K"),
    "emerald-rapids-training": ("Emerald Rapids", "sft", "AMXBF16_SFT"),
    "zen4-bf16": ("AMD EPYC", "moe", "BF16"),
    "zen4-q4k": ("AMD EPYC", "moe", "LLAMAFILE-Q4_K"),
}

_THEMES = {"light": ("#222222", "default"), "dark": ("#dddddd", "dark_background")}


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Write each chart in both themes, where its records are newer."""
    source = max(p.stat().st_mtime for p in (*_records(), Path(__file__)))
    for name, (machine, kind, method) in CHARTS.items():
        found = [r for r in compared(runs, kind) if r.machine.startswith(machine) and r.method == method]
        run = next(r for r in found if r.shape == "qwen3")
        for theme in _THEMES:
            path = folder / f"{name}-{theme}.svg"
            if not path.exists() or path.stat().st_mtime < source:
                _chart(run, theme, path)


def _records() -> list[Path]:
    return list((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*.jsonl"))


def _chart(run: Run, theme: str, path: Path) -> None:
    ink, style = _THEMES[theme]
    colors = {
        "axes.edgecolor": ink,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.labelcolor": ink,
    }
    with plt.style.context(style), plt.rc_context({**colors, "svg.hashsalt": "charts", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        for name, times in run.times.items():
            tokens = sorted(times)
            width = 2.4 if name.startswith("ktmoe") else 1.2
            axes.plot(
                tokens,
                [times[t]["ms"] for t in tokens],
                marker="o",
                markersize=4,
                linewidth=width,
                label=name,
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens in a batch", ylabel="ms", title=run.title)
        axes.set_xticks(run.tokens, [str(t) for t in run.tokens])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
