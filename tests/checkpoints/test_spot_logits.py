"""Exports are compared with their source by logits, which are those of the model as it is loaded."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune_deepseek.__main__ import main
from finetune_deepseek.checkpoints import export, merging, shards
from finetune_deepseek.checkpoints.export import export_bundle, export_native
from finetune_deepseek.checkpoints.opening import open_model
from finetune_deepseek.checkpoints.spot_logits import difference, spot_logits
from finetune_deepseek.training.arguments import LoraArguments
from finetune_deepseek.training.weights.lora import apply_lora
from modeling_deepseek import (
    DeepSeekForQuestionAnswering,
    DeepSeekForRecommendation,
    DeepSeekForSequenceClassification,
)
from tests.checkpoints.conftest import VOCAB_SIZE
from tests.checkpoints.test_merging import shake
from tests.modeling.conftest import HEADS, outputs
from tests.reference.compare import assert_close

IDS = torch.tensor([[7919 * i % VOCAB_SIZE for i in range(1, 9)]])
PRESETS = ["tiny_llm", "tiny_moe", "tiny_v2_lite", "tiny_v2", "tiny_v3_mtp", "tiny_v32", "tiny_v4"]


def spots_of(folder, adapter=None):
    checkpoint = open_model(folder, adapter)
    model = checkpoint.skeleton() if adapter is None else checkpoint.adapter.model
    return spot_logits(model, checkpoint.source, checkpoint.adapter)


@pytest.mark.parametrize("name", PRESETS)
def test_they_are_the_model_s(saved, name):
    model, folder = saved(name)
    assert not set(IDS[0].tolist()) & {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}
    assert_close(spots_of(folder), outputs(model, IDS)[0], name)


def test_limits_and_tables_of_experts_hold(saved):
    model, folder = saved("tiny_v4", swiglu_limit=0.01, num_hash_layers=2)
    assert_close(spots_of(folder), outputs(model, IDS)[0])


@pytest.mark.parametrize("head", HEADS[2:], ids=lambda head: head.__name__)
@pytest.mark.parametrize("fields", [{}, {"tie_item_embeddings": False, "use_qk_norm": True}], ids=["", "untied"])
def test_every_head_goes_out(saved, tmp_path, head, fields):
    model, folder = saved("tiny_llm", head, **fields)
    expected = outputs(model, IDS)
    if head is DeepSeekForRecommendation:
        assert_close(spots_of(folder)[:, 3:], expected, head.__name__)
    elif head is DeepSeekForQuestionAnswering:
        assert_close(spots_of(folder), expected[..., 0], "starts")
    elif head is DeepSeekForSequenceClassification:
        assert_close(spots_of(folder), outputs(model, IDS.view(4, 2)), head.__name__)
    else:
        assert_close(spots_of(folder), expected.flatten(0, -2), head.__name__)
    export_bundle(folder, tmp_path / "out")
    assert torch.equal(outputs(head.from_pretrained(tmp_path / "out"), IDS), expected)


@pytest.mark.parametrize(
    "flags", [{"lora_target": ["all"]}, {"use_dora": True, "lora_target": ["attention"]}], ids=str
)
@pytest.mark.parametrize("name", ["tiny_moe", "tiny_v3", "tiny_v32"])
def test_adapters_count_without_being_merged(saved, tmp_path, name, flags):
    model, folder = saved(name)
    wrapped = shake(apply_lora(model, LoraArguments(use_peft=True, lora_r=3, **flags)))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert_close(spots_of(folder, tmp_path / "adapter"), outputs(wrapped, IDS)[0], name)
    assert difference(spots_of(folder), outputs(wrapped, IDS)[0]) > 0.01


@pytest.mark.parametrize("trained", ["adapted", "whole"])
def test_item_embeddings_that_are_adapted_or_trained(saved, tmp_path, trained):
    model, folder = saved("tiny_llm", DeepSeekForRecommendation)
    words = {"target_modules": ["o_proj", *(["embed_tokens"] if trained == "adapted" else [])]}
    words |= {"modules_to_save": ["embed_tokens"]} if trained == "whole" else {}
    wrapped = shake(get_peft_model(model, LoraConfig(r=3, **words)))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    export_bundle(folder, tmp_path / "out", adapter=tmp_path / "adapter")
    merged = DeepSeekForRecommendation.from_pretrained(tmp_path / "out")
    assert_close(outputs(merged, IDS), outputs(wrapped.get_base_model(), IDS), trained)


def test_difference_is_the_median_over_tokens():
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    other = one.clone()
    other[0] = -one[0]  # a token that went elsewhere
    assert difference(other, one) == 0
    assert difference(1.1 * one, one) == pytest.approx(0.1)
    assert difference(one[:2], one) == float("inf")
    assert not difference(torch.full_like(one, float("nan")), one) <= 1


# What is wrong on disk, though each value was written as it was planned ---------------------------------------------


def other_columns(tensors, *args, **kwargs):
    """Shapes and types are right, and every value that is read again is the one that was written."""
    names = [name for name in tensors if name.endswith("o_proj.weight")]
    # older torch has neither flip nor indices for FP8
    changed = {name: tensors[name].map(lambda weight: torch.cat(weight.split(1, 1)[::-1], 1)) for name in names}
    return shards.write_shards(tensors | changed, *args, **kwargs)


def doubled(weight, factors, scaling):
    b, a = factors()
    return weight + 2 * scaling * b.float() @ a.float()


@pytest.mark.parametrize("form", ["native", "bundle"])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp8"])
def test_other_logits_leave_nothing_behind(saved, tmp_path, form, dtype, monkeypatch, capsys):
    _, folder = saved("tiny_v3")
    flags = [*(() if dtype is None else ("--dtype", dtype))]
    command = ["deepseek-hf", "export", str(folder), str(tmp_path / "out"), "--to", form, *flags]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(export, "write_shards", other_columns)
    assert main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deepseek-hf")]
    assert len(lines) == 1 and f"{tmp_path / 'out'}: saving failed" in lines[0]
    assert "logits of what was written differ from the source's by" in lines[0]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export.FORMS[form](folder, tmp_path / "out", dtype=dtype)
    assert (tmp_path / "out/config.json").is_file()


def test_a_merge_that_goes_wrong_is_found(saved, tmp_path, monkeypatch):
    model, folder = saved("tiny_v3")
    wrapped = shake(apply_lora(model, LoraArguments(use_peft=True, lora_r=3)))
    wrapped.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(merging, "_plus_product", doubled)
    with pytest.raises(OSError, match="logits of what was written differ from the source's"):
        export_native(folder, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_a_config_that_says_something_else_is_found(saved, tmp_path, monkeypatch):
    _, folder = saved("tiny_v3")
    right = export.native_config
    monkeypatch.setattr(export, "native_config", lambda checkpoint: {**right(checkpoint), "rope_theta": 20.0})
    with pytest.raises(OSError, match="logits of what was written differ"):
        export_native(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
