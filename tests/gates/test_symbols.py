"""Instructions beyond the platform's baseline stand in the kernels of an instruction set that has them, only.

One such instruction in a function that everyone calls, a std template compiled for AVX-512 say, and the
module dies on older machines. Looks at the libraries that the environment variable KTMOE_GATE_LIB names (with
colons between), else at what a build of the extension left in build/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from ktmoe_np import isa_info

from ._build import built_cores, cache_entry

_ISAS = tuple(isa_info()["known"])
# An instruction that shows that the kernels of an instruction set were looked at.
_NAMESAKE = {
    "avx2": "%ymm",
    "avx_vnni": "vpdpbusd",
    "avx512": "%zmm",
    "avx512_bf16": "vdpbf16ps",
    "amx": "tdpbf16ps",
}

# Mangled names, since a demangled one may mention a namespace among its arguments. Z: local to a function.
_OWNER = re.compile(r"^_ZZ*N[KV]*5ktmoe7kernels(?:" + "|".join(f"({len(isa)}{isa})" for isa in _ISAS) + ")")
_TABLE = re.compile(
    r"^_ZZ*N[KV]*5ktmoe7kernels\d+\w+?(?:5tableEv|\d+add_(?:nt|nt_int8|nn_tn|elementwise|quantize)ERNS)"
)
_SYMBOL = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(.+)$")
_PREFIXES = re.compile(
    r"^(?:(?:lock|rep|repz|repnz|notrack|bnd|data16|addr32|cs|ds|es|fs|gs|ss|rex\S*|\{\w+\}) +)*"
)

_TILE = re.compile(r"%tmm|^(?:ldtilecfg|sttilecfg|tilerelease|tile\w+|tdp\w+)\b")
_VNNI = re.compile(r"^(?:\{vex\} )?vpdp(?:bu|w)s\w+\b")
_BF16_OR_VBMI = re.compile(r"^v(?:dpbf16ps|cvtne2?ps2bf16|permb|permi2b|permt2b|pmultishiftqb)\b")
_EVEX = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])")
_VEX = re.compile(r"%ymm|^v(?!err\b|erw\b|mcall\b|mmcall\b)")
# SSE3 to SSE4.2, popcnt and BMI, as far as compilers emit them unasked (tzcnt runs as bsf where unknown).
_LATER_SSE = re.compile(
    r"^(?:mov(?:shd|sld|d)up|h(?:add|sub)p[sd]|addsubp[sd]|lddqu|pshufb|palignr|pabs[bwd]|ph(?:add|sub)\w+|pmaddubsw"
    r"|pmulhrsw|psign[bwd]|p?blend\w+|dpp[sd]|extractps|insertps|pinsr[bdq]|pextr[bdq]|pmulld|pmuldq|pm(?:ax|in)(?:sb|sd|uw|ud)"
    r"|pmov[sz]x\w+|packusdw|ptest|round[sp][sd]|pcmp(?:eqq|gtq|[ei]str\w)|popcnt|lzcnt|andn|bextr|bls\w+|bzhi|mulx|p(?:dep|ext)"
    r"|rorx|sarx|shlx|shrx)\b"
)
# What kernels of an instruction set may not use; the rest of the program none of it at all.
_BASELINE = (_TILE, _EVEX, _VEX, _LATER_SSE)
_NOT_IN = {
    "scalar": _BASELINE,
    **dict.fromkeys(isa_info()["on_request"], _BASELINE),
    "avx2": (_TILE, _EVEX, _VNNI),
    "avx_vnni": (_TILE, _EVEX),
    "avx512": (_TILE, _BF16_OR_VBMI),
    "avx512_bf16": (_TILE,),
    "amx": (),
}


@cache
def owner(symbol: str) -> str | None:
    """The instruction set whose kernels a mangled name belongs to; tables are filled on any machine."""
    if _TABLE.match(symbol):
        return None
    match = _OWNER.match(symbol)
    return next(isa for isa, found in zip(_ISAS, match.groups(), strict=True) if found) if match else None


def instructions(disassembly: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of symbol and instruction from the lines of objdump -d --no-show-raw-insn."""
    symbol = ""
    for line in disassembly:
        if found := _INSTRUCTION.match(line):
            yield symbol, _PREFIXES.sub("", found[1])
        elif found := _SYMBOL.match(line):
            symbol = found[1]


@cache
def _is_misplaced(isa: str | None, instruction: str) -> bool:
    return any(pattern.search(instruction) for pattern in (_NOT_IN[isa] if isa else _BASELINE))


def violations(disassembly: Iterable[str]) -> list[str]:
    """The first instruction of every function that the function may not use."""
    found: dict[str, str] = {}
    for symbol, instruction in instructions(disassembly):
        if _is_misplaced(owner(symbol), instruction):
            found.setdefault(symbol, instruction)
    return [f"{symbol}: {instruction}" for symbol, instruction in found.items()]


def missing_namesakes(disassembly: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """The chosen instruction sets whose kernels nowhere have the instruction that shows them."""
    missing = [isa for isa in chosen if isa in _NAMESAKE]
    for symbol, instruction in instructions(disassembly):
        if not missing:
            break
        isa = owner(symbol)
        if isa in missing and _NAMESAKE[isa] in instruction:
            missing.remove(isa)
    return missing


def _disassemble(library: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _libraries() -> list[Path]:
    if named := os.environ.get("KTMOE_GATE_LIB"):
        return [Path(name) for name in named.split(":")]
    # The core as an archive, which keeps its symbols, and the objects of the bindings.
    built = [library.parent for library in built_cores() if any(library.parent.glob("kt_kernel_ext*.so"))]
    if not built:
        return []
    newest = max(built, key=lambda folder: (folder / "libktmoe.a").stat().st_mtime)
    return [newest / "libktmoe.a", *newest.glob("CMakeFiles/kt_kernel_ext.dir/**/*.o")]


def test_instructions_stand_where_they_may() -> None:
    libraries = _libraries()
    if not libraries:
        pytest.skip("nothing is built; KTMOE_GATE_LIB may name a library")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    listings = [_disassemble(library) for library in libraries]
    if "x86-64" not in next(line for line in listings[0] if "file format" in line):
        pytest.skip("not a library for x86-64")
    faults = [fault for listing in listings for fault in violations(listing)]
    assert not faults, "\n".join(faults)

    for library, listing in zip(libraries, listings, strict=True):
        if library.suffix != ".a":  # an object of the bindings
            continue
        chosen = cache_entry(library.parent, "KTMOE_ISAS").split(";")
        assert not missing_namesakes(listing, chosen), f"{library}: of instruction sets that it should have"


_IN_STD = "_ZNSt6vectorIN5ktmoe7kernels6avx5123VecESaIS3_EE9push_backERKS3_"
_IN_BODY = "_ZN5ktmoe7kernels{}8nt_rowsINS_7formats4Bf16EEEvRKNS0_6NtArgsE"


def _listing(symbol: str, instruction: str) -> list[str]:
    return [f"0000000000000000 <{symbol}>:", f"   0:\t{instruction}", "   4:\tret"]


@pytest.mark.parametrize(
    ("symbol", "instruction"),
    [
        ("_ZN5ktmoe9RoutingPlan5buildEv", "vmovaps %xmm0,%xmm1"),
        ("_ZN5ktmoe9RoutingPlan5buildEv", "rep vmovups %xmm0,(%rax)"),
        ("main", "tilerelease"),
        ("main", "kmovd  %eax,%k1"),
        ("main", "pshufb %xmm1,%xmm0"),
        ("main", "popcnt %rax,%rax"),
        (_IN_STD, "vmovdqu64 %zmm0,(%rax)"),
        ("_ZN5ktmoe7kernels10find_tableENS_3IsaE", "vzeroupper"),
        ("_ZZN5ktmoe7kernels4avx25tableEvENKUlvE_clEv", "vzeroupper"),
        ("_ZN5ktmoe7kernels6avx5126add_ntERNS0_11KernelTableE", "vmovdqu8 %zmm0,0x190(%rdi)"),
        (_IN_BODY.format("6scalar"), "vaddps %xmm0,%xmm1,%xmm2"),
        (_IN_BODY.format("7amx_emu"), "vfmadd231ps %xmm0,%xmm1,%xmm2"),
        (_IN_BODY.format("4avx2"), "vaddps %zmm0,%zmm1,%zmm2"),
        (_IN_BODY.format("4avx2"), "vaddps %xmm16,%xmm1,%xmm2"),
        (_IN_BODY.format("4avx2"), "vcmpps $0x1,%ymm0,%ymm1,%k1"),
        (_IN_BODY.format("4avx2"), "vpdpbusd %ymm0,%ymm1,%ymm2"),
        (_IN_BODY.format("6avx512"), "vdpbf16ps %zmm0,%zmm1,%zmm2"),
        (_IN_BODY.format("6avx512"), "vpermb %zmm0,%zmm1,%zmm2"),
        (_IN_BODY.format("11avx512_bf16"), "tdpbf16ps %tmm6,%tmm4,%tmm0"),
        (_IN_BODY.format("11avx512_bf16"), "ldtilecfg (%rax)"),
    ],
)
def test_the_gate_sees_an_instruction_that_is_out_of_place(symbol: str, instruction: str) -> None:
    assert violations(_listing(symbol, instruction)) == [f"{symbol}: {instruction.removeprefix('rep ')}"]


@pytest.mark.parametrize(
    ("symbol", "instruction"),
    [
        ("main", "addps  %xmm0,%xmm1"),
        ("main", "verw   0x8(%rsp)"),
        ("main", "rep stos %rax,%es:(%rdi)"),
        (_IN_BODY.format("4avx2"), "vfmadd231ps %ymm0,%ymm1,%ymm2"),
        (_IN_BODY.format("4avx2") + ".cold", "vzeroupper"),
        (_IN_BODY.format("8avx_vnni"), "{vex} vpdpbusd %ymm0,%ymm1,%ymm2"),
        (_IN_BODY.format("6avx512"), "vpdpbusd %zmm0,%zmm1,%zmm2{%k1}"),
        (_IN_BODY.format("11avx512_bf16"), "vdpbf16ps %zmm0,%zmm1,%zmm2"),
        (_IN_BODY.format("3amx"), "tdpbf16ps %tmm6,%tmm4,%tmm0"),
        ("_ZNK5ktmoe7kernels4avx23Vec4loadEPKSt4byte", "vmovdqu (%rdi),%ymm0"),
    ],
)
def test_the_gate_leaves_others_alone(symbol: str, instruction: str) -> None:
    assert not violations(_listing(symbol, instruction))


def test_the_gate_sees_kernels_that_are_missing() -> None:
    listing = _listing(_IN_BODY.format("4avx2"), "vaddps %ymm0,%ymm1,%ymm2")
    assert missing_namesakes(listing, ["scalar", "avx2"]) == []
    assert missing_namesakes(listing, ["avx2", "avx512"]) == ["avx512"]
