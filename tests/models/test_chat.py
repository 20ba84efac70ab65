"""Chat templates: where they are found, what they can do, and what the sandbox keeps them from."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

import ktmoe_np.models.chat
from ktmoe_np.models import EMBEDDED_MODEL, ChatTemplate, load_chat_template

pytest.importorskip("jinja2")

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? \u00e9"}]

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}"
)


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.models.chat).failed == 0


def test_a_conversation() -> None:
    template = ChatTemplate(CHATML, "here")
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho? \u00e9<|im_end|>\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == expected
    assert template.render(MESSAGES) == expected + "<|im_start|>assistant\n"


@pytest.mark.crosscheck
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "source",
    [CHATML, "{{ bos_token }}{{ messages | tojson }}", "{% for m in messages %}{% break %}{% endfor %}x"],
)
def test_transformers_writes_the_same(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    theirs.chat_template, theirs.bos_token = source, "<s>"
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, "here", bos_token="<s>").render(MESSAGES) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
        "{% for %}",
        "{{ raise_exception('only user and assistant') }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'x' }}",
    ],
)
def test_what_a_template_cannot_do(source: str) -> None:
    with pytest.raises(ValueError, match=r"^here: the chat template: "):
        ChatTemplate(source, "here").render(MESSAGES)


def test_functions_show_nothing_of_the_program() -> None:
    assert ChatTemplate("{{ raise_exception.__globals__ }}", "here").render(MESSAGES) == ""


def test_a_refusal_is_told() -> None:
    with pytest.raises(ValueError, match="here: the chat template: only user and assistant"):
        ChatTemplate("{{ raise_exception('only user and assistant') }}", "here").render(MESSAGES)


def test_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", "here").render([])
    assert text.isdecimal()
    assert len(text) == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "chat_template": "{{ bos_token }}a{{ eos_token }}",
                "bos_token": "<s>",
                "eos_token": {"content": "</s>"},
            },
            "<s>a</s>",
        ),
        ({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
    ],
)
def test_templates_of_directories(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path).render(MESSAGES) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path).render(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "tokenizer_config.json: got no chat template, expected one"),
        ({}, "tokenizer_config.json: got no chat template, expected one"),
        ({"chat_template": [{"name": "tools", "template": "t"}]}, "got no chat template"),
        ({"chat_template": 3}, "tokenizer_config.json: the chat template: got 3, expected a string"),
    ],
)
def test_directories_without_one(config: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(ktmoe_np.models.chat.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="here: chat templates need: pip install jinja2"):
        ChatTemplate("x", "here").render(MESSAGES)
