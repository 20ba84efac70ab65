"""What ``import ktmoe_np`` gives: all its names, when they are used, whichever module comes first."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from cli_runs import environment

import ktmoe_np
from ktmoe_np import _api


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )


def test_every_name_is_there() -> None:
    assert ktmoe_np.__all__ == _api.__all__  # type: ignore[attr-defined]
    for name in _api.__all__:
        assert getattr(ktmoe_np, name) is getattr(_api, name)
        assert name in dir(ktmoe_np)
    assert not hasattr(ktmoe_np, "nothing")
    with pytest.raises(AttributeError, match="module 'ktmoe_np' has no attribute 'nothing'"):
        ktmoe_np.nothing  # type: ignore[attr-defined] # noqa: B018


def test_help_opens_with_what_programs_use() -> None:
    """Names are imported when they are used, so ``pydoc`` has to find them in a new process too."""
    done = run("import pydoc, ktmoe_np; print(pydoc.plain(pydoc.render_doc(ktmoe_np)))")
    assert done.returncode == 0, done.stderr
    opening = done.stdout[: done.stdout.index("PACKAGE CONTENTS")]
    listed = re.findall(r"^ {8}(\w+) {2,}\S.*$", opening, re.MULTILINE)
    assert listed[:2] == ["KTMoEWrapper", "MoEConfig"]
    assert listed.index("BaseMoEWrapper") < listed.index("BaseSFTMoEWrapper") < listed.index("GPUExperts")
    assert len(set(listed)) == len(listed)
    public = {name for name in _api.__all__ if not name.startswith("_")}
    assert public <= set(listed)
    for name in set(listed) - public:
        assert importlib.util.find_spec(f"ktmoe_np.{name}") is not None
    assert "class KTMoEWrapper(builtins.object)" in done.stdout
    assert all(len(line) <= 110 for line in opening.splitlines())


def test_a_star_gives_all() -> None:
    done = run(
        "from ktmoe_np import *; from ktmoe_np import _api; assert set(_api.__all__) <= set(globals())"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_are_there_without_an_import_of_their_own() -> None:
    done = run("import ktmoe_np; ktmoe_np.io.SafetensorsFile; ktmoe_np.kt_kernel_ext.isa_info()")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "module", ["layers.quantized", "experts", "inference.wrappers", "io", "models", "reference", "sft"]
)
def test_any_module_may_be_the_first(module: str) -> None:
    done = run(f"import ktmoe_np.{module}")
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_none() -> None:
    for name in ("a.b", "config.x", "nothing"):
        assert not hasattr(ktmoe_np, name)


def test_threads_that_want_different_modules_at_once() -> None:
    script = """
import threading, ktmoe_np
names = ["config", "reference", "io", "experts", "buffers", "models", "sft", "inference"] * 2
barrier, failed = threading.Barrier(len(names)), []
def want(name):
    barrier.wait()
    try:
        getattr(ktmoe_np, name)
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=want, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
