"""V4 through files: our exports in transformers' class, its saves in ours, equal logits; every tensor counted."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from configuration_deepseek import DeepSeekConfig, preset
from configuration_deepseek.weight_names import with_release_names
from finetune_deepseek.checkpoints.export import export_native
from modeling_deepseek import DeepSeekForCausalLM
from tests.parity.pairs import EAGER
from tests.reference.compare import assert_close
from tests.reference.v4_names import v4_names

FIELDS = {
    **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16},
    **{"q_lora_rank": 24, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 12, "sliding_window": 6},
    **{"compress_ratios": [0, 4, 128, 4, 0], "compress_rope_theta": 160000.0, "max_position_embeddings": 128},
    **{"index_n_heads": 30, "index_head_dim": 14, "index_topk": 3, "num_hash_layers": 2, "expert_dtype": "fp4"},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    **{"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True, "swiglu_limit": 0.5},
    **{"hc_mult": 4, "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.1},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0},
}
FIELDS["rope_parameters"] |= {"original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0}
IDS = torch.arange(3, 25).view(2, 11)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(DeepSeekConfig(**FIELDS))
    model.save_pretrained(tmp_path / "own")
    return model, tmp_path


def test_our_export_in_transformers_class_and_its_save_in_ours(saved):
    model, folder = saved
    export_native(folder / "own", folder / "official", dtype="fp32")
    names = set(v4_names([0, 4, 128, 4], 2, 8, predictions=1, scales=False))
    assert set(load_file(folder / "official/model.safetensors")) == names
    native, info = DeepseekV4ForCausalLM.from_pretrained(folder / "official", output_loading_info=True, **EAGER)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert_close(logits(native), logits(model))
    native.save_pretrained(folder / "theirs")
    again, info = DeepSeekForCausalLM.from_pretrained(folder / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(again), logits(model))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")
def test_quantized_as_released(saved):
    _, folder = saved
    export_native(folder / "own", folder / "fp8", dtype="fp8")
    stored = load_file(folder / "fp8/model.safetensors")
    assert set(stored) == set(v4_names([0, 4, 128, 4], 2, 8, predictions=1))
    assert {stored[f"layers.2.ffn.experts.3.w2.{part}"].dtype for part in ("weight", "scale")} == {
        torch.int8,
        torch.float8_e8m0fnu,
    }
    loaded = DeepSeekForCausalLM.from_pretrained(folder / "fp8", dtype=torch.float32)
    export_native(folder / "fp8", folder / "again")
    again = load_file(folder / "again/model.safetensors")
    assert all(torch.equal(stored[name].view(torch.uint8), again[name].view(torch.uint8)) for name in stored)
    loaded.save_pretrained(folder / "plain")
    export_native(folder / "plain", folder / "anew", dtype="fp8")
    anew = DeepSeekForCausalLM.from_pretrained(folder / "anew", dtype=torch.float32)
    for name, value in anew.named_parameters():
        if ".experts." in name:
            assert torch.equal(value, loaded.get_parameter(name)), name
    assert_close(logits(anew), logits(loaded), tolerance=0.05)  # what isn't quantized became bfloat16, twice


@pytest.mark.parametrize(("name", "experts"), [("v4_flash", 256), ("v4_pro", 384)])
def test_tensors_of_a_release_are_counted(name, experts):
    config = preset(name)
    names = with_release_names(dict.fromkeys(config.weight_shapes("ForCausalLM")), config)
    ratios = config.compress_ratios[: config.num_hidden_layers]
    assert set(names) == set(v4_names(ratios, 3, experts, predictions=1, scales=False))
