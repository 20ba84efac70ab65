"""Which instruction set serves on which machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import ISA, assert_close, draw_batch, draw_layer, run_python

import ktmoe_np
from ktmoe_np import kt_kernel_ext as ext

pytestmark = [pytest.mark.kernels, pytest.mark.engine, pytest.mark.asan, pytest.mark.emulated]

INFO = ktmoe_np.isa_info()
X86 = INFO["known"]
EMULATED = INFO["on_request"]
ARM = ["scalar", *EMULATED]

AVX512 = ["avx2", "avx512"]
TILES = ["avx2", "avx_vnni", "avx512", "avx512_bf16", "amx"]

#: machine -> what its processor has, what is compiled in, and what serves.
MACHINES: dict[str, tuple[list[str], list[str], str]] = {
    "Nehalem": ([], X86, "scalar"),
    "Haswell, Zen 3": (["avx2"], X86, "avx2"),
    "Alder Lake": (["avx2", "avx_vnni"], X86, "avx_vnni"),
    "Cascade Lake, Ice Lake": (AVX512, X86, "avx512"),
    "Zen 4, Zen 5, Cooper Lake with VBMI": ([*AVX512, "avx512_bf16"], X86, "avx512_bf16"),
    "Sapphire Rapids": (TILES, X86, "amx"),
    "Sapphire Rapids whose kernel grants no tiles": (TILES[:-1], X86, "avx512_bf16"),
    "Graviton": ([], ARM, "scalar"),
    "a build without tiles": (TILES, [name for name in X86 if name != "amx"], "avx512_bf16"),
    "a build without AVX-512": (TILES, ["scalar", "avx2"], "avx2"),
    "a build in another order": (TILES, X86[::-1], "amx"),
    "a build of nothing else": (TILES, ["scalar"], "scalar"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_best_that_is_there(machine: str) -> None:
    features, compiled, serves = MACHINES[machine]
    assert ext.select_isa(features, compiled) == serves
    assert ext.select_isa(features, compiled, None) == serves


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("wanted", X86)
def test_overrides(machine: str, wanted: str) -> None:
    features, compiled, _ = MACHINES[machine]
    usable = [name for name in compiled if name in {*features, *ARM}]
    if wanted in usable:
        assert ext.select_isa(features, compiled, wanted) == wanted
    else:
        message = f"isa: got '{wanted}', expected one that can run on this machine: {', '.join(usable)}$"
        with pytest.raises(RuntimeError, match=message):
            ext.select_isa(features, compiled, wanted)


@pytest.mark.parametrize("name", EMULATED)
def test_an_emulator_is_never_chosen_unasked(name: str) -> None:
    assert ext.select_isa([], [name, "scalar"]) == "scalar"
    assert ext.select_isa([name], [name, "scalar"]) == "scalar"


@pytest.mark.parametrize("name", ["avx", "AVX2", "avx2 ", "avx10", "emu"])
def test_a_name_that_is_none(name: str) -> None:
    message = f"isa: got '{name}', expected one of {', '.join(X86)}"
    with pytest.raises(ValueError, match=message):
        ext.select_isa(TILES, X86, name)
    with pytest.raises(ValueError, match=message):
        ext.select_isa(TILES, [*X86, name])


@pytest.mark.parametrize("wrong", [2, 2.0, ["scalar"]])
def test_a_name_that_is_no_word(wrong: Any) -> None:
    with pytest.raises(TypeError):
        ext.select_isa(TILES, X86, wrong)


def test_this_machine() -> None:
    info = ktmoe_np.isa_info()
    assert sorted(info) == ["active", "compiled", "known", "on_request", "supported"]
    assert info["known"][0] == "scalar"
    assert info["on_request"] == ["amx_emu"]
    assert {"scalar"} <= set(info["supported"]) <= set(info["compiled"]) <= set(info["known"])
    for name in info["on_request"]:  # emulators run anywhere
        assert (name in info["supported"]) == (name in info["compiled"])
    assert info["active"] in info["supported"]


def imported(name: str) -> Any:
    script = "from ktmoe_np import isa_info\nprint(isa_info()['active'])"
    return run_python(script, env={"KTMOE_ISA": name})


@pytest.mark.subprocess
@pytest.mark.parametrize("name", X86)
def test_the_environment_chooses(name: str) -> None:
    done = imported(name)
    if name in INFO["supported"]:
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")
    else:
        assert done.returncode == 1
        assert f"isa: got '{name}', expected one that can run on this machine: scalar" in done.stderr


@pytest.mark.subprocess
def test_an_empty_environment_chooses_the_best() -> None:
    best = [name for name in INFO["supported"] if name not in EMULATED][-1]
    done = imported("")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{best}\n", "")


@pytest.mark.subprocess
def test_the_environment_names_what_is_unknown() -> None:
    done = imported("avx1024")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"isa: got 'avx1024', expected one of {', '.join(X86)}" in last
    assert "KTMOE_ISA" in last  # else the origin of the name is unknown


def test_the_limits_of_this_machine() -> None:
    engine = ext.CPUInfer(1)
    for product in ("bfloat16", "int8"):
        limits = ext.measure_limits(engine, seconds=0.01, isa=ISA, product=product)
        assert limits["isa"] == ISA
        assert limits["threads"] == 1
        for name in ("read_bytes_per_s", "dot_flop_per_s", "step_flop_per_s"):
            assert limits[name] > 0
    with pytest.raises(ValueError, match="product: got 'int4', expected 'bfloat16' or 'int8'"):
        ext.measure_limits(engine, 0.01, product="int4")
    for seconds in (0.0, -1.0, 601.0, float("nan")):
        with pytest.raises(ValueError, match=r"seconds: got .*, expected above 0, at most 600"):
            ext.measure_limits(engine, seconds)
    with pytest.raises(ValueError, match="isa: got 'sse', expected one of scalar"):
        ext.measure_limits(engine, 0.01, "sse")
    for name in set(X86) - set(INFO["supported"]):
        with pytest.raises(
            RuntimeError, match=f"isa: got '{name}', expected one that can run on this machine"
        ):
            ext.measure_limits(engine, 0.01, name)
    engine.shutdown()


@pytest.mark.subprocess
def test_all_instruction_sets_agree_within_the_roundings() -> None:
    """Each is within the bound of the reference here, in one place, whatever the others run under."""
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, 3, 45, 70, with_biases=True)
    batch = draw_batch(rng, layer, 20, 2)
    script = """
        import sys
        import numpy as np
        from layers import draw_batch, draw_layer
        rng = np.random.default_rng(0)
        layer = draw_layer(rng, 3, 45, 70, with_biases=True)
        batch = draw_batch(rng, layer, 20, 2)
        sys.stdout.write(layer.forward(batch, out=np.empty((20, 70), np.float32)).tobytes().hex())
    """
    for name in INFO["supported"]:
        done = run_python(script, env={"KTMOE_ISA": name})
        assert (done.returncode, done.stderr) == (0, "")
        result = np.frombuffer(bytes.fromhex(done.stdout), np.float32).reshape(20, 70)
        assert_close(result, layer, batch)
