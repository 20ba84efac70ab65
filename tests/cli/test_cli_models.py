"""`ktmoe generate` and `ktmoe eval`: what they print, as text and as JSON, and their errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import only_error, run_ktmoe

from ktmoe_np.cli import main
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT

PROMPT = "And God said, Let there be light: and there was"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_streams_a_text_and_says_how_fast() -> None:
    done = run_ktmoe("generate", "--prompt", PROMPT, "--tokens", "12")
    assert (done.returncode, done.stderr) == (0, "")
    text, facts = done.stdout.rsplit("\n\n", 1)
    assert text == f"{PROMPT} no more a m"
    assert facts.startswith(f"prompt: {len(PROMPT)} tokens, ")
    assert "per second; text: 12 tokens, then " in facts
    assert "per second, with BF16 and bfloat16 activations" in facts
    assert "in the experts" in facts


def test_generate_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(
        capsys, "generate", str(EMBEDDED_MODEL), "--prompt", PROMPT, "--tokens=12", "--method=AMXINT4"
    )
    assert (value["tokens"], value["method"], value["prompt"]) == (12, "AMXINT4", PROMPT)
    assert len(value["text"]) == 12
    assert 0 < value["experts_of_time"] < 1
    assert value["tokens_per_s"] == pytest.approx(12 / value["seconds"])
    prompt_seconds = value["prompt_tokens"] / value["prompt_tokens_per_s"]
    assert value["prompt_tokens"] == len(PROMPT)
    assert value["decode_tokens_per_s"] == pytest.approx(11 / (value["seconds"] - prompt_seconds))


def test_draws_depend_on_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("generate", "--tokens=20", "--temperature=1")
    texts = [as_json(capsys, *options, f"--seed={seed}")["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_from_fewer_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    greedy = as_json(capsys, "generate", "--prompt", PROMPT, "--tokens=12")["text"]
    for option in ("--top-k=1", "--top-p=1e-9", "--min-p=1"):
        text = as_json(capsys, "generate", "--prompt", PROMPT, "--tokens=12", "--temperature=1", option)[
            "text"
        ]
        assert text == greedy


def test_prompts_of_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    expected = as_json(capsys, "generate", "--prompt", PROMPT, "--tokens=5")
    value = as_json(capsys, "generate", f"--prompt-file={tmp_path / 'prompt'}", "--tokens=5")
    assert (value["prompt"], value["text"]) == (PROMPT, expected["text"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert as_json(capsys, "generate", "--prompt-file=-", "--tokens=5")["text"] == expected["text"]


def test_a_single_token_has_no_rate_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, "generate", "--tokens=1")["decode_tokens_per_s"] is None
    assert main(["generate", "--tokens=1"]) == 0
    assert "text: 1 tokens, with BF16" in capsys.readouterr().out


def test_a_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(EMBEDDED_MODEL / name)
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %} and there was"
    (tmp_path / "chat_template.jinja").write_text(template)
    message = PROMPT.removesuffix(" and there was")
    value = as_json(capsys, "generate", str(tmp_path), "--chat", "--prompt", f" {message}", "--tokens=12")
    assert value["text"] == as_json(capsys, "generate", "--prompt", PROMPT, "--tokens=12")["text"]
    assert main(["generate", str(tmp_path), "--chat", "--prompt", message, "--tokens=3"]) == 0
    assert capsys.readouterr().out.startswith(" no")


def test_a_text_ends_where_the_checkpoint_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(EMBEDDED_MODEL / name)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ord("m")}}}')
    value = as_json(capsys, "generate", str(tmp_path), "--prompt", PROMPT, "--tokens=12")
    assert value["text"] == " no "


def test_letters_appear_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = [*"é€!".encode(), 0xC3]
    monkeypatch.setattr("ktmoe_np.cli.generate.generate", lambda *_, **__: iter(said))
    pieces: list[str] = []
    monkeypatch.setattr("sys.stdout.write", lambda text: pieces.append(text) or len(text))
    assert main(["generate", "--prompt=x"]) == 0
    assert pieces[:5] == ["x", "é", "€", "!", "�"]


def test_eval_measures_every_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(EMBEDDED_TEXT.read_bytes()[:900] + "é".encode())
    value = as_json(capsys, "eval", "--text", str(text), "--methods=BF16,AMXINT8")
    assert [row["method"] for row in value["methods"]] == ["BF16", "AMXINT8"]
    assert all(2 < row["bits_per_byte"] < 4 for row in value["methods"])
    assert value["bytes"] == 902
    assert as_json(capsys, "eval", "--text", str(text), "--methods=BF16", "--bytes=901")["bytes"] == 900


def test_eval_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--bytes=600", "--methods=BF16,MOE_INT4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"600 bytes of {EMBEDDED_TEXT}"
    assert lines[1].split() == ["method", "activations", "bits", "per", "byte", "vs", "first"]
    assert [line.split()[:2] for line in lines[2:]] == [["BF16", "bfloat16"], ["MOE_INT4", "bfloat16"]]
    assert lines[2].split()[3] == "+0.0000"


def test_eval_draws_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bits.svg"
    options = ("eval", "--bytes=600", "--methods=BF16,MOE_INT4", f"--plot={picture}")
    assert main([*options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"The differences are drawn in {picture}"
    assert "<svg" in picture.read_text()
    picture.unlink()
    as_json(capsys, *options)
    assert picture.exists()
    assert main(["eval", "--plot=bits.txt"]) == 2
    assert "--plot: got 'bits.txt', expected a file ending in .png" in only_error(capsys)


def test_eval_measures_the_activation_dtypes_that_methods_have(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("eval", "--bytes=600", "--methods=BF16,AMXINT8,MOE_INT4")
    rows = as_json(capsys, *options, "--activation-dtype=all")["methods"]
    assert [(row["method"], row["activation_dtype"]) for row in rows] == [
        ("BF16", "bfloat16"),
        ("AMXINT8", "int8"),
        ("MOE_INT4", "bfloat16"),
        ("MOE_INT4", "int8"),
    ]
    bits = [row["bits_per_byte"] for row in rows]
    assert len(set(bits)) == 4
    assert max(bits) - min(bits) < 0.1
    alone = as_json(capsys, "eval", "--bytes=600", "--methods=MOE_INT4", "--activation-dtype=int8")
    assert [row["bits_per_byte"] for row in alone["methods"]] == bits[3:]
    auto = as_json(capsys, "eval", "--bytes=600", "--methods=MOE_INT4", "--activation-dtype=auto")
    assert [row["bits_per_byte"] for row in auto["methods"]] == bits[2:3]


def test_experts_of_a_gguf_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from decoders import write_gguf_experts

    file = tmp_path / "experts.gguf"
    write_gguf_experts(file, "q8_0")
    value = as_json(capsys, "eval", "--bytes=600", f"--experts={file}", "--activation-dtype=auto,bfloat16")
    rows = [(row["method"], row["activation_dtype"]) for row in value["methods"]]
    assert rows == [("LLAMAFILE", "int8"), ("LLAMAFILE", "bfloat16")]
    told = {
        dtype: as_json(capsys, "generate", f"--experts={file}", "--tokens=8", f"--activation-dtype={dtype}")
        for dtype in ("auto", "bfloat16", "int8")
    }
    assert {dtype: value["activation_dtype"] for dtype, value in told.items()} == {
        "auto": "int8",
        "bfloat16": "bfloat16",
        "int8": "int8",
    }
    assert all(value["method"] == "LLAMAFILE" for value in told.values())


def test_experts_that_were_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(EMBEDDED_MODEL), str(tmp_path / "int4"), "--method=MOE_INT4"]) == 0
    capsys.readouterr()
    options = ("eval", "--bytes=600", "--activation-dtype=int8")
    (converted,) = as_json(capsys, *options, f"--experts={tmp_path / 'int4'}")["methods"]
    (quantized,) = as_json(capsys, *options, "--methods=MOE_INT4")["methods"]
    assert (converted["method"], converted["activation_dtype"]) == ("MOE_INT4", "int8")
    assert converted["bits_per_byte"] == quantized["bits_per_byte"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt="], "--prompt: got an empty text"),
        (["generate", "/nowhere"], "/nowhere"),
        (["generate", "--method=NONE"], "NONE"),
        (["generate", "--temperature=-1"], "got '-1', expected a number from 0 to 100"),
        (["generate", "--temperature=hot"], "got 'hot', expected a number from 0 to 100"),
        (["generate", "--activation-dtype=int8"], "got int8, expected bfloat16: bf16 weights are not"),
        (["generate", "--activation-dtype=fp8"], "got 'fp8', expected auto, bfloat16 or int8"),
        (["eval", "--activation-dtype=int8,fp8"], "got 'fp8', expected auto, bfloat16 or int8"),
        (["eval", "--methods=BF16", "--activation-dtype=int8"], "got int8, expected bfloat16: bf16 weights"),
        (["generate", "--experts=/nowhere"], "/nowhere"),
        (["generate", "--tokens=0"], "got '0', expected an integer of 1 or more"),
        (["generate", "--top-k=-1"], "got '-1', expected an integer of 0 or more"),
        (["generate", "--top-p=2"], "got '2', expected a number above 0, at most 1"),
        (["generate", "--top-p=0"], "got '0', expected a number above 0, at most 1"),
        (["generate", "--min-p=x"], "got 'x', expected a number from 0 to 1"),
        (["generate", "--prompt=x", "--prompt-file=y"], "not allowed with argument --prompt"),
        (["generate", "--prompt-file=/nowhere"], "/nowhere"),
        (["generate", f"--prompt-file={EMBEDDED_MODEL / 'model.safetensors'}"], "is not UTF-8"),
        (["generate", "--chat"], "got no chat template, expected one"),
        (["eval", "--methods=BF16,"], "got 'BF16,', expected names with commas between them"),
        (["eval", "--text=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_texts_that_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    for content, message in (
        (b"", "got 0 tokens, expected at least 2"),
        (b"ab\xff" + b"c" * 9, "is not UTF-8"),
    ):
        file.write_bytes(content)
        assert main(["eval", "--text", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_a_tokenizer_that_needs_a_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["generate", str(tmp_path)]) == 2
    assert "pip install tokenizers" in capsys.readouterr().err
