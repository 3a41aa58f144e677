"""Broken checkpoints and full disks: one clear line that names the file, and the good files stay."""

import errno
import hashlib
import json
import os

import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_deepseek import DeepSeekForCausalLM
from tests.modeling.conftest import outputs, tiny, token_ids


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint of tiny_v3, to be damaged."""
    tiny("tiny_v3").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **fields):
    """Replace fields of config.json; `None` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder, change):
    """Rewrite model.safetensors with what `change` makes of its tensors."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def refusal(folder, error=ValueError, load=DeepSeekForCausalLM.from_pretrained):
    """The line with which loading is refused."""
    with pytest.raises(error) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line.strip() and str(folder) in line
    return line


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ],
)
def test_a_missing_weight(folder, key):
    change_weights(folder, lambda weights: weights.pop(key))
    line = refusal(folder)
    assert f"1 weights of the model are not in the checkpoint, the first is {key}" in line
    assert "the checkpoint is incomplete, or config.json describes another model" in line


def test_a_config_with_more_layers_than_the_checkpoint(folder):
    change_config(folder, num_hidden_layers=4)
    assert "not in the checkpoint, the first is model.layers.3." in refusal(folder)


def test_a_misshapen_weight(folder):
    def widen(weights):
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(50, 32)

    change_weights(folder, widen)
    line = refusal(folder)
    assert "weight model.layers.0.mlp.up_proj.weight has shape (50, 32) but the config asks for (48, 32)" in line
    assert "mend config.json, or pass ignore_mismatched_sizes=True" in line
    loaded = DeepSeekForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert loaded.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 96}, {"moe_intermediate_size": 24}, {"n_routed_experts": 12}], ids=str
)
def test_a_config_of_other_sizes_than_the_weights(folder, fields):
    change_config(folder, **fields)
    assert " but the config asks for (" in refusal(folder)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_one_expert_of_many(folder, damage):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"

    def spoil(weights):
        if damage == "missing":
            del weights[key]
        else:
            weights[key] = torch.zeros(3, 3)

    change_weights(folder, spoil)
    line = refusal(folder)
    assert "parts of weight model.layers.1.mlp.experts.gate_up_proj do not fit together (first of 1)" in line


def test_keys_of_another_architecture(folder):
    def rename(weights):
        for key in list(weights):
            weights[f"transformer.h.{key.removeprefix('model.layers.')}"] = weights.pop(key)

    change_weights(folder, rename)
    line = refusal(folder)
    assert "the first is model.embed_tokens.weight (it has transformer.h." in line
    assert line.endswith("the checkpoint is incomplete, or config.json describes another model")


def test_weights_that_the_model_has_no_place_for(folder):
    key = "model.layers.1.self_attn.q_norm.weight"
    change_weights(folder, lambda weights: weights.update({key: torch.ones(8)}))
    line = refusal(folder)
    assert f"the model has no place for 1 weights of the checkpoint, the first is {key}; config.json describes" in line


def test_what_old_checkpoints_have_too_is_no_error(folder):
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda weights: weights.update({key: torch.ones(4)}))
    _, info = DeepSeekForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_fewer_layers_than_the_checkpoint_has(folder):
    loaded, info = DeepSeekForCausalLM.from_pretrained(folder, num_hidden_layers=2, output_loading_info=True)
    assert len(loaded.model.layers) == 2
    assert info["unexpected_keys"] and all(".layers.2." in key for key in info["unexpected_keys"])


# Files --------------------------------------------------------------------------------------------------------------


def cut(path, share=0.5):
    """Keep so much of the file's beginning."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("load", [DeepSeekForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_truncated_safetensors_file(folder, share, load):
    cut(folder / "model.safetensors", share)
    line = refusal(folder, load=load)
    assert line.startswith(f"{folder}/model.safetensors is damaged (") and line.endswith("copy or download it again")


def test_a_file_of_something_else_under_that_name(folder):
    (folder / "model.safetensors").write_text("<html>404 not found</html>")
    assert "model.safetensors is damaged (" in refusal(folder)


def test_one_damaged_shard_is_named(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    cut(shards[1])
    assert f"{shards[1]} is damaged (" in refusal(tmp_path)
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path, OSError)


def test_a_shard_that_the_index_does_not_list(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    forgotten = sorted(set(index["weight_map"].values()))[1]
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != forgotten}
    path.write_text(json.dumps(index))
    line = refusal(tmp_path)
    assert "weights of the model are not in the checkpoint" in line or "do not fit together" in line
    assert f"the index does not list {forgotten}" in line


def test_a_truncated_index(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path, max_shard_size="60KB")
    cut(tmp_path / "model.safetensors.index.json")
    assert "model.safetensors.index.json is damaged (" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize(
    "load", [DeepSeekForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained]
)
def test_a_truncated_config(folder, share, load):
    cut(folder / "config.json", share)
    assert "config.json' is not a valid JSON file" in refusal(folder, OSError, load)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(folder, OSError)


# Config -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "deepseek_v2_5"])
@pytest.mark.parametrize("our_mark", [1, None])
def test_a_wrong_model_type(folder, model_type, our_mark):
    change_config(folder, model_type=model_type, deepseek_format=our_mark)
    line = refusal(folder)
    assert f"model_type {model_type!r}, which DeepSeekConfig cannot read; it reads 'llama', " in line


def test_clashing_fields_of_a_file(folder):
    change_config(folder, num_experts_per_tok=9)
    with pytest.raises(ValueError, match="num_experts_per_tok=9 exceeds n_routed_experts=8"):
        DeepSeekForCausalLM.from_pretrained(folder)


# A full disk --------------------------------------------------------------------------------------------------------


def digest(folder):
    """Name -> content of every file below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill_disk_at_write(monkeypatch, number, error):
    """Let the `number`-th weight file break off half-way with `error`."""
    write, calls = transformers.modeling_utils.safe_save_file, []

    def writer(tensors, filename, **kwargs):
        calls.append(filename)
        if len(calls) < number:
            return write(tensors, filename, **kwargs)
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise error

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", writer)
    return calls


NO_SPACE = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", NO_SPACE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("before", ["whole", "shards", "nothing"])
def test_a_full_disk_leaves_the_old_checkpoint(before, shard_size, error, tmp_path, monkeypatch):
    folder, ids = tmp_path / "model", token_ids(2, 7)
    folder.mkdir()
    old, new = tiny("tiny_v3"), tiny("tiny_v3", initializer_range=0.1, hidden_dropout=0.1)
    if before != "nothing":
        old.save_pretrained(folder, max_shard_size="1GB" if before == "whole" else "30KB")
    (folder / "tokenizer.json").write_text("{}")
    kept = digest(folder)
    calls = fill_disk_at_write(monkeypatch, 1 if shard_size == "1GB" else 2, error)
    with pytest.raises(OSError, match="saving failed, the folder is as it was before; .*No space left on device") as e:
        new.save_pretrained(folder, max_shard_size=shard_size)
    assert str(e.value).startswith(f"{folder}: ") and "\n" not in str(e.value)
    assert len(calls) == (1 if shard_size == "1GB" else 2)
    assert digest(folder) == kept and sorted(os.listdir(folder)) == sorted({name.split("/")[0] for name in kept})
    monkeypatch.undo()
    if before != "nothing":
        assert torch.equal(outputs(DeepSeekForCausalLM.from_pretrained(folder), ids), outputs(old, ids))
    new.save_pretrained(folder, max_shard_size=shard_size)
    assert torch.equal(outputs(DeepSeekForCausalLM.from_pretrained(folder), ids), outputs(new, ids))


def test_a_full_disk_while_the_config_is_written(folder, monkeypatch):
    def full(self, path, **kwargs):
        with open(path, "w") as file:
            file.write("{")
        raise NO_SPACE[0]

    kept = digest(folder)
    monkeypatch.setattr(type(tiny("tiny_v3").config), "to_json_file", full)
    with pytest.raises(OSError, match="saving failed, the folder is as it was before"):
        tiny("tiny_v3", hidden_dropout=0.1).save_pretrained(folder)
    assert digest(folder) == kept


def test_an_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch):
    kept = digest(folder)
    fill_disk_at_write(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny("tiny_v3", hidden_dropout=0.1).save_pretrained(folder)
    assert digest(folder) == kept and not list(folder.glob("_saving*"))


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match="model"):
        tiny("tiny_v3").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_failed_upload_does_not_undo_the_save(tmp_path, monkeypatch):
    model = tiny("tiny_v3")

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", no_network)
    with pytest.raises(ConnectionError):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(loaded, token_ids(1, 5)), outputs(model, token_ids(1, 5)))
