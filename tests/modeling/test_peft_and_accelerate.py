"""What of PEFT and accelerate a model with latents and fused experts can't take says so; docs/recipes.md, "PEFT and
accelerate", names what to do instead, which is tried here too."""

import accelerate
import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShadowConfig,
    get_peft_model,
)
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.utils import logging

from modeling_deepseek import DeepSeekForCausalLM
from tests.modeling.conftest import TINY, tiny, token_ids
from tests.reference.compare import assert_close

LATENT = [name for name in TINY if "kv_lora_rank" in vars(tiny(name).config) and tiny(name).config.kv_lora_rank]
COMPRESSED = [name for name in TINY if tiny(name).config.compress_ratios is not None]
OTHERS = [name for name in TINY if name not in (*LATENT, *COMPRESSED)]


def adapted(name, config):
    torch.manual_seed(0)
    return get_peft_model(tiny(name), config).eval()


@pytest.mark.parametrize("name", LATENT)
def test_prefix_tuning_on_latents_is_refused(name):
    model = adapted(name, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = token_ids(2, 4)
    with pytest.raises(ValueError, match="one row of .* prefix tuning.*PromptTuningConfig"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@pytest.mark.parametrize("name", COMPRESSED)
def test_prefix_tuning_on_entries_is_refused(name):
    model = adapted(name, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = token_ids(2, 4)
    with pytest.raises(ValueError, match="which cannot hold the entries of compressed attention"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_a_cache_of_another_model_is_refused(name):
    """One filled by multi-head attention, and one of the right number of heads with rows of another width."""
    cache = DynamicCache()
    tiny("tiny_llm")(token_ids(2, 4), past_key_values=cache)
    other = DynamicCache([(torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3))] * 4)
    for filled in (cache, other):
        with pytest.raises(ValueError, match="it was made for another model"):
            tiny(name)(token_ids(2, 2), past_key_values=filled)


@pytest.mark.parametrize("name", TINY)
def test_prompt_tuning_learns_and_generates(name):
    model = adapted(name, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = token_ids(2, 4)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


@pytest.mark.parametrize("name", OTHERS)
def test_prefix_tuning_on_keys_and_values_of_heads(name):
    model = adapted(name, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = token_ids(2, 4)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


def continued(model, ids, steps):
    """Greedy tokens, each from a call of its own over all that is before it: no cache, and offsets counted anew."""
    for _ in range(steps):
        everything = torch.ones_like(ids)
        ids = model.generate(
            input_ids=ids, attention_mask=everything, max_new_tokens=1, do_sample=False, use_cache=False
        )
    return ids


ACTIVATED = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [8, 13], "init_lora_weights": False}


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_activated_lora_on_what_each_token_has_for_itself(name):
    model = adapted(name, LoraConfig(target_modules=r".*(?<!kv_b)_proj", **ACTIVATED))
    ids = torch.tensor([[5, 8, 13, 9, 7, 7, 6]])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert found.tolist() == continued(model, ids, 6).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_activated_lora_on_what_projects_latents_is_refused_in_decoding(name, cache):
    model = adapted(name, LoraConfig(target_modules=["kv_b_proj"], **ACTIVATED))
    ids = torch.tensor([[5, 8, 13, 9, 7, 7, 6]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = {"max_new_tokens": 6, "cache_implementation": cache, "do_sample": False, "disable_compile": True}
    with pytest.raises(ValueError, match="leave kv_b_proj out of target_modules"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted)


@torch.no_grad()
def test_an_adapter_without_a_task_type_opens_with_our_package_allowed(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path / "base")
    base = DeepSeekForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    for auto_class in (AutoPeftModel, AutoPeftModelForCausalLM):
        with pytest.raises(ValueError, match="import_allowlist"):
            auto_class.from_pretrained(tmp_path / "adapter")
        opened = auto_class.from_pretrained(tmp_path / "adapter", import_allowlist=["modeling_deepseek"])
        assert isinstance(opened.get_base_model(), DeepSeekForCausalLM)
        assert_close(opened.eval()(token_ids(1, 4)).logits, model(token_ids(1, 4)).logits)


@torch.no_grad()
def test_what_loads_experts_one_by_one(tmp_path):
    """accelerate's loader knows the names in files alone; ours and torch's way by state dicts know the experts."""
    model, ids = tiny("tiny_v3"), token_ids(1, 4)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = DeepSeekForCausalLM(model.config)
    with pytest.raises(NotImplementedError, match="meta"):
        accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    by_state_dict = accelerate.load_checkpoint_and_dispatch(DeepSeekForCausalLM(model.config), tmp_path)
    assert_close(by_state_dict.eval()(ids).logits, model(ids).logits)
    parts = ["lm_head", *(f"model.{name}" for name, _ in model.model.named_children() if name != "layers")]
    spread = dict.fromkeys([*parts, "model.layers.0", "model.layers.2"], "cpu") | {"model.layers.1": "disk"}
    ours = DeepSeekForCausalLM.from_pretrained(tmp_path, device_map=spread, offload_folder=tmp_path / "away")
    assert_close(ours(ids).logits, model(ids).logits)


def test_shadow_beside_prediction_layers():
    """Its default wraps all of `model.layers`, of which the last are no layers of the trunk."""
    ids = token_ids(1, 5)
    with pytest.raises(ValueError, match="ShadowCarrier and no Tensor.*target_modules"):
        adapted("tiny_v3_mtp", ShadowConfig(task_type="CAUSAL_LM"))(input_ids=ids, labels=ids)
    layers = [f"model.layers.{number}" for number in range(3)]
    model = adapted("tiny_v3_mtp", ShadowConfig(task_type="CAUSAL_LM", target_modules=layers))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"attention_direction": "prefix"}, "prefix attention reads prompts causally (Trainer keeps labels"),
        ({"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.3}, "prediction layers learn nothing, for all of"),
    ],
)
def test_label_smoothing_of_a_plain_trainer_is_told_what_it_loses(fields, told, tmp_path, caplog):
    """It computes its loss without the model's: prompts are read causally, prediction layers have no gradient."""
    logging.get_logger().warning_once.__func__.cache_clear()
    model = tiny("tiny_v3", **fields).train()
    arguments = TrainingArguments(tmp_path, use_cpu=True, label_smoothing_factor=0.1, report_to=[])
    trainer, ids = Trainer(model, arguments), token_ids(1, 6)
    with caplog.at_level("WARNING"):
        trainer.compute_loss(model, {"input_ids": ids, "labels": ids}).backward()
    assert told in caplog.text
    assert all(weight.grad is None for name, weight in model.named_parameters() if "eh_proj" in name)
