"""Multi-token prediction of one sequence (DeepSeek-V3, arXiv 2412.19437, eq. 21-25), position by position."""

import torch

from tests.reference.layers import linear, rms_norm
from tests.reference.model import decoder_layer, embed, head_of, last_states


def logits_ahead(
    input_ids: list[int], weights: dict[str, torch.Tensor], config: dict, after_norm: bool
) -> list[torch.Tensor]:
    """One [S - d, V] per depth d: row i predicts token i + d + 1 (eq. 21-23).

    Args:
        weights: official names; embedding and head are the language model's.
        after_norm: a layer reads the state before it behind the norm that precedes the head.
    """
    eps, results = config["rms_norm_eps"], []
    states = last_states(input_ids, weights, config)
    if after_norm:
        states = rms_norm(states, weights["model.norm.weight"], eps)
    for d in range(1, config["num_nextn_predict_layers"] + 1):
        layer = config["num_hidden_layers"] + d - 1
        prefix, length = f"model.layers.{layer}.", len(input_ids) - d
        ahead = rms_norm(embed(input_ids[d:], weights), weights[f"{prefix}enorm.weight"], eps)
        behind = rms_norm(states[:length], weights[f"{prefix}hnorm.weight"], eps)
        x = torch.stack(
            [weights[f"{prefix}eh_proj.weight"] @ torch.cat(pair) for pair in zip(ahead, behind, strict=True)]
        )
        x = decoder_layer(x, weights, config, layer)
        normed = rms_norm(x, weights[f"{prefix}shared_head.norm.weight"], eps)
        results.append(linear(normed, weights, head_of(weights)))
        states = normed if after_norm else x
    return results


def loss_ahead(logits: list[torch.Tensor], labels: list[int]) -> torch.Tensor:
    """Mean over the depths of the mean of -log p(label of token i + d + 1), where that is not -100 (eq. 24, 25)."""
    losses = []
    for d, rows in enumerate(logits, start=1):
        terms = [
            torch.logsumexp(rows[i], 0) - rows[i][labels[i + d + 1]]
            for i in range(len(labels) - d - 1)
            if labels[i + d + 1] != -100
        ]
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)
