"""Finding the tensors of a layer's experts by name, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from numpy.typing import NDArray

from ...config import MoEConfig
from ..safetensors.checkpoint import SafetensorsCheckpoint, TensorInfo
from .name_patterns import NAMINGS, PREFIXES, Naming

__all__ = [
    "BIAS_DTYPES",
    "ExpertLayer",
    "aligned",
    "expert_layers",
    "find_layer",
    "layers_with",
    "read_layers",
    "rows_of_roles",
    "speaks_of_experts",
]

AnyArray = NDArray[Any]

_EXPERTS = re.compile(r"\bexperts\.")

#: The number of a layer in a name.
_LAYER_NUMBER = re.compile("[0-9]{1,9}")

BIAS_DTYPES = ("BF16", "F16", "F32")


def speaks_of_experts(name: str) -> bool:
    """Whether a tensor's name speaks of routed experts."""
    return _EXPERTS.search(name) is not None


class ExpertLayer:
    """The names of a layer's tensors, and reading them with their checks."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, prefix: str) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.numbers = checkpoint.layers.of(prefix)  # template -> experts that have it
        self._names: dict[tuple[str, int], list[str]] = {}

    def namings(self) -> list[Naming]:
        """List the rows of the table that are there in full; if none is, those there in part."""
        part = [row for row in NAMINGS if any(name in self.numbers for name in row.tensors.values())]
        full = [row for row in part if all(name in self.numbers for name in row.tensors.values())]
        return [row for row in full or part if not row.needs_biases or self.has_biases(row)]

    def sizes(self, naming: Naming, config: MoEConfig | None) -> tuple[int, int, int]:
        """E, I and H: of `config`, or else as the down projection has them."""
        if config is not None:
            return config.num_experts, config.moe_intermediate_size, config.hidden_size
        template = naming.tensors["down"]
        name = self.name(template, 0)
        if name not in self.checkpoint:
            raise ValueError(f"{self.checkpoint.path}: tensor {name!r} is missing")
        shape = self.checkpoint.info(name).shape
        if len(shape) != (2 if naming.per_expert else 3) or not all(shape):
            letters = "[I, H]" if naming.transposed else "[H, I]"
            expected = letters if naming.per_expert else f"[E, {letters[1:]}"
            file = self.checkpoint.file_of(name)
            raise ValueError(f"{file}: tensor {name!r} has shape {list(shape)}, expected {expected}")
        numbers = set().union(*(self.numbers.get(template, ()) for template in naming.tensors.values()))
        num_experts = 1 + max(numbers) if naming.per_expert else shape[0]
        hidden, inter = shape[-1:-3:-1] if naming.transposed else shape[-2:]
        return num_experts, inter, hidden

    def name(self, template: str, e: int) -> str:
        """Complete a tensor's name."""
        return self.prefix + template.replace("{e}", str(e))

    def names_of(self, template: str, num_experts: int) -> list[str]:
        """List the names of a tensor of each expert, or the one name of a tensor of all of them.

        Where fewer are there, one more than are there: enough to find one missing, however many experts a
        configuration claims.
        """
        key = template, num_experts
        if key not in self._names:
            head, of_each, tail = template.partition("{e}")
            most = 1 + len(self.numbers.get(template, ()))
            numbers = range(min(num_experts, most)) if of_each else [""]
            self._names[key] = [f"{self.prefix}{head}{e}{tail}" for e in numbers]
        return self._names[key]

    def names(self, naming: Naming, sizes: tuple[int, int, int]) -> tuple[str, ...]:
        """List the tensors that the layer must have, biases included if there are some."""
        wanted = self.wanted(naming, sizes)
        return tuple(name for template, _, _ in wanted for name in self.names_of(template, sizes[0]))

    def problem(self, naming: Naming, sizes: tuple[int, int, int]) -> str | None:
        """Say what is wrong with the layer's tensors as `naming` wants them; None if nothing."""
        num_experts = sizes[0]
        for template in naming.tensors.values():
            problem = self.too_many(template, num_experts)
            if problem is not None:
                return problem
        for template, shape, dtypes in self.wanted(naming, sizes):
            for name in self.names_of(template, num_experts):
                problem = self.checkpoint.problem(name, dtypes, (shape,))
                if problem is not None:
                    return problem
        return None

    def too_many(self, template: str, num_experts: int) -> str | None:
        """Say which tensor there is of an expert beyond the last; None if there is none."""
        more = max(self.numbers.get(template, ()), default=-1)
        if more < num_experts:
            return None
        name = self.name(template, more)
        return f"{self.checkpoint.path}: tensor {name!r} is there, expected {num_experts} experts"

    def info(self, name: str) -> TensorInfo | None:
        """Look a tensor up; None when it is not there."""
        return self.checkpoint.find(name)

    def check_gated(self, naming: Naming, config: MoEConfig) -> None:
        """Raise ValueError when experts have another number of projections than the activation needs."""
        if config.activation.gated != naming.gated:
            raise ValueError(
                f"{self.checkpoint.path}: the experts under {self.prefix!r} have "
                f"{'a' if naming.gated else 'no'} gate, but activation {config.activation.name} is "
                f"{'not ' if naming.gated else ''}gated"
            )

    def wanted(
        self, naming: Naming, sizes: tuple[int, int, int]
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """Template, shape and dtypes of each of the naming's weights, and of its biases if there are some."""
        num_experts, inter, hidden = sizes
        rows = rows_of_roles(inter, hidden)
        lead = () if naming.per_expert else (num_experts,)
        for role, template in naming.tensors.items():
            matrix = (rows[role], inter if role == "down" else hidden)
            yield template, (*lead, *(matrix[::-1] if naming.transposed else matrix)), (naming.dtype,)
        if self.has_biases(naming):
            for role, template in naming.biases.items():
                yield template, (*lead, rows[role]), BIAS_DTYPES

    def has_biases(self, naming: Naming) -> bool:
        """Whether any of the naming's biases is there; then all must be."""
        return any(template in self.numbers for template in naming.biases.values())

    def tensors(self, naming: Naming, template: str, num_experts: int) -> list[AnyArray]:
        """One array for each expert."""
        tensors = [aligned(self.checkpoint.tensor(name)) for name in self.names_of(template, num_experts)]
        return tensors if naming.per_expert else list(tensors[0])


def rows_of_roles(inter: int, hidden: int) -> dict[str, int]:
    """N of the matrices of a role, fused or not."""
    return {"gate": inter, "up": inter, "gate_up": 2 * inter, "down": hidden}


def aligned(array: AnyArray) -> AnyArray:
    """`array`, or a copy when its file puts it at an address that its dtype cannot have."""
    return array if array.flags.aligned else array.copy()


def expert_layers(checkpoint: SafetensorsCheckpoint) -> tuple[int, ...]:
    """List the layers that have experts in a naming that `load_experts` knows, in order."""
    return layers_with(checkpoint, {naming.tensors["down"] for naming in NAMINGS})


def layers_with(checkpoint: SafetensorsCheckpoint, known: Collection[str]) -> tuple[int, ...]:
    """List the layers with a tensor of one of the `known` templates, in order."""
    layers = set()
    for prefix in checkpoint.layers.prefixes():
        number = prefix.removesuffix(".").rpartition(".")[2]
        is_layer = _LAYER_NUMBER.fullmatch(number) and prefix in _prefixes(int(number))
        if is_layer and not checkpoint.layers.of(prefix).keys().isdisjoint(known):
            layers.add(int(number))
    return tuple(sorted(layers))


def read_layers(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> list[ExpertLayer]:
    """Sort the layer's tensors, whatever they are, by their prefixes; those without any are empty."""
    return [ExpertLayer(checkpoint, prefix) for prefix in _prefixes(layer_idx)]


def _prefixes(layer_idx: int) -> list[str]:
    return [prefix.format(layer=layer_idx) for prefix in PREFIXES]


def find_layer(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> ExpertLayer:
    """Find the layer's tensors under the first prefix with experts."""
    layers = read_layers(checkpoint, layer_idx)
    for layer in layers:
        if layer.namings():
            return layer
    strangers = [
        f"{layer.prefix}{template}"
        for layer in layers
        for template in layer.numbers
        if speaks_of_experts(template)
    ]
    if strangers:
        where = f"{checkpoint.path}: layer {layer_idx}"
        raise ValueError(f"{where} has experts, but in no naming known here, e.g. {strangers[0]!r}")
    others = ", ".join(map(str, expert_layers(checkpoint))) or "none"
    raise ValueError(f"{checkpoint.path}: layer {layer_idx} has no experts; layers with experts: {others}")
