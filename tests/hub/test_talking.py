"""`deepseek-hf generate` and `chat` with models and adapters of a Hub, at a revision, as with their folders."""

from __future__ import annotations

import pytest


def push(folder):
    """A model in two versions, of which a tag names the first, and an adapter on that; also as folders."""
    from pathlib import Path

    import torch
    from huggingface_hub import HfApi

    from configuration_deepseek import preset
    from finetune_deepseek.training.arguments import LoraArguments
    from finetune_deepseek.training.weights.lora import apply_lora
    from modeling_deepseek import DeepSeekForCausalLM
    from tokenization_deepseek import train_tokenizer

    api, folder = HfApi(), Path(folder)
    tokenizer = train_tokenizer(["one two three four five six seven"] * 3, vocab_size=300)
    api.create_repo("alice/model")
    for seed, tag in enumerate(("v1", "v2")):
        torch.manual_seed(seed)
        fields = {"initializer_range": 0.2, "vocab_size": len(tokenizer), "eos_token_id": None}
        model = DeepSeekForCausalLM(preset("tiny_v3", **fields))
        for part in (model, tokenizer):
            part.save_pretrained(folder / tag)
        api.upload_folder(repo_id="alice/model", folder_path=folder / tag)
        api.create_tag("alice/model", tag=tag)
    base = DeepSeekForCausalLM.from_pretrained("alice/model", revision="v1")
    adapter = apply_lora(base, LoraArguments(use_peft=True, lora_r=2))
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapter.active_peft_config.revision = "v1"
    adapter.save_pretrained(folder / "adapter")
    api.create_repo("alice/adapter")
    api.upload_folder(repo_id="alice/adapter", folder_path=folder / "adapter")


def talk(folder):
    """What each verb writes, by the model's name and flags."""
    import contextlib
    import io
    import json
    import sys
    from pathlib import Path

    from finetune_deepseek.commands.chat import chat
    from finetune_deepseek.commands.generate import generate

    def written(verb, name, *argv):
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"two three\n"))
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), write_through=True)) as out:
            verb([str(name), *argv, "--max_new_tokens=6", "--device=cpu"])
        text = out.buffer.getvalue().decode().strip()
        return json.loads(text)["completions"][0]["text"] if verb is generate else text

    folder = Path(folder)
    found = {}
    for tag in ("v1", "v2"):
        for verb in (generate, chat):
            at_hub = written(verb, "alice/model", f"--model_revision={tag}")
            found[f"{verb.__name__} {tag}"] = [at_hub, written(verb, folder / tag)]
    found["newest"] = [written(generate, "alice/model"), found["generate v2"][1]]
    found["adapter"] = [written(generate, name) for name in ("alice/adapter", folder / "adapter")]
    found["base"] = found["generate v1"][1]
    return found


@pytest.mark.slow
def test_a_name_on_the_hub_talks_as_its_folder(hub, run_client, tmp_path):
    run_client(push, str(tmp_path), hub=hub)
    found = run_client(talk, str(tmp_path), hub=hub)
    base = found.pop("base")
    assert all(at_hub == in_folder and at_hub for at_hub, in_folder in found.values())
    assert found["generate v1"] != found["generate v2"] and found["adapter"][0] != base
