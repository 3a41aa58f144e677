"""Drafts of one sequence behind one token, stage by stage, token by token (DSpark, and V4's released code)."""

import torch

from tests.reference.compressed_attention import frequencies, turned, under
from tests.reference.layers import linear, rms_norm
from tests.reference.moe import moe
from tests.reference.residual import collapse, hyper_head
from tests.reference.shared_model import around as around_shifted
from tests.reference.stream_prediction import around


def attention(block: torch.Tensor, context: torch.Tensor, t: int, weights: dict, config: dict) -> torch.Tensor:
    """[b, D] -> [b, D]: each token sees the contexts of the last tokens up to t, and the whole block."""
    heads, width, eps, groups = (config[n] for n in ("num_attention_heads", "head_dim", "rms_norm_eps", "o_groups"))
    turns, rank = frequencies(config, False), config["o_lora_rank"]
    near = [(s, context[s]) for s in range(max(t - config["sliding_window"] + 1, 0), t + 1)]
    both = near + [(t + 1 + j, token) for j, token in enumerate(block)]
    seen = [turned(rms_norm(weights["wkv.weight"] @ x, weights["kv_norm.weight"], eps), s, turns) for s, x in both]
    outputs = []
    for j, token in enumerate(block):
        latent = rms_norm(weights["wq_a.weight"] @ token, weights["q_norm.weight"], eps)
        queries, mixed = weights["wq_b.weight"] @ latent, []
        for h in range(heads):
            query = queries[h * width : (h + 1) * width]
            if config["kv_source_layer_ids"] is None:
                query = query / (query.pow(2).mean() + eps) ** 0.5
            query = turned(query, t + 1 + j, turns)
            powers = [torch.exp(query @ key * width**-0.5) for key in seen]
            total = sum(powers) + torch.exp(weights["attn_sink"][h])
            value = sum(p * key for p, key in zip(powers, seen, strict=True)) / total
            mixed.append(turned(value, -(t + 1 + j), turns))
        parts = []
        for g in range(groups):
            of_group = torch.cat(mixed[g * heads // groups : (g + 1) * heads // groups])
            parts.append(weights["wo_a.weight"][g * rank : (g + 1) * rank] @ of_group)
        outputs.append(weights["wo_b.weight"] @ torch.cat(parts))
    return torch.stack(outputs)


def states_behind(t: int, taps: torch.Tensor, first: int, stages: list[dict], embeds: torch.Tensor, config: dict):
    """[b, D] before the norm of the head.

    Args:
        taps: [S, k D], of the trunk; first: the token t + 1.
        stages: weights of each, by our names; embeds: [V, D].
    """
    eps, shares = config["rms_norm_eps"], config["kv_source_layer_ids"] is not None
    config = {**config, "num_experts_per_tok": config["dspark_num_experts_per_tok"] or config["num_experts_per_tok"]}
    context = rms_norm(linear(taps, stages[0], "main_proj"), stages[0]["main_norm.weight"], eps)
    ids = [first] + [config["dspark_noise_token_id"]] * (config["dspark_block_size"] - 1)
    x = [torch.stack([embeds[i]] * config["hc_mult"]) for i in ids]
    pre = [[1.0] + [0.0] * (config["hc_mult"] - 1)] * len(ids)
    for weights in stages:

        def attend(states: torch.Tensor, weights=weights) -> torch.Tensor:
            normed = rms_norm(states, weights["input_layernorm.weight"], eps)
            return attention(normed, context, t, under(weights, "self_attn."), config)

        def transform(states: torch.Tensor, weights=weights) -> torch.Tensor:
            return moe(rms_norm(states, weights["post_attention_layernorm.weight"], eps), weights, config, "mlp.")

        for sublayer, prefix in ((attend, "attn_hc."), (transform, "ffn_hc.")):
            if shares:
                x, pre = around_shifted(torch.stack(list(x)), pre, sublayer, under(weights, prefix), config)
            else:
                x = around(x, sublayer, weights, config, prefix)
    if shares:
        return torch.stack([collapse(weight, token) for weight, token in zip(pre, x, strict=True)])
    return torch.stack([hyper_head(token, stages[-1], config, "hc_head.") for token in x])


def scores_of(states: torch.Tensor, previous: list[int], last: dict, head: torch.Tensor, config: dict):
    """Scores [b, V] of drafts and log odds [b] that they are taken, each after the token before it."""
    scores, odds = [], []
    for state, token in zip(states, previous, strict=True):
        markov = last["markov_head.markov_w1.weight"][token]
        normed = rms_norm(state, last["shared_head.norm.weight"], config["rms_norm_eps"])
        scores.append(head @ normed + last["markov_head.markov_w2.weight"] @ markov)
        odds.append(last["confidence_head.proj.weight"][0] @ torch.cat((state, markov)))
    return torch.stack(scores), torch.stack(odds)


def loss_of(scores: torch.Tensor, odds: torch.Tensor, wanted: torch.Tensor, targets: list[int]):
    """The weighted losses of a block's drafts, and their weights, draft by draft."""
    losses, weights = [], []
    for j, target in enumerate(targets):
        p, q = scores[j].softmax(0), wanted[j].softmax(0)
        distance = sum((a - b).abs() for a, b in zip(p, q, strict=True))
        taken, sure = 1 - distance.detach() / 2, 1 / (1 + torch.exp(-odds[j]))
        entropy = -(taken * torch.log(sure) + (1 - taken) * torch.log(1 - sure))
        weights.append(2.718281828459045 ** (-j / 4))
        losses.append(weights[-1] * (-0.1 * torch.log(p[target]) + 0.9 * distance + entropy))
    return losses, weights
