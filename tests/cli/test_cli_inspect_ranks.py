"""`ktmoe inspect --ranks`: the plan of a model over several machines, as JSON and as text."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from cli_runs import only_error
from converted import said
from inspected import write_gguf

import ktmoe_np.cli.inspect
import ktmoe_np.cli.table
from ktmoe_np.cli import main
from ktmoe_np.distributed.volume import mean_volume

pytestmark = pytest.mark.usefixtures("leave_no_engine")

E, I, H, P = 6, 32, 64, 2  # noqa: E741

#: Of an expert, and of what `write_checkpoint` puts beside those of two layers: embedding, routers, norms.
EXPERT_BYTES = 3 * 2 * I * H
REST_BYTES = 2 * 8 * H + 2 * (4 * E * H + 4 * H)


def has(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    """Let the machine have so much memory."""
    memory = {"total_bytes": total, "available_bytes": None, "limit_bytes": None}
    monkeypatch.setattr(ktmoe_np.cli.inspect, "memory_sizes", lambda: memory)


def plan_of(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert main(["inspect", str(path), "--no-measure", "--json", *more]) == 0
    return json.loads(said(capsys))["plan"]


def test_doctests_of_amounts() -> None:
    assert doctest.testmod(ktmoe_np.cli.table).failed == 0


@pytest.mark.parametrize("placement", ["contiguous", "strided"])
def test_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [1, 2], E=E, I=I, H=H, num_experts_per_tok=P)
    room = 2 * EXPERT_BYTES + REST_BYTES
    has(monkeypatch, room)
    plan = plan_of(tmp_path, capsys, "--ranks=4", f"--placement={placement}")
    assert (plan["num_ranks"], plan["placement"], plan["room_bytes"]) == (4, placement, room)
    assert plan["rest_bytes"] == REST_BYTES
    for rank, count in enumerate((2, 2, 1, 1)):
        experts = 2 * count * EXPERT_BYTES
        assert plan["ranks"][rank] == {
            "rank": rank,
            "num_experts": [count, count],
            "expert_bytes": experts,
            "num_bytes": experts + REST_BYTES,
            "fits_in_memory": count == 1,
        }
    volume = vars(mean_volume([2, 2, 1, 1], P, H))
    assert plan["exchange"] == [{"layer": 1, **volume}, {"layer": 2, **volume}]
    out = volume["sent_bytes"]
    assert plan["token_bytes"]["exact"] == pytest.approx(2 * (out + volume["exact_bytes"]))
    assert plan["token_bytes"]["fast"] == pytest.approx(2 * (out + volume["fast_bytes"]))


def test_without_ranks_there_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    assert plan_of(tmp_path, capsys) is None


def text_of(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["inspect", str(path), "--no-measure", *more]) == 0
    text = said(capsys)
    assert max(map(len, text.splitlines())) <= 98
    return text


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1], E=E, I=I, H=H, num_experts_per_tok=P)
    has(monkeypatch, 50_000)
    lines = text_of(tmp_path, capsys, "--ranks", "4").partition("Plan for ")[2].splitlines()
    assert lines == [
        "4 ranks, contiguous experts",
        "",
        "rank  experts per layer  bytes of experts  bytes in all  fits",
        "-" * 61,
        "   0                  2           49.2 kB       53.8 kB    NO",
        "   1                  2           49.2 kB       53.8 kB    NO",
        "   2                  1           24.6 kB       29.2 kB   yes",
        "   3                  1           24.6 kB       29.2 kB   yes",
        "",
        "Every rank maps its experts and the 4.61 kB of the rest of the model; fits: in 50 kB, as this",
        "machine has for a process.",
        "A token goes to 1.4 other ranks in a layer, expected for random experts, with 1.5 of its slots:",
        "190 B out, and back 384 B with combine='exact' or 358 B with 'fast'; in all layers 1.15 kB or 1.1",
        "kB.",
    ]


def test_text_of_one_rank_and_unknown_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    has(monkeypatch, None)
    text = text_of(tmp_path, capsys, "--ranks=1")
    assert "Plan for 1 rank, contiguous experts" in text
    assert "unknown\n" in text.partition("Plan")[2]
    assert text.endswith("of the rest of the model.\n")


def test_gguf_and_converted(
    source: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, converted = (plan_of(path, capsys, "--ranks=2") for path in (source, target))
    assert converted["rest_bytes"] == whole["rest_bytes"] > 0
    assert converted["ranks"][0]["expert_bytes"] < whole["ranks"][0]["expert_bytes"]
    (target / "model.safetensors").unlink()
    assert plan_of(target, capsys, "--ranks=2")["rest_bytes"] == 0
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf")
    plan = plan_of(tmp_path / "model.gguf", capsys, "--ranks=2")
    assert plan["rest_bytes"] == 4 * 64 * 32
    assert sum(rank["expert_bytes"] for rank in plan["ranks"]) == 2 * 4 * 32 * 64 * (2 * 18 / 32 + 2)


@pytest.mark.parametrize("bad", ["--ranks=0", "--ranks=-1", "--ranks=x", "--ranks=4097", "--placement=x"])
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str) -> None:
    assert main(["inspect", str(tmp_path), bad]) == 2
    assert f"argument {bad.partition('=')[0]}: " in only_error(capsys)


def test_further_layers_are_neither_experts_nor_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1], E=E, I=I, H=H)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    plan = plan_of(tmp_path, capsys, "--ranks=2")
    assert plan["rest_bytes"] == REST_BYTES
    assert [rank["num_experts"] for rank in plan["ranks"]] == [[3], [3]]
