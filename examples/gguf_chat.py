"""Chat with a GGUF model: lines from standard input, answers as they are computed.

    python examples/gguf_chat.py MODEL.gguf [--tokens 200] [--temperature 0.7]

Qwen3-MoE, Mixtral and OLMoE models run; a directory with a Hugging Face checkpoint works too. For each answer
the model reads the whole conversation again.
"""

import argparse
import sys

from ktmoe_np.models import (
    MoEDecoder,
    generate,
    load_chat_template,
    load_stop_tokens,
    load_tokenizer,
)


def answer(model, tokenizer, prompt, stop, arguments):
    """Yield the text of an answer in pieces that are whole letters."""
    tokens, shown = [], ""
    following = generate(model, prompt, arguments.tokens, temperature=arguments.temperature, stop=stop)
    for token in following:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # of an unfinished letter
            yield text[len(shown) :]
            shown = text


def main() -> None:
    """Read a line, answer, and so on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file, or a directory with a checkpoint")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    template = load_chat_template(arguments.model)
    stop = load_stop_tokens(arguments.model)
    model = MoEDecoder.from_pretrained(arguments.model)
    messages: list[dict[str, str]] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        prompt = tokenizer.encode(template.render(messages))
        said = ""
        for piece in answer(model, tokenizer, prompt, stop, arguments):
            print(piece, end="", flush=True)
            said += piece
        print()
        messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
