"""Attention of one sequence, head by head and query by query.

Multi-head and grouped-query attention (arXiv 2305.13245); multi-head latent attention with keys and values expanded
(DeepSeek-V2, 2405.04434, eq. 6-15); the same over the keys that an indexer chooses (DeepSeek-V3.2, 2512.02556, eq. 2).
"""

import torch

from tests.reference.indexer import chosen_keys, index_scores
from tests.reference.layers import linear, rms_norm
from tests.reference.rope import frequencies_of, rotate, yarn_magnitude

LATENT_NORM_EPS = 1e-6  # of q_a and kv_a, whatever the config's rms_norm_eps says


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One query [W] over keys [T, W] and values [T, V] -> [V]."""
    scores = torch.stack([(query * key).sum() * scale for key in keys])
    powers = torch.exp(scores - scores.max().detach())
    probabilities = powers / powers.sum()
    return sum(p * value for p, value in zip(probabilities, values, strict=True))


def causal(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    chosen: list[list[int]] | None = None,
) -> torch.Tensor:
    """One head: [S, W], [S, W], [S, V] -> [S, V], query i sees keys 0 to i, or those of them in `chosen[i]`."""
    seen = [list(range(i + 1)) for i in range(len(queries))] if chosen is None else chosen
    return torch.stack([attend_one(query, keys[s], values[s], scale) for query, s in zip(queries, seen, strict=True)])


def mha(x: torch.Tensor, weights: dict[str, torch.Tensor], config: dict, prefix: str = "") -> torch.Tensor:
    """[S, D] -> [S, D]. Query head h uses key / value head h // (heads / key-value heads)."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, positions = config["head_dim"], range(len(x))
    frequencies, factor = frequencies_of(config["rope_parameters"], width, config["max_position_embeddings"], len(x))
    q, k, v = (linear(x, weights, f"{prefix}{name}_proj") for name in "qkv")
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        columns, kv_columns = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)

        def turned(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack([rotate(rows[i], i, frequencies, config["rope_interleave"], factor) for i in positions])

        outputs.append(causal(turned(q[:, columns]), turned(k[:, kv_columns]), v[:, kv_columns], width**-0.5))
    return linear(torch.cat(outputs, dim=-1), weights, f"{prefix}o_proj")


def query_latent(x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """[S, D] -> [S, query latent width]."""
    compressed = linear(x, weights, f"{prefix}q_a_proj")
    return rms_norm(compressed, weights[f"{prefix}q_a_layernorm.weight"], LATENT_NORM_EPS)


def dsa(x: torch.Tensor, weights: dict[str, torch.Tensor], config: dict, prefix: str = "") -> torch.Tensor:
    """[S, D] -> [S, D]. Latent attention of each query to the index_topk keys so far that score highest."""
    scores = index_scores(x, query_latent(x, weights, prefix), weights, config, f"{prefix}indexer.")
    chosen = [chosen_keys(row[: i + 1].tolist(), config["index_topk"]) for i, row in enumerate(scores)]
    return mla(x, weights, config, prefix, chosen)


def mla(
    x: torch.Tensor,
    weights: dict[str, torch.Tensor],
    config: dict,
    prefix: str = "",
    chosen: list[list[int]] | None = None,
) -> torch.Tensor:
    """[S, D] -> [S, D]. Every head: its own positionless key and value from the latent, one rotary key for all."""
    nope, rope, v_width = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent_width, positions, parameters = config["kv_lora_rank"], range(len(x)), config["rope_parameters"]
    frequencies, factor = frequencies_of(parameters, rope, config["max_position_embeddings"], len(x))
    scale = (nope + rope) ** -0.5
    if parameters["rope_type"] == "yarn" and parameters.get("mscale_all_dim"):
        scale *= yarn_magnitude(parameters["factor"], parameters["mscale_all_dim"]) ** 2

    def turned(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([rotate(rows[i], i, frequencies, config["rope_interleave"], factor) for i in positions])

    if config["q_lora_rank"] is None:
        q = linear(x, weights, f"{prefix}q_proj")
    else:
        q = linear(query_latent(x, weights, prefix), weights, f"{prefix}q_b_proj")
    down = linear(x, weights, f"{prefix}kv_a_proj_with_mqa")
    latent = rms_norm(down[:, :latent_width], weights[f"{prefix}kv_a_layernorm.weight"], LATENT_NORM_EPS)
    shared_key = turned(down[:, latent_width:])
    up = linear(latent, weights, f"{prefix}kv_b_proj")
    outputs = []
    for h in range(config["num_attention_heads"]):
        of_query, of_head = h * (nope + rope), h * (nope + v_width)
        q_nope, q_rope = q[:, of_query : of_query + nope], q[:, of_query + nope : of_query + nope + rope]
        key, value = up[:, of_head : of_head + nope], up[:, of_head + nope : of_head + nope + v_width]
        queries = torch.cat((q_nope, turned(q_rope)), dim=-1)
        outputs.append(causal(queries, torch.cat((key, shared_key), dim=-1), value, scale, chosen))
    return linear(torch.cat(outputs, dim=-1), weights, f"{prefix}o_proj")
