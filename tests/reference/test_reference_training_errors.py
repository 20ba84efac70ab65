"""What the training step of the reference refuses, and how it says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import bf16, draw_layer
from training_cases import draw_training

from ktmoe_np.reference import Dropout, moe_backward, moe_forward_sft


def lora_with(**change: Any) -> dict[str, Any]:
    return {"lora": replace(draw_training(0)[0]["lora"], **change)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": np.zeros((5, 48))}, TypeError, "hidden_states: got float64, expected bfloat16"),
        (
            {"hidden_states": np.zeros((5, 48), int), "exact": True},
            TypeError,
            "hidden_states: got int64, expected float32 or float16 or bfloat16 or float64",
        ),
        (
            {"topk_ids": np.full((5, 2), 4)},
            IndexError,
            r"topk_ids: got expert 4 at \[0, 0\], expected ids below 4",
        ),
        ({"lora": {}}, TypeError, "lora: got dict, expected a LoraWeights"),
        ({"dropout": 0.5}, TypeError, "dropout: got float, expected a Dropout"),
        ({"dropout": Dropout(0.5, seed=-1)}, ValueError, "seed: got -1, expected 0 to"),
        ({"cache_dtype": np.float16}, ValueError, "cache_dtype: got float16, expected bfloat16 or float32"),
        (
            {"accumulate_dtype": np.float16},
            ValueError,
            "accumulate_dtype: got float16, expected float32 or float64",
        ),
        ({"out_dtype": np.int8}, ValueError, "out_dtype: got int8, expected bfloat16, float32 or float64"),
        (
            lora_with(gate_lora_a=np.zeros((4, 3, 48))),
            TypeError,
            "gate_lora_a: got float64, expected bfloat16 or float32",
        ),
        (
            lora_with(gate_lora_a=np.zeros((3, 3, 48), bf16)),
            ValueError,
            r"gate_lora_a: got shape \[3, 3, 48\], expected \[E=4, R, H=48\]",
        ),
        (
            lora_with(gate_lora_b=np.zeros((4, 40, 2), bf16)),
            ValueError,
            r"gate_lora_b: got shape \[4, 40, 2\], expected \[E=4, I=40, R=3\]",
        ),
        (lora_with(up_lora_a=None), TypeError, "up_lora_a: got NoneType, expected a NumPy array"),
        (
            lora_with(up_lora_b=np.zeros((4, 3, 40), bf16)),
            ValueError,
            r"up_lora_b: got shape \[4, 3, 40\], expected \[E=4, I=40, R=3\]",
        ),
        (
            lora_with(down_lora_a=np.zeros((4, 3, 48), "f4")),
            ValueError,
            r"down_lora_a: got shape \[4, 3, 48\], expected \[E=4, R=3, I=40\]",
        ),
        (
            lora_with(down_lora_b=np.zeros((4, 40, 3), "f4")),
            ValueError,
            r"down_lora_b: got shape \[4, 40, 3\], expected \[E=4, H=48, R=3\]",
        ),
        (
            {"activation": "relu2", "up_proj": None},
            ValueError,
            "up_lora_a: got one, expected None: activation relu2 has one projection",
        ),
        (
            {"activation": "relu2", "up_proj": None, **lora_with(up_lora_a=None)},
            ValueError,
            "up_lora_b: got one, expected None: activation relu2 has one projection",
        ),
    ],
)
def test_wrong_arguments_of_the_forward_pass(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer, _ = draw_training(0)
    with pytest.raises(error, match=message):
        moe_forward_sft(**{**layer, **change})


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (np.nan, ValueError, "lora_alpha: got nan, expected a finite number"),
        (np.inf, ValueError, "lora_alpha: got inf, expected a finite number"),
        ("8", TypeError, "lora_alpha: got '8', expected a number"),
    ],
)
def test_a_wrong_alpha_is_refused_at_once(alpha: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_with(lora_alpha=alpha)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cache": None}, TypeError, "cache: got NoneType, expected a ForwardCache"),
        (
            {"skip_lora": True, "full_weight_grad": True},
            ValueError,
            "full_weight_grad: got True, expected False with skip_lora",
        ),
        ({"grad_output": [[1.0]]}, TypeError, "grad_output: got list, expected a NumPy array"),
        ({"grad_output": np.zeros((5, 48), "f4")}, TypeError, "grad_output: got float32, expected bfloat16"),
        (
            {"grad_output": np.zeros((5, 47), bf16)},
            ValueError,
            r"grad_output: got shape \[5, 47\], expected \[T=5, H=48\]",
        ),
    ],
)
def test_wrong_arguments_of_the_backward_pass(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    _, cache = moe_forward_sft(**draw_layer(0))
    with pytest.raises(error, match=message):
        moe_backward(**{"cache": cache, "grad_output": np.zeros((5, 48), bf16), **arguments})
