"""Every text release, shrunk: opens under every head by its own config.json, and has the same LoRA groups and counts
before and after saving."""

import json

import pytest
import torch

from configuration_deepseek import DeepSeekConfig
from finetune_deepseek.training.arguments import LoraArguments
from finetune_deepseek.training.weights.groups import OTHER
from finetune_deepseek.training.weights.lora import apply_lora, attached_layers, census
from modeling_deepseek import DeepSeekForCausalLM
from tests.configuration.test_official import RELEASES
from tests.modeling.conftest import HEADS, labels_for, outputs, token_ids
from tests.modeling.test_heads import OWN_WEIGHTS

SMALLER = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8},
    **{"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10},
    **{"index_n_heads": 6, "index_head_dim": 14, "index_topk": 5},
    **{"n_routed_experts": 8, "moe_intermediate_size": 20, "num_experts_per_tok": 3, "first_k_dense_replace": 1},
}
# Adapted weights per group with --lora_target all: 3 layers, of which MoE models have the first dense.
ENDS = {"embeddings": 1, "head": 1}
EXPERTS = {"dense": 3, "shared": 6, "experts": 4, "router": 2}
V3 = {"attention": 15, **EXPERTS, **ENDS, "mtp": 12}
COUNTS = {
    **dict.fromkeys(("LLM-7B", "LLM-67B", "Coder-6.7B", "Coder-5.7bmqa"), {"attention": 12, "dense": 9, **ENDS}),
    **dict.fromkeys(
        ("R1-Distill-Qwen-7B", "R1-Distill-Llama-8B", "R1-0528-Qwen3-8B"), {"attention": 12, "dense": 9, **ENDS}
    ),
    **dict.fromkeys(("MoE-16B", "V2-Lite"), {"attention": 12, **EXPERTS, **ENDS}),
    **dict.fromkeys(("V2", "V2, first upload", "V2.5"), {"attention": 15, **EXPERTS, **ENDS}),
    **dict.fromkeys(("V3", "V3.1"), V3),
    "V3.2": {**V3, "indexer": 9, "mtp": 15},
}


def test_every_release_has_a_row_or_the_file_of_one():
    assert all(any(file == RELEASES[row] for row in COUNTS) for file in RELEASES.values())


def shrunk(file):
    """A published config.json with the same fields and mechanisms, of a tiny model."""
    small = {key: SMALLER.get(key, value) for key, value in file.items() if value is not None or key not in SMALLER}
    grouped = file["num_key_value_heads"] < file["num_attention_heads"]
    small["num_key_value_heads"] = min(file["num_key_value_heads"], 2) if grouped else 4
    if file.get("n_group", 1) > 1:
        small |= {"n_group": 4, "topk_group": 2}
    small.pop("quantization_config", None)
    return small | {"torch_dtype": "float32"}


@pytest.fixture(params=COUNTS, scope="module")
def release(request, tmp_path_factory):
    """(name, model, folder with the release's own config.json)."""
    folder = tmp_path_factory.mktemp("release")
    file = shrunk(RELEASES[request.param])
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(DeepSeekConfig.from_dict({**file, "initializer_range": 0.2})).eval()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(file))
    return request.param, model, folder


def test_opens_whole(release):
    name, model, folder = release
    loaded, info = DeepSeekForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.source_model_type == RELEASES[name]["model_type"]
    is_sparse, ahead = name == "V3.2", [layer for layer in loaded.model.layers if hasattr(layer, "eh_proj")]
    assert len(ahead) == RELEASES[name].get("num_nextn_predict_layers", 0)
    assert {hasattr(layer.self_attn, "indexer") for layer in loaded.model.layers} == {is_sparse}
    ids = token_ids(2, 7)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_every_head_learns_and_comes_back(release, head, tmp_path):
    _, model, folder = release
    loaded, info = head.from_pretrained(folder, num_labels=3, pad_token_id=2, output_loading_info=True)
    own = OWN_WEIGHTS[head] if head is not DeepSeekForCausalLM else set()
    assert set(info["missing_keys"]) == own and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    ids = token_ids(3, 9)
    if labels := labels_for(loaded, ids):
        loss = loaded(ids, **labels).loss
        loss.backward()
        assert loss.isfinite() and loaded.get_input_embeddings().weight.grad.any()
    loaded.save_pretrained(tmp_path)
    again, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(again, ids), outputs(loaded, ids))


def described(model):
    """Adapters by group, and the census without them."""
    groups = census(model)
    return {word: len(layers) for word, layers in attached_layers(model).items() if layers}, {
        word: (group.total, group.active) for word, group in groups.items()
    }


def test_lora_groups_and_counts(release, tmp_path):
    name, model, folder = release
    plain = described(model)[1]
    assert sum(total for total, _ in plain.values()) == model.num_parameters() and plain[OTHER][0] > 0
    arguments = LoraArguments(use_peft=True, lora_r=2, lora_target=["all"])
    adapted = apply_lora(DeepSeekForCausalLM.from_pretrained(folder), arguments)
    assert described(adapted) == (COUNTS[name], plain)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert described(again) == ({}, plain)
    assert described(apply_lora(again, arguments)) == (COUNTS[name], plain)


def test_the_default_groups_leave_prediction_layers_alone(release):
    name, _, folder = release
    adapted = apply_lora(DeepSeekForCausalLM.from_pretrained(folder), LoraArguments(use_peft=True, lora_r=2))
    wanted = {word: COUNTS[name][word] for word in ("attention", "dense", "shared", "experts") if word in COUNTS[name]}
    assert described(adapted)[0] == wanted
