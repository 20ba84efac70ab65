"""Finding the tensors of a layer's natively quantized experts, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...config import MoEConfig
from ...formats.gptq import group_sizes
from ...formats.methods import find_method
from ..safetensors.checkpoint import SafetensorsCheckpoint, TensorInfo
from .encoding import Encoding, Shapes, TensorSpec
from .encodings import METHODS, NATIVE_LAYOUTS
from .layer import BIAS_DTYPES, WEIGHT_DTYPES, ExpertLayer, layers_with, read_layers, rows_of_roles
from .name_patterns import NamePattern
from .quantization_options import quantization_options

__all__ = ["NativeLayout", "find_native_layouts", "why_no_layout"]

#: Experts that are looked at to tell the encoding: one that is damaged is outvoted.
_PROBED = 3


class _Wanted(NamedTuple):
    """Tensors that must be there, all alike."""

    template: str
    dtypes: tuple[str, ...]
    shapes: Shapes


@dataclass(frozen=True)
class NativeLayout:
    """The layer's tensors seen as one pattern and one encoding; of all experts or of some of them."""

    layer: ExpertLayer
    pattern: NamePattern
    encoding: Encoding
    experts: tuple[int, ...] | None = None

    def chosen(self, config: MoEConfig) -> Sequence[int]:
        """The experts that are read."""
        return range(config.num_experts) if self.experts is None else self.experts

    @property
    def method(self) -> str:
        """The method that multiplies the experts."""
        return self.encoding.method

    @property
    def group_size(self) -> int:
        """Columns that share a scale; of what is converted, the most that blocks may have."""
        if self.encoding.unpack is None:
            return self.encoding.group_size
        common = 0
        for role in self.pattern.tensors:
            num_columns, num_groups = self._groups(role)
            common = math.gcd(common, num_columns, group_sizes(num_columns).get(num_groups, 0))
        blocks = find_method(self.method, "inference").encodings
        fitting = [size for size in blocks if size is not None and common % size == 0]
        return max(fitting, default=self.encoding.group_size)

    def _groups(self, role: str) -> tuple[int, int]:
        """K of a projection's matrices and the groups that it is cut into, of the first expert."""
        e = min(self.expert_ids(role, self.encoding.codes))
        codes = self.layer.info(self.name(role, self.encoding.codes, e))
        scale = self.layer.info(self.name(role, self.encoding.scale, e))
        assert codes is not None
        num_groups = 0 if scale is None else scale.shape[0 if self.encoding.transposed else -1]
        return self.encoding.size(codes.shape)[1], num_groups

    def name(self, role: str, spec: TensorSpec, e: int) -> str:
        """A tensor of a projection; of fused experts, the same for all."""
        return self.layer.name(self.pattern.tensors[role] + spec.suffix, e)

    def names_of(self, role: str, spec: TensorSpec, config: MoEConfig) -> list[str]:
        """The tensors of a projection, one for each expert that is read or one for all of them."""
        template = self.pattern.tensors[role] + spec.suffix
        return self.layer.names_of(template, config.num_experts, self.experts)

    def expert_ids(self, role: str, spec: TensorSpec) -> set[int]:
        """The experts that have such a tensor; of fused experts, one that stands for all."""
        return self.layer.expert_ids.get(self.pattern.tensors[role] + spec.suffix, set())

    def tensor_specs(self, role: str) -> tuple[TensorSpec, ...]:
        """The tensors that a projection's matrices are made of, those included that it may have and has."""
        specs = self.encoding.tensor_specs
        return tuple(spec for spec in specs if not spec.optional or self.expert_ids(role, spec))

    def has_codes(self) -> list[bool]:
        """Whether any expert has codes, for each of the projections."""
        return [bool(self.expert_ids(role, self.encoding.codes)) for role in self.pattern.tensors]

    def rows(self, config: MoEConfig) -> dict[str, int]:
        """N of each projection, fused or not."""
        rows = rows_of_roles(config.moe_intermediate_size, config.hidden_size)
        return {role: rows[role] for role in self.pattern.tensors}

    def mismatches(self) -> tuple[bool, int]:
        """Whether no codes are of the dtype; and how much speaks against the layout, at a few experts.

        Sizes are taken from the codes, so that no configuration is needed.
        """
        codes = self.encoding.codes
        no_codes_match, count = True, 0
        expert_ids = sorted(set().union(*(self.expert_ids(role, codes) for role in self.pattern.tensors)))
        for e in expert_ids[:_PROBED]:
            for role in self.pattern.tensors:
                info = self.layer.info(self.name(role, codes, e))
                no_codes_match = no_codes_match and (info is None or info.dtype not in codes.dtypes)
                for spec in self.tensor_specs(role):
                    count += self._mismatches(self.name(role, spec, e), spec, info)
                stem = self.pattern.tensors[role]
                count += sum(stem + suffix in self.layer.expert_ids for suffix in self.encoding.refused)
        return no_codes_match, count

    def _mismatches(self, name: str, spec: TensorSpec, codes: TensorInfo | None) -> int:
        """How badly a tensor matches these codes."""
        info = self.layer.info(name)
        if info is None:
            return 2
        count = int(info.dtype not in spec.dtypes)
        if codes is not None:
            lead = 0 if self.pattern.per_expert else 1
            if len(codes.shape) < lead + 2:
                return count + 1
            shapes = spec.shapes(*self.encoding.size(codes.shape[lead:]))
            count += info.shape not in [(*codes.shape[:lead], *shape) for shape in shapes]
        return count

    def wanted(self, config: MoEConfig) -> Iterator[_Wanted]:
        """The tensors that the layer must have."""
        lead = () if self.pattern.per_expert else (config.num_experts,)
        rows = self.rows(config)
        for role, num_rows in rows.items():
            num_columns = config.moe_intermediate_size if role == "down" else config.hidden_size
            for spec in self.tensor_specs(role):
                shapes = tuple((*lead, *shape) for shape in spec.shapes(num_rows, num_columns))
                yield _Wanted(self.pattern.tensors[role] + spec.suffix, spec.dtypes, shapes)
        if self.layer.has_biases(self.pattern):
            for role, template in self.pattern.biases.items():
                yield _Wanted(template, BIAS_DTYPES, ((*lead, rows[role]),))

    def check(self, config: MoEConfig) -> tuple[str, ...]:
        """Raise ValueError when a tensor is not what `config` wants it to be; otherwise list them all.

        Of experts that are not read the tensors have to be there, and their files stay closed.
        """
        checkpoint = self.layer.checkpoint
        self._check_config(config)
        for role in self.pattern.tensors:
            for spec in self.encoding.tensor_specs:
                problem = self.layer.too_many(self.pattern.tensors[role] + spec.suffix, config.num_experts)
                if problem is not None:
                    raise problem
            for suffix in self.encoding.refused:
                for e in self.layer.expert_ids.get(self.pattern.tensors[role] + suffix, ()):
                    name = self.layer.name(self.pattern.tensors[role] + suffix, e)
                    weights = "weights" if self.encoding.zeros else "symmetric weights"
                    raise ValueError(
                        f"{checkpoint.file_of(name)}: tensor {name!r}: got one, expected none: {self.method} "
                        f"takes only {weights} in groups of neighbors"
                    )
        names: list[str] = []
        for wanted in self.wanted(config):
            for name in self.layer.names_to_look_at(wanted.template, config.num_experts, self.experts):
                problem = checkpoint.problem(name, wanted.dtypes, wanted.shapes, config.origin())
                if problem is not None:
                    raise problem
            names += self.layer.names_of(wanted.template, config.num_experts, self.experts)
        return tuple(names)

    def _check_config(self, config: MoEConfig) -> None:
        """Raise ValueError when no tensors of this layout can be what `config` describes."""
        self.layer.check_gated(self.pattern, config)
        where = f"{self.layer.checkpoint.path}: the experts under {self.layer.prefix!r}"
        for size in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, size) % self.encoding.group_size:
                raise ValueError(
                    f"{where}: got {size} {getattr(config, size)}, expected a multiple of "
                    f"{self.encoding.group_size} for {self.method}"
                )


def find_native_layouts(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> list[tuple[int, NativeLayout]]:
    """List what the layer's experts may be, the likeliest first, each with how much speaks against it.

    Of encodings that differ in their zero points alone, the model's configuration says which comes first.
    """
    ranked = []
    for layout in _layouts_by_name(read_layers(checkpoint, layer_idx)):
        no_codes_match, count = layout.mismatches()
        if not no_codes_match:
            ranked.append((count, layout))
    if any(layout.encoding.symmetric is not None for _, layout in ranked):
        symmetric = quantization_options(checkpoint.path).symmetric
        return sorted(ranked, key=lambda pair: (pair[0], pair[1].encoding.symmetric is (not symmetric)))
    return sorted(ranked, key=lambda pair: pair[0])


def _layouts_by_name(layers: Sequence[ExpertLayer]) -> list[NativeLayout]:
    """List the layouts whose codes are there by name, under the first prefix that has any."""
    for layer in layers:
        incomplete = [
            layout
            for layout in (NativeLayout(layer, *row) for row in NATIVE_LAYOUTS)
            if any(layout.has_codes())
        ]
        layouts = [layout for layout in incomplete if all(layout.has_codes())] or incomplete
        # Experts with a gate are not taken for experts without one, whose one projection is up_proj too.
        layouts = [layout for layout in layouts if layout.pattern.gated] or layouts
        if layouts:
            return layouts
    return []


def why_no_layout(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> str:
    """Say why a layer has no native layout."""
    codes = {
        stem + encoding.codes.suffix
        for pattern, encoding in NATIVE_LAYOUTS
        for stem in pattern.tensors.values()
    }
    for layer in read_layers(checkpoint, layer_idx):
        known = codes.union(*(pattern.tensors.values() for pattern in layer.patterns()))
        there = sorted(known & layer.expert_ids.keys())
        if there:
            name = layer.name(there[0], min(layer.expert_ids[there[0]]))
            expected = f"expected weights of {', '.join(METHODS)}"
            dtype = checkpoint.info(name).dtype
            if dtype in WEIGHT_DTYPES:
                expected += f"; method {find_method(None, 'inference').name} takes these"
            return f"{checkpoint.file_of(name)}: tensor {name!r}: got {dtype}, {expected}"
    others = ", ".join(map(str, layers_with(checkpoint, codes))) or "none"
    return f"{checkpoint.path}: layer {layer_idx} has no known experts; layers with experts: {others}"
