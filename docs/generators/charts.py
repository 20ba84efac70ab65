"""Charts of the records, in colors for light and for dark pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # no display

import matplotlib.pyplot as plt

from .records import Run, compared, read_runs

__all__ = ["CHARTS", "README_FOLDER", "draw", "draw_for_readme", "records_of_readme"]

#: Name of a file -> machine (the start of it), kind, method.
CHARTS = {
    "emerald-rapids-bf16": ("Emerald Rapids", "moe", "BF16"),
    "emerald-rapids-int8": ("Emerald Rapids", "moe", "AMXINT8"),
    "emerald-rapids-q4k": ("Emerald Rapids", "moe", "LLAMAFILE-Q4_K"),
    "emerald-rapids-training": ("Emerald Rapids", "sft", "AMXBF16_SFT"),
    "zen4-bf16": ("Zen 4", "moe", "BF16"),
    "zen4-q4k": ("Zen 4", "moe", "LLAMAFILE-Q4_K"),
}
#: Where the README's chart is stored, and what it has side by side.
README_FOLDER = Path(__file__).resolve().parents[1] / "_static"
_OF_README = {
    "bf16 weights, 16 vCPUs of Emerald Rapids": "emerald-rapids-bf16",
    "Q4_K weights, 2 vCPUs of Zen 4": "zen4-q4k",
}
#: Family of a record, without the instruction set -> its name, color on light, and on dark.
_LINES = {
    "ktmoe": ("ktmoe_np", "#c0392b", "#ff7f6e"),
    "ktmoe bfloat16": ("ktmoe_np, bf16 activations", "#e59866", "#f5b78e"),
    "ktmoe int8": ("ktmoe_np, int8 activations", "#c0392b", "#ff7f6e"),
    "kt-kernel": ("kt-kernel 0.7.2", "#1f618d", "#5dade2"),
    "ggml": ("llama.cpp (ggml)", "#1e8449", "#58d68d"),
    "torch loop": ("torch, a loop over experts", "#7d7d7d", "#a0a0a0"),
    "torch grouped_mm": ("torch, grouped_mm", "#505050", "#cccccc"),
}
_THEMES = {"light": ("#222222", "default"), "dark": ("#dddddd", "dark_background")}


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Write each chart in both themes, where its records are newer."""
    source = max(path.stat().st_mtime for path in (*_records(), Path(__file__)))
    for name in CHARTS:
        run = _run(runs, name)
        for theme in _THEMES:
            path = folder / f"{name}-{theme}.svg"
            if not path.exists() or path.stat().st_mtime < source:
                _save([(run.title, run)], theme, (7.2, 3.6), path)


def records_of_readme() -> str:
    """A digest of the numbers in the README's chart, which the files have in their descriptions."""
    runs = read_runs()
    numbers = [
        {f: {str(t): record["ms"] for t, record in sorted(times.items())} for f, times in run.times.items()}
        for run in (_run(runs, name) for name in _OF_README.values())
    ]
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def draw_for_readme() -> None:
    """Write the README's chart in both themes."""
    runs = read_runs()
    panels = [(title, _run(runs, name)) for title, name in _OF_README.items()]
    for theme in _THEMES:
        _save(panels, theme, (9.6, 3.8), README_FOLDER / f"layer-{theme}.svg", records_of_readme())


def _records() -> list[Path]:
    return list((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*.jsonl"))


def _run(runs: Sequence[Run], name: str) -> Run:
    """The run of a chart: with most numbers of those that are current."""
    machine, kind, method = CHARTS[name]
    found = [r for r in compared(runs, kind) if r.machine.startswith(machine) and r.method == method]
    return max((r for r in found if r.shape == "qwen3"), key=lambda r: len(r.times) * len(r.tokens))


def _save(
    panels: Sequence[tuple[str, Run]],
    theme: str,
    size: tuple[float, float],
    path: Path,
    description: str | None = None,
) -> None:
    ink, style = _THEMES[theme]
    inks = ("axes.edgecolor", "text.color", "xtick.color", "ytick.color", "axes.labelcolor")
    settings = {**dict.fromkeys(inks, ink), "svg.hashsalt": "charts", "svg.fonttype": "none", "font.size": 10}
    with plt.style.context(style), plt.rc_context(settings):
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for ax, (title, run) in zip(axes[0], panels, strict=True):
            _panel(ax, title, run, theme)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Description": description})
        plt.close(figure)


def _panel(axes: Any, title: str, run: Run, theme: str) -> None:
    for family, times in run.times.items():
        first, *rest = family.split()
        key = " ".join([first, *(word for word in rest if word in ("bfloat16", "int8"))])
        label, *colors = _LINES.get(key if first == "ktmoe" else family, (family, "#7d3c98", "#bb8fce"))
        tokens = sorted(times)
        axes.plot(
            tokens,
            [times[t]["ms"] for t in tokens],
            marker="o",
            markersize=4,
            linewidth=2.4 if first == "ktmoe" else 1.2,
            color=colors[list(_THEMES).index(theme)],
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens in a batch", ylabel="ms per layer", title=title)
    axes.set_xticks(run.tokens, [str(t) for t in run.tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
