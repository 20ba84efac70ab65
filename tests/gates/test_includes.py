"""Who may include whom: the layers of the core, and what the pure parts of the package may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ._tree import CPP_SUFFIXES, ROOT, files_under

# A folder of cpp/ and the folders it may include from.
_LAYERS = {
    "core": {"core"},
    "isa": {"core", "isa"},
    "formats": {"core", "isa", "formats"},
    "kernels": {"core", "isa", "formats", "kernels"},
    "runtime": {"core", "runtime"},
    "moe": {"core", "isa", "formats", "kernels", "runtime", "moe"},
    "sft": {"core", "isa", "formats", "kernels", "runtime", "moe", "sft"},
    "xla": {"core", "isa", "formats", "kernels", "runtime", "moe", "sft", "xla"},
    "bindings": {"core", "isa", "formats", "kernels", "runtime", "moe", "sft", "xla", "bindings"},
}
_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
_FRAMEWORKS = {"torch", "jax", "jaxlib", "transformers", "tensorflow", "cupy", "mlx", "keras"}
# The adapters of frameworks, which nothing else of the package imports.
_ADAPTERS = {
    "ktmoe_np.jax": {"jax"},
    "ktmoe_np.torch": {"torch", "transformers"},
    "ktmoe_np.compat": {"torch"},
}
# Modules that state what is computed, and so depend on nothing that computes it.
_PURE = ("reference", "config")
# The only one of them that uses the extension, at first use, for the names of the activations.
_ASKS_FOR_NAMES = "ktmoe_np.config.activations"


def include_faults(name: str, source: str, cpp: Path = ROOT / "cpp") -> list[str]:
    """What is wrong with the includes of cpp/<name>."""
    folder = name.split("/")[0]
    faults = []
    for bracket, included in _INCLUDE.findall(source):
        if included.startswith(("nanobind", "Python.h", "numpy/")) and folder != "bindings":
            faults.append(f"cpp/{name} includes {included}: only cpp/bindings knows Python")
        if bracket == "<":
            continue
        target = included.split("/")[0]
        if target not in _LAYERS[folder]:
            faults.append(f"cpp/{name} includes {included}: {folder} may not know {target}")
        elif not (cpp / included).is_file():
            faults.append(f"cpp/{name} includes {included}: not a path below cpp")
    return faults


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of the modules that a module of `package` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            prefix = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (prefix, node.module) if part)
            names.add(module)
            if node.module is None:  # from . import x
                names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def is_pure(module: str, known_pure: set[str]) -> bool:
    """Whether a pure module may import `module`."""
    top = module.split(".")[0]
    if top in ("numpy", "ml_dtypes") or top in sys.stdlib_module_names:
        return True
    return any(module == pure or module.startswith(pure + ".") for pure in known_pure)


def _python_modules() -> list[tuple[str, Path]]:
    source = ROOT / "src"
    modules = []
    for path in files_under("src/ktmoe_np", suffixes={".py"}):
        parts = list(path.relative_to(source).with_suffix("").parts)
        modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return modules


def _package_of(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def _imports() -> dict[str, set[str]]:
    return {
        module: imported_modules(path.read_text(), _package_of(module, path))
        for module, path in _python_modules()
    }


def test_includes_follow_the_layers() -> None:
    files = files_under("cpp", suffixes=CPP_SUFFIXES)
    assert files
    faults = [
        fault
        for path in files
        for fault in include_faults(path.relative_to(ROOT / "cpp").as_posix(), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_pure_modules_import_numpy_and_ml_dtypes_only() -> None:
    imports = _imports()
    package = {"ktmoe_np." + name for name in _PURE}
    assert package <= imports.keys()
    # A pure module may lean on others of the package that are themselves pure.
    imports[_ASKS_FOR_NAMES] -= {"ktmoe_np", "ktmoe_np.kt_kernel_ext"}
    pure, todo = set(package), [m for m in imports if any(m == p or m.startswith(p + ".") for p in package)]
    faults = []
    while todo:
        module = todo.pop()
        for imported in imports[module]:
            if imported.startswith("ktmoe_np.") and imported in imports and not is_pure(imported, pure):
                pure.add(imported)
                todo.append(imported)
            elif not imported.startswith("ktmoe_np.") and not is_pure(imported, pure):
                faults.append(f"{module} imports {imported}, on behalf of {' or '.join(sorted(package))}")
            elif imported.endswith("kt_kernel_ext"):
                faults.append(f"{module} imports the extension")
    assert not faults, "\n".join(faults)


def test_the_reference_is_imported_without_the_extension() -> None:
    program = "import sys; sys.modules['ktmoe_np.kt_kernel_ext'] = None; import ktmoe_np.reference"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "src", check=True)


def _adapter(module: str) -> str | None:
    """The adapter of a framework that a module is, or is part of."""
    return next((name for name in _ADAPTERS if f"{module}.".startswith(f"{name}.")), None)


def test_no_module_imports_a_framework() -> None:
    faults = []
    for module, names in _imports().items():
        own = _adapter(module)
        may = _ADAPTERS.get(own or "", set())
        for imported in names:
            other = _adapter(imported)
            if (other is not None and other != own) or imported.split(".")[0] in _FRAMEWORKS - may:
                faults.append(f"{module} imports {imported}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("core/a.h", '#include "isa/isa.h"', "core may not know isa"),
        ("runtime/a.cpp", '#include "kernels/table.h"', "runtime may not know kernels"),
        ("kernels/a.h", '#include "moe/config.h"', "kernels may not know moe"),
        ("moe/a.h", "#include <nanobind/nanobind.h>", "only cpp/bindings knows Python"),
        ("moe/a.h", '#include "config.h"', "moe may not know config.h"),
        ("moe/a.h", '#include "core/gone.h"', "not a path below cpp"),
    ],
)
def test_the_gate_sees_a_wrong_include(name: str, source: str, fault: str) -> None:
    (found,) = include_faults(name, source)
    assert fault in found


def test_the_gate_sees_imports_wherever_they_stand() -> None:
    source = "import torch.nn\ndef f():\n    from ..other import g\n    from . import h\n"
    assert imported_modules(source, "ktmoe_np.io") == {
        "torch.nn",
        "ktmoe_np.other",
        "ktmoe_np.io",
        "ktmoe_np.io.h",
    }
    assert not is_pure("torch.nn", set())
    assert not is_pure("ktmoe_np.kt_kernel_ext", {"ktmoe_np.config"})
    assert is_pure("numpy.typing", set())
