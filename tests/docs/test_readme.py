"""The README can be read in a minute, its code runs, and its chart shows what the records say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf_models import write_gguf_model
from mpi import run_ranks

from ktmoe_np.models import EMBEDDED_MODEL

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

#: What a block imports -> the packages that it needs.
_NEEDS = {"jax": ("jax",), "transformers": ("torch", "transformers")}
_RANKS = "mpi4py"


def _here(block: str, gguf: Path) -> str:
    """Code of the README with the packaged model instead of a large one."""
    code = block.replace("/models/Qwen3-30B-A3B-Q4_K_M.gguf", str(gguf))
    return code.replace("/models/Qwen3-30B-A3B", str(EMBEDDED_MODEL))


def _needs(block: str) -> list[str]:
    return [package for word, needed in _NEEDS.items() if f" {word}" in block for package in needed]


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme") / "model.gguf"
    write_gguf_model(EMBEDDED_MODEL, path, experts="q4_0")
    return path


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"block {i}", marks=[pytest.mark.crosscheck] if _needs(block) else [])
        for i, block in enumerate(BLOCKS)
        if _RANKS not in block
    ],
)
def test_code_runs(block: str, gguf_model: Path) -> None:
    for package in _needs(block):
        pytest.importorskip(package)
    names: dict[str, Any] = {}
    exec(_here(BLOCKS[0], gguf_model), names)
    if block != BLOCKS[0]:
        exec(_here(block, gguf_model), names)
    assert names["y"].shape == names["x"].shape


@pytest.mark.mpi
@pytest.mark.subprocess
def test_code_for_ranks_runs(gguf_model: Path, tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if _RANKS in block)
    equal = "whole = moe.forward(x, ids, weights)\nassert (y == whole).all()\nprint('good')\n"
    script = _here(BLOCKS[0], gguf_model) + _here(block, gguf_model) + equal
    ended = run_ranks(2, script, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("good") == 2


def test_every_kind_of_use_has_code() -> None:
    assert "/models/" in BLOCKS[0]
    assert [_needs(block) for block in BLOCKS] == [[], ["jax"], ["torch", "transformers"], []]
    assert [_RANKS in block for block in BLOCKS] == [False, False, False, True]


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 160


def test_what_it_links_to_is_there() -> None:
    paths = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", README)
    links = [first or second for first, second in paths]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_chart_is_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generators.charts import README_FOLDER, records_of_readme

    charts = sorted(README_FOLDER.glob("layer-*.svg"))
    assert [chart.stem for chart in charts] == ["layer-dark", "layer-light"]
    for chart in charts:
        assert records_of_readme() in chart.read_text(), "run: (cd docs; python -m generators)"
