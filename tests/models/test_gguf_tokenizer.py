"""Tokenizers in GGUF headers: the tokens of the tokenizer that they were written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktmoe_np.io.gguf.checkpoint import GgufCheckpoint
from ktmoe_np.models import EMBEDDED_TEXT, load_chat_template, load_stop_tokens, load_tokenizer
from ktmoe_np.models import gguf_tokenizer as module

tokenizers = pytest.importorskip("tokenizers")

Change = Callable[[gguf.GGUFWriter], None]

LINES = EMBEDDED_TEXT.read_text().splitlines()[:400]

CUTS = {name: tokenizers.Regex(cut) for name, cut in module._CUTS.items()}


def trained(pre: str) -> Any:
    """A tokenizer of merged bytes, as Hugging Face makes them."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    if pre == "qwen2":
        own.normalizer = tokenizers.normalizers.NFC()
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(CUTS[pre], "isolated")
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters])
    own.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(LINES, trainer)
    return own


def merges_of(own: Any) -> list[str]:
    import json

    merges = json.loads(own.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def write(path: Path, add: Change, num_tokens: int) -> None:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    add(writer)
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_merges(own: Any, pre: str | None, more: Change = lambda writer: None) -> Change:
    def add(writer: gguf.GGUFWriter) -> None:
        vocab = sorted(own.get_vocab(), key=own.get_vocab().__getitem__)
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocab)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
        writer.add_token_merges(merges_of(own))
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        more(writer)

    return add


@pytest.fixture(scope="module", params=["gpt-2", "qwen2", "llama-bpe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tokenizer, and the one that is read from a header."""
    own = trained(request.param)
    path = tmp_path_factory.mktemp("merges") / "model.gguf"
    write(path, of_merges(own, request.param), own.get_vocab_size())
    return own, load_tokenizer(path)


@given(st.one_of(st.text(max_size=60), st.sampled_from(LINES)))
@settings(deadline=None)
def test_texts_have_the_same_tokens(pair: tuple[Any, Any], text: str) -> None:
    own, read = pair
    assert read.encode(text) == own.encode(text).ids
    assert read.decode(read.encode(text)) == own.decode(own.encode(text).ids)


def test_special_tokens_are_whole(pair: tuple[Any, Any]) -> None:
    _, read = pair
    assert read.encode("<|begin|>Alice<|end|>")[0] == 1
    assert read.encode("<|begin|>Alice<|end|>")[-1] == 0
    assert read.decode([1, *read.encode("Alice"), 0]) == "Alice"


def test_texts_begin_with_a_token_where_the_header_says_so(tmp_path: Path) -> None:
    own = trained("gpt-2")
    add = of_merges(own, None, lambda writer: writer.add_add_bos_token(True))
    write(tmp_path / "x.gguf", add, own.get_vocab_size())
    read = load_tokenizer(tmp_path / "x.gguf")
    assert read.encode("Alice") == [1, *own.encode("Alice").ids]
    assert read.encode("<|begin|>Alice") == read.encode("Alice")  # a template may have written it


def test_stop_tokens_and_templates(tmp_path: Path) -> None:
    own = trained("gpt-2")

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(7)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")

    write(tmp_path / "x.gguf", of_merges(own, "gpt-2", more), own.get_vocab_size())
    assert load_stop_tokens(tmp_path / "x.gguf") == {0, 7}
    template = load_chat_template(tmp_path / "x.gguf")
    assert template.render([{"role": "user", "content": "Who?"}]) == "<|begin|>Who?<|end|>"


def pieces() -> tuple[Any, list[str], list[float]]:
    """A tokenizer of pieces with scores: SentencePiece's, as Hugging Face converts them."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    own.train_from_iterator(LINES, trainer)
    own.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    vocab = sorted(own.get_vocab(), key=own.get_vocab().__getitem__)
    made = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges_of(own))))}
    scores = [-float(made[token]) if token in made else -1e6 for token in vocab]
    return own, vocab, scores


def of_pieces(vocab: list[str], scores: list[float], more: Change = lambda writer: None) -> Change:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(vocab)
        writer.add_token_scores(scores)
        kinds = [2, 3, 3, *[6] * 256]
        writer.add_token_types([*kinds, *[1] * (len(vocab) - len(kinds))])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        more(writer)

    return add


def test_pieces_with_scores(tmp_path: Path) -> None:
    own, vocab, scores = pieces()
    write(tmp_path / "x.gguf", of_pieces(vocab, scores), len(vocab))
    read = load_tokenizer(tmp_path / "x.gguf")
    for text in [*LINES[:200], "été ☃", "a  b"]:
        assert read.encode(text) == [1, *own.encode(text).ids], text
        assert read.decode(read.encode(text)) == text
    assert load_stop_tokens(tmp_path / "x.gguf") == {2}


def test_pieces_without_a_space_in_front(tmp_path: Path) -> None:
    own, vocab, scores = pieces()

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)

    write(tmp_path / "x.gguf", of_pieces(vocab, scores, more), len(vocab))
    read = load_tokenizer(tmp_path / "x.gguf")
    assert read.decode(read.encode(" Alice")) == " Alice"
    assert read.encode(" Alice") == own.encode("Alice").ids


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: None, "'tokenizer.ggml.model': got None, expected gpt2 or llama"),
        (
            lambda w: w.add_tokenizer_model("bert"),
            "'tokenizer.ggml.model': got 'bert', expected gpt2 or llama",
        ),
        (
            lambda w: w.add_tokenizer_model("gpt2"),
            "'tokenizer.ggml.tokens': got None, expected a list of strings",
        ),
        (
            lambda w: (
                w.add_tokenizer_model("gpt2"),
                w.add_token_list(["a"]),
                w.add_tokenizer_pre("falcon3"),
            ),
            "'tokenizer.ggml.pre': got 'falcon3', expected one of default, gpt-2",
        ),
        (
            lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a"]), w.add_token_merges(["ab"])),
            "'tokenizer.ggml.merges': got .*, expected a list of pairs",
        ),
        (
            lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a"]), w.add_token_merges(["a b"])),
            "the package tokenizers refuses its tokens",
        ),
        (
            lambda w: (
                w.add_tokenizer_model("llama"),
                w.add_token_list(["a", "b"]),
                w.add_token_scores([1.0]),
            ),
            "'tokenizer.ggml.scores': got .*, expected 2 numbers",
        ),
        (
            lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a", "b"]), w.add_token_types([1])),
            "'tokenizer.ggml.token_type': got .*, expected 2 numbers",
        ),
        (
            lambda w: (
                w.add_tokenizer_model("gpt2"),
                w.add_token_list(["a", "b"]),
                w.add_bos_token_id(2),
                w.add_add_bos_token(True),
            ),
            "'tokenizer.ggml.bos_token_id': got 2, expected a token from 0 to 1",
        ),
    ],
)
def test_headers_that_are_refused(add: Change, message: str, tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", add, 2)
    with pytest.raises(ValueError, match=message) as e:
        load_tokenizer(tmp_path / "x.gguf")
    assert "x.gguf" in str(e.value)


def test_bytes_without_merges(tmp_path: Path) -> None:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(letters)

    write(tmp_path / "x.gguf", add, 256)
    read = load_tokenizer(tmp_path / "x.gguf")
    assert read.decode(read.encode("Ægir, 1\n")) == "Ægir, 1\n"
    assert len(read.encode("Æ")) == 2


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a"])

    write(tmp_path / "x.gguf", add, 1)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"x.gguf: its tokenizer needs: pip install tokenizers"):
        module.build_tokenizer(GgufCheckpoint(tmp_path / "x.gguf"))
