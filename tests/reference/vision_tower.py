"""V4.1's vision tower and aligner for one image, place by place (the release's own code, and its report)."""

import math

import torch

from tests.reference.layers import linear, rms_norm

Weights = dict[str, torch.Tensor]


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def turned(head: torch.Tensor, row: int, column: int, theta: float) -> torch.Tensor:
    """[W]: number i and i + W / 2 are a pair; the first half of the pairs is turned by the row."""
    pairs, out = len(head) // 2, [torch.zeros(())] * len(head)
    for i in range(pairs):
        place, j = (row, i) if i < pairs // 2 else (column, i - pairs // 2)
        angle = place * theta ** (-2 * j / pairs)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = head[i] * cos - head[i + pairs] * sin
        out[i + pairs] = head[i + pairs] * cos + head[i] * sin
    return torch.stack(out)


def attention(x: torch.Tensor, weights: Weights, vision: dict, width: int) -> torch.Tensor:
    """[S, C] -> [S, C]; `width` places are in a row."""
    channels, heads = vision["hidden_size"], vision["num_attention_heads"]
    size, qkv = channels // heads, linear(x, weights, "wqkv")
    rows = []
    for h in range(heads):
        query, key, value = (qkv[:, part * channels + h * size :][:, :size] for part in range(3))
        places = [divmod(s, width) for s in range(len(x))]
        query = [turned(q, *place, vision["rope_theta"]) for q, place in zip(query, places, strict=True)]
        key = [turned(k, *place, vision["rope_theta"]) for k, place in zip(key, places, strict=True)]
        powers = torch.exp(torch.stack([torch.stack([q @ k / size**0.5 for k in key]) for q in query]))
        rows.append(powers @ value / powers.sum(1, keepdim=True))
    return linear(torch.cat(rows, dim=1), weights, "wo")


def tower(patches: torch.Tensor, weights: Weights, vision: dict, width: int) -> torch.Tensor:
    """[S, 3 p p] -> [S, C]."""
    x = linear(patches, weights, "patch_embed.proj")
    for i in range(vision["num_hidden_layers"]):
        own = under(weights, f"blocks.{i}.")
        x = x + attention(rms_norm(x, own["norm1.weight"], 1e-6), under(own, "attn."), vision, width)
        both = linear(rms_norm(x, own["norm2.weight"], 1e-6), own, "mlp.w1")
        gate, up = both[:, : vision["intermediate_size"]], both[:, vision["intermediate_size"] :]
        x = x + linear(gate / (1 + torch.exp(-gate)) * up, own, "mlp.w2")
    return rms_norm(x, weights["norm.weight"], 1e-6)


def aligner(x: torch.Tensor, weights: Weights, height: int, width: int, ratio: int) -> torch.Tensor:
    """[h w, C] -> [tokens, D]."""
    tokens = []
    for row in range(0, height, ratio):
        for column in range(0, width, ratio):
            joined = []
            for channel in range(x.shape[1]):
                for i in range(row, row + ratio):
                    for j in range(column, column + ratio):
                        inside = i < height and j < width
                        joined.append(x[i * width + j, channel] if inside else x.new_zeros(()))
            tokens.append(torch.stack(joined))
    inner = linear(torch.stack(tokens), weights, "w1")
    return linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), weights, "w2")


def places(tokens: torch.Tensor, weights: Weights, width: int) -> list[torch.Tensor]:
    """[h w, D] -> what stands at an image's places: each row and a newline, between start and end."""
    rows = [weights["image_start"]]
    for i, token in enumerate(tokens):
        rows += [token, weights["image_newline"]] if i % width == width - 1 else [token]
    return [*rows, weights["image_end"]]
