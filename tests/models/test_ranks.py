"""A decoder whose experts lie on several ranks: does it say, and learn, what one process does, to the bit?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import AnyArray, assert_same_bits
from ranks import experts_of, on_ranks

from ktmoe_np.distributed import RankError
from ktmoe_np.distributed.adapters import WholeAdapters
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, bits_per_token, generate, loss_and_gradients
from ktmoe_np.sft import export_peft

TEXT = np.frombuffer(
    b"And God saw the light, that it was good: and God divided the light from the darkness." * 3, np.uint8
)


def model_on(comm: Any, **options: Any) -> MoEDecoder:
    return MoEDecoder.from_pretrained(comm=comm, **options)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("placement", ["contiguous", "strided"])
def test_expectations_and_texts(num_ranks: int, placement: Any) -> None:
    alone = MoEDecoder.from_pretrained()
    expected = bits_per_token(alone, TEXT, window=30, batch=5)
    said = list(generate(alone, b"And God said, ", 12, temperature=0.8, seed=3))

    def rank(comm: Any) -> Any:
        model = model_on(comm, placement=placement)
        assert model.ranks is not None
        assert (model.ranks.rank, model.ranks.size) == (comm.rank, num_ranks)
        bits = bits_per_token(model, TEXT, window=30, batch=5)
        return bits, list(generate(model, b"And God said, ", 12, temperature=0.8, seed=3)), repr(model)

    for bits, text, shown in on_ranks(num_ranks, rank):
        assert (bits, text) == (expected, said)
        assert "16 experts" in shown
    assert alone.ranks is None


def test_stop_tokens_end_all_ranks() -> None:
    said = list(generate(MoEDecoder.from_pretrained(), b"And God said, ", 12))

    def rank(comm: Any) -> list[int]:
        return list(generate(model_on(comm), b"And God said, ", 12, stop=[said[4]]))

    assert on_ranks(2, rank) == [said[: said.index(said[4])]] * 2


@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients(num_ranks: int, num_sequences: int) -> None:
    sequences = [TEXT[7 * i : 7 * i + 20 + i] for i in range(num_sequences)]
    alone = MoEDecoder.from_pretrained(mode="sft", lora_rank=2)
    expected = loss_and_gradients(alone, sequences)

    def rank(comm: Any) -> Any:
        loss = loss_and_gradients(model_on(comm, mode="sft", lora_rank=2), sequences)
        return experts_of("contiguous", 16, comm), loss

    for mine, loss in on_ranks(num_ranks, rank):
        assert (loss.bits_per_token, loss.num_tokens) == (expected.bits_per_token, expected.num_tokens)
        for got, want in zip(loss.layers, expected.layers, strict=True):
            assert got.matrices.keys() == want.matrices.keys()
            for name, value in got.matrices.items():
                assert_same_bits(value, want.matrices[name][mine], name)


def test_adapters_in_files(tmp_path: Any) -> None:
    """What one process has written is read on ranks, and the other way round."""
    alone = MoEDecoder.from_pretrained(mode="sft", lora_rank=2)
    rng = np.random.default_rng(0)
    for experts in alone.trained_experts():
        changed = {n: rng.standard_normal(v.shape, np.float32) / 20 for n, v in experts.lora_weights.items()}
        experts.update_lora_weights(**changed)
    export_peft(tmp_path / "alone", alone.trained_experts(), base_model_name_or_path=EMBEDDED_MODEL)  # type: ignore[arg-type]
    expected = bits_per_token(alone, TEXT, window=60)

    def rank(comm: Any) -> float:
        model = model_on(comm, adapter=tmp_path / "alone")
        whole = [
            WholeAdapters(experts, experts.gather_experts(experts.lora_weights))  # type: ignore[arg-type, union-attr]
            for experts in model.trained_experts()
        ]
        if comm.rank == 1:
            export_peft(tmp_path / "ranks", whole, base_model_name_or_path=EMBEDDED_MODEL)
        return bits_per_token(model, TEXT, window=60)

    assert on_ranks(3, rank) == [expected] * 3
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("alone", "ranks")]
    assert files[0] == files[1]


def test_arrays_of_other_experts() -> None:
    def rank(comm: Any) -> str:
        experts = model_on(comm, mode="sft", lora_rank=2).trained_experts()[0]
        arrays: dict[str, AnyArray] = {"x": np.zeros((8 + comm.rank, 3), np.float32)}
        with pytest.raises(RankError) as found:
            experts.gather_experts(arrays)  # type: ignore[union-attr]
        return str(found.value)

    assert on_ranks(2, rank) == ["rank 1: ValueError: x: got 9 experts, expected 8, this rank's"] * 2


def test_what_ranks_cannot_mix() -> None:
    def rank(comm: Any) -> str:
        with pytest.raises(ValueError, match="prefill_activation_dtype") as found:
            model_on(comm, method="MOE_INT8", prefill_activation_dtype="int8")
        return str(found.value)

    expected = (
        "prefill_activation_dtype: got 'int8', expected 'bfloat16' as in later steps: calls of ranks are of "
        "different sequences"
    )
    assert on_ranks(2, rank) == [expected] * 2


def test_no_sequences() -> None:
    """Of one rank is fine; of all of them in a step is an error, as in one process."""

    def rank(comm: Any) -> int:
        model = model_on(comm, mode="sft", lora_rank=2)
        with pytest.raises(ValueError, match="sequences: got shapes"):
            loss_and_gradients(model, [])
        return loss_and_gradients(model, [TEXT[:9]]).num_tokens

    assert on_ranks(2, rank) == [8, 8]
