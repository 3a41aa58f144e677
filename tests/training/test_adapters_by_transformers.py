"""An adapter opened by transformers' own ways answers as in training: its base gets what training changed there."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from configuration_deepseek import preset
from finetune_deepseek.training.loading import served_model
from finetune_deepseek.training.saved import Saved, write
from modeling_deepseek import (
    AutoModelForEmbedding,
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
)
from tests.reference.compare import assert_close

LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
BOTH_WAYS = {"attention_direction": "bidirectional", "type_vocab_size": 3}
CASES = {
    "last_token": (DeepSeekForEmbedding, AutoModelForEmbedding, {"pooling": "last_token", "query_prefix": "q: "}, []),
    "latent": (DeepSeekForEmbedding, AutoModelForEmbedding, {"pooling": "latent"}, ["pooling"]),
    "labels": (DeepSeekForSequenceClassification, AutoModelForSequenceClassification, LABELS, ["score"]),
    "both ways": (
        DeepSeekForQuestionAnswering, AutoModelForQuestionAnswering, BOTH_WAYS,
        ["qa_outputs", "token_type_embeddings"],
    ),
}  # fmt: skip


def save(folder, model_class, changes, in_full):
    """A language model, and an adapter on it under another head and config, as a run of ours leaves it."""
    torch.manual_seed(0)
    DeepSeekForCausalLM(preset("tiny_v3", initializer_range=0.2)).save_pretrained(folder / "base")
    base = model_class.from_pretrained(folder / "base", **changes)
    lora = LoraConfig(init_lora_weights=False, modules_to_save=in_full or None)
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    config = base.config.to_dict()
    write(folder / "adapter", None, {}, Saved.open(None, str(folder / "base")), config, model_class.__name__)


@torch.no_grad()
def answers(model):
    outputs = model.eval()(torch.tensor([[5, 8, 13, 9, 3], [7, 7, 6, 4, 22]]))
    return torch.cat([part.flatten() for part in outputs.to_tuple() if isinstance(part, torch.Tensor)])


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    model_class, auto_class, changes, in_full = CASES[request.param]
    folder = tmp_path_factory.mktemp("adapter")
    save(folder, model_class, changes, in_full)
    return folder, model_class, auto_class, changes


def test_classes_of_both_kinds_open_it_as_our_commands_do(case):
    folder, model_class, auto_class, changes = case
    expected = answers(served_model(Saved.open(None, str(folder / "adapter")), auto_class))
    for opener in (model_class, auto_class):
        model = opener.from_pretrained(folder / "adapter")
        assert_close(answers(model), expected)
        assert {name: getattr(model.config, name) for name in changes} == changes


def test_a_base_without_the_changes_is_told(case, caplog):
    folder, model_class, _, changes = case
    with caplog.at_level(logging.WARNING):
        try:
            model_class.from_pretrained(folder / "base").load_adapter(folder / "adapter")
        except RuntimeError:  # of transformers: a head of other labels
            assert "id2label" in changes
    assert f"{next(iter(changes))}=" in caplog.text and "it will answer otherwise" in caplog.text


def test_what_the_caller_says_counts_more(case):
    folder, model_class, _, changes = case
    if "pooling" in changes:
        assert model_class.from_pretrained(folder / "adapter", pooling="mean").config.pooling == "mean"


def test_another_class_is_told(case, caplog):
    folder, model_class, _, _ = case
    with caplog.at_level(logging.WARNING):
        AutoModel.from_pretrained(folder / "adapter")
    assert f"use {model_class.__name__}.from_pretrained" in caplog.text


def test_the_base_beside_it_is_found_when_both_have_moved(tmp_path):
    save(tmp_path / "before", *(CASES["last_token"][0], *CASES["last_token"][2:]))
    expected = answers(DeepSeekForEmbedding.from_pretrained(tmp_path / "before" / "adapter"))
    (tmp_path / "before").rename(tmp_path / "after")
    assert_close(answers(DeepSeekForEmbedding.from_pretrained(tmp_path / "after" / "adapter")), expected)


def test_another_model_in_the_place_of_its_base_is_refused(tmp_path, monkeypatch):
    """Also where the adapter has moved, and the name of its base is one from the working directory."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    save(Path(), *(CASES["last_token"][0], *CASES["last_token"][2:]))
    moved = (tmp_path / "one" / "adapter").rename(tmp_path / "adapter")
    expected = answers(DeepSeekForEmbedding.from_pretrained(moved))
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(ValueError, match="adapter: its base model base is not there"):
        DeepSeekForEmbedding.from_pretrained(moved)
    DeepSeekForCausalLM(preset("tiny_v3")).save_pretrained("base")
    for opened_by in (DeepSeekForEmbedding, AutoModelForEmbedding):
        with pytest.raises(ValueError, match="base model base: base is another model than the one"):
            opened_by.from_pretrained(moved)
    record = json.loads((moved / "deepseek_hf.json").read_text())
    del record["base"]["print"]
    (moved / "deepseek_hf.json").write_text(json.dumps(record))
    assert (answers(DeepSeekForEmbedding.from_pretrained(moved)) - expected).abs().max() > 1e-3


def test_a_record_gives_no_argument_of_from_pretrained(tmp_path):
    save(tmp_path, *(CASES["last_token"][0], *CASES["last_token"][2:]))
    path = tmp_path / "adapter" / "deepseek_hf.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"changes": {"trust_remote_code": True}}))
    with pytest.raises(ValueError, match="trust_remote_code, which is no field of the config"):
        DeepSeekForEmbedding.from_pretrained(tmp_path / "adapter")


def test_a_plain_adapter_of_peft_opens_as_ever(tmp_path):
    torch.manual_seed(0)
    DeepSeekForCausalLM(preset("tiny_v3")).save_pretrained(tmp_path / "base")
    model = get_peft_model(DeepSeekForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    found = answers(DeepSeekForCausalLM.from_pretrained(tmp_path / "adapter"))
    base = DeepSeekForCausalLM.from_pretrained(tmp_path / "base")
    assert_close(found, answers(PeftModel.from_pretrained(base, tmp_path / "adapter")))


def test_both_directions_without_a_word_about_caches():
    """The config of a saved language model asks for a cache, which a direction set afterwards has none for."""
    config = preset("tiny_v3")
    config.attention_direction = "bidirectional"
    assert DeepSeekForQuestionAnswering(config)(torch.tensor([[5, 8]])).start_logits.shape == (1, 2)
