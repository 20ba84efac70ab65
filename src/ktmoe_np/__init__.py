"""Mixture-of-experts layers on CPUs, from NumPy.

`KTMoEWrapper` makes a layer; `reference` is the specification in NumPy; `isa_info` says what runs here.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in typing, which is not imported for it

# The names come from `_api`, which is imported when the first of them is used. So the command `ktmoe`, a part
# of this package, is in control (of Ctrl-C, of a wrong KTMOE_ISA) before NumPy and the extension are loaded.
if TYPE_CHECKING:
    from ._api import *  # noqa: F403
else:

    def __getattr__(name):
        """Import a module of the package, or what the package offers."""
        from importlib import import_module
        from importlib.util import find_spec

        if name == "__all__" or (name.isidentifier() and not name.startswith("__")):
            if name not in ("cli", "kt_kernel_ext"):
                # Threads that want different modules all take this one first. A thread that imported a module
                # of a package while another imports the package would wait for it in a circle. The extension
                # imports nothing of the package, and modules that `_api` imports ask for it.
                import_module(f"{__name__}._api")
            module = f"{__name__}.{name}"
            if find_spec(module) is not None:
                return import_module(module)
            offered = vars(import_module(f"{__name__}._api"))
            if name in offered:
                return globals().setdefault(name, offered[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
