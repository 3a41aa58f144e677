"""A saved recommender in three processes: by our Auto class, by AutoModel where our packages are (the trunk, with a
warning), and by AutoModel with trust_remote_code where they aren't."""

from __future__ import annotations

import json

import pytest

PRESETS = ["tiny_llm", "tiny_v3", "texts", "features"]  # items of text; users and contexts with features
HISTORY = [5, 9, 30]
REQUESTS = {"features": {"user_features": [2], "context_features": [4]}}


def save(folder):
    import torch

    from configuration_deepseek import preset
    from modeling_deepseek import DeepSeekForRecommendation

    facts = {}
    for name in PRESETS:
        torch.manual_seed(0)
        if name == "texts":
            model = DeepSeekForRecommendation(preset("tiny_v3", pad_token_id=0, num_items=1)).eval()
            model.add_items([[3 + n, 50 + n % 7] for n in range(40)])
        elif name == "features":
            columns = {"user_features": {"gender": ["F", "M"]}, "context_features": {"day": ["Mo", "Tu"]}}
            model = DeepSeekForRecommendation(preset("tiny_v3", pad_token_id=0, **columns)).eval()
        else:
            model = DeepSeekForRecommendation(preset(name, pad_token_id=0)).eval()
        model.save_pretrained(f"{folder}/{name}")
        items, scores = model.recommend(HISTORY, k=5, **REQUESTS.get(name, {}))
        facts[name] = [items.tolist(), scores.tolist()]
    return facts


def load(folder, auto_class, trust_remote_code):
    """Class, recommendations if it makes any, and warnings, by preset; `auto_class` may be one of ours."""
    import warnings

    import transformers

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    if auto_class == "AutoModelForRecommendation":
        import modeling_deepseek

        auto = modeling_deepseek.AutoModelForRecommendation
    else:
        if not trust_remote_code:
            import modeling_deepseek  # noqa: F401 - this alone registers everything
        auto = getattr(transformers, auto_class)
    facts = {}
    for name in PRESETS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = auto.from_pretrained(f"{folder}/{name}", **trust)
        said = [str(warning.message) for warning in caught if "trunk" in str(warning.message)]
        facts[name] = [type(model).__module__.split(".")[0], type(model).__name__, said]
        if hasattr(model, "recommend"):
            items, scores = model.recommend(HISTORY, k=5, **REQUESTS.get(name, {}))
            facts[name].append([items.tolist(), scores.tolist()])
            model.save_pretrained(f"{folder}/again/{name}")
            if name == "texts":  # a new item with the words of item 5 has its score
                new = int(model.add_items([[7, 54]]))
                scores = model.recommend(HISTORY, k=41, exclude_seen=False, filter=[5, new])[1]
                assert new == 41 and abs(scores[0] - scores[1]) < 1e-5
    return facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recommenders")


@pytest.fixture(scope="module")
def saved(run_client, folder):
    return run_client(save, str(folder))


def check(fact, expected_class, saved):
    """Class, no warning, the same items, and scores up to their last bits, which depend on where weights lie."""
    module, name, said, (items, scores) = fact
    assert [module, name, said, items] == [*expected_class, [], saved[0]]
    assert scores == pytest.approx(saved[1], rel=1e-5)


def test_our_auto_class_gives_the_recommender(saved, run_client, folder):
    facts = run_client(load, str(folder), "AutoModelForRecommendation", False)
    for name in PRESETS:
        check(facts[name], ["modeling_deepseek", "DeepSeekForRecommendation"], saved[name])


def test_automodel_with_our_package_gives_the_trunk_and_says_so(saved, run_client, folder):
    facts = run_client(load, str(folder), "AutoModel", False)
    for name in PRESETS:
        module, found, said = facts[name]
        assert [module, found, len(said)] == ["modeling_deepseek", "DeepSeekModel", 1]
        assert "\n" not in said[0] and said[0].endswith("use DeepSeekForRecommendation.from_pretrained.")


def test_a_stranger_gets_the_recommender_by_automodel(saved, run_stranger, folder):
    facts = run_stranger(load, str(folder), "AutoModel", True)
    for name in PRESETS:
        check(facts[name], ["transformers_modules", "DeepSeekForRecommendation"], saved[name])
        config = json.loads((folder / name / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "recommendation_head.DeepSeekForRecommendation"
    again = run_stranger(load, str(folder / "again"), "AutoModel", True)  # what a stranger saved
    for name in PRESETS:
        check(again[name], ["transformers_modules", "DeepSeekForRecommendation"], saved[name])
