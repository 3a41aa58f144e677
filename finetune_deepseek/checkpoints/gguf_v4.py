"""What GGUF's architecture `deepseek4` (DeepSeek-V4) has otherwise than the older ones of gguf.py.

gguf 0.19 has no tables for it, so names of tensors and fields stand here, as llama.cpp reads them (llama-cpp-python
0.3.36). Experts that are stored as FP4 stay so, exactly:

    V4     a byte holds columns 2i | 2i + 1; the scales of 32 columns, powers of two, lie in a tensor of their own
    MXFP4  17 bytes for 32 columns: the scale's exponent, then bytes of columns j | j + 16

Letters: E experts, R rows, C columns.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.weight_names import SCALE

from .tensors import LazyTensor, Tensors, dequantize, is_fp4, is_packed

BLOCK, BLOCK_BYTES = 32, 17
BIAS = 127  # of a power of two's exponent in one byte
SQRT_SOFTPLUS = 4  # llama.cpp's number for this score of experts
RATIOS, STREAMS = (0, 4, 128), 4  # llama.cpp knows no others
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{f"model.hc_head.{part}": f"output_hc_{part}.weight" for part in ("fn", "base", "scale")},
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.wq_a.weight": "attn_q_a.weight",
    "self_attn.q_norm.weight": "attn_q_a_norm.weight",
    "self_attn.wq_b.weight": "attn_q_b.weight",
    "self_attn.wkv.weight": "attn_kv.weight",
    "self_attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "self_attn.wo_a.weight": "attn_output_a.weight",
    "self_attn.wo_b.weight": "attn_output_b.weight",
    "self_attn.attn_sink": "attn_sinks.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{
        f"self_attn.{ours}compressor.{part}": f"{theirs}_compressor_{word}.weight"
        for ours, theirs in (("", "attn"), ("indexer.", "indexer"))
        for part, word in (("wkv.weight", "kv"), ("wgate.weight", "gate"), ("ape", "ape"), ("norm.weight", "norm"))
    },
    **{f"{part}_hc.{one}": f"hc_{part}_{one}.weight" for part in ("attn", "ffn") for one in ("fn", "base", "scale")},
    **{
        f"mlp.{ours}.{part}_proj.weight": f"ffn_{part}_{theirs}.weight"
        for ours, theirs in (("experts", "exps"), ("shared_experts", "shexp"))
        for part in ("gate", "up", "down")
    },
}


def place_of(name: str) -> str | None:
    """llama.cpp's name for a weight, experts being stacked; None if it has no place for it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return TOP.get(name)
    return f"blk.{layer[1]}.{IN_LAYER[layer[2]]}" if layer[2] in IN_LAYER else None


def unknown_fields(config: DeepSeekConfig) -> Iterator[tuple[bool, str]]:
    """Whether a field is one that llama.cpp computes otherwise, and how the refusal names it."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    others = sorted(set(ratios) - set(RATIOS))
    yield bool(others), f"compress_ratios {others}: it knows 0, 4 and 128"
    yield 4 not in ratios, "compress_ratios without 4"
    yield config.hc_mult != STREAMS, f"hc_mult {config.hc_mult}: it knows {STREAMS}"
    yield config.n_group not in (None, 1), f"n_group {config.n_group} in the layers of V4"
    yield bool(config.index_head_dim % 64), f"index_head_dim {config.index_head_dim}, no multiple of 64"


def unpacked(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """The weights as GGUF has them: FP4 as MXFP4, FP8 as bfloat16, tables of experts in 32 bits."""
    fp4 = {name for name, tensor in tensors.items() if is_fp4(name, tensor)}
    scales = {name.removesuffix("weight") + SCALE for name in fp4}
    others = {name: tensor for name, tensor in tensors.items() if name not in fp4 | scales}
    words = {name: "BF16" for name, tensor in others.items() if is_packed(name, tensor)}
    words |= {name: "I32" for name in others if name.endswith(".tid2eid")}
    found = {name: _mxfp4(name, tensors) for name in fp4}
    for name, tensor in dequantize(others, config).items():
        found[name] = tensor.to(words[name]) if name in words else tensor
    return {name: found[name] for name in tensors if name in found}


def _mxfp4(name: str, tensors: Tensors) -> LazyTensor:
    weight, scale = tensors[name], tensors[name.removesuffix("weight") + SCALE]
    rows, halves = weight.shape
    shape = (rows, 2 * halves // BLOCK * BLOCK_BYTES)
    return LazyTensor(shape, "U8", lambda: in_mxfp4(weight.read(), scale.read()))


def in_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [R, C / 2] and powers of two [R, C / 32] -> uint8 [R, C / 32 * 17]."""
    pairs = packed.view(torch.uint8).unflatten(-1, (-1, BLOCK // 2))
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)  # [R, C / 32, 32]
    low, high = codes.chunk(2, dim=-1)
    exponent = torch.frexp(scale.float()).exponent - 1 + BIAS  # frexp's mantissa of a power of two is 1/2
    return torch.cat((exponent.to(torch.uint8).unsqueeze(-1), low + 16 * high), dim=-1).flatten(-2)


def add_compressed(writer: Any, config: DeepSeekConfig) -> None:
    """Fields of attention and residual streams."""
    layers, clamp = config.num_hidden_layers, config.swiglu_limit or 0.0  # 0: none
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_swiglu_clamp_exp([float(clamp)] * layers)
    writer.add_swiglu_clamp_shexp([float(clamp)] * layers)
    writer.add_embedding_length_out(config.hidden_size * config.hc_mult)
    writer.add_array("deepseek4.attention.compress_ratios", [int(ratio) for ratio in config.compress_ratios[:layers]])
    for key, number in {
        "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hash_layer_count": config.num_hash_layers,
    }.items():
        writer.add_uint32(f"deepseek4.{key}", number)
    writer.add_float32("deepseek4.attention.compress_rope_freq_base", config.compress_rope_theta)
    writer.add_float32("deepseek4.hyper_connection.epsilon", config.hc_eps)
