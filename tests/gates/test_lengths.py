"""A file fits a sitting, a function fits a screen."""

from __future__ import annotations

import ast

from ._cpp import functions
from ._tree import CPP_SUFFIXES, ROOT, files_under, name_of, project_files

_MAX_FILE_LINES = 500
_MAX_FUNCTION_LINES = 70
_CODE = ("cpp", "src", "tests", "bench")


def python_functions(source: str) -> list[tuple[str, int]]:
    """Name and number of lines of every function, its decorators and its documentation left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        found.append((node.name, lines))
    return found


def test_no_file_is_long() -> None:
    suffixes = CPP_SUFFIXES | {".py", ".cmake", ".sh"}
    scripts = [ROOT / "CMakeLists.txt", ROOT / ".ci" / "run", ROOT / ".ci" / "wheels"]
    files = [p for p in project_files() if p.suffix in suffixes or p in scripts]
    assert files
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files}
    long = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > _MAX_FILE_LINES]
    assert not long, "\n".join(long)


def test_no_python_function_is_long() -> None:
    long = [
        f"{name_of(path)}: {name} has {lines} lines"
        for path in files_under(*_CODE, suffixes={".py"})
        for name, lines in python_functions(path.read_text())
        if lines > _MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_no_cpp_function_is_long() -> None:
    long = [
        f"{name_of(path)}:{function.first_line}: {function.head[-60:]} has {function.num_lines} lines"
        for path in files_under(*_CODE, suffixes=CPP_SUFFIXES)
        for function in functions(path.read_text())
        if function.num_lines > _MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_the_gate_measures_functions() -> None:
    body = "  call({1, 2}, '}', \"}\");  // }\n" * 80
    method = f"struct S {{\n  int x = 0;\n  void f() const {{\n{body}  }}\n}};\n"
    source = f"namespace a {{\n{method}int g(S s) {{\n  return 0;\n}}\n}}\n"
    assert [(f.head, f.num_lines) for f in functions(source)] == [("void f() const", 82), ("int g(S s)", 3)]
    assert python_functions('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n') == [("f", 2)]
    assert python_functions("def f(\n    a,\n):\n    def g():\n        pass\n") == [("f", 5), ("g", 2)]


def test_every_cpp_file_with_code_has_its_functions_found() -> None:
    # The count is of no interest; that the heuristic has not gone blind is.
    found = sum(len(functions(path.read_text())) for path in files_under("cpp", suffixes=CPP_SUFFIXES))
    assert found > 200
