"""The error of a checkpoint that is not there."""

from __future__ import annotations

import os
import re

__all__ = ["no_such_path"]

#: The name of a model on the Hugging Face Hub: owner and model.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def no_such_path(path: str | os.PathLike[str]) -> FileNotFoundError:
    """Make the error of a path that does not exist; where it may be a model's name, it says how to fetch it.

    Examples
    --------
    >>> print(no_such_path("/models/x"))
    /models/x: no such file or directory
    >>> print(no_such_path("Qwen/Qwen3-30B-A3B").args[0].partition("; ")[2])
    for the model of that name: huggingface-cli download Qwen/Qwen3-30B-A3B --local-dir Qwen/Qwen3-30B-A3B
    """
    name = os.fspath(path)
    message = f"{name}: no such file or directory"
    if _HUB_NAME.fullmatch(name) and not name.endswith((".gguf", ".safetensors", ".json")):
        message += f"; for the model of that name: huggingface-cli download {name} --local-dir {name}"
    return FileNotFoundError(message)
