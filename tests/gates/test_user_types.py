"""What a type checker tells a user of the package: mypy, strict, on programs that are right and wrong."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ktmoe_np
from ktmoe_np.sft.options import SFTKeywords, SFTOptions

_SOURCE = Path(ktmoe_np.__file__).resolve().parents[1]

#: Before each program.
_PRELUDE = """\
from typing import Literal, reveal_type
import numpy as np
from ktmoe_np import *
from ktmoe_np.models import MoEDecoder
x, ids, mask = np.zeros((4, 8), np.float32), [[0, 1]], np.zeros(8, bool)
moe = KTMoEWrapper(0, 8, 2, 128, 64)
sft = KTMoEWrapper(0, 8, 2, 128, 64, method="BF16_SFT", mode="sft")
"""

#: Programs, and what mypy says of their last line: an error, a revealed type, or nothing.
_PROGRAMS = {
    "unknown_keyword": (
        "KTMoEWrapper(0, 8, 2, 128, 64, nonsense=3)",
        'error: Unexpected keyword argument "nonsense" for overloaded function "KTMoEWrapper"',
    ),
    "unknown_keyword_of_training": (
        'KTMoEWrapper(0, 8, 2, 128, 64, method="BF16_SFT", mode="sft", nonsense=3)',
        'error: Unexpected keyword argument "nonsense" for overloaded function "KTMoEWrapper"',
    ),
    "misspelled_rank": (
        'KTMoEWrapper.from_pretrained("model", mode="sft", lora_rnak=3)',
        'error: Unexpected keyword argument "lora_rnak" for overloaded function "from_pretrained" of '
        '"KTMoEWrapper"; did you mean "lora_rank"?',
    ),
    "option_of_training_in_inference": (
        "KTMoEWrapper(0, 8, 2, 128, 64, lora_rank=3)",
        'error: No overload variant of "KTMoEWrapper" matches',
    ),
    "unknown_mode": (
        'KTMoEWrapper(0, 8, 2, 128, 64, mode="training")',
        'error: No overload variant of "KTMoEWrapper" matches',
    ),
    "training_without_a_method": (
        'KTMoEWrapper(0, 8, 2, 128, 64, mode="sft")',
        'error: No overload variant of "KTMoEWrapper" matches',
    ),
    "layer_idx_that_is_a_string": (
        'KTMoEWrapper("0", 8, 2, 128, 64)',
        'error: No overload variant of "KTMoEWrapper" matches',
    ),
    "misspelled_option_of_a_decoder": (
        'MoEDecoder.from_pretrained("model", mode="sft", lora_rnak=3)',
        'error: Unexpected keyword argument "lora_rnak"',
    ),
    "rank_of_a_decoder_for_inference": (
        'MoEDecoder.from_pretrained("model", lora_rank=3)',
        'error: No overload variant of "from_pretrained" of "MoEDecoder" matches',
    ),
    "misspelled_scale": (
        "moe.load_weights_from_tensors(x, x, x, gate_scal=x)",
        'error: Unexpected keyword argument "gate_scal"',
    ),
    "hidden_states_that_are_a_number": (
        "moe.forward(1, ids, x)",
        'error: No overload variant of "forward" of "BaseMoEWrapper" matches',
    ),
    "misspelled_adapter": (
        "sft.update_lora_weights(gate_lora_c=x)",
        'error: Unexpected keyword argument "gate_lora_c"',
    ),
    "misspelled_bias": (
        "GPUExperts(moe.config, mask, x, None, x, gate_bais=x)",
        'error: Unexpected keyword argument "gate_bais"',
    ),
    "misspelled_dtype_of_activations": (
        'sft.forward_sft(x, ids, x, activation_dtype="int4")',
        'error: No overload variant of "forward_sft" of "BaseSFTMoEWrapper" matches',
    ),
    "class_for_inference": (
        "reveal_type(KTMoEWrapper(0, 8, 2, 128, 64, mask, numa_nodes=[0, 0]))",
        'note: Revealed type is "ktmoe_np.inference.base.BaseMoEWrapper"',
    ),
    "class_for_training": (
        'reveal_type(KTMoEWrapper(0, 8, 2, 128, 64, method="BF16_SFT", mode="sft", lora_rank=4))',
        'note: Revealed type is "ktmoe_np.sft.base.BaseSFTMoEWrapper"',
    ),
    "class_of_a_checkpoint_for_inference": (
        'reveal_type(KTMoEWrapper.from_pretrained("model", 3, max_deferred_experts_per_token=1))',
        'note: Revealed type is "ktmoe_np.inference.base.BaseMoEWrapper"',
    ),
    "class_of_a_checkpoint_for_training": (
        'reveal_type(KTMoEWrapper.from_pretrained("model", mode="sft", lora_alpha=16, seed=1))',
        'note: Revealed type is "ktmoe_np.sft.base.BaseSFTMoEWrapper"',
    ),
    "class_when_the_mode_is_a_variable": (
        "def make(mode: Literal['inference', 'sft']) -> None:\n"
        "    reveal_type(KTMoEWrapper(0, 8, 2, 128, 64, method='BF16_SFT', mode=mode))",
        'note: Revealed type is "ktmoe_np.inference.base.BaseMoEWrapper | '
        'ktmoe_np.sft.base.BaseSFTMoEWrapper"',
    ),
    "result_on_the_host": (
        "reveal_type(moe.forward(x, ids, x))",
        'note: Revealed type is "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"',
    ),
    "result_that_the_caller_gave": (
        "reveal_type(moe.forward(x, ids, x, out=mask))",
        'note: Revealed type is "numpy.ndarray[tuple[int], ',
    ),
    "result_of_another_library": (
        "class Tensor:\n    shape, dtype = (4, 8), object()\nreveal_type(sft.forward_sft(Tensor(), ids, x))",
        'note: Revealed type is "result_of_another_library.Tensor"',
    ),
    "result_in_a_stream": ("reveal_type(moe.forward(x, ids, x, 7))", 'note: Revealed type is "Any"'),
    "step_of_training": (
        "sft.forward_sft(x, ids, x, out=x)\n"
        "gradients = sft.backward(x)\n"
        "sft.update_lora_weights(gate_lora_a=gradients.gate_lora_a)",
        None,
    ),
    "dtypes_of_activations": (
        'KTMoEWrapper.from_pretrained("model", activation_dtype="int8")\n'
        "sft.forward(x, ids, x, activation_dtype=np.dtype(np.int8))\n"
        "moe.forward(x, ids, x, activation_dtype=np.int8)",
        None,
    ),
    "decoder_with_an_adapter": ('MoEDecoder.from_pretrained(adapter="adapter", lora_rank=3)', None),
    "what_a_program_does": (
        'moe.load_weights_from_tensors([x, x], None, x, ids[0], gate_format="Q4_0", gate_bias=x)\n'
        "moe.set_gpu_experts_mask(mask)\n"
        "moe.submit_forward(x, np.array(ids), x)\n"
        "GPUExperts(moe.config, mask, x, None, x).add(moe.sync_forward(), x)\n"
        "KTMoEWrapper.drain_deferred(chain=DeferralChain())\n"
        "generate_gpu_experts_masks([[1, 2]], 1)\n"
        'parse_activation({"kind": "silu", "limit": 7.0})',
        None,
    ),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy says of each program, in one run: it reads NumPy's types first, which takes 10 to 20 s."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("programs")
    for name, (program, _) in _PROGRAMS.items():
        (folder / f"{name}.py").write_text(f"{_PRELUDE}{program}\n")
    environment = dict(os.environ)
    if "site-packages" not in _SOURCE.parts:
        environment["MYPYPATH"] = str(_SOURCE)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file="]
    command += ["--cache-dir", str(folder / "cache"), *sorted(f"{name}.py" for name in _PROGRAMS)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.stderr == ""
    found: dict[str, list[str]] = {name: [] for name in _PROGRAMS}
    for line in done.stdout.splitlines():
        parts = re.match(r"(\w+)\.py:(\d+): (.*)", line)
        if parts is not None:
            found[parts[1]].append(parts[3])
    return found


@pytest.mark.parametrize("name", _PROGRAMS)
def test_what_mypy_says(name: str, verdicts: dict[str, list[str]]) -> None:
    expected = _PROGRAMS[name][1]
    if expected is None:
        assert verdicts[name] == []
    else:
        assert verdicts[name][0].startswith(expected)
        errors = [line for line in verdicts[name] if line.startswith("error")]
        assert expected.startswith("error") == bool(errors)


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(ktmoe_np.__file__).parent / "py.typed").is_file()


def test_keywords_of_training_are_the_fields_of_the_options() -> None:
    keywords = [(name, value.__forward_arg__) for name, value in SFTKeywords.__annotations__.items()]
    assert keywords == [(field.name, field.type) for field in fields(SFTOptions)]


def _public_functions() -> Iterator[tuple[str, Any]]:
    """The functions that users call, by name: those of public modules, and methods of their classes."""
    for module in ("", ".models", ".sft", ".io", ".cpuinfer", ".buffers"):
        package = importlib.import_module(f"ktmoe_np{module}")
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isclass(found):
                for key, value in vars(found).items():
                    is_made = key in ("__init__", "__new__") and not getattr(found, "_is_protocol", False)
                    if is_made or (key[0] != "_" and callable(getattr(value, "__func__", value))):
                        yield f"{name}.{key}", value
            elif inspect.isfunction(found):
                yield name, found


def _is_generated(function: Any) -> bool:
    """Whether it is the constructor that `dataclass` has made of fields."""
    return bool(function.__code__.co_filename == "<string>")


def test_no_public_function_takes_anything() -> None:
    """Neither keywords of any name nor arguments of any type; what is annotated is what is accepted."""
    functions = dict(_public_functions())
    assert {"KTMoEWrapper.__new__", "BaseMoEWrapper.__init__", "MoEDecoder.forward"} <= functions.keys()
    faults = []
    for name, function in functions.items():
        for parameter in inspect.signature(getattr(function, "__func__", function)).parameters.values():
            annotation = str(parameter.annotation)
            is_tunnel = parameter.kind is parameter.VAR_KEYWORD and not annotation.startswith("Unpack[")
            is_data = name.endswith("__init__") and _is_generated(function)
            if is_tunnel or (annotation == "Any" and not is_data):
                faults.append(f"{name}: {parameter}")
    assert not faults, "\n".join(faults)
