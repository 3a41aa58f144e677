"""A saved embedding model in three processes: by our Auto class, by AutoModel where our packages are (the trunk, with
a warning), and by AutoModel with trust_remote_code where they aren't."""

from __future__ import annotations

import json

import pytest

PRESETS = {"tiny_llm": {}, "tiny_v3": {"pooling": "latent", "num_pooling_latents": 5, "num_pooling_heads": 4}}
TEXT = [[5, 9, 30]]


def save(folder, presets, text):
    import torch

    from configuration_deepseek import preset
    from modeling_deepseek import DeepSeekForEmbedding

    facts = {}
    for name, fields in presets.items():
        torch.manual_seed(0)
        model = DeepSeekForEmbedding(preset(name, query_prefix="query: ", **fields)).eval()
        model.save_pretrained(f"{folder}/{name}")
        facts[name] = model(torch.tensor(text)).embeddings.tolist()
    return facts


def load(folder, presets, text, auto_class, trust_remote_code):
    """Class, warnings, and the embedding and the prefix if it makes any, by preset."""
    import warnings

    import torch
    import transformers

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    auto = getattr(transformers, auto_class, None)
    if not trust_remote_code:
        import modeling_deepseek

        auto = auto or getattr(modeling_deepseek, auto_class)
    facts = {}
    for name in presets:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = auto.from_pretrained(f"{folder}/{name}", **trust)
        said = [str(warning.message) for warning in caught if "trunk" in str(warning.message)]
        facts[name] = [type(model).__module__.split(".")[0], type(model).__name__, said]
        outputs = model(torch.tensor(text))
        if hasattr(outputs, "embeddings"):
            facts[name] += [outputs.embeddings.tolist(), model.config.query_prefix]
            model.save_pretrained(f"{folder}/again/{name}")
    return facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedding_models")


@pytest.fixture(scope="module")
def saved(run_client, folder):
    return run_client(save, str(folder), PRESETS, TEXT)


def check(fact, package, saved):
    module, name, said, embeddings, prefix = fact
    assert [module, name, said, prefix] == [package, "DeepSeekForEmbedding", [], "query: "]
    assert embeddings[0] == pytest.approx(saved[0], rel=1e-5, abs=1e-6)


def test_our_auto_class_gives_the_embedding_model(saved, run_client, folder):
    facts = run_client(load, str(folder), PRESETS, TEXT, "AutoModelForEmbedding", False)
    for name in PRESETS:
        check(facts[name], "modeling_deepseek", saved[name])


def test_automodel_with_our_package_gives_the_trunk_and_says_so(saved, run_client, folder):
    facts = run_client(load, str(folder), PRESETS, TEXT, "AutoModel", False)
    for name in PRESETS:
        module, found, said = facts[name]
        assert [module, found, len(said)] == ["modeling_deepseek", "DeepSeekModel", 1]
        assert "\n" not in said[0] and said[0].endswith("use DeepSeekForEmbedding.from_pretrained.")


def test_a_stranger_gets_the_embedding_model_by_automodel(saved, run_stranger, folder):
    facts = run_stranger(load, str(folder), PRESETS, TEXT, "AutoModel", True)
    again = run_stranger(load, str(folder / "again"), PRESETS, TEXT, "AutoModel", True)  # what a stranger saved
    for name in PRESETS:
        check(facts[name], "transformers_modules", saved[name])
        check(again[name], "transformers_modules", saved[name])
        config = json.loads((folder / name / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "embedding_head.DeepSeekForEmbedding"
