"""The names of a checkpoint's tensors by layer, so that a layer is found without looking at the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

__all__ = ["LayerNames"]

#: The expert number under which tensors of all experts are kept.
_ALL = -1

#: Digits that no expert's number has.
_LONG = 10


class LayerNames:
    """Tensor names, split once at the number of their layer; those of a layer are sorted at first use.

    Parameters
    ----------
    names : iterable of str
        All of a checkpoint.

    Examples
    --------
    >>> stem = "model.layers.3."
    >>> names = LayerNames([f"{stem}mlp.experts.{e}.w1.weight" for e in range(3)] + [f"{stem}norm.weight"])
    >>> names.of(stem)
    {'mlp.experts.{e}.w1.weight': {0, 1, 2}, 'norm.weight': {-1}}
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[str]] = {}  # what stands before a layer's own names -> its tensors
        self._numbers: dict[str, dict[str, set[int]]] = {}
        for name in names:
            head, found, rest = name.partition("layers.")
            if found:
                prefix = f"{head}layers.{rest.partition('.')[0]}."
                self._names.setdefault(prefix, []).append(name)

    def prefixes(self) -> Collection[str]:
        """List what layers' names begin with, e.g. ``model.layers.0.``."""
        return self._names.keys()

    def of(self, prefix: str) -> Mapping[str, set[int]]:
        """Templates of a layer's names, with {e} for an expert's number, and the experts that have them.

        A tensor that is not of one expert has the number -1.
        """
        numbers = self._numbers.get(prefix)
        if numbers is None:
            numbers = {}
            for name in self._names.get(prefix, ()):
                template, number = _template(name[len(prefix) - 1 :])
                numbers.setdefault(template, set()).add(number)
            self._numbers[prefix] = numbers
        return numbers


def _template(name: str) -> tuple[str, int]:
    """`name`, which begins with a dot, without it and with {e} for the expert's number; and the number.

    Cut, not matched: with a thousand names a layer, patterns would take most of the time of finding it.
    """
    head, _, rest = name.partition(".experts.")
    number, dot, tail = rest.partition(".")
    if dot and len(number) < _LONG and number.isascii() and number.isdecimal():
        return f"{head}.experts.{{e}}.{tail}"[1:], int(number)
    return name[1:], _ALL
