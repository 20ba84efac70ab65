"""Finding the tensors of a layer's natively quantised experts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...config import MoEConfig
from ..safetensors.checkpoint import SafetensorsCheckpoint, TensorInfo
from .encoding import Encoding, Part, Shapes
from .encodings import FORMS, METHODS
from .layer import BIAS_DTYPES, ExpertLayer, layers_with, read_layers, rows_of_roles
from .name_patterns import Naming

__all__ = ["Form", "find_forms", "no_form"]

#: Experts that are looked at to tell the encoding: one that is damaged is outvoted.
_PROBED = 3

#: Suffixes of AWQ, which it shares with GPTQ.
_QWEIGHT, _SCALES = ".qweight", ".scales"


class _Wanted(NamedTuple):
    """Tensors that must be there, all alike."""

    names: list[str]
    dtypes: tuple[str, ...]
    shapes: Shapes


@dataclass(frozen=True)
class Form:
    """The layer's tensors seen as one naming and one encoding."""

    layer: ExpertLayer
    naming: Naming
    encoding: Encoding

    @property
    def method(self) -> str:
        """The method that multiplies the experts."""
        return self.encoding.method

    def name(self, role: str, part: Part, e: int) -> str:
        """A tensor of a projection; of fused experts, whatever the expert."""
        return self.layer.name(self.naming.tensors[role] + part.suffix, e)

    def names_of(self, role: str, part: Part, config: MoEConfig) -> list[str]:
        """The tensors of a projection, one for each expert or one for all of them."""
        return self.layer.names_of(self.naming.tensors[role] + part.suffix, config.num_experts)

    def numbers(self, role: str, part: Part) -> set[int]:
        """The experts that have such a tensor; of fused experts, one that stands for all."""
        return self.layer.numbers.get(self.naming.tensors[role] + part.suffix, set())

    def parts(self, role: str) -> tuple[Part, ...]:
        """The tensors that a projection's matrices are made of, those included that it may have and has."""
        parts = self.encoding.parts
        return tuple(part for part in parts if not part.optional or self.numbers(role, part))

    def has_codes(self) -> list[bool]:
        """Whether any expert has codes, for each of the projections."""
        return [bool(self.numbers(role, self.encoding.codes)) for role in self.naming.tensors]

    def rows(self, config: MoEConfig) -> dict[str, int]:
        """N of each projection, fused or not."""
        rows = rows_of_roles(config.moe_intermediate_size, config.hidden_size)
        return {role: rows[role] for role in self.naming.tensors}

    def misfits(self) -> tuple[bool, int]:
        """Whether no codes are of the dtype; and how much speaks against the form, at a few experts.

        Sizes are taken from the codes, so that no configuration is needed.
        """
        codes = self.encoding.codes
        strange, count = True, 0
        numbers = sorted(set().union(*(self.numbers(role, codes) for role in self.naming.tensors)))
        for e in numbers[:_PROBED]:
            for role in self.naming.tensors:
                info = self.layer.info(self.name(role, codes, e))
                strange = strange and (info is None or info.dtype not in codes.dtypes)
                for part in self.parts(role):
                    count += self._misfits(self.name(role, part, e), part, info)
        return strange, count

    def _misfits(self, name: str, part: Part, codes: TensorInfo | None) -> int:
        """How much speaks against one tensor, when the codes that it goes with are these."""
        info = self.layer.info(name)
        if info is None:
            return 2
        count = int(info.dtype not in part.dtypes)
        if codes is not None:
            lead = 0 if self.naming.per_expert else 1
            if len(codes.shape) < lead + 2:
                return count + 1
            shapes = part.shapes(*self.encoding.size(codes.shape[lead:]))
            count += info.shape not in [(*codes.shape[:lead], *shape) for shape in shapes]
        return count

    def wanted(self, config: MoEConfig) -> Iterator[_Wanted]:
        """The tensors that the layer must have."""
        lead = () if self.naming.per_expert else (config.num_experts,)
        rows = self.rows(config)
        for role, num_rows in rows.items():
            num_columns = config.moe_intermediate_size if role == "down" else config.hidden_size
            for part in self.parts(role):
                shapes = tuple((*lead, *shape) for shape in part.shapes(num_rows, num_columns))
                yield _Wanted(self.names_of(role, part, config), part.dtypes, shapes)
        if self.layer.has_biases(self.naming):
            for role, template in self.naming.biases.items():
                names = self.layer.names_of(template, config.num_experts)
                yield _Wanted(names, BIAS_DTYPES, ((*lead, rows[role]),))

    def check(self, config: MoEConfig) -> tuple[str, ...]:
        """Raise ValueError when a tensor is not what `config` wants it to be; otherwise list them all."""
        checkpoint = self.layer.checkpoint
        self._check_config(config)
        for role in self.naming.tensors:
            for part in self.encoding.parts:
                problem = self.layer.too_many(self.naming.tensors[role] + part.suffix, config.num_experts)
                if problem is not None:
                    raise ValueError(problem)
            for suffix in self.encoding.refused:
                for e in self.layer.numbers.get(self.naming.tensors[role] + suffix, ()):
                    name = self.layer.name(self.naming.tensors[role] + suffix, e)
                    raise ValueError(
                        f"{checkpoint.file_of(name)}: tensor {name!r} is there, but {self.method} takes only "
                        "symmetric weights in groups of neighbours"
                    )
        names: list[str] = []
        for wanted in self.wanted(config):
            for name in wanted.names:
                problem = checkpoint.problem(name, wanted.dtypes, wanted.shapes)
                if problem is not None:
                    raise ValueError(problem)
            names += wanted.names
        return tuple(names)

    def _check_config(self, config: MoEConfig) -> None:
        """Raise ValueError when no tensors of this form can be what `config` describes."""
        self.layer.check_gated(self.naming, config)
        where = f"{self.layer.checkpoint.path}: the experts under {self.layer.prefix!r}"
        for size in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, size) % self.encoding.group_size:
                raise ValueError(
                    f"{where} are {self.method}, which needs {size} to be a multiple of "
                    f"{self.encoding.group_size}, got {getattr(config, size)}"
                )


def find_forms(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> list[tuple[int, Form]]:
    """List what the layer's experts may be, the likeliest first, each with how much speaks against it.

    Raises
    ------
    ValueError
        A layer of AWQ.
    """
    ranked = []
    for form in _named_forms(read_layers(checkpoint, layer_idx)):
        strange, count = form.misfits()
        if not strange:
            ranked.append((count, form))
    return sorted(ranked, key=lambda pair: pair[0])


def _named_forms(layers: Sequence[ExpertLayer]) -> list[Form]:
    """List the forms whose codes are there by name, under the first prefix that has any."""
    for layer in layers:
        _refuse_awq(layer)
        part = [form for form in (Form(layer, *row) for row in FORMS) if any(form.has_codes())]
        forms = [form for form in part if all(form.has_codes())] or part
        # Experts with a gate are not taken for experts without one, whose one projection is up_proj too.
        forms = [form for form in forms if form.naming.gated] or forms
        if forms:
            return forms
    return []


def _refuse_awq(layer: ExpertLayer) -> None:
    """Raise ValueError for the format that has GPTQ's names, but packs codes of eight rows in a number."""
    for naming, _ in FORMS:
        for stem in naming.tensors.values():
            if numbers := layer.numbers.get(stem + _QWEIGHT):
                name = layer.name(stem + _QWEIGHT, min(numbers))
                codes = layer.info(name)
                scales = layer.info(layer.name(stem + _SCALES, min(numbers)))
                if codes and scales and _packs_rows(codes.shape, scales.shape):
                    raise ValueError(
                        f"{layer.checkpoint.file_of(name)}: tensor {name!r} is there, but AWQ layers are not "
                        "read: the codes of a row do not lie together, nor in their order"
                    )


def _packs_rows(codes: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Whether there is a number for the codes of eight scales, or more of a group."""
    return bool(codes and scales) and 0 < codes[-1] * 8 == scales[-1]


def no_form(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> str:
    """Say why a layer has no native form."""
    codes = {stem + encoding.codes.suffix for naming, encoding in FORMS for stem in naming.tensors.values()}
    for layer in read_layers(checkpoint, layer_idx):
        known = codes.union(*(naming.tensors.values() for naming in layer.namings()))
        there = sorted(known & layer.numbers.keys())
        if there:
            name = layer.name(there[0], min(layer.numbers[there[0]]))
            expected = f"expected weights of {', '.join(METHODS)}"
            dtype = checkpoint.info(name).dtype
            return f"{checkpoint.file_of(name)}: tensor {name!r} is {dtype}, {expected}"
    others = ", ".join(map(str, layers_with(checkpoint, codes))) or "none"
    return f"{checkpoint.path}: layer {layer_idx} has no known experts; layers with experts: {others}"
