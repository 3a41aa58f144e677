"""Tables of counted items: those of the baselines, the weights that validation chooses, and a whole run."""

import json

import numpy as np
import pytest
import torch
from scipy import sparse

from configuration_deepseek import preset
from finetune_deepseek.recommendation.arguments import RecommendationArguments
from finetune_deepseek.recommendation.baselines import ItemKNN, Transitions
from finetune_deepseek.recommendation.count_tables import WEIGHTS, best_count_weights, count_items, largest
from finetune_deepseek.recommendation.recommender import Recommender
from finetune_deepseek.recommendation.serving import load
from modeling_deepseek import DeepSeekForRecommendation
from modeling_deepseek.item_counts import NO_ITEM

from .test_recommendation import SMALL, recommendation, write_ring

ITEMS = 12


def histories(users=9, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.permutation(np.arange(1, ITEMS))[: draw.integers(2, 8)].tolist() for _ in range(users)]


def test_scores_are_those_of_the_baselines():
    """With all entries kept and the whole history read, up to the scale and the order of what comes equally often."""
    train, asked = histories(), histories(4, seed=1)
    config = preset("tiny_llm", vocab_size=ITEMS, pad_token_id=0, num_item_neighbors=ITEMS, item_neighbor_window=ITEMS)
    model = DeepSeekForRecommendation(config)
    model.item_counts.fill(*count_items(train, ITEMS, ITEMS))
    rows = torch.tensor([row + [0] * (ITEMS - len(row)) for row in asked])
    near, after = (scores.numpy() for scores in model.item_counts.scores(rows))
    expected = ItemKNN(train, ITEMS).scores(asked)
    np.testing.assert_allclose(near, expected / expected.max(1, keepdims=True), rtol=1e-5, atol=1e-7)
    counts = Transitions(train, ITEMS).counts[[row[-1] for row in asked]].toarray()
    np.testing.assert_allclose(after, np.log1p(counts), rtol=1e-6)
    assert after.any()


def test_the_largest_entries_are_kept():
    columns, values = largest(sparse.csr_matrix([[0, 3, 1, 2], [0, 0, 0, 0], [5, 0, 0, 0]], dtype=np.float32), 2)
    assert columns.tolist() == [[1, 3], [NO_ITEM, NO_ITEM], [0, NO_ITEM]]
    assert values.tolist() == [[3, 2], [0, 0], [5, 0]]


def test_weights_are_chosen_by_hits_then_by_ranks():
    ranks = np.full((2, len(WEIGHTS)), 20)
    ranks[0, [3, 7]] = 9, 2
    weights, scores = best_count_weights(ranks)
    assert weights == WEIGHTS[7] and scores["hr@10"] == 0.5
    ranks[:, 5] = 10
    assert best_count_weights(ranks)[0] == WEIGHTS[5]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    settings = SMALL | {
        "interactions_file": write_ring(folder / "ring.csv"),
        "item_counts": True,
        "learning_rate": 1e-9,
    }
    return folder, recommendation(**settings, max_steps=1, output_dir=folder / "out")


def test_a_run_counts_chooses_and_saves(counted, tmp_path):
    """Nothing is learned here, but the next item of the ring always followed the last one."""
    folder, results = counted
    assert results["test_ndcg@10"] == results["eval_ndcg@10"] == 1 and results["item_transition_weight"] > 0
    config = json.loads((folder / "out/config.json").read_text())
    assert config["item_transition_weight"] == results["item_transition_weight"]
    assert "auto_map" in config and config["architectures"] == ["DeepSeekForRecommendation"]
    assert "of 25 weights of what is counted validation HR@10 chose" in (folder / "out/README.md").read_text()
    rows = (folder / "out/generated_predictions.jsonl").read_text().splitlines()
    recommender = load(str(folder / "out"))
    for line in rows[:3]:
        row = json.loads(line)
        best = [item for item, _ in recommender.recommend(row["source"], k=3)]
        assert row["prediction"]["items"][:3] == best and row["target"] == best[0]
    again = recommendation(
        model_name_or_path=folder / "out", interactions_file=folder / "ring.csv", do_train=False, do_predict=True,
        output_dir=tmp_path / "out", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert again["test_ndcg@10"] == pytest.approx(results["test_ndcg@10"])


def test_what_counts_cant_do_is_one_line(counted, tmp_path):
    folder, _ = counted
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="is searched exactly; use index='exact'"):
        load(str(folder / "out"), index="faiss")
    with pytest.raises(ValueError, match="--item_counts: a saved model keeps its own"):
        recommendation(model_name_or_path=folder / "out", interactions_file=folder / "ring.csv", item_counts=True,
                       output_dir=tmp_path / "out", use_cpu=True)  # fmt: skip
    with pytest.raises(ValueError, match="--item_counts: SASRec has none"):
        RecommendationArguments(item_counts=True, sasrec=True)


def test_an_explanation_is_of_what_is_learned(counted):
    recommender = load(str(counted[0] / "out"))
    assert isinstance(recommender, Recommender)
    history = recommender.items[1:4]
    shares = recommender.explain(history, recommender.items[5], steps=64)
    numbers = torch.tensor([[recommender.numbers[item] for item in history]])
    model = recommender.model
    with torch.no_grad():
        average = model.read_items(torch.arange(model.config.vocab_size)).mean(0).expand(1, 3, -1)
        mask = torch.ones_like(numbers)
        scores = [
            model(inputs_embeds=read, attention_mask=mask).logits[0, 5]
            for read in (model.read_items(numbers), average)
        ]
    assert sum(share for _, share in shares) == pytest.approx(float(scores[0] - scores[1]), abs=1e-3)
