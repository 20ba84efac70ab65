"""Chat templates: conversations as the text that a model was trained on."""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arrays.types import PathLike
from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.json_text import MAX_JSON_BYTES, read_json_object, shown
from ..io.regular_file import read_regular
from .gguf_tokenizer import tokenizer_text

__all__ = ["ChatTemplate", "load_chat_template"]


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, and the texts of tokens that it names."""

    source: str
    origin: str  #: where it is from
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Write a conversation as a text.

        Templates come with models, from others, and are code: they are run in Jinja's sandbox, which lets
        them reach nothing but the messages, and change none.

        Parameters
        ----------
        messages : sequence of mappings
            Each with ``role``, such as system, user or assistant, and ``content``.
        add_generation_prompt : bool
            End with what the model's answer begins with.

        Returns
        -------
        str

        Raises
        ------
        ValueError
            The template is faulty, does what the sandbox forbids, or refuses the messages: names its origin.
        ImportError
            The package jinja2 is missing.

        Examples
        --------
        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> template = ChatTemplate(source, origin="an example")
        >>> template.render([{"role": "user", "content": "Amen."}])
        '<user>Amen.'
        """
        try:
            jinja2 = importlib.import_module("jinja2")
            sandbox = importlib.import_module("jinja2.sandbox")
        except ImportError as error:
            raise ImportError(f"{self.origin}: chat templates need: pip install jinja2") from error
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            text: str = environment.from_string(self.source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
            )
        except (jinja2.exceptions.TemplateError, _RefusedError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{self.origin}: the chat template: {error!s:.200}") from error
        return text


class _RefusedError(Exception):
    """What a template says of messages that it does not take."""


def _refuse(message: object) -> None:
    raise _RefusedError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_chat_template(path: PathLike) -> ChatTemplate:
    """Read the chat template of a model.

    Parameters
    ----------
    path : str or path-like
        The directory of a checkpoint, with ``chat_template.jinja`` or a template in
        ``tokenizer_config.json``; or a GGUF model.

    Returns
    -------
    ChatTemplate

    Raises
    ------
    ValueError
        There is none, or something else in its place: names the file.
    """
    if is_gguf(path):
        checkpoint = GgufCheckpoint.shared(path)
        source = checkpoint.metadata("tokenizer.chat_template")
        tokens = (tokenizer_text(checkpoint, name) for name in ("bos", "eos"))
        return ChatTemplate(_checked(source, str(checkpoint.path)), str(checkpoint.path), *tokens)
    file, config = Path(path) / "chat_template.jinja", Path(path) / "tokenizer_config.json"
    content = read_json_object(config) if config.exists() else {}
    tokens = (_text_of(content.get(f"{name}_token")) for name in ("bos", "eos"))
    if file.exists():
        return ChatTemplate(read_regular(file, MAX_JSON_BYTES).decode(errors="replace"), str(file), *tokens)
    source = content.get("chat_template")
    if isinstance(source, list):  # several by name
        named = [one for one in source if isinstance(one, dict)]
        source = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return ChatTemplate(_checked(source, str(config)), str(config), *tokens)


def _checked(source: object, origin: str) -> str:
    if source is None:
        raise ValueError(f"{origin}: got no chat template, expected one: the model was not made for chats")
    if not isinstance(source, str):
        raise ValueError(f"{origin}: the chat template: got {shown(source)}, expected a string")
    return source


def _text_of(token: object) -> str:
    """The text of a token, which a config names or describes."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
