"""Compressed attention of one document without padding, token by token, head by head, channel by channel.

DeepSeek-V4's report, section 2.3, with what its released code does: a norm of each query head without a weight, values
that are the rotated keys, an output that is turned back, a sink per head.
"""

import torch

from tests.reference.indexer import chosen_keys
from tests.reference.layers import linear, rms_norm
from tests.reference.rope import frequencies_of, rotate, yarn_frequencies

Weights = dict[str, torch.Tensor]


def frequencies(config: dict, compresses: bool) -> list[float]:
    """Of windows rope_theta alone; where there are entries compress_rope_theta, and YaRN without its magnitude."""
    rope, width = config["rope_parameters"], config["qk_rope_head_dim"]
    if not compresses:
        return frequencies_of({"rope_type": "default", "rope_theta": rope["rope_theta"]}, width, 0, 0)[0]
    theta = config["compress_rope_theta"]
    if rope["rope_type"] == "default":
        return frequencies_of({"rope_type": "default", "rope_theta": theta}, width, 0, 0)[0]
    return yarn_frequencies(width, theta, rope["factor"], rope["original_max_position_embeddings"])


def turned(vector: torch.Tensor, position: int, turns: list[float]) -> torch.Tensor:
    """The last pairs of a vector, rotated."""
    width = 2 * len(turns)
    return torch.cat((vector[:-width], rotate(vector[-width:], position, turns, interleaved=True)))


def entries(x: torch.Tensor, weights: Weights, ratio: int, overlaps: bool, turns: list[float], eps: float):
    """One row for each whole block of `ratio` tokens: [S, D] -> list of [W]."""
    content, gate, ape = linear(x, weights, "wkv"), linear(x, weights, "wgate"), weights["ape"]
    width = content.shape[1] // 2 if overlaps else content.shape[1]
    made = []
    for block in range(len(x) // ratio):
        rows = []  # (content, gate), each [W]
        for j in range(ratio):
            t = block * ratio + j
            if overlaps and block:
                before = t - ratio
                rows.append((content[before, :width], gate[before, :width] + ape[j, :width]))
            offset = width if overlaps else 0
            rows.append((content[t, offset:], gate[t, offset:] + ape[j, offset:]))
        channels = []
        for c in range(width):
            powers = [torch.exp(z[c]) for _, z in rows]
            channels.append(sum(p * k[c] for p, (k, _) in zip(powers, rows, strict=True)) / sum(powers))
        entry = rms_norm(torch.stack(channels), weights["norm.weight"], eps)
        made.append(turned(entry, block * ratio, turns))
    return made


def under(weights: Weights, prefix: str) -> Weights:
    """The weights of a part."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def index_scores(x, query_latent, weights: Weights, config: dict, ratio: int, turns: list[float]):
    """Score of every query with every entry, later ones too: S lists of scores."""
    heads, width, eps = config["index_n_heads"], config["index_head_dim"], config["rms_norm_eps"]
    keys = entries(x, under(weights, "compressor."), ratio, True, turns, eps)
    queries, of_heads = linear(query_latent, weights, "wq_b"), linear(x, weights, "weights_proj")
    scores = []
    for t in range(len(x)):
        row = []
        for key in keys:
            parts = []
            for h in range(heads):
                query = turned(queries[t, h * width : (h + 1) * width], t, turns)
                parts.append(of_heads[t, h] * (query @ key).clamp(min=0))
            row.append(sum(parts) * width**-0.5 * heads**-0.5)
        scores.append(row)
    return scores


def compressed_attention(x: torch.Tensor, weights: Weights, config: dict, word: str, ratio: int) -> torch.Tensor:
    """[S, D] -> [S, D].

    Args:
        word: "swa", "hca" or "csa"; ratio: tokens of an entry.
    """
    heads, width, eps, groups = (
        config["num_attention_heads"],
        config["head_dim"],
        config["rms_norm_eps"],
        config["o_groups"],
    )
    turns = frequencies(config, word != "swa")
    latent = rms_norm(linear(x, weights, "wq_a"), weights["q_norm.weight"], eps)
    queries = linear(latent, weights, "wq_b")
    rows = rms_norm(linear(x, weights, "wkv"), weights["kv_norm.weight"], eps)
    keys = [turned(row, t, turns) for t, row in enumerate(rows)]
    made = [] if word == "swa" else entries(x, under(weights, "compressor."), ratio, word == "csa", turns, eps)
    scores = index_scores(x, latent, under(weights, "indexer."), config, ratio, turns) if word == "csa" else None
    outputs = []
    for t in range(len(x)):
        seen = [keys[s] for s in range(max(t - config["sliding_window"] + 1, 0), t + 1)]
        past = [e for e in range(len(made)) if (e + 1) * ratio <= t + 1]
        if scores is not None:
            past = chosen_keys([scores[t][e].item() for e in past], config["index_topk"])
        seen += [made[e] for e in past]
        mixed = []
        for h in range(heads):
            query = queries[t, h * width : (h + 1) * width]
            query = turned(query / (query.pow(2).mean() + eps) ** 0.5, t, turns)
            powers = [torch.exp(query @ key * width**-0.5) for key in seen]
            total = sum(powers) + torch.exp(weights["attn_sink"][h])
            value = sum(p * key for p, key in zip(powers, seen, strict=True)) / total
            mixed.append(turned(value, -t, turns))
        parts = []
        for g in range(groups):
            of_group = torch.cat(mixed[g * heads // groups : (g + 1) * heads // groups])
            rank = config["o_lora_rank"]
            parts.append(weights["wo_a.weight"][g * rank : (g + 1) * rank] @ of_group)
        outputs.append(weights["wo_b.weight"] @ torch.cat(parts))
    return torch.stack(outputs)
