"""An adapter by its id on the Hub, its base by a revision, and what is cached when the Hub is gone."""

from __future__ import annotations

import pytest

ROWS = [{"query": "what is red", "passage": "a fox"}, {"query": "what is blue", "passage": "the sea"}]


def push(folder):
    """A base of two revisions, and an embedding adapter on the first, pushed by runs of ours."""
    import json
    from pathlib import Path

    import torch
    from huggingface_hub import HfApi

    from configuration_deepseek import preset
    from finetune_deepseek.commands.finetune import finetune
    from modeling_deepseek import DeepSeekForCausalLM
    from tokenization_deepseek import train_tokenizer

    torch.manual_seed(0)
    rows = Path(folder) / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = train_tokenizer(["a fox is red, the sea is blue"] * 3, vocab_size=300)
    model = DeepSeekForCausalLM(preset("tiny_v3", vocab_size=len(tokenizer), initializer_range=0.2))
    model.push_to_hub("alice/base")
    tokenizer.push_to_hub("alice/base")
    first = HfApi().model_info("alice/base").sha
    common = ["--train_file", str(rows), "--validation_file", str(rows), "--use_cpu", "true", "--disable_tqdm", "true"]
    finetune(
        ["embedding", *common, "--model_name_or_path", "alice/base", "--use_peft", "--pooling", "last_token"]
        + ["--query_prefix", "q: ", "--max_steps", "3", "--output_dir", f"{folder}/adapter", "--push_to_hub"]
        + ["--hub_model_id", "alice/adapter", "--learning_rate", "0.05"]
    )
    results = json.loads((Path(folder) / "adapter/all_results.json").read_text())
    both = Path(folder) / "both"
    both.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "deepseek_hf.json"):
        (both / name).write_bytes((Path(folder) / "adapter" / name).read_bytes())
    model.config.save_pretrained(both)
    HfApi().create_repo("alice/both")
    HfApi().upload_folder(repo_id="alice/both", folder_path=both)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    model.push_to_hub("alice/base")  # the adapter stays on the first revision
    return {"first": first, "loss": results["eval_loss"]}


def use(folder):
    """By its id: evaluate, retrieve, train on; then the same and inspect with the Hub gone."""
    import contextlib
    import io
    import json
    from pathlib import Path

    import huggingface_hub.constants
    import torch

    from finetune_deepseek.commands.evaluate import evaluate
    from finetune_deepseek.commands.finetune import finetune
    from finetune_deepseek.commands.inspect import inspect
    from finetune_deepseek.retrieval.passage_index import Retriever
    from finetune_deepseek.training.saved import Saved
    from modeling_deepseek import AutoModelForEmbedding, DeepSeekForEmbedding

    facts = {}
    rows = f"{folder}/rows.jsonl"
    common = ["--validation_file", rows, "--use_cpu", "true", "--disable_tqdm", "true"]
    evaluate(["embedding", "alice/adapter", *common, "--output_dir", f"{folder}/evaluated"])
    facts["loss"] = json.loads(Path(f"{folder}/evaluated/all_results.json").read_text())["eval_loss"]
    saved = Saved.open(None, "alice/adapter")
    facts["base"] = [saved.base.name, saved.base.commit, saved.adapter["revision"]]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        both = Saved.open(None, "alice/both")
    facts["both"] = [both.is_adapter, both.base.name, err.getvalue()]
    local = Retriever.load(f"{folder}/adapter").encode(["what is red"], is_query=True)
    local_folder = f"{folder}/adapter"
    for name, opener in {"class": DeepSeekForEmbedding, "auto": AutoModelForEmbedding}.items():
        with torch.no_grad():
            model, expected = (opener.from_pretrained(where).eval() for where in ("alice/adapter", local_folder))
            ids = torch.tensor([[5, 6, 7]])
            facts[name] = [float((model(ids).embeddings - expected(ids).embeddings).abs().max()), model.config.pooling]
    facts["same"] = bool(torch.allclose(Retriever.load("alice/adapter").encode(["what is red"], is_query=True), local))
    finetune(
        ["embedding", *common, "--train_file", rows, "--model_name_or_path", "alice/adapter", "--max_steps", "1"]
        + ["--output_dir", f"{folder}/further"]
    )
    facts["trained"] = json.loads(Path(f"{folder}/further/all_results.json").read_text())["parameters_trainable"]
    facts["further"] = Saved.open(None, f"{folder}/further").changes

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    facts["offline"] = bool(
        torch.allclose(Retriever.load("alice/adapter").encode(["what is red"], is_query=True), local)
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inspect(["alice/base", "--revision", saved.base.commit])
    facts["inspected"] = out.getvalue()
    return facts


@pytest.fixture(scope="module")
def facts(hub, run_client, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    pushed = run_client(push, folder, hub=hub)
    return pushed, run_client(use, folder, hub=hub)


def test_an_adapter_by_its_id_is_the_adapter(facts):
    pushed, found = facts
    assert found["loss"] == pytest.approx(pushed["loss"], rel=1e-4)
    assert found["same"] and found["trained"] > 0
    assert found["further"]["pooling"] == "last_token" and found["further"]["query_prefix"] == "q: "


def test_a_repository_with_a_config_too_is_an_adapter_aloud(facts):
    """As for transformers, which goes to the base that the adapter names."""
    is_adapter, base, told = facts[1]["both"]
    assert is_adapter and base == "alice/base"
    assert "alice/both: it holds a config.json and an adapter; the adapter on alice/base is taken." in told


@pytest.mark.parametrize("way", ["class", "auto"])
def test_transformers_opens_it_on_the_base_of_its_training(facts, way):
    difference, pooling = facts[1][way]
    assert difference < 1e-5 and pooling == "last_token"


def test_its_base_is_the_commit_of_its_training(facts):
    pushed, found = facts
    assert found["base"] == ["alice/base", pushed["first"], pushed["first"]]


def test_what_is_cached_opens_offline(facts):
    assert facts[1]["offline"] and "weights           match the config" in facts[1]["inspected"]
