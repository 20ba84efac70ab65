"""Fine-tune the experts of a Qwen3-MoE decoder that is written in JAX, with one `scan` over its layers.

    python examples/jax_lora_scan.py [CHECKPOINT] [--steps 10]

Attention, norms and the router are JAX arrays of all layers, stacked; the experts stay mapped, outside the
program, and `moe_sft` calls those of layer `index`. The adapters of all layers are stacked too, so `jax.grad`
gives one array for each of the six matrices.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import SafetensorsCheckpoint, load_hf_config
from ktmoe_np.jax import lora_parameters, moe_sft
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT, load_tokenizer

DENSE = {
    "input_norm": "input_layernorm.weight",
    "expert_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "router": "mlp.gate.weight",
}


def load_dense(path, num_layers):
    """All but the experts, in float32: arrays of all layers [L, ...], embedding, last norm, output head."""
    checkpoint = SafetensorsCheckpoint(path)
    tensor = lambda name: jnp.asarray(checkpoint.tensor(name)).astype(jnp.float32)  # noqa: E731
    layers = {
        key: jnp.stack([tensor(f"model.layers.{i}.{name}") for i in range(num_layers)])
        for key, name in DENSE.items()
    }
    head = "lm_head.weight" if "lm_head.weight" in checkpoint.names() else "model.embed_tokens.weight"
    return layers, tensor("model.embed_tokens.weight"), tensor("model.norm.weight"), tensor(head)


def rms_norm(x, weight, eps):
    """Divide by the root of the mean square."""
    return weight * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rotate(x, theta):
    """Turn the halves of each head by angles that depend on the position; x is [B, T, heads, D]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(layer, x, config):
    """Causal attention of [B, T, H]."""
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads = lambda y: y.reshape(*y.shape[:-1], -1, config["head_dim"])  # noqa: E731
    query = rotate(rms_norm(heads(x @ layer["q"].T), layer["q_norm"], eps), theta)
    key = rotate(rms_norm(heads(x @ layer["k"].T), layer["k_norm"], eps), theta)
    mixed = jax.nn.dot_product_attention(query, key, heads(x @ layer["v"].T), is_causal=True)
    return mixed.reshape(*x.shape[:-1], -1) @ layer["o"].T


def decoder_layer(experts, config, x, of_layer):
    """Attention, then experts, each added to its input; `of_layer` has one layer's arrays and its index."""
    layer, lora, index = of_layer
    x = x + attend(layer, rms_norm(x, layer["input_norm"], config["rms_norm_eps"]), config)
    rows = rms_norm(x, layer["expert_norm"], config["rms_norm_eps"])
    chances, ids = jax.lax.top_k(jax.nn.softmax(rows @ layer["router"].T), config["num_experts_per_tok"])
    weights = chances / chances.sum(-1, keepdims=True)
    out = moe_sft(experts, lora, rows.astype(jnp.bfloat16), ids, weights, index=index)
    return x + out.astype(jnp.float32), None


def bits_per_token(lora, dense, experts, config, tokens):
    """The loss of a batch of texts [B, T]."""
    layers, embedding, last_norm, head = dense
    x, _ = jax.lax.scan(
        partial(decoder_layer, experts, config),
        embedding[tokens[:, :-1]],
        (layers, lora, jnp.arange(len(experts))),
    )
    logits = rms_norm(x, last_norm, config["rms_norm_eps"]) @ head.T
    chances = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean() / jnp.log(2)


def main() -> None:
    """Train the adapters on a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED_MODEL)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    config = load_hf_config(arguments.checkpoint)
    dense = load_dense(arguments.checkpoint, config["num_hidden_layers"])
    experts = [
        KTMoEWrapper.from_pretrained(arguments.checkpoint, i, mode="sft", lora_rank=8)
        for i in range(config["num_hidden_layers"])
    ]
    lora = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *map(lora_parameters, experts))

    optimizer = optax.adam(arguments.rate)
    state = optimizer.init(lora)

    @jax.jit
    def step(lora, state, tokens):
        loss, gradients = jax.value_and_grad(bits_per_token)(lora, dense, experts, config, tokens)
        updates, state = optimizer.update(gradients, state)
        return loss, optax.apply_updates(lora, updates), state

    text = load_tokenizer(arguments.checkpoint).encode(EMBEDDED_TEXT.read_text()[:100_000])
    size = 4 * arguments.window
    for i in range(arguments.steps):
        tokens = jnp.array(text[i * size : (i + 1) * size]).reshape(4, arguments.window)
        loss, lora, state = step(lora, state, tokens)
        print(f"step {i + 1:3d}: {loss:.4f} bits per token")


if __name__ == "__main__":
    main()
