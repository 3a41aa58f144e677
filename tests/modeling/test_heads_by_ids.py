"""Hash layers (V4) and tables of n-grams (V4.1) read token ids: heads hand them on, in training and from files."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForQuestionAnswering,
    DeepSeekForRecommendation,
    DeepSeekModel,
)
from tests.modeling.conftest import HEADS, labels_for, outputs, tiny, token_ids
from tests.reference.compare import assert_close
from tests.reference.shared_model import ENGRAM

MODELS = {"hash layers": ("tiny_v4", {"num_hash_layers": 2}), "n-grams": ("tiny_v4.1", ENGRAM)}
READ = {"hash layers": "layers.1.mlp.gate.tid2eid", "n-grams": "layers.3.engram.embed.weight"}


def model_of(name: str, head: type) -> torch.nn.Module:
    preset, fields = MODELS[name]
    return tiny(preset, head, **fields)


def changed(model: torch.nn.Module, name: str) -> None:
    """Exchange what the model has for its ids."""
    key = READ[name] if isinstance(model, DeepSeekModel) else f"model.{READ[name]}"
    table = {**dict(model.named_parameters()), **dict(model.named_buffers())}[key]
    table.data.copy_(table.data.roll(1, 0))


@pytest.mark.parametrize("head", [head for head in HEADS if head is not DeepSeekForRecommendation])
@pytest.mark.parametrize("name", MODELS)
def test_a_head_reads_ids_learns_pads_and_is_saved(name, head, tmp_path):
    model, ids = model_of(name, head), token_ids(2, 9, seed=4)
    before = outputs(model, ids)
    padded = torch.cat((torch.full((2, 3), model.config.pad_token_id), ids), dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    left = outputs(model, padded, attention_mask=mask)
    assert_close(left[:, 3:] if left.shape[1] == 12 else left, before, "left padding", tolerance=3e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(head.from_pretrained(tmp_path), ids), before)
    if labels := labels_for(model, ids):
        result = model.train()(input_ids=ids, **labels)
        result.loss.backward()
        assert result.loss.isfinite() and model.model.layers[0].input_layernorm.weight.grad.any()
    changed(model.eval(), name)
    assert (outputs(model, ids) - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, model.config.hidden_size))


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_tokens_are_added_beside_ids(name):
    preset, fields = MODELS[name]
    model, ids = tiny(preset, DeepSeekForQuestionAnswering, type_vocab_size=2, **fields), token_ids(2, 9, seed=4)
    kinds, table = torch.tensor([[0, 1, 0] * 3]), model.token_type_embeddings.weight
    found = outputs(model, ids, token_type_ids=kinds)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + (table[kinds] - table[0]))
    assert_close(found, outputs(model, ids), "kinds as part of the embeddings")
    assert (found - outputs(tiny(preset, DeepSeekForQuestionAnswering, **fields), ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_items_have_no_ids_of_tokens(name):
    with pytest.raises(ValueError, match="DeepSeekForRecommendation reads vectors of items, but .* read token ids"):
        model_of(name, DeepSeekForRecommendation)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_learn_beside_ids_and_generation_goes_on_by_them(name, tmp_path):
    lora = LoraConfig(target_modules=["wq_a", "wo_b"], target_parameters=["mlp.experts.down_proj"], r=2)
    model, ids = get_peft_model(model_of(name, DeepSeekForCausalLM), lora), token_ids(2, 7, seed=4)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    model(input_ids=ids, labels=ids).loss.backward()
    taught = [parameter.grad for key, parameter in model.named_parameters() if ".lora_" in key]
    assert taught and all(grad is not None and grad.isfinite().all() for grad in taught)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad():
        written = model.generate(input_ids=ids, **arguments)
        assert torch.equal(written, model.generate(input_ids=ids, use_cache=False, **arguments))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(model_of(name, DeepSeekForCausalLM), tmp_path)
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v4", "tiny_v4.1"])
@pytest.mark.parametrize("wrong", [97, -1])
def test_ids_without_a_row_are_refused_in_one_line(name, wrong):
    with pytest.raises(ValueError) as refused:
        tiny(name)(torch.tensor([[5, wrong]]))
    line = str(refused.value)
    assert f"input_ids hold {wrong}, but the model's tokens are 0 to 96 (vocab_size=97)" in line and "\n" not in line
