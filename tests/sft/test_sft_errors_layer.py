"""What a layer for training is refused for: its options, its adapters. Nothing has changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

from ktmoe_np import KTMoEWrapper
from ktmoe_np.arrays.checks import as_numpy

AnyArray = Any
Error = type[BaseException]

E, I, H, P, R, T = 4, 24, 40, 2, 3, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(0), (E, I, H), R)


@pytest.fixture(scope="module")
def batch(student: Student) -> Batch:
    return draw_training(np.random.default_rng(1), student, T, P)[0]


@pytest.fixture
def moe(student: Student) -> Any:
    return student.wrapper(P)


# ---- options ----

OPTIONS: dict[str, tuple[dict[str, Any], Error, str]] = {
    "lora_rank": ({"lora_rank": -1}, ValueError, r"lora_rank: got -1, expected 0 or more"),
    "lora_rank, float": ({"lora_rank": 2.0}, TypeError, r"lora_rank: got 2\.0, expected an integer"),
    "lora_rank, huge": ({"lora_rank": 5000}, ValueError, r"lora_rank: got 5000, expected 0 to 4096"),
    "lora_alpha": ({"lora_alpha": np.inf}, ValueError, r"lora_alpha: got inf, expected a finite number"),
    "lora_alpha, word": ({"lora_alpha": "32"}, TypeError, r"lora_alpha: got '32', expected a number"),
    "lora_dropout": (
        {"lora_dropout": 1},
        ValueError,
        r"lora_dropout: got 1, expected at least 0 and below 1",
    ),
    "lora_dropout, NaN": ({"lora_dropout": np.nan}, ValueError, r"lora_dropout: got nan, expected a finite"),
    "lora_dropout, bool": ({"lora_dropout": True}, TypeError, r"lora_dropout: got True, expected a number"),
    "max_cache_depth": ({"max_cache_depth": 0}, ValueError, r"max_cache_depth: got 0, expected 1 or more"),
    "full_weight_grad": ({"full_weight_grad": 1}, TypeError, r"full_weight_grad: got 1, expected a bool"),
    "recompute": ({"recompute": None}, TypeError, r"recompute: got None, expected a bool"),
    "seed": ({"seed": -1}, ValueError, r"seed: got -1, expected 0 or more"),
    "seed, huge": (
        {"seed": 2**64},
        ValueError,
        r"seed: got 18446744073709551616, expected at most 1844674407",
    ),
    "cache_dtype": (
        {"cache_dtype": np.float16},
        ValueError,
        r"cache_dtype: got <class 'numpy.float16'>, expected bfloat16 or float32",
    ),
    "cache_dtype, None": (
        {"cache_dtype": None},
        ValueError,
        r"cache_dtype: got None, expected bfloat16 or f",
    ),
    "cache_dtype, word": ({"cache_dtype": "bf"}, TypeError, r"cache_dtype: got 'bf', expected bfloat16 or f"),
    "a name": (
        {"lora_rnk": 3},
        TypeError,
        r"lora_rnk: got an unknown keyword, expected one of lora_rank, lora_",
    ),
    "deferred": (
        {"max_deferred_experts_per_token": 1},
        ValueError,
        r"max_deferred_experts_per_token: got 1, expected 0: only inference defers experts",
    ),
    "skipped adapters": (
        {"method": "AMXBF16_SFT_SkipLoRA", "full_weight_grad": True},
        ValueError,
        r"full_weight_grad: got True, expected False: method 'AMXBF16_SFT_SkipLoRA' has no gradients of weig",
    ),
    "method": (
        {"method": "BF16"},
        ValueError,
        r"method: got 'BF16' for mode 'sft', expected one of AMXBF16_SFT, BF16_SFT, AMXBF16_SFT_SkipLoRA, ",
    ),
    "group_size": ({"group_size": 32}, ValueError, r"group_size: got 32, expected None: method 'BF16_SFT'"),
    "layer_idx": (
        {"layer_idx": 2**31},
        ValueError,
        r"layer_idx: got 2147483648, expected at most 2147483647",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_construction_refuses(case: str) -> None:
    change, error, message = OPTIONS[case]
    options = {"layer_idx": 0, "mode": "sft", "method": "BF16_SFT", **change}
    sizes = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": H, "moe_intermediate_size": I}
    with pytest.raises(error, match=message):
        KTMoEWrapper(**sizes, **options)


@pytest.mark.parametrize(
    "option",
    [
        {"lora_rank": 16},
        {"lora_alpha": 32.0},
        {"lora_dropout": 0.0},
        {"max_cache_depth": 1},
        {"full_weight_grad": False},
        {"recompute": False},
        {"seed": 0},
        {"cache_dtype": bf16},
    ],
    ids=lambda option: next(iter(option)),
)
def test_inference_has_no_options_of_training(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}: got .* in mode 'inference', expected it in mode 'sft'"):
        KTMoEWrapper(0, E, P, H, I, **option)
    with pytest.raises(TypeError, match=r"^num_gpu_experts: got an unknown .*gpu_experts_mask, which gene"):
        KTMoEWrapper(0, E, P, H, I, num_gpu_experts=1)
    with pytest.raises(TypeError, match=r"lora_rnk: got an unknown keyword"):
        KTMoEWrapper(0, E, P, H, I, lora_rnk=3)


# ---- adapters ----

LORA: dict[str, tuple[str, Callable[[AnyArray], Any], Error, str]] = {
    "dtype": (
        "gate_lora_a",
        lambda m: m.astype(np.float64),
        TypeError,
        rf"gate_lora_a: got float64 \[{E}, {R}, {H}\], expected float32 or bfloat16 \[{E}, {R}, {H}\]",
    ),
    "another rank": (
        "up_lora_b",
        lambda m: np.concatenate([m, m], axis=2),
        ValueError,
        rf"up_lora_b: got float32 \[{E}, {I}, {2 * R}\], expected float32 or bfloat16 \[{E}, {I}, {R}\]",
    ),
    "transposed": (
        "down_lora_a",
        lambda m: m.swapaxes(1, 2),
        ValueError,
        rf"down_lora_a: got float32 \[{E}, {I}, {R}\], expected .* \[{E}, {R}, {I}\]",
    ),
    "one expert": (
        "down_lora_b",
        lambda m: m[0],
        ValueError,
        rf"down_lora_b: got float32 \[{H}, {R}\], expected .* \[{E}, {H}, {R}\]",
    ),
    "experts": ("gate_lora_b", lambda m: m[1:], ValueError, rf"gate_lora_b: got float32 \[{E - 1}, {I}, {R}"),
    "a list": ("gate_lora_b", lambda m: m.tolist(), TypeError, r"gate_lora_b: got list, expected an array"),
    "a number": ("up_lora_a", lambda m: 0.0, TypeError, r"up_lora_a: got float, expected an array"),
}


@pytest.mark.parametrize("how", ["init_lora_weights", "update_lora_weights"])
@pytest.mark.parametrize("case", LORA)
def test_adapters_are_refused(moe: Any, student: Student, batch: Batch, case: str, how: str) -> None:
    name, change, error, message = LORA[case]
    before = moe.forward(*batch)
    other = next(n for n in student.lora if n != name)
    arguments = {other: np.ones_like(student.lora[other]), name: change(student.lora[name])}
    with pytest.raises(error, match=message):
        getattr(moe, how)(**arguments)
    assert_same_bits(moe.forward(*batch), before)
    for each, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, student.lora[each])


def test_adapters_that_do_not_exist(student: Student) -> None:
    without = Student(student.layer, {}, 0).wrapper(P)
    without.init_lora_weights()
    assert without.lora_weights == {}
    with pytest.raises(ValueError, match="gate_lora_a: got one, expected None: lora_rank is 0"):
        without.update_lora_weights(gate_lora_a=student.lora["gate_lora_a"])
    ungated = draw_student(np.random.default_rng(2), (E, I, H), R, "relu2").wrapper(P)
    for name in ("up_lora_a", "up_lora_b"):
        with pytest.raises(
            ValueError, match=f"{name}: got one, expected None: activation relu2 is not gated"
        ):
            ungated.init_lora_weights(**{name: student.lora[name]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'gate_lora_c'"):
        ungated.update_lora_weights(gate_lora_c=student.lora["gate_lora_a"])


def test_an_array_that_numpy_cannot_read() -> None:
    class Elsewhere:
        def __array__(self, *args: Any, **options: Any) -> Any:
            raise TypeError("not on the CPU")

    with pytest.raises(
        TypeError, match=r"up_lora_a: got Elsewhere, expected .* NumPy can read: not on the CPU"
    ):
        as_numpy(Elsewhere(), "up_lora_a")
