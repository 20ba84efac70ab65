"""One registry: what is listed in C++ is listed nowhere else, has a reference, and is in the documents."""

from __future__ import annotations

import re
import runpy
from collections.abc import Collection

import pytest

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.arrays.activation import FORMULAS
from ktmoe_np.config import activation_kinds, activation_names
from ktmoe_np.formats.encodings import NATIVE_FORMATS
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.formats.methods import METHODS
from ktmoe_np.io.layouts.encodings import METHODS as METHODS_WITH_LAYOUTS
from ktmoe_np.reference.activation import FUNCTIONS
from ktmoe_np.reference.gguf import TYPES
from ktmoe_np.reference.native import DECODERS

from ._tree import CPP_SUFFIXES, ROOT, files_under, name_of

#: A sample of what may be added, as files name it -> the most files that name it.
MOST_FILES = {
    "iq4_?xs": 3,  # the format, its line, its reference
    "swiglu_?step": 5,  # its line, formula and derivative, its reference, its formula for experts on a GPU
    "avx_?vnni": 3,  # its line, the CPU feature, its header
    "(?<!a)mx_?fp8": 5,  # the format, its line, the entry of its method, its reference, its tensors
}


@pytest.mark.parametrize("sample", MOST_FILES)
def test_an_addition_touches_few_files(sample: str) -> None:
    files = files_under("cpp", "src", suffixes=CPP_SUFFIXES | {".py"})
    found = [name_of(path) for path in files if re.search(sample, path.read_text(), re.IGNORECASE)]
    assert 0 < len(found) <= MOST_FILES[sample], "\n".join(found)


def test_the_readme_names_every_instruction_set() -> None:
    text, info = (ROOT / "README.md").read_text(), ext.isa_info()
    promised = [isa for isa in info["known"] if isa not in info["on_request"]]
    assert [isa for isa in promised if f"`{isa}`" not in text] == []


@pytest.mark.parametrize(
    ("listed", "table"),
    [
        pytest.param(activation_kinds(), FUNCTIONS, id="reference/activation.py: FUNCTIONS"),
        pytest.param(activation_kinds(), FORMULAS, id="arrays/activation.py: FORMULAS"),
        pytest.param(GGUF_FORMATS, TYPES, id="reference/gguf.py: TYPES"),
        pytest.param(
            {fmt.method for fmt in NATIVE_FORMATS.values()}, DECODERS, id="reference/native.py: DECODERS"
        ),
        pytest.param(
            {fmt.method for fmt in NATIVE_FORMATS.values()},
            METHODS_WITH_LAYOUTS,
            id="io/layouts/encodings.py",
        ),
    ],
)
def test_a_table_covers_the_registry(listed: Collection[str], table: Collection[str]) -> None:
    assert set(table) == set(listed), (
        f"missing: {set(listed) - set(table)}, unknown: {set(table) - set(listed)}"
    )


def test_names_are_unique() -> None:
    for names in (
        [info.name for info in ext.formats() if info.gguf_type is None],
        [info.name for info in ext.formats() if info.gguf_type is not None],
        [info.gguf_type for info in ext.formats() if info.gguf_type is not None],
        activation_names(),
        [(method.mode, method.name) for method in METHODS],
    ):
        assert len(set(names)) == len(names)


def test_every_class_of_a_method_is_there() -> None:
    for info in ext.methods():
        base = ext.moe.MoE_SFT_Interface if info.mode == "sft" else ext.moe.MoE_Interface
        assert issubclass(getattr(ext.moe, info.layer), base)
    classes = [name for name in vars(ext.moe) if name.endswith("_MOE")]
    assert sorted(classes) == sorted(info.layer for info in ext.methods())


def test_the_page_of_tables_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "write_tables.py"))
    assert tool["PAGE"].read_text() == tool["page"](), "run: python tools/write_tables.py"
