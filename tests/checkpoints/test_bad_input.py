"""Bad input to export ends in one line that names the file or weight, and leaves nothing behind."""

import json
import os
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finetune_deepseek.__main__ import main
from finetune_deepseek.checkpoints import shards
from finetune_deepseek.checkpoints.export import export_native
from modeling_deepseek import DeepSeekForCausalLM


@pytest.fixture
def source(saved):
    """A good checkpoint in shards, to be damaged."""
    model, folder = saved("tiny_v3")
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="80KB")
    return folder


@pytest.fixture
def refused(source, tmp_path, capsys, monkeypatch):
    """Run `deepseek-hf export` and give the line that it ends with; nothing may be left behind."""

    def run(*flags: str, destination=tmp_path / "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", "export", str(source), str(destination), *flags])
        assert main() == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deepseek-hf")]
        assert len(lines) == 1 and sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def shard(folder, number):
    return sorted(folder.glob("model-*.safetensors"))[number]


def test_a_shard_that_is_not_there(source, refused):
    path = shard(source, 1)
    path.unlink()
    assert f"{path} is not there, but model.safetensors.index.json lists it" in refused("--to", "native")


def test_a_truncated_shard(source, refused):
    path = shard(source, 2)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged" in refused("--to", "native")


def test_a_damaged_index(source, refused):
    (source / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is damaged" in refused("--to", "bundle")


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_weight_that_its_shard_lacks(source, refused):
    name = next(iter(load_file(shard(source, 0))))
    change(shard(source, 0), lambda tensors: tensors.pop(name))
    line = refused("--to", "native")
    assert f"{shard(source, 0)} lacks weight {name}, which model.safetensors.index.json says is there" in line


def test_weights_of_another_architecture(source, refused):
    config = json.loads((source / "config.json").read_text()) | {"q_lora_rank": None}
    (source / "config.json").write_text(json.dumps(config))
    assert "self_attn.q_a_layernorm.weight is of another architecture than config.json says" in refused(
        "--to", "native"
    )


def test_missing_and_misshapen_weights(source, refused):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "weight model.layers.3.self_attn.q_a_proj.weight is missing" in refused("--to", "native")
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 331}))
    assert "embed_tokens.weight has shape (330, 32), but config.json asks for (331, 32)" in refused("--to", "bundle")


@pytest.mark.parametrize("model_type", ["deepseek_vl", "kimi_k2", "glm4_moe", "gpt2"])
def test_another_family(source, refused, model_type):
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = refused("--to", "native")
    assert f"{source}: config.json has model_type '{model_type}'" in line and "deepseek_v3" in line


def test_scales_of_fp8_that_do_not_fit(source, refused, tmp_path):
    export_native(source, tmp_path / "fp8", dtype="fp8")
    shutil.rmtree(source)
    shutil.move(tmp_path / "fp8", source)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    change(source / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(2, 1)}))
    assert f"{source}: scale {name} has shape (2, 1)" in refused("--to", "native")


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(source, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=3)
    get_peft_model(DeepSeekForCausalLM.from_pretrained(source), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_for_another_base(adapter, refused):
    path, name = (
        adapter / "adapter_model.safetensors",
        "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight",
    )
    change(path, lambda tensors: tensors.update({name: torch.ones(3, 7)}))
    line = refused("--to", "native", "--merge-adapter", str(adapter))
    assert f"the adapter is for another base: {name} has shape (3, 7), this base asks for (3, 40)" in line
    change(path, lambda tensors: tensors.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(1)}))
    change(path, lambda tensors: tensors.update({name: torch.ones(3, 40)}))
    line = refused("--to", "native", "--merge-adapter", str(adapter))
    assert "another base, which has no place for its base_model.model.model.layers.9.x.lora_A.weight" in line
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert f"{adapter}: the adapter is for another base" in refused("--to", "native", "--merge-adapter", str(adapter))


def test_adapters_that_cannot_be_merged(adapter, refused):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert "began as pissa, which changes the base model" in refused("--to", "native", "--merge-adapter", str(adapter))
    path.write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["o_proj"]}))
    assert "only LoRA is merged" in refused("--to", "native", "--merge-adapter", str(adapter))
    path.unlink()
    assert f"{adapter} is no adapter" in refused("--to", "native", "--merge-adapter", str(adapter))


@pytest.fixture
def adapter_alone(adapter, source, tmp_path):
    """The adapter in the place of the source, and its base beside it."""
    shutil.move(source, tmp_path / "base")
    shutil.copytree(adapter, source)
    settings = json.loads((source / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (source / "adapter_config.json").write_text(json.dumps(settings))
    return tmp_path / "base"


def test_an_adapter_as_the_source(adapter_alone, source, refused):
    assert f"{source} is an adapter: name its base model, and the adapter after --merge-adapter" in refused(
        "--to", "native"
    )
    (adapter_alone / "config.json").write_text(json.dumps({"model_type": "deepseek_vl"}))
    assert "model_type 'deepseek_vl'" in refused("--adapter-format", "per-expert")


def test_a_model_and_an_adapter_in_one_folder(adapter, source, refused):
    for path in adapter.iterdir():
        shutil.copyfile(path, source / path.name)
    assert f"{source}: it holds an adapter (adapter_config.json) and a model (model-" in refused("--to", "native")


def test_an_adapter_without_experts_needs_no_rewriting(adapter_alone, refused):
    assert "has no fused experts, so it needs no rewriting" in refused("--adapter-format", "per-expert")


# Destination and flags ----------------------------------------------------------------------------------------------


def test_a_destination_that_exists(source, refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    assert f"{tmp_path / 'full'} exists" in refused("--to", "native", destination=tmp_path / "full")
    assert f"{tmp_path / 'full/note.txt'} exists" in refused("--to", "native", destination=tmp_path / "full/note.txt")
    (tmp_path / "empty").mkdir()
    export_native(source, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()


def test_a_destination_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "can't be written (Not a directory)" in refused("--to", "native", destination=tmp_path / "file/out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "can't be written (no right to write there)" in refused("--to", "native", destination=tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing(refused, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    assert "No space left on device" in refused("--to", "native")


def test_what_reads_back_otherwise_is_not_kept(refused, monkeypatch):
    save = shards.save_file

    def corrupt(tensors, path, metadata):
        save({name: value + 1 for name, value in tensors.items()}, path, metadata)

    monkeypatch.setattr(shards, "save_file", corrupt)
    assert "reads back otherwise than it was written" in refused("--to", "native")


def test_flags(refused):
    assert "--to is missing; choose from native, bundle, gguf" in refused()
    assert "invalid choice: 'onnx'" in refused("--to", "onnx")
    assert "unexpected argument '--max-shard-sise' (did you mean '--max-shard-size'?)" in refused(
        "--max-shard-sise", "1"
    )
    assert "--max-shard-size lots" in refused("--to", "native", "--max-shard-size", "lots")
    assert "--adapter-format rewrites an adapter and nothing else" in refused(
        "--adapter-format", "per-expert", "--to", "native"
    )
