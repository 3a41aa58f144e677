"""V4.1's text model for one sequence, token by token (its report and the releases' own code).

Layers that make entries, that choose, and that read; streams read by the weights of the sub-layer before; n-grams
looked up; a second bias for the experts of an image's tokens.
"""

import numpy
import torch

from tests.reference.compressed_attention import frequencies, turned, under
from tests.reference.indexer import chosen_keys
from tests.reference.layers import linear, rms_norm
from tests.reference.moe import moe
from tests.reference.residual import collapse, normed, sigmoid, sinkhorn

Weights = dict[str, torch.Tensor]
# Tables of n-grams for the preset tiny_v4.1, which has none: ids are as they are, none joined.
ENGRAM = {
    **{"engram_layer_ids": [0, 3], "engram_num_embeddings": [260, 700], "engram_max_ngram_size": 4},
    **{"engram_vocab_size": 20, "engram_n_heads": 2, "engram_head_dim": 6, "engram_compressed_vocab_size": 97},
    "engram_pad_token_id": 2,
}


# Attention -----------------------------------------------------------------------------------------------------------


def latents(x: torch.Tensor, weights: Weights, ratio: int, eps: float) -> list[torch.Tensor]:
    """One row for each whole block of `ratio` tokens, not rotated: [S, D] -> list of [W]."""
    content = linear(x, weights, "compressor.wkv")
    rows = []
    for block in range(len(x) // ratio):
        places = range(block * ratio, (block + 1) * ratio)
        if ratio == 1:
            row = content[block]
        else:
            gate = linear(x, weights, "compressor.wgate")
            channels = []
            for c in range(content.shape[1]):
                powers = [torch.exp(gate[t, c]) for t in places]
                channels.append(sum(p * content[t, c] for p, t in zip(powers, places, strict=True)) / sum(powers))
            row = torch.stack(channels)
        rows.append(rms_norm(row, weights["compressor.norm.weight"], eps))
    return rows


def scores_of(x, latent, keys, weights: Weights, config: dict, turns) -> list[list[float]]:
    """Score of every query with every index key."""
    heads, width = config["index_n_heads"], config["index_head_dim"]
    queries, of_heads = linear(latent, weights, "indexer.wq_b"), linear(x, weights, "indexer.weights_proj")
    rows = []
    for t in range(len(x)):
        heads_of_query = [turned(queries[t, h * width : (h + 1) * width], t, turns) for h in range(heads)]
        row = []
        for key in keys:
            parts = [of_heads[t, h] * (query @ key).clamp(min=0) for h, query in enumerate(heads_of_query)]
            row.append((sum(parts) * width**-0.5 * heads**-0.5).item())
        rows.append(row)
    return rows


def best_blocks(scores: list[float], size: int, count: int) -> list[int]:
    """Blocks of so many entries with the highest best score; the last is always among them."""
    blocks = [max(scores[i : i + size]) for i in range(0, len(scores), size)]
    blocks[-1] = float("inf")
    return chosen_keys(blocks, count)


def choose(scores: list[list[float]], ratio: int, config: dict, blocks: list[list[int]] | None) -> list[list[int]]:
    """The entries of each query, among those that it sees, and inside of its blocks if there are any."""
    chosen, size = [], config["candidate_block_size"]
    for t, row in enumerate(scores):
        seen = range((t + 1) // ratio)
        inside = [e for e in seen if blocks is None or e // size in blocks[t]]
        chosen.append([inside[i] for i in chosen_keys([row[e] for e in inside], config["index_topk"])])
    return chosen


def shared_attention(x: torch.Tensor, weights: Weights, config: dict, layer: int, state: dict) -> torch.Tensor:
    """[S, D] -> [S, D].

    Args:
        state: what layers leave for each other: entries, keys, chosen, blocks. Changed in place.
    """
    ratio, eps = config["compress_ratios"][layer], config["rms_norm_eps"]
    heads, width, groups = config["num_attention_heads"], config["head_dim"], config["o_groups"]
    turns = frequencies(config, ratio > 0)
    latent = rms_norm(linear(x, weights, "wq_a"), weights["q_norm.weight"], eps)
    queries = linear(latent, weights, "wq_b")
    window = [
        turned(k, t, turns) for t, k in enumerate(rms_norm(linear(x, weights, "wkv"), weights["kv_norm.weight"], eps))
    ]
    if layer in config["kv_source_layer_ids"]:
        made = latents(x, weights, ratio, eps)
        state["entries"] = [turned(row, w * ratio, turns) for w, row in enumerate(made)]
        keys = [rms_norm(weights["indexer.wk.weight"] @ row, weights["indexer.k_norm.weight"], eps) for row in made]
        state["keys"] = [turned(key, w * ratio, turns) for w, key in enumerate(keys)]
        state["blocks"] = None
    if layer in config["index_source_layer_ids"]:
        scores = scores_of(x, latent, state["keys"], weights, config, turns)
        state["chosen"] = choose(scores, ratio, config, state["blocks"])
        if layer == config["candidate_source_layer_id"]:
            size, count = config["candidate_block_size"], config["candidate_topk_blocks"]
            seen = [row[: (t + 1) // ratio] for t, row in enumerate(scores)]
            state["blocks"] = [best_blocks(row, size, count) if row else [] for row in seen]
    outputs = []
    for t in range(len(x)):
        seen = [window[s] for s in range(max(t - config["sliding_window"] + 1, 0), t + 1)]
        seen += [state["entries"][e] for e in state["chosen"][t]] if ratio else []
        mixed = []
        for h in range(heads):
            query = turned(queries[t, h * width : (h + 1) * width], t, turns)
            powers = [torch.exp(query @ key * width**-0.5) for key in seen]
            total = sum(powers) + torch.exp(weights["attn_sink"][h])
            mixed.append(turned(sum(p * key for p, key in zip(powers, seen, strict=True)) / total, -t, turns))
        rank, size = config["o_lora_rank"], heads // groups
        parts = [
            weights["wo_a.weight"][g * rank : (g + 1) * rank] @ torch.cat(mixed[g * size : (g + 1) * size])
            for g in range(groups)
        ]
        outputs.append(weights["wo_b.weight"] @ torch.cat(parts))
    return torch.stack(outputs)


# Engram --------------------------------------------------------------------------------------------------------------


def primes_from(number: int, count: int) -> list[int]:
    """The first primes that are not below a number, by division."""
    found = []
    while len(found) < count:
        if number > 1 and all(number % d for d in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 1
    return found


def rows_of(ids: list[int], config: dict, layer: int) -> list[list[int]]:
    """Rows of a layer's table for each token, n by n and head by head, by whole numbers. Ids below 0 end an n-gram."""
    heads, longest = config["engram_n_heads"], config["engram_max_ngram_size"]
    columns, number = heads * (longest - 1), config["engram_layer_ids"].index(layer)
    primes = primes_from(config["engram_vocab_size"], columns * (number + 1))[columns * number :]
    bound = ((2**63 - 1) // config["engram_compressed_vocab_size"]) // 2
    drawn = numpy.random.default_rng(10007 * layer).integers(0, bound, size=longest, dtype=numpy.int64)
    factors = [2 * int(value) + 1 for value in drawn]
    rows = []
    for t in range(len(ids)):
        behind, ended = [], False
        for back in range(longest):
            ended = ended or t - back < 0 or ids[t - back] < 0
            behind.append(config["engram_pad_token_id"] if ended else ids[t - back])
        row = []
        for n in range(2, longest + 1):
            mixed = 0
            for i in range(n):
                mixed ^= behind[i] * factors[i]
            for head in range(heads):
                column = (n - 2) * heads + head
                row.append(mixed % primes[column] + sum(primes[:column]))
        rows.append(row)
    return rows


def engram(streams: torch.Tensor, row: list[int], weights: Weights, config: dict) -> torch.Tensor:
    """One token's streams [N, D] with its memory written into them; ids as they are, none joined."""
    count, width = streams.shape
    memory = weights["wkv.weight"] @ torch.cat([weights["embed.weight"][i] for i in row])
    value, written, eps = memory[count * width :], [], config["rms_norm_eps"]
    for i, stream in enumerate(streams):
        query = rms_norm(stream, weights["q_weight"][i], eps)
        key = rms_norm(memory[i * width : (i + 1) * width], weights["k_weight"][i], eps)
        product = (query @ key) / width**0.5
        root = product.abs().clamp(min=1e-6) ** 0.5
        written.append(stream + sigmoid(root if product >= 0 else -root) * value)
    return torch.stack(written)


# The model -----------------------------------------------------------------------------------------------------------


def around(streams: torch.Tensor, pre: list, sublayer, weights: Weights, config: dict) -> tuple[torch.Tensor, list]:
    """[S, N, D] around a sub-layer of all tokens, which reads by `pre`: the same, and the next sub-layer's `pre`."""
    count, eps = config["hc_mult"], config["hc_eps"]
    outputs = sublayer(torch.stack([collapse(weight, token) for weight, token in zip(pre, streams, strict=True)]))
    joined, found = [], []
    for token, output in zip(streams, outputs, strict=True):
        z = weights["fn"] @ normed(token, config["rms_norm_eps"])
        scale, base = weights["scale"], weights["base"]
        found.append([sigmoid(scale[0] * z[i] + base[i]) + eps for i in range(count)])
        post = [2 * sigmoid(scale[1] * z[count + i] + base[count + i]) for i in range(count)]
        comb = sinkhorn(
            (scale[2] * z[2 * count :] + base[2 * count :]).reshape(count, count), config["hc_sinkhorn_iters"], eps
        )
        joined.append(
            torch.stack([post[k] * output + sum(comb[j, k] * token[j] for j in range(count)) for k in range(count)])
        )
    return torch.stack(joined), found


def experts(x: torch.Tensor, weights: Weights, config: dict, ids: list[int]) -> torch.Tensor:
    """[S, D] -> [S, D], an image's tokens by their own bias."""
    image = {**weights, "gate.e_score_correction_bias": weights["gate.e_score_correction_bias_vl"]}
    rows = [
        moe(token[None], image if i == config["image_token_id"] else weights, config)
        for token, i in zip(x, ids, strict=True)
    ]
    return torch.cat(rows)


def shared_model(
    ids: list[int], weights: Weights, config: dict, given: dict[int, torch.Tensor] | None = None
) -> torch.Tensor:
    """[S] token ids -> [S, V] logits. Weights by our names, experts one by one; given: place -> its embedding."""
    eps, image = config["rms_norm_eps"], config["image_token_id"]
    table, given = weights["model.embed_tokens.weight"], given or {}
    embeds = torch.stack([given[i] if i in given else table[token] for i, token in enumerate(ids)])
    streams = torch.stack([embeds] * config["hc_mult"], dim=1)  # [S, N, D]
    pre, state = [[1.0] + [0.0] * (config["hc_mult"] - 1)] * len(ids), {}
    for layer in range(config["num_hidden_layers"]):
        own = under(weights, f"model.layers.{layer}.")
        if layer in (config["engram_layer_ids"] or ()):
            rows = rows_of([-1 if token == image else token for token in ids], config, layer)
            memory = under(own, "engram.")
            streams = torch.stack(
                [
                    x if i == image else engram(x, row, memory, config)
                    for x, row, i in zip(streams, rows, ids, strict=True)
                ]
            )

        def attend(x, own=own, layer=layer):
            normed_x = rms_norm(x, own["input_layernorm.weight"], eps)
            return shared_attention(normed_x, under(own, "self_attn."), config, layer, state)

        def transform(x, own=own):
            return experts(rms_norm(x, own["post_attention_layernorm.weight"], eps), under(own, "mlp."), config, ids)

        streams, pre = around(streams, pre, attend, under(own, "attn_hc."), config)
        streams, pre = around(streams, pre, transform, under(own, "ffn_hc."), config)
    states = torch.stack([collapse(weight, token) for weight, token in zip(pre, streams, strict=True)])
    return linear(rms_norm(states, weights["model.norm.weight"], eps), weights, "lm_head")
