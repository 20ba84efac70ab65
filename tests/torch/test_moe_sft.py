"""Layers as operators of torch: their bits and gradients are those of the NumPy calls."""

from __future__ import annotations

import doctest
import gc
import re
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

torch = pytest.importorskip("torch")

import ktmoe_np.torch  # noqa: E402
from ktmoe_np import KTMoEWrapper  # noqa: E402
from ktmoe_np import kt_kernel_ext as ext  # noqa: E402
from ktmoe_np.torch import lora_parameters, moe_forward, moe_sft  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, R, P, T = 3, 45, 70, 4, 2, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R)


def drawn(student: Student, seed: int = 2, tokens: int = T) -> tuple[list[Any], Any]:
    """Hidden states, ids and weights, and the gradient of the output, as tensors."""
    batch, grad_output = draw_training(np.random.default_rng(seed), student, tokens, P)
    return [of_torch(array) for array in batch], of_torch(grad_output)


def expected(student: Student, arrays: list[Any], grad_output: Any) -> tuple[Any, Any]:
    """The output and the gradients, from NumPy."""
    sft = student.wrapper(P)
    out = sft.forward_sft(*map(numpy_of, arrays))
    return out, sft.backward(numpy_of(grad_output))


def leaves(arrays: list[Any]) -> list[Any]:
    """Hidden states and weights that require grad."""
    x, ids, weights = (array.clone() for array in arrays)
    return [x.requires_grad_(), ids, weights.requires_grad_()]


def assert_gradients(arrays: list[Any], lora: dict[str, Any], gradients: Any, times: int = 1) -> None:
    x, _, weights = arrays
    found = {"grad_input": x.grad, "grad_weights": weights.grad, **{n: p.grad for n, p in lora.items()}}
    wanted = {
        "grad_input": gradients.grad_input,
        "grad_weights": gradients.grad_weights,
        **gradients.matrices,
    }
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same_bits(numpy_of(found[name]), times * gradient, name)


def test_doctests() -> None:
    pytest.importorskip("transformers")
    package = ktmoe_np.torch
    for module in (package, package.calls, package.modules, package.replace):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


# ---- the bits ----


@pytest.mark.parametrize("tokens", [0, 1, T, 33])
def test_outputs_and_gradients_are_those_of_numpy(student: Student, tokens: int) -> None:
    arrays, grad_output = drawn(student, tokens=tokens)
    out, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch)
    assert y.dtype is torch.bfloat16
    assert_same_bits(numpy_of(y), out)
    y.backward(grad_output)
    assert_gradients(batch, lora, gradients)


@pytest.mark.parametrize("activation", ["relu2", "swigluoai"])
def test_layers_with_and_without_a_gate(activation: str) -> None:
    student = draw_student(np.random.default_rng(3), (E, I, H), R, activation)
    arrays, grad_output = drawn(student)
    _, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    moe_sft(sft, lora, *batch).backward(grad_output)
    assert_gradients(batch, lora, gradients)


def test_leading_axes(student: Student) -> None:
    arrays, grad_output = drawn(student)
    out, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves([array.reshape(2, 3, -1) for array in arrays])
    y = moe_sft(sft, lora, *batch)
    assert_same_bits(numpy_of(y), out.reshape(2, 3, H))
    y.backward(grad_output.reshape(2, 3, H))
    assert_same_bits(numpy_of(batch[0].grad), gradients.grad_input.reshape(2, 3, H))
    assert_same_bits(numpy_of(batch[2].grad), gradients.grad_weights.reshape(2, 3, P))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_have_the_dtypes_of_their_tensors(student: Student, dtype: str) -> None:
    kind = getattr(torch, dtype)
    arrays, grad_output = drawn(student)
    _, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora = {name: torch.nn.Parameter(p.to(kind)) for name, p in lora_parameters(sft).items()}
    x, ids, weights = arrays
    batch = leaves([x.float().to(kind), ids.int(), weights.double()])
    moe_sft(sft, lora, *batch).backward(grad_output)
    assert (batch[0].grad.dtype, batch[2].grad.dtype) == (kind, torch.float64)
    assert {p.grad.dtype for p in lora.values()} == {kind}
    if dtype == "float32":
        np.testing.assert_array_equal(batch[0].grad.numpy(), gradients.grad_input.astype(np.float32))


def test_any_of_the_inputs_may_require_grad(student: Student) -> None:
    arrays, grad_output = drawn(student)
    _, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    frozen = {name: p.detach() for name, p in lora_parameters(sft).items()}
    x, ids, weights = leaves(arrays)
    moe_sft(sft, frozen, x, ids, weights.detach()).backward(grad_output)
    assert_same_bits(numpy_of(x.grad), gradients.grad_input)
    moe_sft(sft, frozen, x.detach(), ids, weights).backward(grad_output)
    assert_same_bits(numpy_of(weights.grad), gradients.grad_weights)
    one = dict(frozen, down_lora_b=torch.nn.Parameter(frozen["down_lora_b"]))
    moe_sft(sft, one, *arrays).backward(grad_output)
    assert_same_bits(numpy_of(one["down_lora_b"].grad), gradients.down_lora_b)


def test_int8_activations_are_repeated_in_the_backward_pass() -> None:
    student = draw_student(np.random.default_rng(5), (E, 64, 64), R, method=("MOE_INT8_SFT", None))
    arrays, grad_output = drawn(student)
    sft, again = student.wrapper(P), student.wrapper(P)
    out = again.forward_sft(*map(numpy_of, arrays), activation_dtype="int8")
    gradients = again.backward(numpy_of(grad_output))
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch, activation_dtype="int8")
    moe_sft(sft, lora, *batch)  # takes the place of the saved pass
    y.backward(grad_output)
    assert_same_bits(numpy_of(y), out)
    assert_gradients(batch, lora, gradients)


# ---- saved passes ----


def test_passes_go_back_in_any_order(student: Student) -> None:
    sft = student.wrapper(P)
    lora = lora_parameters(sft)
    drawings = [drawn(student, seed, tokens) for seed, tokens in ((2, 6), (3, 6), (4, 9))]
    batches = [leaves(arrays) for arrays, _ in drawings]
    outs = [moe_sft(sft, lora, *batch) for batch in batches]
    for i in (1, 0, 2):
        arrays, grad_output = drawings[i]
        for p in lora.values():
            p.grad = None
        outs[i].backward(grad_output)
        assert_gradients(batches[i], lora, expected(student, arrays, grad_output)[1])


def test_a_pass_has_the_adapters_that_it_was_called_with(student: Student) -> None:
    arrays, grad_output = drawn(student)
    out, gradients = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch)
    others = {name: p.detach() * 2 for name, p in lora.items()}
    assert not np.array_equal(numpy_of(moe_sft(sft, others, *arrays)), out)
    y.backward(grad_output)
    assert_gradients(batch, lora, gradients)


def test_retain_graph(student: Student) -> None:
    arrays, grad_output = drawn(student)
    gradients = expected(student, arrays, grad_output)[1]
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch)
    y.backward(grad_output, retain_graph=True)
    y.backward(grad_output)
    for name, matrix in gradients.matrices.items():
        assert_same_bits(numpy_of(lora[name].grad), 2 * matrix, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(student: Student, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    arrays, grad_output = drawn(student)
    gradients = expected(student, arrays, grad_output)[1]
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)

    def block(*tensors: Any) -> Any:
        return moe_sft(sft, lora, *tensors)

    checkpoint(block, *batch, use_reentrant=reentrant).backward(grad_output)
    assert_gradients(batch, lora, gradients)


def test_nothing_is_saved_without_a_gradient(student: Student) -> None:
    arrays, grad_output = drawn(student)
    out, _ = expected(student, arrays, grad_output)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = moe_sft(sft, lora, *batch)
        assert not y.requires_grad
        assert_same_bits(numpy_of(y), out)
    moe_sft(sft, {name: p.detach() for name, p in lora.items()}, *arrays)
    assert sft.num_cached == 0
    moe_sft(sft, lora, *batch)
    assert sft.num_cached == 1


def test_passes_of_the_layer_itself_are_not_mistaken(student: Student) -> None:
    arrays, grad_output = drawn(student)
    gradients = expected(student, arrays, grad_output)[1]
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch)
    sft.clear_cache()
    other, _ = drawn(student, seed=9)
    sft.forward_sft(*map(numpy_of, other))
    y.backward(grad_output)
    assert_gradients(batch, lora, gradients)


def test_masked_experts(student: Student) -> None:
    mask = np.array([False, True, False])
    arrays, grad_output = drawn(student)
    plain = student.wrapper(P, gpu_experts_mask=mask)
    out, gradients = plain.forward_sft(*map(numpy_of, arrays)), plain.backward(numpy_of(grad_output))
    sft = student.wrapper(P, gpu_experts_mask=mask)
    lora, batch = lora_parameters(sft), leaves(arrays)
    y = moe_sft(sft, lora, *batch)
    assert_same_bits(numpy_of(y), out)
    y.backward(grad_output)
    assert_gradients(batch, lora, gradients)


# ---- what torch does with operators ----


def test_the_operator_is_as_torch_expects(student: Student) -> None:
    arrays, _ = drawn(student)
    sft = student.wrapper(P)
    lora = list(lora_parameters(sft).values())
    x, ids, weights = leaves(arrays)
    # The number of a pass is another in every call, so results are compared by the tests above.
    for name in ("test_schema", "test_faketensor"):
        torch.library.opcheck(
            torch.ops.ktmoe_np.moe_sft.default,
            (sft.number, x.detach(), ids, weights.detach(), [p.detach() for p in lora], True, None),
            test_utils=name,
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_programs_have_one_graph(student: Student, backend: str) -> None:
    arrays, grad_output = drawn(student)
    sft = student.wrapper(P)
    lora, batch = lora_parameters(sft), leaves(arrays)

    def program(x: Any, ids: Any, weights: Any) -> Any:
        return moe_sft(sft, lora, x, ids, weights) * 2

    plain = program(*batch)
    plain.backward(grad_output)
    wanted = [batch[0].grad, batch[2].grad, *(p.grad for p in lora.values())]
    again = leaves(arrays)
    for p in lora.values():
        p.grad = None
    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    y = compiled(*again)
    assert_same_bits(numpy_of(y), numpy_of(plain))
    y.backward(grad_output)
    found = [again[0].grad, again[2].grad, *(p.grad for p in lora.values())]
    for one, other in zip(found, wanted, strict=True):
        assert_same_bits(numpy_of(one), numpy_of(other))


# ---- inference ----


def test_forward_passes_of_inference(student: Student) -> None:
    moe = student.layer.wrapper(P)
    arrays, _ = drawn(student)
    out = moe.forward(*map(numpy_of, arrays))
    assert_same_bits(numpy_of(moe_forward(moe, *arrays)), out)
    lead = [array.reshape(2, 3, -1) for array in arrays]
    assert_same_bits(numpy_of(moe_forward(moe, *lead)), out.reshape(2, 3, H))
    with pytest.raises(TypeError, match=r"^moe_forward: got tensors that require grad, expected none: moe"):
        moe_forward(moe, *leaves(arrays))
    with torch.no_grad():
        assert_same_bits(numpy_of(moe_forward(moe, *leaves(arrays))), out)


# ---- errors ----


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "x, float64": (
        lambda a: a.update(x=a["x"].double()),
        TypeError,
        "hidden_states: got torch.float64 [6, 70], expected bfloat16, float32 or float16",
    ),
    "x, width": (
        lambda a: a.update(x=a["x"][:, 1:]),
        ValueError,
        "hidden_states: got shape [6, 69], expected [..., 70]",
    ),
    "ids, floats": (
        lambda a: a.update(ids=a["ids"] * 1.0),
        TypeError,
        "topk_ids: got torch.float32 [6, 2], expected integers",
    ),
    "ids, tokens": (
        lambda a: a.update(ids=a["ids"][1:]),
        ValueError,
        "topk_ids: got shape [5, 2], expected [6, 2]",
    ),
    "ids, beyond int64": (
        lambda a: a.update(ids=torch.from_numpy(np.full((T, P), 2**63 + 5, np.uint64))),
        IndexError,
        "topk_ids: got expert ",
    ),
    "x, a list": (
        lambda a: a.update(x=a["x"].tolist()),
        TypeError,
        "hidden_states: got list, expected a tensor",
    ),
    "x, NumPy's": (
        lambda a: a.update(x=a["x"].float().detach().numpy()),
        TypeError,
        "hidden_states: got ndarray, expected a tensor",
    ),
    "weights, NumPy's": (
        lambda a: a.update(w=a["w"].detach().numpy()),
        TypeError,
        "topk_weights: got ndarray, expected a tensor",
    ),
    "lora, a list": (
        lambda a: a.update(lora=list(a["lora"].values())),
        TypeError,
        "lora: got list, expected a mapping of names to adapters",
    ),
    "lora, NumPy's": (
        lambda a: a["lora"].update(up_lora_b=a["lora"]["up_lora_b"].detach().numpy()),
        TypeError,
        "up_lora_b: got ndarray, expected a tensor",
    ),
    "ids, experts": (lambda a: a.update(ids=a["ids"] + E), IndexError, "topk_ids: got expert "),
    "weights, integers": (
        lambda a: a.update(w=a["w"].int()),
        TypeError,
        "topk_weights: got torch.int32 [6, 2], expected floats",
    ),
    "weights, device": (
        lambda a: a.update(w=a["w"].to("meta")),
        TypeError,
        "topk_weights: got a tensor on meta, expected cpu",
    ),
    "lora, missing": (
        lambda a: a["lora"].pop("up_lora_b"),
        ValueError,
        f"lora: got no 'up_lora_b', expected float32 or bfloat16 [{E}, {I}, {R}]",
    ),
    "lora, unknown": (
        lambda a: a["lora"].update(x=None),
        ValueError,
        "lora: got 'x', expected gate_lora_a, gate_lora_b",
    ),
    "lora, shape": (
        lambda a: a["lora"].update(up_lora_b=a["lora"]["up_lora_b"][1:]),
        ValueError,
        f"up_lora_b: got float32 [{E - 1}, {I}, {R}], expected float32 or bfloat16 [{E}, {I}, {R}]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(student: Student, case: str) -> None:
    change, error, message = REFUSED[case]
    sft = student.wrapper(P)
    (x, ids, weights), _ = drawn(student)
    arguments = {"x": x, "ids": ids, "w": weights, "lora": dict(lora_parameters(sft))}
    change(arguments)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        moe_sft(sft, arguments["lora"], arguments["x"], arguments["ids"], arguments["w"])


def test_layers_that_are_refused(student: Student) -> None:
    arrays, _ = drawn(student)
    with pytest.raises(TypeError, match=r"^sft: got NativeMoEWrapper, expected a BaseSFTMoEWrapper, of"):
        moe_sft(student.layer.wrapper(P), {}, *arrays)
    with pytest.raises(TypeError, match=r"^moe: got NativeSFTMoEWrapper, expected a BaseMoEWrapper, of"):
        moe_forward(student.wrapper(P), *arrays)
    dropping = student.wrapper(P, lora_dropout=0.5)
    with pytest.raises(ValueError, match=r"^sft: got lora_dropout 0.5, expected 0 in an autograd graph"):
        moe_sft(dropping, lora_parameters(dropping), *arrays)
    empty = KTMoEWrapper(0, E, P, H, I, mode="sft", method="BF16_SFT", lora_rank=R)
    with pytest.raises(RuntimeError, match=r"^sft: layer 0 has no weights yet"):
        moe_sft(empty, lora_parameters(empty), *arrays)


def test_a_layer_that_is_gone(student: Student) -> None:
    arrays, grad_output = drawn(student)
    sft = student.wrapper(P)
    y = moe_sft(sft, lora_parameters(sft), *leaves(arrays))
    del sft
    gc.collect()
    with pytest.raises(RuntimeError, match=r"layer: got the number of one that was deleted, expected one"):
        y.backward(grad_output)


def test_what_tasks_of_the_extension_refuse(student: Student) -> None:
    sft = student.wrapper(P)
    x, ids, weights = (numpy_of(array) for array in drawn(student)[0])
    six, none = tuple(student.lora.values()), (None,) * 6
    rows = np.empty_like(x), np.empty_like(weights)
    forward, backward = ext.moe.numbered_forward_task, ext.moe.numbered_backward_task
    batch = sft._layer, x, ids, weights
    with pytest.raises(ValueError, match=r"^lora: got 5 matrices, expected 6$"):
        forward(*batch, np.empty_like(x), six[1:], 1)
    with pytest.raises(
        ValueError, match=r"^gate_lora_a: got float32 \[2, 4, 70\], expected float32 or bfloat16 \["
    ):
        forward(*batch, np.empty_like(x), (six[0][1:], *six[1:]), 1)
    with pytest.raises(ValueError, match=r"^grad_lora: got 0 matrices, expected 6$"):
        backward(*batch, six, 1, x, *rows, ())
    with pytest.raises(TypeError, match=r"^grad_weights: got bfloat16 \[6, 2\], expected float32 \[6, 2\]$"):
        backward(*batch, six, 1, x, rows[0], weights.astype(bf16), none)
    with pytest.raises(ValueError, match=r"^grad_input: its memory overlaps that of grad_output"):
        backward(*batch, six, 1, x, x, rows[1], none)
    wrong = backward(sft._layer, x, ids + E, weights, six, 0, x.copy(), *rows, none)
    with pytest.raises(IndexError, match=r"^topk_ids: got expert "):
        sft.cpu_infer.run(wrong)
    assert all(np.isnan(each.astype(np.float32)).all() for each in rows)
    assert 0 != ext.moe.next_pass_number() != ext.moe.next_pass_number()


def test_adapters_are_copies(student: Student) -> None:
    sft = student.wrapper(P)
    lora = lora_parameters(sft)
    assert all(isinstance(p, torch.nn.Parameter) for p in lora.values())
    with torch.no_grad():
        lora["up_lora_a"].zero_()
    assert_same_bits(sft.lora_weights["up_lora_a"], student.lora["up_lora_a"])
    of_bf16 = draw_student(np.random.default_rng(4), (E, I, H), R, dtype=bf16)
    assert lora_parameters(of_bf16.wrapper(P))["up_lora_a"].dtype is torch.bfloat16
