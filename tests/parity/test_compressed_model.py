"""Whole V4 models against transformers' own with copied weights: logits, states, loss, gradients, caching, generation.

Its faults are not followed: left padding, packing and inputs of embeddings are held against ours without padding
(tests/modeling). Its float32 models are right otherwise.
"""

import functools

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from configuration_deepseek import DeepSeekConfig, preset
from finetune_deepseek.checkpoints.export import export_native
from modeling_deepseek import DeepSeekForCausalLM
from tests.parity.pairs import EAGER
from tests.reference.compare import assert_close

RENAMES = (
    ("compressor.indexer.scorer.weights_proj", "indexer.weights_proj"),
    *(("compressor.indexer.q_b_proj", "indexer.wq_b"), ("compressor.indexer.", "indexer.compressor.")),
    *(("self_attn.q_a_proj", "self_attn.wq_a"), ("q_a_norm", "q_norm"), ("self_attn.q_b_proj", "self_attn.wq_b")),
    *(("compressor.kv_norm", "compressor.norm"), ("kv_proj", "wkv"), ("compressor.gate_proj", "compressor.wgate")),
    *(("position_bias", "ape"), ("o_a_proj", "wo_a"), ("o_b_proj", "wo_b"), ("sinks", "attn_sink")),
    *(("hc_head.hc_", "hc_head."),),
)
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
BASE = {
    **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16},
    **{"q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 12, "sliding_window": 6, "max_position_embeddings": 128},
    # so many index heads that scores which tie at zero are rare
    **{"index_n_heads": 30, "index_head_dim": 12, "index_topk": 3, "partial_rotary_factor": 0.5},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    **{"initializer_range": 0.2, "compress_rates": RATES, "num_hash_layers": 2, "swiglu_limit": 0.5},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_nextn_predict_layers": 0},
}
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
MIXED = {"layer_types": [KINDS[0], KINDS[1], KINDS[2], KINDS[1]]}
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CASES = {
    "v4": {**MIXED, "rope_parameters": YARN},
    "v4_no_yarn": {**MIXED, "swiglu_limit": 10.0, "hc_mult": 2, "hc_sinkhorn_iters": 3, "rms_norm_eps": 1e-3},
    "v4_ratios": {"compress_ratios": [0, 4, 128, 4, 0], "rope_parameters": YARN, "num_hash_layers": 0},
}


@functools.cache
def pair_of(name: str) -> tuple[DeepseekV4ForCausalLM, DeepSeekForCausalLM]:
    """Native and ours, the same weights, ours of the config as transformers writes it."""
    torch.manual_seed(1)
    native = DeepseekV4ForCausalLM._from_config(DeepseekV4Config(**BASE | CASES[name]), **EAGER).float().eval()
    generator = torch.Generator().manual_seed(2)
    for key, weight in [*native.named_parameters(), *native.named_buffers()]:
        if key.endswith("tid2eid"):
            scores = torch.rand(len(weight), 8, generator=generator)
            weight.data.copy_(scores.topk(3).indices)
        elif not key.endswith("inv_freq"):
            offset = 1.0 if "norm" in key or key.endswith("scale") else 0.0
            weight.data.copy_(offset + 0.25 * torch.randn(weight.shape, generator=generator))
    ours = DeepSeekForCausalLM._from_config(DeepSeekConfig.from_dict(native.config.to_dict()), **EAGER).eval()
    ours.load_state_dict(as_ours(dict(native.state_dict())))
    return native, ours


def as_ours(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names as ours."""
    renamed = {}
    for key, weight in weights.items():
        for old, new in RENAMES:
            key = key.replace(old, new)
        renamed[key] = weight
    return renamed


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    """A native model and ours."""
    return pair_of(request.param)


def token_ids(batch: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_logits_and_states(pair):
    native, ours = pair
    asked = {"output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    a, b = ours(token_ids(), **asked), native(token_ids(), **asked)
    assert_close(a.logits, b.logits)
    for one, other in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_close(one, other, "states")
    ours.set_attn_implementation("sdpa")
    by_kernel = ours(token_ids()).logits
    ours.set_attn_implementation("eager")
    assert_close(by_kernel, b.logits, "sdpa")


@torch.no_grad()
def test_prefill_in_pieces_and_decoding(pair):
    native, ours = pair
    expected = native(token_ids(), use_cache=False).logits
    for lengths in ([13, 9, 1, 1, 1, 12], [3] * 12 + [1]):
        cache, parts = None, []
        for piece in token_ids().split(lengths, dim=1):
            output = ours(piece, cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
        assert_close(torch.cat(parts, dim=1), expected, f"in pieces of {lengths}")


def test_loss_and_gradients(pair):
    native, ours = pair
    labels = token_ids().masked_fill(token_ids() % 5 == 0, -100)
    losses = [model(token_ids(), labels=labels, use_cache=False).loss for model in (ours, native)]
    assert_close(*losses)
    for model, loss in zip((ours, native), losses, strict=True):
        model.zero_grad()
        loss.backward()
    theirs = as_ours({key: p.grad for key, p in native.named_parameters() if p.grad is not None})
    for key, parameter in ours.named_parameters():
        if ".indexer." not in key:  # a choice has no gradient
            # that of a scale is one sum over all tokens, which cancels: rounding shows more
            tolerance = 1e-4 if key.endswith("scale") else 2e-5
            assert_close(parameter.grad, theirs[key], f"gradient of {key}", tolerance)


@torch.no_grad()
def test_the_same_tokens_are_generated(pair):
    for asked in ({}, {"num_beams": 3}):
        a, b = (model.generate(token_ids(2, 21), max_new_tokens=9, do_sample=False, **asked) for model in pair[::-1])
        assert torch.equal(a, b)


@torch.no_grad()
def test_transformers_opens_what_is_exported_and_so_do_we(tmp_path):
    torch.manual_seed(0)
    fields = {"compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1, "index_n_heads": 30, "initializer_range": 0.2}
    model = DeepSeekForCausalLM(preset("tiny_v4", **fields)).eval()
    model.save_pretrained(tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    for opened in (
        DeepseekV4ForCausalLM.from_pretrained(tmp_path / "native", **EAGER),
        DeepSeekForCausalLM.from_pretrained(tmp_path / "native", **EAGER),
    ):
        assert_close(opened.eval()(token_ids()).logits, model(token_ids()).logits)
    assert opened.config.compress_ratios == fields["compress_ratios"] and opened.config.num_hash_layers == 1
