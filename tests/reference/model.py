"""A whole causal language model for one sequence, from the tensors of an official checkpoint."""

import torch

from tests.reference.attention import dsa, mha, mla
from tests.reference.layers import linear, rms_norm, swiglu
from tests.reference.moe import moe


def decoder_layer(x: torch.Tensor, weights: dict[str, torch.Tensor], config: dict, i: int) -> torch.Tensor:
    """Layer i, [S, D] -> [S, D]. Layers from num_hidden_layers on are as the last one."""
    latent = mla if config["index_topk"] is None else dsa
    eps, attention = config["rms_norm_eps"], mha if config["kv_lora_rank"] is None else latent
    prefix, kind = f"model.layers.{i}.", min(i, config["num_hidden_layers"] - 1)
    x = x + attention(
        rms_norm(x, weights[f"{prefix}input_layernorm.weight"], eps), weights, config, f"{prefix}self_attn."
    )
    normed = rms_norm(x, weights[f"{prefix}post_attention_layernorm.weight"], eps)
    has_experts = (
        config["n_routed_experts"] is not None
        and kind >= config["first_k_dense_replace"]
        and kind % config["moe_layer_freq"] == 0
    )
    if has_experts:
        return x + moe(normed, weights, config, f"{prefix}mlp.")
    return x + swiglu(normed, weights, f"{prefix}mlp.")


def embed(input_ids: list[int], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """[S] token ids -> [S, D]."""
    return torch.stack([weights["model.embed_tokens.weight"][token] for token in input_ids])


def last_states(input_ids: list[int], weights: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """[S] token ids -> [S, D] behind the last decoder layer, before the final norm."""
    x = embed(input_ids, weights)
    for i in range(config["num_hidden_layers"]):
        x = decoder_layer(x, weights, config, i)
    return x


def head_of(weights: dict[str, torch.Tensor]) -> str:
    """Name of the head: the embedding where there is no other."""
    return "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"


def causal_lm(input_ids: list[int], weights: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """[S] token ids -> [S, V] logits.

    Args:
        weights: official names, experts one by one. Without lm_head.weight the embedding is the head too.
        config: fields of the published config.json, completed.
    """
    x = rms_norm(last_states(input_ids, weights, config), weights["model.norm.weight"], config["rms_norm_eps"])
    return linear(x, weights, head_of(weights))
