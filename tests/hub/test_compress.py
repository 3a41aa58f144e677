"""`deepseek-hf compress` of a model on the Hub, at a revision; and what it has made, opened by strangers."""

import pytest


def push_and_compress(folder):
    """Two revisions of a translator with three and two layers; the first, made smaller."""
    import json
    from pathlib import Path

    from huggingface_hub import HfApi

    from finetune_deepseek.commands.compress import compress
    from finetune_deepseek.commands.finetune import finetune
    from modeling_deepseek import DeepSeekForCausalLM

    api, folder = HfApi(), Path(folder)
    rows = [{"translation": {"en": word, "de": word}} for word in ("one", "two", "three")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"--{split}_file={folder / 'rows.jsonl'}" for split in ("train", "validation")]
    common = [*data, "--target_lang=de", "--use_cpu=true", "--disable_tqdm=true", "--max_target_length=16"]
    api.create_repo("alice/small")
    for layers, tag in ((3, "v1"), (2, "v2")):
        shape = f"--config_overrides=num_hidden_layers={layers},n_group=1,topk_group=1"
        made = f"--output_dir={folder / tag}"
        finetune(["translation", "--preset=tiny_v3", "--vocab_size=300", shape, made, "--max_steps=1", *common])
        api.upload_folder(repo_id="alice/small", folder_path=folder / tag, ignore_patterns=["checkpoint-*"])
        api.create_tag("alice/small", tag=tag)
    ways = ["--prune-layers=1", "--prune-experts=0.25"]
    compress(["alice/small", str(folder / "out"), *ways, "--model_revision=v1", *common])
    report = json.loads((folder / "out" / "compression.json").read_text())
    model = DeepSeekForCausalLM.from_pretrained(folder / "out")
    return {
        "layers": model.config.num_hidden_layers,
        "experts": model.config.n_routed_experts,
        "bytes": [report["bytes_before"], (folder / "v1" / "model.safetensors").stat().st_size],
        "card": "made of `alice/small`" in (folder / "out" / "README.md").read_text(),
        "logits": model(model.dummy_inputs["input_ids"]).logits[0, -1].tolist(),
    }


def open_it(folder):
    """A stranger's logits, on the ids that dummy inputs have."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "out", trust_remote_code=True)
    return model(model.dummy_inputs["input_ids"]).logits[0, -1].tolist()


@pytest.mark.slow
def test_a_revision_on_the_hub_is_made_smaller_and_opened_by_strangers(hub, run_client, run_stranger, tmp_path):
    found = run_client(push_and_compress, str(tmp_path), hub=hub)
    logits = found.pop("logits")
    size, expected = found.pop("bytes")
    assert found == {"layers": 2, "experts": 6, "card": True} and size == expected
    assert run_stranger(open_it, str(tmp_path)) == pytest.approx(logits, abs=1e-5)
