"""Finding the tensors of a layer's experts by name, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from ...config import MoEConfig
from ..safetensors.checkpoint import SafetensorsCheckpoint, TensorInfo
from .name_patterns import NAME_PATTERNS, PREFIXES, NamePattern

__all__ = [
    "BIAS_DTYPES",
    "WEIGHT_DTYPES",
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

#: Of the numbers that weights and biases may be.
WEIGHT_DTYPES = ("BF16", "F32", "F16")
BIAS_DTYPES = ("BF16", "F16", "F32")


def speaks_of_experts(name: str) -> bool:
    """Whether a tensor's name speaks of routed experts."""
    return _EXPERTS.search(name) is not None


class ExpertLayer:
    """The names of a layer's tensors, and reading them with their checks."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, prefix: str) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.expert_ids = checkpoint.layers.of(prefix)  # template -> experts that have it
        self._names: dict[tuple[str, int], list[str]] = {}

    def patterns(self) -> list[NamePattern]:
        """List the rows of the table that are there in full; if none is, those there in part."""
        part = [row for row in NAME_PATTERNS if any(name in self.expert_ids for name in row.tensors.values())]
        full = [row for row in part if all(name in self.expert_ids for name in row.tensors.values())]
        return [row for row in full or part if not row.needs_biases or self.has_biases(row)]

    def sizes(self, pattern: NamePattern, config: MoEConfig | None) -> tuple[int, int, int]:
        """E, I and H: of `config`, or else as the down projection has them."""
        if config is not None:
            return config.num_experts, config.moe_intermediate_size, config.hidden_size
        template = pattern.tensors["down"]
        name = self.name(template, 0)
        letters = "[I, H]" if pattern.transposed else "[H, I]"
        expected = letters if pattern.per_expert else f"[E, {letters[1:]}"
        if name not in self.checkpoint:
            raise ValueError(f"{self.checkpoint.path}: tensor {name!r}: got none, expected {expected}")
        shape = self.checkpoint.info(name).shape
        if len(shape) != (2 if pattern.per_expert else 3) or not all(shape):
            file = self.checkpoint.file_of(name)
            raise ValueError(f"{file}: tensor {name!r}: got shape {list(shape)}, expected {expected}")
        expert_ids = set().union(
            *(self.expert_ids.get(template, ()) for template in pattern.tensors.values())
        )
        num_experts = 1 + max(expert_ids) if pattern.per_expert else shape[0]
        hidden, inter = shape[-1:-3:-1] if pattern.transposed else shape[-2:]
        return num_experts, inter, hidden

    def name(self, template: str, e: int) -> str:
        """Complete a tensor's name."""
        return self.prefix + template.replace("{e}", str(e))

    def names_of(self, template: str, num_experts: int, experts: Sequence[int] | None = None) -> list[str]:
        """List the names of a tensor of each expert, or of these, or the one name of a tensor of all of them.

        Where fewer are there, one more than are there: enough to find one missing, however many experts a
        configuration claims.
        """
        if experts is not None and "{e}" in template:
            return [self.name(template, e) for e in experts]
        key = template, num_experts
        if key not in self._names:
            head, of_each, tail = template.partition("{e}")
            most = 1 + len(self.expert_ids.get(template, ()))
            expert_ids = range(min(num_experts, most)) if of_each else [""]
            self._names[key] = [f"{self.prefix}{head}{e}{tail}" for e in expert_ids]
        return self._names[key]

    def names(
        self, pattern: NamePattern, sizes: tuple[int, int, int], experts: Sequence[int] | None = None
    ) -> tuple[str, ...]:
        """List the tensors that the layer, or these experts of it, must have; biases if there are some."""
        wanted = self.wanted(pattern, sizes, experts)
        return tuple(name for template, _, _ in wanted for name in self.names_of(template, sizes[0], experts))

    def problem(
        self,
        pattern: NamePattern,
        sizes: tuple[int, int, int],
        origin: str = "",
        experts: Sequence[int] | None = None,
    ) -> ValueError | None:
        """The error of the layer's tensors as `pattern` wants them; None if nothing is wrong.

        Where `experts` are given, other experts' tensors have to be there, and their files stay closed.
        """
        num_experts = sizes[0]
        for template in pattern.tensors.values():
            problem = self.too_many(template, num_experts)
            if problem is not None:
                return problem
        for template, shape, dtypes in self.wanted(pattern, sizes, experts):
            for name in self.names_to_look_at(template, num_experts, experts):
                problem = self.checkpoint.problem(name, dtypes, (shape,), origin)
                if problem is not None:
                    return problem
        return None

    def names_to_look_at(
        self, template: str, num_experts: int, experts: Sequence[int] | None
    ) -> Iterator[str]:
        """Names of `names_of` of all experts: those that are missing, and those of `experts`."""
        chosen = set(self.names_of(template, num_experts, experts))
        for name in self.names_of(template, num_experts):
            if name in chosen or name not in self.checkpoint:
                yield name

    def too_many(self, template: str, num_experts: int) -> ValueError | None:
        """The error of a tensor of an expert beyond the last; None if there is none."""
        more = max(self.expert_ids.get(template, ()), default=-1)
        if more < num_experts:
            return None
        name = self.name(template, more)
        return ValueError(f"{self.checkpoint.path}: tensor {name!r}: got one, expected {num_experts} experts")

    def info(self, name: str) -> TensorInfo | None:
        """Look a tensor up; None when it is not there."""
        return self.checkpoint.find(name)

    def check_gated(self, pattern: NamePattern, config: MoEConfig) -> None:
        """Raise ValueError when experts have another number of projections than the activation needs."""
        if config.activation.gated != pattern.gated:
            raise ValueError(
                f"{self.checkpoint.path}: the experts under {self.prefix!r} have "
                f"{'a' if pattern.gated else 'no'} gate, but activation {config.activation.name} is "
                f"{'not ' if pattern.gated else ''}gated"
            )

    def wanted(
        self, pattern: NamePattern, sizes: tuple[int, int, int], experts: Sequence[int] | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """Template, shape and dtypes of each of the pattern's weights, and of its biases if there are any."""
        num_experts, inter, hidden = sizes
        rows = rows_of_roles(inter, hidden)
        lead = () if pattern.per_expert else (num_experts,)
        for role, template in pattern.tensors.items():
            matrix = (rows[role], inter if role == "down" else hidden)
            shape = (*lead, *(matrix[::-1] if pattern.transposed else matrix))
            yield template, shape, self._weight_dtypes(template, experts[0] if experts else 0)
        if self.has_biases(pattern):
            for role, template in pattern.biases.items():
                yield template, (*lead, rows[role]), BIAS_DTYPES

    def _weight_dtypes(self, template: str, e: int) -> tuple[str, ...]:
        """The dtypes that weights may have: that of expert e's, the first, if it is one of numbers."""
        first = self.info(self.name(template, e))
        return WEIGHT_DTYPES if first is None or first.dtype not in WEIGHT_DTYPES else (first.dtype,)

    def has_biases(self, pattern: NamePattern) -> bool:
        """Whether any of the pattern's biases is there; then all must be."""
        return any(template in self.expert_ids for template in pattern.biases.values())

    def tensors(
        self, pattern: NamePattern, template: str, num_experts: int, experts: Sequence[int] | None = None
    ) -> list[AnyArray]:
        """One array for each expert, or for each of these."""
        arrays = [self.checkpoint.tensor(name) for name in self.names_of(template, num_experts, experts)]
        if not pattern.per_expert:
            arrays = [arrays[0][e] for e in (range(num_experts) if experts is None else experts)]
        return [aligned(array) for array in arrays]


def rows_of_roles(inter: int, hidden: int) -> dict[str, int]:
    """N of the matrices of a role, fused or not."""
    return {"gate": inter, "up": inter, "gate_up": 2 * inter, "down": hidden}


def aligned(array: AnyArray) -> AnyArray:
    """`array`, or a copy when its file puts it at an address that its dtype cannot have."""
    return array if array.flags.aligned else array.copy()


def expert_layers(checkpoint: SafetensorsCheckpoint) -> tuple[int, ...]:
    """List the layers that have experts in a layout that `load_experts` knows, in order."""
    return layers_with(checkpoint, {pattern.tensors["down"] for pattern in NAME_PATTERNS})


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
    """Sort the layer's tensors by their prefixes; those without any are empty."""
    return [ExpertLayer(checkpoint, prefix) for prefix in _prefixes(layer_idx)]


def _prefixes(layer_idx: int) -> list[str]:
    return [prefix.format(layer=layer_idx) for prefix in PREFIXES]


def find_layer(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> ExpertLayer:
    """Find the layer's tensors under the first prefix with experts."""
    layers = read_layers(checkpoint, layer_idx)
    for layer in layers:
        if layer.patterns():
            return layer
    unknown_names = [
        f"{layer.prefix}{template}"
        for layer in layers
        for template in layer.expert_ids
        if speaks_of_experts(template)
    ]
    if unknown_names:
        where = f"{checkpoint.path}: layer {layer_idx}"
        raise ValueError(f"{where} has experts, but under no known tensor names, e.g. {unknown_names[0]!r}")
    others = ", ".join(map(str, expert_layers(checkpoint))) or "none"
    raise ValueError(f"{checkpoint.path}: layer {layer_idx} has no experts; layers with experts: {others}")
