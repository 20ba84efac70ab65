"""Whole models with activations in bfloat16 and int8: defaults, one pass and steps, prefill of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoders import assert_same_but_for_roundings, logits_of, write_gguf_experts

from ktmoe_np.models import MoEDecoder, bits_per_token, loss_and_gradients

TEXT = b"And God said, Let there be light: and there was"
OTHER = b"In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "experts.gguf"
    write_gguf_experts(path, {"gate": "q4_0", "up": "f16", "down": "q8_0"})
    return path


def load(gguf_file: Path, **options: Any) -> MoEDecoder:
    return MoEDecoder.from_pretrained(experts_path=gguf_file, **options)


def steps_of(model: MoEDecoder, text: bytes, num_prompt: int = 1) -> Any:
    """The logits of a text whose tokens behind a prompt come one at a time."""
    cache = model.new_cache()
    parts = [text[:num_prompt], *(bytes([token]) for token in text[num_prompt:])]
    return np.concatenate([model.forward([list(part)], [cache])[0] for part in parts])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("BF16", "bfloat16"), ("MOE_INT8", "bfloat16"), ("MOE_INT4", "bfloat16"), ("AMXINT8", "int8")],
)
def test_the_default_is_the_methods_own(method: str, dtype: str) -> None:
    model = MoEDecoder.from_pretrained(method=method)
    assert model.activation_dtypes == [dtype] * 4
    asked = MoEDecoder.from_pretrained(method=method, activation_dtype=dtype)  # type: ignore[call-overload]
    assert logits_of(model, TEXT).tobytes() == logits_of(asked, TEXT).tobytes()
    assert f"{method} with {dtype} activations" in repr(model)


def test_the_default_of_quantized_gguf_types_is_int8(gguf_file: Path) -> None:
    default, int8, bf16 = (
        load(gguf_file, **({} if dtype is None else {"activation_dtype": dtype}))
        for dtype in (None, "int8", ml_dtypes.bfloat16)
    )
    assert default.activation_dtypes == int8.activation_dtypes == ["int8"] * 4
    assert bf16.activation_dtypes == ["bfloat16"] * 4
    assert logits_of(default, TEXT).tobytes() == logits_of(int8, TEXT).tobytes()
    assert logits_of(default, TEXT).tobytes() != logits_of(bf16, TEXT).tobytes()
    assert abs(bits_per_token(default, list(OTHER)) - bits_per_token(bf16, list(OTHER))) < 0.1


def test_gguf_types_that_are_numbers_stay_in_bf16(tmp_path: Path) -> None:
    write_gguf_experts(tmp_path / "experts.gguf", "bf16")
    model = load(tmp_path / "experts.gguf")
    assert model.activation_dtypes == ["bfloat16"] * 4
    assert logits_of(model, TEXT).tobytes() == logits_of(MoEDecoder.from_pretrained(), TEXT).tobytes()


@pytest.mark.parametrize("options", [{"method": "MOE_INT4"}, {"method": "MOE_INT8", "group_size": 32}])
def test_a_text_in_steps_is_the_text_at_once(options: dict[str, Any]) -> None:
    model, long = MoEDecoder.from_pretrained(**options, activation_dtype="int8"), OTHER * 2
    assert_same_but_for_roundings(model, long, steps_of(model, long), logits_of(model, long))


def test_a_gguf_text_in_steps_is_the_text_at_once(gguf_file: Path) -> None:
    model, long = load(gguf_file), OTHER * 2
    assert_same_but_for_roundings(model, long, steps_of(model, long, 20), logits_of(model, long))


def test_the_prompt_may_have_a_dtype_of_its_own() -> None:
    models = {
        (prefill, steps): MoEDecoder.from_pretrained(
            method="MOE_INT4", activation_dtype=steps, prefill_activation_dtype=prefill
        )
        for prefill in ("bfloat16", "int8")
        for steps in ("bfloat16", "int8")
    }  # type: dict[tuple[str, str], MoEDecoder]
    mixed = models["bfloat16", "int8"]
    assert mixed.activation_dtypes == ["int8"] * 4
    first, later = TEXT[:20], TEXT[20:21]
    for (prefill, _), model in models.items():
        assert logits_of(model, first).tobytes() == logits_of(models[prefill, prefill], first).tobytes()
    step = steps_of(mixed, first + later, len(first))[-1]
    others = [models[dtype, dtype] for dtype in ("bfloat16", "int8")]
    assert step.tobytes() not in [
        steps_of(model, first + later, len(first))[-1].tobytes() for model in others
    ]


def test_sequences_that_begin_beside_others_have_their_bits(gguf_file: Path) -> None:
    model = load(gguf_file, prefill_activation_dtype="bfloat16")
    cache, alone = model.new_cache(), steps_of(model, TEXT, len(TEXT) - 1)[-1]
    model.forward([list(TEXT[:-1])], [cache])
    began, step, again = model.forward(
        [list(OTHER), list(TEXT[-1:]), list(OTHER)], [model.new_cache(), cache, model.new_cache()]
    )
    assert step[0].tobytes() == alone.tobytes()
    assert began.tobytes() == again.tobytes() == logits_of(model, OTHER).tobytes()


def test_training_takes_what_the_model_takes(gguf_file: Path) -> None:
    losses = {
        dtype: loss_and_gradients(
            load(gguf_file, mode="sft", lora_rank=2, activation_dtype=dtype), [list(TEXT)]
        ).bits_per_token
        for dtype in ("bfloat16", "int8")
    }
    default = load(gguf_file, mode="sft", lora_rank=2)
    assert default.activation_dtypes == ["int8"] * 4
    assert loss_and_gradients(default, [list(TEXT)]).bits_per_token == losses["int8"] != losses["bfloat16"]
    assert bits_per_token(default, list(TEXT)) == pytest.approx(losses["int8"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_dtype": "int8"}, r"^activation_dtype: got int8, expected bfloat16: bf16 weights"),
        (
            {"activation_dtype": "int4"},
            r"^activation_dtype: got 'int4', expected None, 'bfloat16' or 'int8'$",
        ),
        ({"prefill_activation_dtype": "int8"}, r"^prefill_activation_dtype: got int8, expected bfloat16"),
        ({"prefill_activation_dtype": "int4"}, r"^prefill_activation_dtype: got 'int4', expected None"),
        ({"method": "AMXINT8", "activation_dtype": "bfloat16"}, r"^activation_dtype: got bfloat16.*MOE_INT8"),
    ],
)
def test_dtypes_that_experts_do_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEDecoder.from_pretrained(**options)


def test_what_is_no_dtype() -> None:
    with pytest.raises(
        TypeError, match=r"^prefill_activation_dtype: got 3\.5, expected None, 'bfloat16' or 'int8'$"
    ):
        MoEDecoder.from_pretrained(prefill_activation_dtype=3.5)  # type: ignore[call-overload]


def test_a_loaded_model_changes_its_dtype(gguf_file: Path) -> None:
    model = load(gguf_file)
    model.set_activation_dtype("bfloat16")
    assert model.activation_dtypes == ["bfloat16"] * 4
    bf16 = logits_of(load(gguf_file, activation_dtype="bfloat16"), TEXT)
    assert logits_of(model, TEXT).tobytes() == bf16.tobytes()
    model.set_activation_dtype()
    assert model.activation_dtypes == ["int8"] * 4
    plain = MoEDecoder.from_pretrained()
    with pytest.raises(ValueError, match=r"^activation_dtype: got int8, expected bfloat16: bf16 weights"):
        plain.set_activation_dtype("int8")
    assert plain.activation_dtypes == ["bfloat16"] * 4


def test_layers_say_what_they_can_take(gguf_file: Path) -> None:
    both = ("bfloat16", "int8")
    for options, dtypes in (
        ({"experts_path": gguf_file}, both),
        ({"method": "MOE_INT4"}, both),
        ({"method": "AMXINT8"}, ("int8",)),
        ({"method": "BF16"}, ("bfloat16",)),
    ):  # type: dict[str, Any], tuple[str, ...]
        model = MoEDecoder.from_pretrained(**options)
        assert [experts.activation_dtypes for experts in model.experts] == [dtypes] * 4


@pytest.mark.parametrize(
    ("name", "got", "expected"),
    [("hidden_size", 32, 256), ("num_experts", 8, 16), ("num_experts_per_tok", 2, 4)],
)
def test_experts_of_another_model(name: str, got: int, expected: int, tmp_path: Path) -> None:
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 256, name: got}
    shape = {"E": sizes["num_experts"], "I": 64, "H": sizes["hidden_size"]}
    per_token = sizes["num_experts_per_tok"]
    write_checkpoint(tmp_path, "qwen3_moe", [0], **shape, num_experts_per_tok=per_token)
    with pytest.raises(ValueError, match=rf"{name} of layer 0: got {got}, expected {expected}$"):
        MoEDecoder.from_pretrained(experts_path=tmp_path)
