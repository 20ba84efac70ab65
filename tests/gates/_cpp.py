"""As much of C++ as the gates need: code without comments and strings, and where functions begin and end."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMENT_OR_TEXT = re.compile(
    r"""//[^\n]* | /\*.*?\*/
      | R"(?P<mark>\w*)\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*"
      | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])*'  # not the separator of digits
    """,
    re.DOTALL | re.VERBOSE,
)
# What opens a brace that holds declarations rather than statements.
_SCOPE = re.compile(
    r"^(?:template\s*<.*>\s*)?(?:inline\s+)?(?:namespace|class|struct|union|enum|extern)\b", re.DOTALL
)


def without_comments_and_texts(source: str) -> str:
    """The code alone; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        kept = '""' if found.startswith(('"', "R")) else ""
        return kept + "\n" * found.count("\n")

    return _COMMENT_OR_TEXT.sub(blank, source)


@dataclass(frozen=True)
class Function:
    """A function's head, as written, and its lines."""

    head: str
    first_line: int
    last_line: int

    @property
    def num_lines(self) -> int:
        return self.last_line - self.first_line + 1


def functions(source: str) -> list[Function]:
    """Blocks of statements that stand in a namespace or class: functions, constructors, test cases."""
    code = re.sub(
        r"^[ \t]*#(?:\\\n|[^\n])*",
        lambda m: "\n" * m.group().count("\n"),
        without_comments_and_texts(source),
        flags=re.MULTILINE,
    )
    found: list[Function] = []
    open_braces: list[tuple[bool, str, int]] = []  # is a scope, head, line
    head_begin = 0
    for match in re.finditer(r"[{};]", code):
        at = match.start()
        head = code[head_begin:at].strip()
        in_scope = all(is_scope for is_scope, _, _ in open_braces)
        if match.group() == "{":
            line = code.count("\n", 0, at - len(code[head_begin:at].lstrip())) + 1
            is_scope = in_scope and (bool(_SCOPE.match(head)) and not head.endswith(")"))
            open_braces.append((is_scope, head, line))
        elif match.group() == "}" and open_braces:
            is_scope, opened, line = open_braces.pop()
            inside_function = any(not outer for outer, _, _ in open_braces)
            if not is_scope and not inside_function and "(" in opened:
                found.append(Function(" ".join(opened.split()), line, code.count("\n", 0, at) + 1))
        head_begin = at + 1
    return found
