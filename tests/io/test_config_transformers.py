"""Sizes of experts in a config.json, against those that transformers reads."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from ktmoe_np.config import MoEConfig

pytestmark = pytest.mark.crosscheck

#: What each class of experts reads its sizes from, in its source: the attribute of the config.
_READS = re.compile(r"self\.(hidden_dim|hidden_size|intermediate_dim|intermediate_size) = config\.(\w+)")
_CLASS = re.compile(
    r"^class (\w*Experts)\(nn\.Module\):\n(.*?)(?=^class |^@|^def |\Z)", re.DOTALL | re.MULTILINE
)

#: Experts that no checkpoint of a mixture of experts names so: shared ones, and those of encoder-decoders.
_OTHERS = re.compile("Shared|Talker|Nllb|Switch")

#: What a config.json gets, each size with a value of its own.
SIZES = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "hidden_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
}


def families() -> dict[str, str]:
    """Folder of a model -> the attribute that the intermediate size of its experts is."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name, body in _CLASS.findall(path.read_text()):
            reads = dict(_READS.findall(body))
            attribute = reads.get("intermediate_dim", reads.get("intermediate_size"))
            if attribute and not _OTHERS.search(name):
                found[path.parent.name] = attribute
    return found


def config_classes(family: str) -> list[Any]:
    """The classes of configs of a family that count experts."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    classes = [
        cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__
    ]
    return [cls for cls in classes if cls.model_type and not _OTHERS.search(cls.__name__)]


def names_of(cls: Any) -> set[str]:
    """The values that a class of configs has, by all of their names."""
    return {*cls.__dataclass_fields__, *cls.attribute_map}


def sizes_of(cls: Any) -> dict[str, int]:
    """`SIZES`, without what is another name of a value that the config has too."""
    return {name: value for name, value in SIZES.items() if cls.attribute_map.get(name) not in SIZES}


def read_by_transformers(cls: Any, attribute: str) -> int | None:
    """The intermediate size of a config with these sizes; None for one that cannot have them."""
    try:
        size: int = getattr(cls(**sizes_of(cls)), attribute)
    except Exception:  # they contradict others of its values, or differ by layer
        return None
    return size


def test_experts_have_the_intermediate_size_that_transformers_gives_them() -> None:
    got: dict[str, int] = {}
    expected: dict[str, int] = {}
    for family, attribute in families().items():
        for cls in config_classes(family):
            counts = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
            if attribute not in names_of(cls) or names_of(cls).isdisjoint(counts):
                continue
            value = read_by_transformers(cls, attribute)
            if value is not None:
                expected[cls.model_type] = value
                read = MoEConfig.from_hf_config({**sizes_of(cls), "model_type": cls.model_type}, 0)
                got[cls.model_type] = read.moe_intermediate_size
    assert got == expected
    assert len(got) > 50, sorted(got)
    assert {SIZES["intermediate_size"], SIZES["moe_intermediate_size"]} == set(got.values())
