"""V4's additional prediction of one sequence, position by position: streams, a window, experts (V4's report, 2.4)."""

import torch

from tests.reference.compressed_attention import compressed_attention, under
from tests.reference.layers import linear, rms_norm
from tests.reference.moe import moe
from tests.reference.residual import hyper_connection, hyper_head


def around(streams: list[torch.Tensor], sublayer, weights: dict, config: dict, prefix: str) -> list[torch.Tensor]:
    """Streams of all tokens, [N, D] each, around a sub-layer of all tokens, [S, D] -> [S, D]."""
    inputs: list[torch.Tensor] = []

    def seen(x: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    for token in streams:
        hyper_connection(token, seen, weights, config, prefix)
    outputs = sublayer(torch.stack(inputs))
    return [
        hyper_connection(token, lambda x, t=t: outputs[t], weights, config, prefix) for t, token in enumerate(streams)
    ]


def logits_ahead(streams: torch.Tensor, embeds: torch.Tensor, head: torch.Tensor, weights: dict, config: dict):
    """[S - 1, V]: row i predicts token i + 2.

    Args:
        streams: [S, N, D], of the trunk's last layer; embeds: [S, D], of the tokens.
        head: [V, D], of the language model.
        weights: of the prediction layer, by our names.
    """
    eps, x = config["rms_norm_eps"], []
    for i in range(len(embeds) - 1):
        ahead = linear(rms_norm(embeds[i + 1], weights["enorm.weight"], eps), weights, "e_proj")
        behind = [linear(rms_norm(stream, weights["hnorm.weight"], eps), weights, "h_proj") for stream in streams[i]]
        x.append(torch.stack([ahead + state for state in behind]))

    def attend(states: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(states, weights["input_layernorm.weight"], eps)
        return compressed_attention(normed, under(weights, "self_attn."), config, "swa", 0)

    def transform(states: torch.Tensor) -> torch.Tensor:
        return moe(rms_norm(states, weights["post_attention_layernorm.weight"], eps), weights, config, "mlp.")

    x = around(x, attend, weights, config, "attn_hc.")
    x = around(x, transform, weights, config, "ffn_hc.")
    states = torch.stack([hyper_head(token, weights, config, "hc_head.") for token in x])
    return rms_norm(states, weights["shared_head.norm.weight"], eps) @ head.T
