"""`deepseek-hf inspect` and `export` on a repository of a Hub: headers by ranged requests, no weight file whole."""

from __future__ import annotations

import pytest


def push(folder):
    """Push a model in shards with its tokenizer, and an adapter for it."""
    import torch

    from configuration_deepseek import preset
    from finetune_deepseek.training.arguments import LoraArguments
    from finetune_deepseek.training.weights.lora import apply_lora
    from modeling_deepseek import DeepSeekForCausalLM
    from tokenization_deepseek import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["A cat sat."] * 3, vocab_size=300)
    model = DeepSeekForCausalLM(preset("tiny_v3", vocab_size=len(tokenizer)))
    model.push_to_hub("alice/model", max_shard_size="100KB")
    tokenizer.push_to_hub("alice/model")
    apply_lora(model, LoraArguments(use_peft=True, lora_r=2)).push_to_hub("alice/adapter")


def look(folder):
    """Inspect both, and export the model; what was said, and the weight files in the cache after inspecting."""
    import contextlib
    import io
    import os
    from pathlib import Path

    from finetune_deepseek.checkpoints.export import export_native
    from finetune_deepseek.commands.inspect import inspect

    said = {}
    for name in ("model", "adapter"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            inspect([f"alice/{name}"])
        said[name] = out.getvalue()
    try:
        inspect(["alice/absent"])
    except ValueError as error:
        said["absent"] = str(error)
    cache = Path(os.environ["HF_HOME"])
    said["cached"] = [str(path) for path in cache.rglob("models--alice--model/**/*.safetensors")]
    export_native("alice/model", f"{folder}/native")
    said["exported"] = sorted(os.listdir(f"{folder}/native"))
    return said


@pytest.fixture(scope="module")
def said(hub, run_client, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("inspect"))
    run_client(push, folder, hub=hub)
    return run_client(look, folder, hub=hub)


def test_a_model_is_described_without_its_weight_files(said):
    assert "alice/model: DeepSeek-V3, R1 or V3.1 (deepseek_v3), ForCausalLM" in said["model"]
    assert "weights           match the config" in said["model"] and "warning" not in said["model"]
    assert said["cached"] == []


def test_an_adapter_is_described(said):
    assert "LORA adapter, rank 2" in said["adapter"] and "experts" in said["adapter"]


def test_a_repository_that_is_not_there_is_one_line(said):
    assert said["absent"].startswith("alice/absent: ") and "\n" not in said["absent"]


def test_a_model_of_the_hub_is_exported(said):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(said["exported"])
