"""Rotary position embedding (RoFormer, arXiv 2104.09864) in both pair layouts, with its long-context scalings.

Used by every generation: multi-head attention rotates whole heads in the half layout, latent attention rotates its
rotary part in the interleaved layout, compressed attention the end of each head, likewise. Tokens of an image are
rotated by their row and their column, which take turns over the pairs (axial RoPE, arXiv 2403.13298). Frequencies
under linear, dynamic, llama3 and YaRN scaling come from transformers' initialisers; YaRN's softmax factor is here.
"""

import copy
import math

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .fused import RotatedTail, is_trained
from .layers import Float32Buffers, without_autocast


def yarn_softmax_factor(rope_parameters: dict) -> float:
    """What YaRN multiplies the softmax scale with: m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1.

    DeepSeek's releases apply it at every length (arXiv 2309.00071, section 3.4, moved from cos and sin to the scale).
    """
    mscale, factor = rope_parameters.get("mscale_all_dim"), rope_parameters.get("factor", 1.0)
    if rope_parameters["rope_type"] != "yarn" or not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of the last dimension.

    Args:
        x: [B, H, S, W].
        cos, sin: [B or 1, S, W / 2], one angle per pair.
        interleaved: pairs are (0, 1), (2, 3), ... of x; else (i, i + W / 2).

    Returns:
        [B, H, S, W] with the first members of all pairs, then the second members. Queries and keys are permuted
        alike, so their products do not depend on the layout.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def of_pairs(position_ids: torch.Tensor, pairs: int) -> torch.Tensor:
    """Positions [B, S] -> [B, S, 1]; or [B, S, A] -> [B, S, pairs], the axes in turn."""
    if position_ids.ndim == 2:
        return position_ids[..., None]
    axes = torch.arange(pairs, device=position_ids.device) % position_ids.shape[-1]
    return position_ids[..., axes]


def rotate_tail(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs at the end of the last dimension, and leave every number where it stands.

    Keys that are values too come out as values, so V4 turns the result back by the query's position (-sin).

    Args:
        x: [B, H, S, W]; cos, sin: [B or 1, S, R / 2], of which the last R of W are rotated.
    """
    width = 2 * cos.shape[-1]
    pairs = x[..., -width:].float().unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :-width], rotated.to(x.dtype)), dim=-1)


def rotate_heads(
    module: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """[B, S, H, W] -> [B, H, S, W], with `apply_rotary` done to the last channels, as many as there are angles for."""
    if is_trained(module, x) and x.dtype == cos.dtype:
        return RotatedTail.apply(x, cos, sin, interleaved)
    x, width = x.transpose(1, 2), 2 * cos.shape[-1]
    rotated = apply_rotary(x[..., -width:], cos, sin, interleaved)
    return rotated if width == x.shape[-1] else torch.cat((x[..., :-width], rotated), dim=-1)


def without_entries(config):
    """The config as the rotary embedding of windows reads it: V4 scales positions only where it compresses."""
    if config.compress_ratios is None:
        return config
    return _rotating(config, {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]})


def with_entries(config):
    """The config as the rotary embedding of layers that compress reads it: their base, and YaRN without a factor."""
    amplitude = {"attention_factor": 1.0} if config.rope_parameters["rope_type"] == "yarn" else {}
    return _rotating(config, {**config.rope_parameters, "rope_theta": config.compress_rope_theta, **amplitude})


def _rotating(config, rope_parameters: dict):
    changed = copy.copy(config)
    changed.head_dim, changed.rope_parameters = config.qk_rope_head_dim, rope_parameters
    return changed


class DeepSeekRotaryEmbedding(Float32Buffers):
    """Positions to cos and sin, one angle per pair, computed in float32."""

    inv_freq: torch.Tensor

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device: torch.device | None = None, **kwargs):
        """[W / 2] frequencies theta^(-2i / W) (RoFormer, eq. 15), and the factor 1 on cos and sin."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B or 1, S], or on A axes [B or 1, S, A] -> cos, sin [B or 1, S, W / 2] in the type of x (whose
        values are not read). Of several axes, pair i is turned by axis i % A."""
        with without_autocast(x):  # angles need float32
            angles = of_pairs(position_ids, len(self.inv_freq)).float() * self.inv_freq.to(x.device).float()
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
