"""Routing of one token from the formulas.

DeepSeekMoE (arXiv 2401.06066, eq. 3-5), DeepSeek-V2 (2405.04434, section 2.2.2 and its released code's rule:
normalise, or scale), DeepSeek-V3 (2412.19437, eq. 12-16).
"""

import torch


def best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest values."""
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:count]


def scores_of(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """[E] softmax, sigmoid or sqrt(log(1 + e^x)) of the logits."""
    if scoring == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    if scoring == "sqrtsoftplus":
        return torch.log1p(torch.exp(logits)) ** 0.5
    powers = torch.exp(logits - logits.max().detach())
    return powers / powers.sum()


def chosen_experts(scores: list[float], top_k: int, method: str, bias: list[float], n_group: int, topk_group: int):
    """The experts of a token, best first."""
    if method == "greedy":
        return best(scores, top_k)
    size = len(scores) // n_group
    choice = [s + b for s, b in zip(scores, bias, strict=True)] if method == "noaux_tc" else list(scores)
    count, outside = (2, float("-inf")) if method == "noaux_tc" else (1, 0.0)
    ranks = []
    for group in range(n_group):
        members = sorted(choice[group * size : (group + 1) * size], reverse=True)
        ranks.append(sum(members[:count]))
    kept = best(ranks, topk_group)
    return best([value if i // size in kept else outside for i, value in enumerate(choice)], top_k)


def route(
    logits: torch.Tensor, router: dict, bias: torch.Tensor | None = None, row: list[int] | None = None
) -> dict[int, torch.Tensor]:
    """Expert -> weight for one token.

    Args:
        logits: [E].
        router: the config's fields scoring_func, topk_method, num_experts_per_tok, n_group, topk_group,
            norm_topk_prob, routed_scaling_factor.
        bias: [E], e_score_correction_bias, with noaux_tc.
        row: the experts that a table has for the token, in hash layers (DeepSeek-V4's report, section 2.1).
    """
    top_k, scores = router["num_experts_per_tok"], scores_of(logits, router["scoring_func"])
    offsets = [0.0] * len(logits) if bias is None else bias.tolist()
    groups = router.get("n_group") or 1, router.get("topk_group") or 1
    chosen = row or chosen_experts(scores.tolist(), top_k, router["topk_method"], offsets, *groups)
    weights = {expert: scores[expert] for expert in chosen}
    factor = router["routed_scaling_factor"]
    if router["scoring_func"] == "softmax":
        if router["norm_topk_prob"] and top_k > 1:
            total = sum(weights.values())
            return {expert: weight / total for expert, weight in weights.items()}  # not scaled
        return {expert: weight * factor for expert, weight in weights.items()}
    total = sum(weights.values()) + 1e-20 if router["norm_topk_prob"] else 1.0
    return {expert: weight / total * factor for expert, weight in weights.items()}
