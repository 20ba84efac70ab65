"""What is declared of XLA's interface lies in memory as in the headers that come with jaxlib."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

pytestmark = pytest.mark.crosscheck

SOURCES = Path(__file__).resolve().parents[2] / "cpp"

#: Our structs and theirs, each with the members that must lie at the same places.
STRUCTS = {
    ("Extension", "XLA_FFI_Extension_Base"): {"struct_size": "struct_size", "type": "type", "next": "next"},
    ("ApiVersion", "XLA_FFI_Api_Version"): {
        "major_version": "major_version",
        "minor_version": "minor_version",
    },
    ("ErrorCreateArgs", "XLA_FFI_Error_Create_Args"): {"message": "message", "code": "errc"},
    ("StreamGetArgs", "XLA_FFI_Stream_Get_Args"): {"context": "ctx", "stream": "stream"},
    ("Buffer", "XLA_FFI_Buffer"): {"dtype": "dtype", "data": "data", "rank": "rank", "dims": "dims"},
    ("Buffers", "XLA_FFI_Args"): {"size": "size", "types": "types", "values": "args"},
    ("Buffers ", "XLA_FFI_Rets"): {"size": "size", "types": "types", "values": "rets"},
    ("Attributes", "XLA_FFI_Attrs"): {"size": "size", "types": "types", "names": "names", "values": "attrs"},
}

#: Structs that go on behind what is declared here.
BEGINNINGS = {
    ("Api", "XLA_FFI_Api"): {
        "version": "api_version",
        "create_error": "XLA_FFI_Error_Create",
        "get_stream": "XLA_FFI_Stream_Get",
    },
    ("CallFrame", "XLA_FFI_CallFrame"): {
        "extensions": "extension_start",
        "api": "api",
        "stage": "stage",
        "args": "args",
        "rets": "rets",
        "attributes": "attrs",
    },
    ("Metadata", "XLA_FFI_Metadata"): {"version": "api_version", "traits": "traits"},
    ("MetadataExtension", "XLA_FFI_Metadata_Extension"): {"base": "extension_base", "metadata": "metadata"},
}

CONSTANTS = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kApiMajor": "XLA_FFI_API_MAJOR",
    "kIsBuffer": "XLA_FFI_ArgType_BUFFER",
    "kExecuteStage": "XLA_FFI_ExecutionStage_EXECUTE",
    "int(ErrorCode::kInvalidArgument)": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "int(ErrorCode::kResourceExhausted)": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "int(ErrorCode::kFailedPrecondition)": "XLA_FFI_Error_Code_FAILED_PRECONDITION",
    "int(ErrorCode::kOutOfRange)": "XLA_FFI_Error_Code_OUT_OF_RANGE",
    "int(ErrorCode::kInternal)": "XLA_FFI_Error_Code_INTERNAL",
    "int(DataType::kInt32)": "XLA_FFI_DataType_S32",
    "int(DataType::kInt64)": "XLA_FFI_DataType_S64",
    "int(DataType::kUint32)": "XLA_FFI_DataType_U32",
    "int(DataType::kFloat32)": "XLA_FFI_DataType_F32",
    "int(DataType::kBf16)": "XLA_FFI_DataType_BF16",
}


def compiled(assertions: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "abi.cpp"
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    if "XLA_FFI_InternalExtension" in header:  # its name in newer versions
        assertions = [
            line.replace("XLA_FFI_Extension_Base", "XLA_FFI_InternalExtension") for line in assertions
        ]
    includes = ['#include "xla/abi.h"', '#include "xla/ffi/api/c_api.h"', "using namespace ktmoe::xla;"]
    source.write_text("\n".join([*includes, *assertions]) + "\n")
    paths = [f"-I{SOURCES}", f"-I{jax.ffi.include_dir()}"]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", *paths, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assertions() -> list[str]:
    lines = [f"static_assert({ours} == {theirs});" for ours, theirs in CONSTANTS.items()]
    lines.append("static_assert(kOldestApiMinor <= XLA_FFI_API_MINOR);")
    for (ours, theirs), members in {**STRUCTS, **BEGINNINGS}.items():
        for mine, their in members.items():
            lines.append(f"static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {their}));")
            lines.append(f"static_assert(sizeof({ours}::{mine}) == sizeof({theirs}::{their}));")
    lines += [f"static_assert(sizeof({ours}) == sizeof({theirs}));" for ours, theirs in STRUCTS]
    return lines


def test_structs_and_constants(tmp_path: Path) -> None:
    done = compiled(assertions(), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_difference_would_show(tmp_path: Path) -> None:
    wrong = "static_assert(offsetof(Buffer, data) == offsetof(XLA_FFI_Buffer, rank));"
    assert "static assertion failed" in compiled([wrong], tmp_path).stderr
