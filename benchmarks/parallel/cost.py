"""What a sharded model should need: memory, bytes between ranks, and the time of a decode step that these allow.

    python benchmarks/run.py parallel.cost

prints the predictions of docs/scaling.md. They are arithmetic on data sheets, to hold measurements against; nothing here
was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A decoder with gated MLPs, and how many bytes a number of it takes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weight_bytes: float = 2
    activation_bytes: int = 2
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Weights of linear layers and embeddings; norms are too few to count."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        a_layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * a_layer + (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device and its link to the others, by data sheet.

    Attributes:
        memory: bytes. usable: the share of it that the engine takes.
        bandwidth: of the memory, bytes a second.
        link: to the other devices, bytes a second in one direction.
        latency: seconds that a sum of few bytes takes, whatever the bytes. An assumption.
    """

    memory: float
    bandwidth: float
    link: float
    latency: float
    usable: float = 0.9


LLAMA_70B = Sizes(
    layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256
)  # fmt: skip
H100 = Device(memory=80e9, bandwidth=3.35e12, link=450e9, latency=10e-6)


def summed_per_token(sizes: Sizes, sums: int = 2) -> int:
    """Bytes that a rank gives to sums for one token: two a layer, after attention and after the MLP or experts."""
    return sums * sizes.layers * sizes.hidden * sizes.activation_bytes


def embedded_per_token(sizes: Sizes) -> int:
    """Bytes that a rank gives to the sum of an embedding split by vocabulary, for one token."""
    return sizes.hidden * sizes.activation_bytes


PEAK = 4  # bytes that a rank gives for a token's largest input of a layer, cut by inputs, that rounds them to 8 bits
WINNER = 16  # bytes that a rank gives for a sampled row of which the largest logit is wanted: it, and its token


def logits_per_row(sizes: Sizes, ranks: int, logit_bytes: int) -> int:
    """Bytes that a rank gives for a sampled row of which all logits are wanted."""
    return -(-sizes.vocabulary // ranks) * logit_bytes


def link_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes that a ring sends over each link to sum `num_bytes`."""
    return 2 * num_bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Prediction:
    """Of a decode step of `sequences` with `context` tokens each. Bytes are those of one rank, times seconds."""

    weights: float
    kv_per_token: float
    cached_tokens: int  # that fit beside the weights
    link_bytes: float
    weight_time: float
    kv_time: float
    link_time: float

    @property
    def step(self) -> float:
        return self.weight_time + self.kv_time + self.link_time


def predict(sizes: Sizes, device: Device, ranks: int, *, sequences: int, context: int) -> Prediction:
    """Several ranks have the same key/value heads if these are fewer. Raises ValueError if heads cannot be dealt out evenly."""
    if sizes.heads % ranks or sizes.kv_heads % ranks and ranks % sizes.kv_heads:
        raise ValueError(f"{sizes.heads} heads and {sizes.kv_heads} key/value heads cannot be dealt out to {ranks} ranks")
    dealt = replace(sizes, kv_heads=max(sizes.kv_heads, ranks))
    weights = dealt.parameters * sizes.weight_bytes / ranks
    kv = dealt.kv_bytes_per_token / ranks
    sums = 2 * sizes.layers + 1
    sent = link_bytes(sequences * (summed_per_token(sizes) + embedded_per_token(sizes)), ranks)
    return Prediction(
        weights=weights,
        kv_per_token=kv,
        cached_tokens=max(0, int((device.memory * device.usable - weights) / kv)),
        link_bytes=sent,
        weight_time=weights / device.bandwidth,
        kv_time=sequences * context * kv / device.bandwidth,
        link_time=0.0 if ranks == 1 else sums * device.latency + sent / device.link,
    )


def table(sequences: int = 32, context: int = 2048) -> str:
    """Markdown: Llama-70B in bf16 on 2, 4 and 8 H100."""
    lines = [
        "| H100 | weights a GPU | cache a token | tokens that fit | a step sends | weights | cache | sums | step | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (2, 4, 8):
        found = predict(LLAMA_70B, H100, ranks, sequences=sequences, context=context)
        fits = found.cached_tokens >= sequences * context
        times = [f"{1e3 * part:.1f} ms" for part in (found.weight_time, found.kv_time, found.link_time, found.step)]
        if not fits:
            times = [times[0], "does not fit", "", ""]
        cells = [
            str(ranks),
            f"{found.weights / 1e9:.1f} GB",
            f"{found.kv_per_token / 1e3:.0f} kB",
            f"{found.cached_tokens:,}",
            f"{found.link_bytes / 1e6:.0f} MB",
            *times,
            f"{sequences / found.step:,.0f}" if fits else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
