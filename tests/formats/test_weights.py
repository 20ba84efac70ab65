"""The weights that loaders produce and layers consume."""

from __future__ import annotations

import doctest

import ktmoe_np.formats.weights
from ktmoe_np.formats.weights import ExpertWeights, Projection


def test_doctests() -> None:
    result = doctest.testmod(ktmoe_np.formats.weights)
    assert result.attempted
    assert not result.failed


def test_projections_and_biases_by_name() -> None:
    gate, up, down = Projection([1, 2], bias=[3]), Projection([4, 5]), Projection([6, 7], bias=[8])
    weights = ExpertWeights(gate, up, down)
    assert weights.num_experts == 2
    assert list(weights.projections.values()) == [gate, up, down]
    assert weights.biases == {"gate_proj": [3], "down_proj": [8]}
    assert weights.bias_arguments() == {"gate_bias": [3], "up_bias": None, "down_bias": [8]}
    assert ExpertWeights.of(weights.projections).arguments() == weights.arguments()
    assert weights.arguments()["up_proj"] == [4, 5]


def test_scales_are_those_of_blocks_or_of_rows() -> None:
    assert Projection([1], block_scales=[2]).scales == [2]
    assert Projection([1], channel_scale=[3]).scales == [3]
    assert Projection([1], block_scales=[2], channel_scale=[3]).scales == [2]
