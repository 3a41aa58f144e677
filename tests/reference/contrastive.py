"""Slow plain versions of pooling and of the contrastive loss: one text, one pair, one size at a time."""

import math

import torch


def pool(states, is_token, mode):
    """[B, S, D], [B, S] -> [B, D] for the modes mean and last_token."""
    rows = []
    for row, mask in zip(states, is_token.tolist(), strict=True):
        tokens = [state for state, there in zip(row, mask, strict=True) if there]
        rows.append(tokens[-1] if mode == "last_token" else sum(tokens) / len(tokens))
    return torch.stack(rows)


def rms_norm(vector, weight, eps):
    return vector / torch.sqrt((vector * vector).mean() + eps) * weight


def latent_attention(states, is_token, weights, num_heads, eps):
    """`weights`: the module's state dict."""
    width = states.shape[-1] // num_heads
    latents = [rms_norm(latent, weights["latent_norm.weight"], eps) for latent in weights["latents.weight"]]
    keys = [weights["key.weight"] @ latent for latent in latents]
    values = [weights["value.weight"] @ latent for latent in latents]
    rows = []
    for row, mask in zip(states, is_token.tolist(), strict=True):
        tokens = []
        for state, there in zip(row, mask, strict=True):
            if not there:
                continue
            query = weights["query.weight"] @ rms_norm(state, weights["query_norm.weight"], eps)
            heads = []
            for head in range(num_heads):
                part = slice(head * width, (head + 1) * width)
                scores = [torch.exp(torch.dot(query[part], key[part]) / math.sqrt(width)) for key in keys]
                heads.append(sum(s * value[part] for s, value in zip(scores, values, strict=True)) / sum(scores))
            state = state + weights["output.weight"] @ torch.cat(heads)
            inner = weights["up.weight"] @ rms_norm(state, weights["feed_forward_norm.weight"], eps)
            inner = inner + weights["up.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            tokens.append(state + weights["down.weight"] @ inner + weights["down.bias"])
        rows.append(sum(tokens) / len(tokens))
    return torch.stack(rows)


def matryoshka(queries, passages, targets, temperature, sizes):
    total = 0.0
    for size in sizes:
        for query, target in zip(queries, targets.tolist(), strict=True):
            short = query[:size] / torch.sqrt((query[:size] ** 2).sum())
            scores = []
            for passage in passages:
                other = passage[:size] / torch.sqrt((passage[:size] ** 2).sum())
                scores.append(torch.exp(torch.dot(short, other) / temperature))
            total = total - torch.log(scores[target] / sum(scores)) / len(queries)
    return total
