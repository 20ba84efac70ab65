"""The plan of `ktmoe inspect --ranks`: what each of several machines maps, and what tokens exchange."""

from __future__ import annotations

from typing import Any

from ..distributed.volume import expert_counts, mean_volume
from ..io.inspect import CheckpointReport, LayerReport
from ..io.rest_bytes import rest_bytes
from .table import amount, counted, rounded, wrap

__all__ = ["plan", "plan_lines"]


def plan(report: CheckpointReport, num_ranks: int, placement: str, room: int | None) -> dict[str, Any]:
    """Spread the experts of a checkpoint over ranks, each on a machine with so much room.

    Parameters
    ----------
    report : CheckpointReport
    num_ranks : int
        N.
    placement : str
        See `ktmoe_np.distributed.volume.expert_counts`.
    room : int or None
        Bytes of memory; None where the system does not say.

    Returns
    -------
    dict
        Of JSON values.
    """
    with_experts = [layer.config.layer_idx for layer in (*report.layers, *report.further_layers)]
    rest = rest_bytes(report.path, with_experts)
    counts = [expert_counts(layer.config.num_experts, num_ranks, placement) for layer in report.layers]
    ranks = []
    for rank in range(num_ranks):
        own = [of_layer[rank] for of_layer in counts]
        # The experts of a layer are alike.
        sizes = [
            layer.num_bytes * count // layer.config.num_experts
            for layer, count in zip(report.layers, own, strict=True)
        ]
        num_bytes = sum(sizes) + rest
        fits = None if room is None else num_bytes <= room
        experts = {"rank": rank, "num_experts": own, "expert_bytes": sum(sizes)}
        ranks.append({**experts, "num_bytes": num_bytes, "fits_in_memory": fits})
    layers = [_exchange(layer, own) for layer, own in zip(report.layers, counts, strict=True)]
    return {
        "num_ranks": num_ranks,
        "placement": placement,
        "rest_bytes": rest,
        "room_bytes": room,
        "ranks": ranks,
        "exchange": layers,
        "token_bytes": {
            combine: sum(layer["sent_bytes"] + layer[f"{combine}_bytes"] for layer in layers)
            for combine in ("exact", "fast")
        },
    }


def _exchange(layer: LayerReport, counts: tuple[int, ...]) -> dict[str, Any]:
    """What a token of a layer exchanges, by expectation."""
    volume = mean_volume(counts, layer.config.num_experts_per_tok, layer.config.hidden_size)
    return {"layer": layer.config.layer_idx, **vars(volume)}


def plan_lines(value: dict[str, Any]) -> list[str]:
    """Set a plan as text, at most 98 columns wide."""
    return [
        f"Plan for {counted(value['num_ranks'], 'rank')}, {value['placement']} experts",
        "",
        *_table(value),
        "",
        wrap(_mapped(value)),
        *([wrap(_exchanged(value))] if value["num_ranks"] > 1 else []),
    ]


def _table(value: dict[str, Any]) -> list[str]:
    """A row for each rank."""
    rows = [("rank", "experts per layer", "bytes of experts", "bytes in all", "fits")]
    for rank in value["ranks"]:
        least, most = min(rank["num_experts"]), max(rank["num_experts"])
        rows.append(
            (
                str(rank["rank"]),
                str(least) if least == most else f"{least} to {most}",
                amount(rank["expert_bytes"]),
                amount(rank["num_bytes"]),
                {True: "yes", False: "NO", None: "unknown"}[rank["fits_in_memory"]],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _mapped(value: dict[str, Any]) -> str:
    said = f"Every rank maps its experts and the {amount(value['rest_bytes'])} of the rest of the model"
    if value["room_bytes"] is None:
        return f"{said}."
    return f"{said}; fits: in {amount(value['room_bytes'])}, as this machine has for a process."


def _exchanged(value: dict[str, Any]) -> str:
    """Say what a token exchanges in a layer, or in the layers on average."""
    layers = value["exchange"]
    mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    exact, fast = value["token_bytes"]["exact"], value["token_bytes"]["fast"]
    return (
        f"A token goes to {rounded(mean['ranks'])} other ranks in a layer, expected for random experts, with "
        f"{rounded(mean['slots'])} of its slots: {amount(mean['sent_bytes'])} out, and back "
        f"{amount(mean['exact_bytes'])} with combine='exact' or {amount(mean['fast_bytes'])} with 'fast'; "
        f"in all layers {amount(exact)} or {amount(fast)}."
    )
