"""Trains the embedded model, of bytes, with the architecture of Qwen3-MoE.

`python tools/train_model.py CORPUS OUT`: CORPUS is a directory that tools/fetch_corpus.sh has filled; of its
texts alice.txt is left out, for fine-tuning. OUT becomes an ordinary Hugging Face checkpoint: config.json,
model.safetensors (bf16), tokenizer.json; and training.csv, the loss.

Needs torch and safetensors; a minute on one GPU. Every expert is computed for every token, which for experts
this small is faster than gathering their tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

TEXTS = ("bible.txt", "paradise_lost.txt", "as_you_like_it.txt", "electronic_texts.txt")


@dataclass(frozen=True)
class Config:
    """Sizes, by the names of config.json."""

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal attention of grouped heads; queries and keys are normed, then turned by their positions."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.size)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.kv_heads, self.size)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + half) of each head by the angles of the positions."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class Experts(nn.Module):
    """A router and experts: the best few of each token, with weights that sum to 1."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        hidden = c.num_experts * c.moe_intermediate_size
        self.gate_proj = nn.Linear(c.hidden_size, hidden, bias=False)  # of all experts, one below the other
        self.up_proj = nn.Linear(c.hidden_size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, c.hidden_size, bias=False)  # of all experts, side by side

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        chances = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        best, ids = chances.topk(c.num_experts_per_tok, -1)
        weights = torch.zeros_like(chances).scatter(-1, ids, best / best.sum(-1, keepdim=True))
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        hidden = hidden.unflatten(-1, (c.num_experts, -1)) * weights.to(hidden.dtype).unsqueeze(-1)
        used = (weights > 0).float().mean((0, 1)) / c.num_experts_per_tok
        balance = c.num_experts * (used * chances.mean((0, 1))).sum()  # 1 when all are used alike
        return self.down_proj(hidden.flatten(-2)), balance


class Layer(nn.Module):
    """Attention and experts, each beside a way straight through."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Experts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), dropout, self.training)
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, dropout, self.training), balance


class Model(nn.Module):
    """The whole; the head's weights are those of the embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * c.num_hidden_layers if deep else 1))

    def forward(self, ids: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        c, length = self.c, ids.shape[1]
        angles = torch.arange(length, device=ids.device)[:, None] * c.rope_theta ** (
            -torch.arange(0, c.head_dim, 2, device=ids.device) / c.head_dim
        )
        angles = torch.cat((angles, angles), -1)
        x, balance = self.embed_tokens(ids), torch.zeros((), device=ids.device)
        for layer in self.layers:
            x, more = layer(x, angles.cos(), angles.sin(), dropout)
            balance = balance + more / c.num_hidden_layers
        return F.linear(self.norm(x), self.embed_tokens.weight), balance


def read_corpus(directory: Path) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last twentieth of each text to measure by."""
    train, held_out = [], []
    for name in TEXTS:
        data = torch.frombuffer(bytearray((directory / name).read_bytes()), dtype=torch.uint8)
        cut = len(data) * 19 // 20
        train.append(data[:cut])
        held_out.append(data[cut:])
    return torch.cat(train), torch.cat(held_out)


def draw(data: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Windows from anywhere, and what follows each byte."""
    starts = torch.randint(len(data) - length - 1, (batch, 1), device=data.device)
    windows = data[starts + torch.arange(length + 1, device=data.device)].long()
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Model, ids: Tensor, following: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Nats a byte, and how unevenly experts are used."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, balance = model(ids, dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), following.flatten()), balance


@torch.no_grad()
def bits_per_byte(model: Model, data: Tensor, length: int) -> float:
    """Over neighboring windows; the first bytes of each have little to go by."""
    model.eval()
    windows = data[: len(data) // (length + 1) * (length + 1)].view(-1, length + 1).long()
    losses = [loss_of(model, part[:, :-1], part[:, 1:])[0] for part in windows.split(64)]
    model.train()
    return float(torch.stack(losses).mean()) / math.log(2)


def train(
    model: Model, data: Tensor, held_out: Tensor, options: argparse.Namespace
) -> list[tuple[int, float, float]]:
    """Train by AdamW, the rate rising for a while and then falling as a cosine; rows of training.csv."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=data.is_cuda)
    rows, began = [], time.monotonic()
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / options.warm_up)
        rate = options.rate * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, balance = loss_of(model, *draw(data, options.batch, options.length), options.dropout)
        (loss + options.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            rows.append((step + 1, loss.item() / math.log(2), bits_per_byte(model, held_out, options.length)))
            seconds = time.monotonic() - began
            _, trained, measured = rows[-1]
            text = f"step {step + 1}: {trained:.3f} bits per byte, held out {measured:.3f}"
            print(f"{text}, balance {balance.item():.2f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def checkpoint_tensors(model: Model) -> dict[str, Tensor]:
    """The weights in bf16 by the names that Qwen3-MoE gives them: a tensor for each expert's projection."""
    tensors = {}
    for name, weight in model.state_dict().items():
        name, weight = f"model.{name}", weight.detach().to("cpu", torch.bfloat16)
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if not stem.endswith(".mlp") or last == "gate":
            tensors[name] = weight
            continue
        for e, part in enumerate(weight.chunk(model.c.num_experts, 1 if last == "down_proj" else 0)):
            tensors[f"{stem}.experts.{e}.{last}.weight"] = part.contiguous()
    return tensors


def config_json(config: Config) -> dict[str, object]:
    """What transformers makes the model of."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "intermediate_size": 4 * config.hidden_size,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def tokenizer_json() -> dict[str, object]:
    """A token for each byte, its number the byte's value; bytes are written as GPT-2 writes them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + sum(other not in plain for other in range(byte))))
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": None,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }


def save(model: Model, rows: list[tuple[int, float, float]], directory: Path) -> None:
    """Write the checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(model), directory / "model.safetensors", {"format": "pt"})
    files = {
        "config.json": config_json(model.c),
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, content in files.items():
        (directory / name).write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    with (directory / "training.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [
                ("step", "train_bits_per_byte", "held_out_bits_per_byte"),
                *((step, f"{a:.4f}", f"{b:.4f}") for step, a, b in rows),
            ]
        )


def main() -> None:
    """Train and save."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("corpus", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--steps", type=int, default=2400)
    p.add_argument("--warm-up", type=int, default=200)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--rate", type=float, default=3e-3)
    p.add_argument("--dropout", type=float, default=0.15)
    p.add_argument("--balance", type=float, default=0.01)
    p.add_argument("--every", type=int, default=400, help="steps between measurements")
    p.add_argument("--seed", type=int, default=0)
    options = p.parse_args()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, held_out = (part.to(device) for part in read_corpus(options.corpus))
    model = Model(Config()).to(device)
    rows = train(model, data, held_out, options)
    save(model, rows, options.out)


if __name__ == "__main__":
    main()
