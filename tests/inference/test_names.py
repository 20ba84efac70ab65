"""The names of the KTransformers family: each that the tables of DESIGN.md have is where they say."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ktmoe_np
from ktmoe_np import AMXSFTMoEWrapper, BaseSFTMoEWrapper, KTMoEWrapper
from ktmoe_np.formats.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]

#: What must be among them: the names that are fixed.
FIXED = [
    "CPUInfer",
    "WorkerPool",
    "WorkerPoolConfig",
    "InNumaPool",
    "TaskQueue",
    "MoE_Interface",
    "TP_MOE_Common<T>",
    "TP_MOE<T>",
    "TP_MOE_SFT<T>",
    "AMX_MOE_BASE<T,Derived>",
    "AMX_MOE_TP<Kernel>",
    "AMX_SFT_MOE_TP<Kernel,BaseMOE>",
    "GemmKernel224BF",
    "GemmKernel224Int8",
    "GemmKernel224Int4",
    "GeneralMOEConfig",
    "MOESFTConfig",
    "ForwardCache",
    "KTMoEWrapper",
    "_MoEBase",
    "BaseMoEWrapper",
    "BaseSFTMoEWrapper",
    "AMXMoEWrapper",
    "NativeMoEWrapper",
    "LlamafileMoEWrapper",
    "GeneralMoEWrapper",
    "AMXSFTMoEWrapper",
    "KExpertsCPUBuffer",
    "KExpertsSFTBuffer",
    "kt_kernel_ext",
    "kt_kernel_ext.moe",
]


class Row(NamedTuple):
    """A line of a table."""

    name: str
    where: str
    difference: str


def table_rows(text: str) -> list[Row]:
    """The lines of the tables whose second cell is code."""
    section = text[text.index("## 12. Names") :]
    found = re.findall(r"^\| `([^`|]+)` \| `([^`|]+)` \|(.*)\|$", section, re.MULTILINE)
    return [Row(name, where, difference.strip()) for name, where, difference in found]


ROWS = table_rows((ROOT / "DESIGN.md").read_text())


def declares(header: str, name: str) -> bool:
    """Whether a C++ header defines a class, a struct or a constant of that name."""
    kinds = rf"^(?:class|struct) {name}\b[^;]*{{|^inline constexpr \w+ {name}\b"
    return re.search(kinds, (ROOT / header).read_text(), re.MULTILINE) is not None


def resolve(path: str) -> Any:
    """The object of a dotted path, or, of ``path(argument)``, the parameter of that name."""
    whole, _, argument = path.partition("(")
    package, *names = whole.split(".")
    found: Any = importlib.import_module(package)
    for name in names:
        found = getattr(found, name)
    return inspect.signature(found).parameters[argument.rstrip(")")] if argument else found


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.where} {row.name}" for row in ROWS])
def test_a_name_is_where_the_table_says(row: Row) -> None:
    last = row.name.partition("<")[0].rpartition(".")[2]
    if row.where.endswith(".h"):
        assert declares(row.where, last)
    else:
        assert re.search(rf"[.(]{re.escape(last)}\)?$", row.where)
        assert resolve(row.where) is not None


def test_the_tables_have_every_fixed_name() -> None:
    assert set(FIXED) <= {row.name.replace(", ", ",") for row in ROWS}


def test_what_has_lost_its_parameters_says_so() -> None:
    templates = [row for row in ROWS if "<" in row.name]
    assert len(templates) == 6
    assert all(row.difference for row in templates)


def test_a_name_that_is_not_there_is_found_out() -> None:
    assert not declares("cpp/moe/layer/tp_moe.h", "TP_MOE_Common")  # used there, declared elsewhere
    assert not declares("cpp/runtime/task_queue.h", "CPUInfer")
    with pytest.raises(AttributeError):
        resolve("ktmoe_np.BaseMoEWrapper.forward_sft")
    with pytest.raises(KeyError):
        resolve("ktmoe_np.KTMoEWrapper(lora_rank)")


def test_classes_of_the_top_level_are_public() -> None:
    names = [row.where.removeprefix("ktmoe_np.") for row in ROWS if re.fullmatch(r"ktmoe_np\.\w+", row.where)]
    public = [name for name in names if name != "kt_kernel_ext"]  # a module
    assert len(public) >= 12
    assert set(public) <= set(ktmoe_np.__all__)


def test_every_wrapper_for_training_is_of_the_family() -> None:
    found = set()
    for method in METHODS:
        if method.mode == "sft":
            moe = KTMoEWrapper(0, 2, 1, 256, 256, mode="sft", method=method.name)
            assert isinstance(moe, AMXSFTMoEWrapper), method.name
            found.add(type(moe))
    assert {kind.__name__ for kind in found} == {
        "NativeSFTMoEWrapper",
        "QuantizedSFTMoEWrapper",
        "LlamafileSFTMoEWrapper",
    }
    assert AMXSFTMoEWrapper.__mro__[1] is BaseSFTMoEWrapper
