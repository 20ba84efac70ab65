"""How Sphinx builds the documentation: ``sphinx-build -W --keep-going -b html docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ktmoe_np

project = "ktmoe_np"
author = "The ktmoe_np authors"
release = version = ktmoe_np.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
]
exclude_patterns = ["generated"]

# Every link between pages and every name that a page refers to is checked.
nitpicky = True
# Single backticks in docstrings are names of the package, which become links, and parameters, which do not.
# numpydoc and nanobind mark no difference, so a name that is not found stays text.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Signatures that nanobind writes: types of the standard library and of NumPy.
    ("py:class", ".*"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have the types, with shapes
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"ktmoe_np {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "native"

# Links to other sites need the network: `sphinx-build -b linkcheck docs build/linkcheck`, by hand.
linkcheck_timeout = 20


def _headings_of_modules(
    app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Make headings in docstrings of modules rubrics, as they are elsewhere."""
    if what != "module":
        return
    for i in range(len(lines) - 1, 0, -1):
        if lines[i] and set(lines[i]) == {"-"}:
            lines[i - 1 : i + 1] = [f".. rubric:: {lines[i - 1]}", ""]


def setup(app: Any) -> None:
    """Write the pages and charts that follow from the registry, the command and the records of benches."""
    from generators import write_all

    app.connect("autodoc-process-docstring", _headings_of_modules)
    app.connect("builder-inited", lambda app: write_all(Path(app.srcdir) / "generated"))
