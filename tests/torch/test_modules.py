"""Experts as modules, and in the place of those of models: what torch and transformers do with modules."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from layers import assert_same_bits
from sft_layers import Student, draw_student, draw_training

torch = pytest.importorskip("torch")

from ktmoe_np.sft import export_peft, peft_scale  # noqa: E402
from ktmoe_np.torch import MoEExperts, lora_parameters, moe_forward, moe_sft  # noqa: E402
from ktmoe_np.torch.modules import SeparateExperts  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, R, P, T = 3, 45, 70, 4, 2, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R)


@pytest.fixture
def arrays(student: Student) -> list[Any]:
    batch, _ = draw_training(np.random.default_rng(2), student, T, P)
    return [of_torch(array) for array in batch]


@pytest.fixture
def experts(student: Student) -> MoEExperts:
    return MoEExperts(student.wrapper(P))


def test_a_module_for_training(student: Student, experts: MoEExperts, arrays: list[Any]) -> None:
    sft = student.wrapper(P)
    out = numpy_of(experts(*arrays).detach())
    assert_same_bits(out, numpy_of(moe_sft(sft, lora_parameters(sft), *arrays).detach()))
    assert {name for name, _ in experts.named_parameters()} == {f"lora.{name}" for name in student.lora}
    assert repr(experts).startswith("MoEExperts(\n  NativeSFTMoEWrapper layer 0: ")


def test_a_module_for_inference(student: Student, arrays: list[Any]) -> None:
    moe = student.layer.wrapper(P)
    experts = MoEExperts(moe)
    assert not list(experts.parameters())
    assert_same_bits(numpy_of(experts(*arrays)), moe.forward(*map(numpy_of, arrays)))


def test_a_layer_that_defers_experts_is_refused(student: Student, arrays: list[Any]) -> None:
    moe = student.layer.wrapper(P, max_deferred_experts_per_token=1)
    for call in (lambda: MoEExperts(moe), lambda: moe_forward(moe, *arrays)):
        with pytest.raises(
            ValueError, match="moe: got max_deferred_experts_per_token 1, expected 0 under torch"
        ):
            call()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_ids_of_other_experts_are_skipped(student: Student, arrays: list[Any], dtype: str) -> None:
    x, ids, weights = arrays
    experts, elsewhere = MoEExperts(student.layer.wrapper(P)), ids.clone()
    elsewhere[:, 0] = -1
    skipped = ids.clone()
    skipped[:, 0] = E  # as transformers marks experts of other ranks
    out = experts(x, skipped.to(getattr(torch, dtype)), weights)
    assert_same_bits(numpy_of(out), numpy_of(experts(x, elsewhere, weights)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_outputs_have_the_dtype_of_the_input(experts: MoEExperts, arrays: list[Any], dtype: str) -> None:
    x, ids, weights = arrays
    kind = getattr(torch, dtype)
    y = experts(x.to(kind), ids, weights.to(kind))
    assert y.dtype is kind
    assert y.isfinite().all()
    y.float().sum().backward()


def test_sentinels_are_skipped(experts: MoEExperts, arrays: list[Any]) -> None:
    x, ids, weights = arrays
    skipped, elsewhere = ids.clone(), ids.clone()
    skipped[:, 1], elsewhere[:, 1] = -1, E
    elsewhere[0, 1] = E + 5
    assert torch.equal(experts(x, elsewhere, weights), experts(x, skipped, weights))


def test_copies_share_the_layer_and_have_their_own_adapters(experts: MoEExperts, arrays: list[Any]) -> None:
    other = copy.deepcopy(experts)
    assert other.layer is experts.layer
    before = experts(*arrays)
    with torch.no_grad():
        for p in other.lora.values():
            p.mul_(2)
    assert torch.equal(experts(*arrays), before)
    changed = other(*arrays)
    assert not torch.equal(changed, before)
    changed.float().sum().backward()
    before.float().sum().backward()
    for name, p in experts.lora.items():
        assert not torch.equal(p.grad, other.lora[name].grad)


def test_adapters_are_the_state(student: Student, experts: MoEExperts, arrays: list[Any]) -> None:
    with torch.no_grad():
        for p in experts.lora.values():
            p.add_(0.25)
    other = MoEExperts(student.wrapper(P))
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(*arrays), experts(*arrays))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_layer_gets_the_adapters_of_the_module(experts: MoEExperts, tmp_path: Path, dtype: str) -> None:
    experts.to(getattr(torch, dtype))
    with torch.no_grad():
        for p in experts.lora.values():
            p.add_(0.25)
    layer = experts.update_layer()
    for name, p in experts.lora.items():
        np.testing.assert_array_equal(layer.lora_weights[name].astype(np.float32), numpy_of(p.float()))
    export_peft(tmp_path, [layer])
    assert peft_scale(tmp_path)[0] == R


def test_a_layer_for_inference_gets_none(student: Student) -> None:
    with pytest.raises(TypeError, match=r"^layer: got NativeMoEWrapper, expected one of mode 'sft'$"):
        MoEExperts(student.layer.wrapper(P)).update_layer()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_moves_to_other_dtypes(experts: MoEExperts, arrays: list[Any], dtype: str) -> None:
    kind = getattr(torch, dtype)
    before = experts(*arrays)
    experts.to(kind)
    y = experts(*arrays)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, before, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert {p.grad.dtype for p in experts.lora.values()} == {kind}


def test_a_module_is_not_pickled(experts: MoEExperts) -> None:
    with pytest.raises(TypeError, match=r"^MoEExperts: got layer 0 to be pickled, expected a state_dict: "):
        pickle.dumps(experts)


def test_layers_that_are_refused(student: Student) -> None:
    wrong: Any = object()
    with pytest.raises(TypeError, match=r"^layer: got object, expected one that KTMoEWrapper makes$"):
        MoEExperts(wrong)
    with pytest.raises(ValueError, match=r"^layer: got lora_dropout 0.5, expected 0$"):
        MoEExperts(student.wrapper(P, lora_dropout=0.5))


def test_experts_one_by_one(experts: MoEExperts, arrays: list[Any]) -> None:
    """A block that picks rows itself gives what one call does, but for the rounding of each expert."""
    x, ids, weights = arrays
    separate = SeparateExperts(experts)
    assert len(separate) == E
    out = torch.zeros((T, H))
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, separate[e](x[tokens]).float() * weights[tokens, slots, None])
    torch.testing.assert_close(out.bfloat16(), experts(*arrays), rtol=0.02, atol=0.02)
    with pytest.raises(IndexError, match=re.escape(f"experts: got {E}, expected one of {E}")):
        separate[E]


def test_experts_are_iterated_over(experts: MoEExperts) -> None:
    assert len(list(SeparateExperts(experts))) == E
