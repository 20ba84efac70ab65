"""Tensor names by layer: the number of an expert, and that only the requested layer is read."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import ktmoe_np.io.layouts.layer_names
from ktmoe_np.io import SafetensorsCheckpoint, load_experts
from ktmoe_np.io.layouts.layer_names import LayerNames


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.layouts.layer_names).failed == 0


@pytest.mark.parametrize(
    ("name", "template", "number"),
    [
        ("mlp.experts.12.w1.weight", "mlp.experts.{e}.w1.weight", 12),
        ("experts.0.w1", "experts.{e}.w1", 0),
        ("mlp.shared_experts.0.w1", "mlp.shared_experts.0.w1", -1),
        ("mlp.shared_experts.0.experts.3.w1", "mlp.shared_experts.0.experts.{e}.w1", 3),
        ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", -1),
        ("mlp.experts.7", "mlp.experts.7", -1),
        ("mlp.experts..w1", "mlp.experts..w1", -1),
        ("mlp.experts.-1.w1", "mlp.experts.-1.w1", -1),
        ("mlp.experts.\N{ARABIC-INDIC DIGIT THREE}.w1", "mlp.experts.\N{ARABIC-INDIC DIGIT THREE}.w1", -1),
        ("mlp.experts.1234567890.w1", "mlp.experts.1234567890.w1", -1),
        ("mlp.experts.123456789.w1", "mlp.experts.{e}.w1", 123456789),
        ("", "", -1),
    ],
)
def test_what_an_experts_number_is(name: str, template: str, number: int) -> None:
    assert LayerNames([f"model.layers.1.{name}"]).of("model.layers.1.") == {template: {number}}


def test_layers_whose_names_begin_alike() -> None:
    heads = ("model.layers.1.", "model.layers.11.", "layers.1.", "mtp.layers.1.")
    names = LayerNames([*(f"{head}{i}" for i, head in enumerate(heads)), "lm_head", "model.layers."])
    assert [names.of(head) for head in heads] == [{str(i): {-1}} for i in range(4)]
    assert set(heads) < set(names.prefixes())
    assert names.of("model.layers.2.") == {}


@given(
    st.lists(
        st.from_regex(r"((model\.|a)?layers\.[01]{1,2}\.)?(a\.)?experts\.[0-9]{0,2}\.?b?", fullmatch=True)
    )
)
def test_nothing_is_lost_and_nothing_is_added(names: list[str]) -> None:
    found = LayerNames(names)
    back = {
        prefix + template.replace("{e}", str(number))
        for prefix in found.prefixes()
        for template, numbers in found.of(prefix).items()
        for number in numbers
    }
    # A number may have been written with zeros before it.
    plain = {re.sub(r"(?<=\bexperts\.)0+(?=[0-9]+\.)", "", name) for name in names if "layers." in name}
    assert back == plain


def test_a_layer_is_found_without_looking_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", range(8), E=2, I=4, H=4)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    asked: list[str] = []
    original = ktmoe_np.io.layouts.layer_names._template
    monkeypatch.setattr(
        ktmoe_np.io.layouts.layer_names, "_template", lambda name: (asked.append(name), original(name))[1]
    )
    load_experts(checkpoint, 3)
    num_names = 2 * 3 + 2
    assert len(asked) == num_names
    load_experts(checkpoint, 3)
    assert len(asked) == num_names
