"""A whole causal language model for one sequence, from the tensors of an official checkpoint."""

import torch

from tests.reference.attention import mha, mla
from tests.reference.layers import linear, rms_norm, swiglu
from tests.reference.moe import moe


def causal_lm(input_ids: list[int], weights: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """[S] token ids -> [S, V] logits.

    Args:
        weights: official names, experts one by one. Without lm_head.weight the embedding is the head too.
        config: fields of the published config.json, completed.
    """
    eps, attention = config["rms_norm_eps"], mha if config["kv_lora_rank"] is None else mla
    x = torch.stack([weights["model.embed_tokens.weight"][token] for token in input_ids])
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        x = x + attention(
            rms_norm(x, weights[f"{prefix}input_layernorm.weight"], eps), weights, config, f"{prefix}self_attn."
        )
        normed = rms_norm(x, weights[f"{prefix}post_attention_layernorm.weight"], eps)
        has_experts = (
            config["n_routed_experts"] is not None
            and i >= config["first_k_dense_replace"]
            and i % config["moe_layer_freq"] == 0
        )
        if has_experts:
            x = x + moe(normed, weights, config, f"{prefix}mlp.")
        else:
            x = x + swiglu(normed, weights, f"{prefix}mlp.")
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
    return linear(rms_norm(x, weights["model.norm.weight"], eps), weights, head)
