"""Saving and loading: whole and in shards, in other types, on a device map, and over an older save."""

import json
import os
import re

import peft
import pytest
import torch
from packaging import version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from configuration_deepseek import DeepSeekConfig
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekModel
from modeling_deepseek.checkpoint_files import in_turn
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.reference.compare import assert_close


def weight_files(folder):
    """Names of the files that hold or list weights."""
    return sorted(name for name in os.listdir(folder) if "safetensors" in name)


def weights_of(folder):
    """All saved tensors by name."""
    loaded = {}
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            loaded |= load_file(folder / name)
    return loaded


def test_saved_and_loaded_is_the_same(model, head, tmp_path):
    ids = token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() and not loaded.training


def test_the_folder_has_the_official_names(causal, tmp_path):
    causal.save_pretrained(tmp_path)
    weights, config = weights_of(tmp_path), causal.config
    experts = [key for key in weights if ".mlp.experts." in key]
    moe_layers = sum(spec.feed_forward == "moe" for spec in config.specs) + config.num_nextn_predict_layers
    assert len(experts) == moe_layers * 3 * (config.n_routed_experts or 0)
    if moe_layers:
        fused = causal.model.layers[2].mlp.experts
        gate, up = fused.gate_up_proj[5].chunk(2)
        prefix = "model.layers.2.mlp.experts.5."
        assert torch.equal(weights[f"{prefix}gate_proj.weight"], gate)
        assert torch.equal(weights[f"{prefix}up_proj.weight"], up)
        assert torch.equal(weights[f"{prefix}down_proj.weight"], fused.down_proj[5])
    assert sum(tensor.numel() for tensor in weights.values()) == sum(t.numel() for t in causal.state_dict().values())


def test_shards(causal, tmp_path):
    ids = token_ids(2, 7)
    causal.save_pretrained(tmp_path, max_shard_size="30KB")
    files = weight_files(tmp_path)
    assert len(files) > 3 and "model.safetensors.index.json" in files and "model.safetensors" not in files
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in files[:-1]:
        with safe_open(tmp_path / name, "pt") as file:
            assert all(index[key] == name for key in file.keys())  # noqa: SIM118
    assert torch.equal(outputs(DeepSeekForCausalLM.from_pretrained(tmp_path), ids), outputs(causal, ids))


SIZES = {"whole": "1GB", "few": "60KB", "many": "20KB"}


@pytest.mark.parametrize("first", SIZES)
@pytest.mark.parametrize("second", SIZES)
def test_a_second_save_leaves_nothing_of_the_first(first, second, tmp_path):
    old, new, ids = tiny("tiny_v3"), tiny("tiny_v3", initializer_range=0.1), token_ids(2, 7)
    old.save_pretrained(tmp_path, max_shard_size=SIZES[first])
    (tmp_path / "tokenizer.json").write_text("{}")
    new.save_pretrained(tmp_path, max_shard_size=SIZES[second])
    clean = tmp_path / "clean"
    new.save_pretrained(clean, max_shard_size=SIZES[second])
    assert weight_files(tmp_path) == weight_files(clean)
    assert set(os.listdir(tmp_path)) == {*os.listdir(clean), "tokenizer.json", "clean"}
    assert torch.equal(outputs(DeepSeekForCausalLM.from_pretrained(tmp_path), ids), outputs(new, ids))


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path / "model", is_main_process=False)
    assert os.listdir(tmp_path / "model") == []


def test_a_given_state_dict_is_saved_and_left_alone(tmp_path):
    model = tiny("tiny_v3")
    state = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    keys = list(state)
    model.save_pretrained(tmp_path, state_dict=state)
    assert list(state) == keys
    assert not any(tensor.any() for tensor in weights_of(tmp_path).values())


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"transformers' own load_adapter asks for peft {MIN_PEFT_VERSION}",
)
def test_adapters_are_saved_beside_the_weights(tmp_path):
    model = tiny("tiny_v3")
    model.save_pretrained(tmp_path)
    before = weights_of(tmp_path)
    lora = peft.LoraConfig(target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.add_adapter(lora)
    model.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["adapter_model.safetensors", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == before.keys()
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    ids = token_ids(2, 7)
    assert_close(outputs(loaded, ids), outputs(model, ids))
    loaded.disable_adapters()
    assert_close(outputs(loaded, ids), outputs(tiny("tiny_v3"), ids))


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"transformers' own load_adapter asks for peft {MIN_PEFT_VERSION}",
)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_an_adapter_leaves_the_prediction_layers_of_its_base(tmp_path, weight):
    model = tiny("tiny_v3", num_nextn_predict_layers=1, mtp_loss_weight=weight)
    model.save_pretrained(tmp_path / "base")
    model = DeepSeekForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["q_b_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "adapter" / "config.json").unlink(missing_ok=True)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = token_ids(1, 7)
    assert_close(outputs(loaded, ids), outputs(model, ids))
    assert len(loaded.model.layers) == len(model.model.layers) == loaded.config.num_hidden_layers + 1
    assert_close(loaded.model.layers[-1].eh_proj.weight, model.model.layers[-1].eh_proj.weight)


FLOAT32 = re.compile(r"gate\.weight$|(attn|ffn)_hc\.|hc_head\.|attn_sink$|\.ape$")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"], ids=str)
def test_loading_in_another_type(causal, dtype, tmp_path):
    causal.save_pretrained(tmp_path)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if FLOAT32.search(key) else expected), key
    for key, buffer in loaded.named_buffers():
        assert buffer.dtype == torch.float32, key
        assert torch.equal(buffer, causal.get_buffer(key)), key
    assert outputs(loaded, token_ids(1, 5)).dtype == expected


def test_a_bfloat16_save_is_bfloat16_but_for_the_correction_bias(tmp_path):
    tiny("tiny_v3").to(torch.bfloat16).save_pretrained(tmp_path)
    for key, tensor in weights_of(tmp_path).items():
        assert tensor.dtype == (torch.float32 if "e_score_correction_bias" in key else torch.bfloat16), key
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"], ids=str)
def test_device_maps(causal, device_map, tmp_path):
    causal.save_pretrained(tmp_path)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids = token_ids(2, 7).to(loaded.device)
    assert_close(outputs(loaded, ids).cpu(), outputs(causal, ids.cpu()))


@pytest.mark.parametrize("part", ["layers", "attention"])
def test_weights_on_disk(causal, part, tmp_path):
    folder, ids = tmp_path / "model", token_ids(2, 6)
    causal.save_pretrained(folder)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    if causal.config.hc_mult is not None:
        device_map["model.hc_head"] = "cpu"
    for i in range(len(causal.model.layers)):
        on_disk = i > 0
        if part == "layers":
            device_map[f"model.layers.{i}"] = "disk" if on_disk else "cpu"
            continue
        for child, _ in causal.model.layers[i].named_children():
            away = on_disk and child == "self_attn"
            device_map[f"model.layers.{i}.{child}"] = "disk" if away else "cpu"
    loaded = DeepSeekForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(loaded.model.layers[2].self_attn.parameters()).is_meta
    assert not next(loaded.model.layers[0].self_attn.parameters()).is_meta
    assert_close(outputs(loaded, ids), outputs(causal, ids))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **greedy), causal.generate(ids, **greedy))
    loaded.save_pretrained(tmp_path / "again")
    saved, expected = weights_of(tmp_path / "again"), weights_of(folder)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


def test_load_state_dict_takes_official_names(causal, tmp_path):
    """Trainer's resume hands over what is in the file, past transformers' conversion."""
    causal.save_pretrained(tmp_path)
    fresh = DeepSeekForCausalLM(causal.config)
    fresh.load_state_dict(weights_of(tmp_path))
    assert torch.equal(outputs(fresh.eval(), token_ids(2, 7)), outputs(causal, token_ids(2, 7)))


def test_prediction_modules_after_the_last_layer_are_passed_over(tmp_path):
    model = tiny("tiny_v3")
    model.save_pretrained(tmp_path)
    weights = weights_of(tmp_path)
    extra = {key.replace("layers.2", "layers.3"): t.clone() for key, t in weights.items() if "layers.2" in key}
    extra["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(weights | extra, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, token_ids(2, 7)), outputs(model, token_ids(2, 7)))


def test_auto_config_reads_the_folder(causal, tmp_path):
    causal.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DeepSeekConfig and config.to_diff_dict() == causal.config.to_diff_dict()


def test_meta_models_cost_nothing_and_can_be_filled(name):
    with torch.device("meta"):
        empty = DeepSeekModel(tiny(name).config)
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("before", [None, "0"])
def test_loads_that_overlap_leave_the_environment_as_it_was(before, monkeypatch):
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        loads = [in_turn() for _ in range(3)]
        for load in loads:
            load.__enter__()
        for place in order:
            assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
            loads[place].__exit__(None, None, None)
        assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
