"""A mixture-of-experts layer, token by token and expert by expert (DeepSeekMoE, arXiv 2401.06066, eq. 9-11)."""

import torch

from tests.reference.layers import swiglu
from tests.reference.routers import route


def moe(
    x: torch.Tensor, weights: dict[str, torch.Tensor], config: dict, prefix: str = "", ids: list[int] | None = None
) -> torch.Tensor:
    """[N, D] -> [N, D].

    Args:
        weights: official names under `prefix`: gate.weight, gate.e_score_correction_bias, experts.0.gate_proj.weight
            and so on, shared_experts.*.
        config: fields as in the published config.json.
        ids: the tokens' ids, where gate.tid2eid [V, K] chooses.
    """
    outputs, limit = [], config.get("swiglu_limit")
    for i, token in enumerate(x):
        logits = weights[f"{prefix}gate.weight"] @ token
        output = torch.zeros_like(token)
        row = weights[f"{prefix}gate.tid2eid"][ids[i]].tolist() if f"{prefix}gate.tid2eid" in weights else None
        bias = weights.get(f"{prefix}gate.e_score_correction_bias")
        for expert, weight in route(logits, config, bias, row).items():
            output = output + weight * swiglu(token, weights, f"{prefix}experts.{expert}.", limit)
        if config.get("n_shared_experts"):
            output = output + swiglu(token, weights, f"{prefix}shared_experts.", limit)
        outputs.append(output)
    return torch.stack(outputs)
