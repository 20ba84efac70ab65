"""A model on paper of layers on 2 to 64 hosts: `python -m bench.ops.model_hosts` prints its table.

Of one layer, with T tokens on each of N hosts, in expected values (`ktmoe_np.distributed.volume`):

    experts   a host reads the weights of its experts that a token has:  E/N * (1 - (1 - P/E)^(N T))
    compute   the larger of reading them and of multiplying, N T P / N rows of 6 H I operations
    exchange  bytes of T tokens out and back over the host's link, and three latencies: header, tokens, rows
    layer     compute + exchange (nothing hidden), and the larger of the two (all hidden)

Hosts are those of the benches, 16 processors of an Emerald Rapids server: see HOST.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktmoe_np.distributed.volume import expert_counts, mean_volume

from ..core.shapes import Shape

__all__ = ["HOST", "MODELS", "Host", "LayerTimes", "layer_times", "main", "table"]


@dataclass(frozen=True)
class Host:
    """What a host reaches."""

    read: float  #: bytes of weights per second
    flops: float  #: operations of bf16 products per second, in large batches
    latency: float  #: seconds of an exchange without bytes


#: Measured on 16 processors of Emerald Rapids: the read limit, and 0.45 of the limit of products.
HOST = Host(read=103e9, flops=0.45 * 14.6e12, latency=10e-6)

#: Layers of experts, in a byte per weight, and how many a model has.
MODELS = ((Shape("DeepSeek-V3", 7168, 2048, 256, 8), 58), (Shape("Kimi-K2", 7168, 2048, 384, 8), 60))

_HOSTS = (2, 4, 8, 16, 32, 64)
_GBIT = (25, 100, 400)
#: Tokens of a host: decoding of 16 sequences, and a prompt.
_BATCHES = ((16, "decode"), (4096, "prefill"))


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer."""

    compute: float
    exchange: float


def layer_times(
    shape: Shape, num_hosts: int, tokens: int, gbit: float, host: Host = HOST, combine: str = "exact"
) -> LayerTimes:
    """The time of a layer of one byte per weight when each host has so many tokens."""
    total = num_hosts * tokens
    read_experts = shape.experts / num_hosts * (1 - (1 - shape.per_token / shape.experts) ** total)
    reading = read_experts * shape.weights_per_expert / host.read
    multiplying = shape.flop(tokens) / host.flops  # every host has the rows of T tokens
    volume = mean_volume(expert_counts(shape.experts, num_hosts), shape.per_token, shape.hidden)
    back = volume.exact_bytes if combine == "exact" else volume.fast_bytes
    wire = tokens * max(volume.sent_bytes, back) * 8 / (gbit * 1e9)  # a link works in both directions at once
    wire += tokens * min(volume.sent_bytes, back) * 8 / (gbit * 1e9)  # but rows wait for tokens
    return LayerTimes(max(reading, multiplying), wire + 3 * host.latency)


def _rate(shape: Shape, layers: int, num_hosts: int, tokens: int, gbit: float) -> str:
    """Tokens per second of all hosts, experts alone: with nothing and with all of the exchange hidden."""
    times = layer_times(shape, num_hosts, tokens, gbit)
    total = num_hosts * tokens / layers
    slow, fast = total / (times.compute + times.exchange), total / max(times.compute, times.exchange)
    mark = "*" if times.exchange > times.compute else ""
    return f"{slow:,.0f} to {fast:,.0f}{mark}"


def table() -> list[str]:
    """The lines of the table, in Markdown; a star where the exchange takes longer than the experts."""
    lines = []
    for shape, layers in MODELS:
        for tokens, what in _BATCHES:
            lines += [
                f"{shape.name}, {what}, {tokens} tokens on each host, tokens per second of all hosts:",
                "",
                "| hosts | " + " | ".join(f"{gbit} Gbit/s" for gbit in _GBIT) + " |",
                "|---|" + "---|" * len(_GBIT),
            ]
            for hosts in _HOSTS:
                rates = [_rate(shape, layers, hosts, tokens, gbit) for gbit in _GBIT]
                lines.append(f"| {hosts} | " + " | ".join(rates) + " |")
            lines.append("")
    return lines


def main() -> int:
    print("\n".join(table()).rstrip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
