"""News recommendation in MIND's format, on simulated news: files, scores against plain ones, cold news, bad input."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.checkpoints.export import export_bundle
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.arguments import NewsArguments
from finetune_deepseek.recommendation.items.mind import prediction_text, read_behaviors, read_news
from finetune_deepseek.recommendation.news import NewsCollator, NewsRecommendation
from finetune_deepseek.recommendation.scores import impression_scores
from finetune_deepseek.recommendation.serving import load
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForRecommendation
from tests.small_runs import flags

from .simulated_news import news_line, write

SMALL = {
    "preset": "tiny_llm",
    "vocab_size": 300,
    "config_overrides": "initializer_range=0.1",
    "max_text_length": 8,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "warmup_steps": 0,
}


def news(**settings):
    return run_stages(NewsRecommendation, parse_command("news_recommendation", NewsArguments, flags(settings)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run on simulated news, tested on news that came later and on impressions that can't be scored."""
    folder = tmp_path_factory.mktemp("news")
    train = write(folder / "train", 1, 60)
    odd = ["98\tU98\t11/15/2019\t\tN101-1 N102-0", "99\tU99\t11/15/2019\tN101 N4711\tN101-0 N102-0"]
    test = write(folder / "test", 101, 20, seed=1, extra_impressions=odd)
    results = news(**SMALL, train_dir=train, test_dir=test, output_dir=folder / "out", max_steps=30)
    return folder, results


def test_topics_are_learned_and_hold_for_news_without_a_click(learned):
    folder, results = learned
    assert results["test_auc"] > 0.9 and results["test_cold_auc"] > 0.9
    assert results["test_cold_impressions"] == 21 and results["test_impressions_left_out"] == 1
    assert results["baseline_auc"] == 0.5  # no click on any of them in training
    assert results["test_auc_low"] <= results["test_auc"] <= results["test_auc_high"]
    card = (folder / "out" / "README.md").read_text()
    for line in (
        "test/behaviors.tsv: 1 impressions of users without a history",
        "test/behaviors.tsv: 1 news of histories are in no news.tsv and were left out",
        "test: 30 of 30 news are in no training impression or history",
        "test: 1 of 22 impressions have no click, or nothing else, and are left out of the scores",
    ):
        assert line in card
    lines = [json.loads(line) for line in (folder / "out" / "generated_predictions.jsonl").read_text().splitlines()]
    assert [len(line["prediction"]) for line in lines] == [len(line["candidates"]) for line in lines]


def test_a_saved_model_scores_the_same(learned, tmp_path):
    folder, results = learned
    again = news(
        model_name_or_path=folder / "out", test_dir=folder / "test", do_predict=True, do_train=False,
        output_dir=tmp_path / "out", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=5,
    )  # fmt: skip
    for name in ("auc", "mrr", "ndcg@5", "ndcg@10"):
        assert again[f"test_{name}"] == pytest.approx(results[f"test_{name}"], abs=1e-6)
    more = write(tmp_path / "more", 201, 4)
    extended = news(
        model_name_or_path=folder / "out", test_dir=more, do_predict=True, do_train=False,
        output_dir=tmp_path / "more_out", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert "30 items were added to the catalogue" in (tmp_path / "more_out" / "README.md").read_text()
    assert extended["test_auc"] > 0.7


def test_predictions_are_the_plain_products(learned):
    """The first test impression, each title alone through the trunk, without padding."""
    folder, _ = learned
    recommender = load(str(folder / "out"))
    model = recommender.model
    line = json.loads((folder / "out" / "generated_predictions.jsonl").read_text().splitlines()[0])
    texts, _ = read_news(str(folder / "test"), ["title"])

    def vector(item):
        eos = recommender.tokenizer.eos_token_id
        ids = [*recommender.tokenizer(texts[item], add_special_tokens=True)["input_ids"]]
        ids = ids if ids[-1] == eos else [*ids, eos]
        states = model.model(torch.tensor([ids])).last_hidden_state[0]
        return model.item_texts.projection.weight @ (sum(states) / len(states))

    with torch.no_grad():
        history = torch.stack([vector(item) for item in line["source"]])
        user = model.model(inputs_embeds=history[None]).last_hidden_state[0, -1]
        expected = [float(torch.dot(user, vector(item))) for item in line["candidates"]]
    assert line["prediction"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_new_items_are_recommended_and_saved(learned, tmp_path, capsys):
    folder, _ = learned
    recommender = load(str(folder / "out"))
    history = [item for item in recommender.items[1:] if item in read_news(str(folder / "train"), ["category"])[0]]
    sports = [item for item in history if read_news(str(folder / "train"), ["category"])[0][item] == "sports"][:3]
    recommender.add_items({"today": "team coach", 7: "soup bread"})
    best = [item for item, _ in recommender.recommend(sports, k=70)]
    assert best.index("today") < best.index("7")
    with pytest.raises(ValueError, match="item 'today' is in the catalogue already"):
        recommender.add_items({"today": "again"})
    with pytest.raises(ValueError, match="new item 'empty' has no text"):
        recommender.add_items({"empty": " "})
    recommender.save(tmp_path / "saved")
    assert load(str(tmp_path / "saved")).recommend(sports, k=70) == recommender.recommend(sports, k=70)
    shares = recommender.explain(sports, "today", steps=8)
    assert [item for item, _ in shares] == sports and any(share for _, share in shares)
    (tmp_path / "history.json").write_text(json.dumps(sports))
    (tmp_path / "new.json").write_text(json.dumps({"today": "team coach"}))
    arguments = ["--history", tmp_path / "history.json", "--new_items", tmp_path / "new.json", "--k", "70"]
    assert guarded(list(map(str, [folder / "out", *arguments])), "recommend") == 0
    assert "today" in json.loads(capsys.readouterr().out)["items"]


def test_a_bundle_brings_the_catalogue(learned, tmp_path):
    export_bundle(learned[0] / "out", tmp_path / "bundle")
    ours, bundled = load(str(learned[0] / "out")), load(str(tmp_path / "bundle"))
    assert bundled.items == ours.items
    assert bundled.recommend(ours.items[1:4], k=3)[0][0] == ours.recommend(ours.items[1:4], k=3)[0][0]


def test_an_adapter_is_learned(learned, tmp_path):
    folder, _ = learned
    results = news(
        **{name: SMALL[name] for name in ("use_cpu", "disable_tqdm", "warmup_steps")}, do_train=True, do_predict=True,
        model_name_or_path=folder / "out", train_dir=folder / "train", test_dir=folder / "test", max_steps=1,
        use_peft=True, lora_target=["attention"], output_dir=tmp_path / "adapter",
    )  # fmt: skip
    assert results["test_auc"] > 0.8 and results["parameters_trainable_share"] < 0.5


# -- the scores --


def plain_scores(scores, clicked):
    """By sorting and counting pairs, as MIND's evaluation describes it."""
    pairs = [(a, b) for a, c in zip(scores, clicked, strict=True) if c
             for b, d in zip(scores, clicked, strict=True) if not d]  # fmt: skip
    auc = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], clicked[number]))
    ranked = [clicked[number] for number in order]
    mrr = sum(click / rank for rank, click in enumerate(ranked, start=1)) / sum(ranked)
    found = {"auc": auc, "mrr": mrr}
    for k in (5, 10):
        gain = sum((2**click - 1) / math.log2(rank + 1) for rank, click in enumerate(ranked[:k], start=1))
        best = sorted(ranked, reverse=True)
        ideal = sum((2**click - 1) / math.log2(rank + 1) for rank, click in enumerate(best[:k], start=1))
        found[f"ndcg@{k}"] = gain / ideal
    return found


def test_impressions_are_scored_as_by_the_plain_way():
    from sklearn.metrics import ndcg_score, roc_auc_score

    rng = random.Random(0)
    for size in (2, 3, 7, 13, 30):
        for decimals in (0, 6):  # with ties, and without
            clicked = [1, 0, *(int(rng.random() < 0.3) for _ in range(size - 2))]
            rng.shuffle(clicked)
            scores = [round(rng.random() * 3, decimals) for _ in clicked]
            got = impression_scores(np.array(scores), np.array(clicked))
            assert got == pytest.approx(plain_scores(scores, clicked))
            assert got["auc"] == pytest.approx(roc_auc_score(clicked, scores))
            if decimals and size > 5:
                assert got["ndcg@5"] == pytest.approx(ndcg_score([clicked], [scores], k=5))
    for clicked in ([0, 0], [1, 1]):
        with pytest.raises(ValueError, match="one kind is missing"):
            impression_scores(np.zeros(2), np.array(clicked))
    assert impression_scores(np.array([np.nan, 1.0]), np.array([1, 0]))["auc"] == 0


def test_a_click_is_learned_against_others_of_its_impression():
    collate = NewsCollator(2, seed=0)
    features = [
        {"input_ids": [3, 4], "candidates": [5, 6, 7, 8], "click": 9, "number": 0},
        {"input_ids": [0], "candidates": [5], "click": 2, "number": 1},
    ]
    drawn = set()
    for epoch in range(40):
        collate.set_epoch(epoch)
        batch = collate(features)
        assert batch["candidates"][:, 0].tolist() == [9, 2] and batch["labels"].tolist() == [0, 0]
        assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]  # no history is one padding that is read
        assert batch["candidates"][1].tolist() == [2, 5, 0]
        drawn.add(tuple(sorted(batch["candidates"][0, 1:].tolist())))
    assert len(drawn) == 6  # every pair of the four


@pytest.mark.parametrize("workers", [0, 2])
def test_news_not_clicked_are_drawn_anew_in_each_epoch_and_alike_in_each_worker(workers):
    """Thirty equal impressions: each row has draws of its own, whichever worker reads it, also when resumed."""
    rows = [{"input_ids": [1], "candidates": list(range(5, 40)), "click": 9, "number": n} for n in range(30)]

    def epochs(first):
        collate = NewsCollator(3, seed=7)
        loader = DataLoader(
            rows, batch_size=5, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
        )
        for epoch in range(first, 3):
            collate.set_epoch(epoch)
            yield torch.cat([batch["candidates"] for batch in loader]).tolist()

    found, alone = list(epochs(0)), NewsCollator(3, seed=7)
    alone.set_epoch(2)
    assert found[0] != found[1] != found[2] and found[1:] == list(epochs(1))
    assert found[2] == [alone([row])["candidates"][0].tolist() for row in rows]
    assert len({tuple(row) for row in found[0]}) > 25


# -- the format --


def folder_of(tmp_path, news_lines, impressions):
    (tmp_path / "news.tsv").write_text("\n".join(news_lines))
    (tmp_path / "behaviors.tsv").write_text("\n".join(impressions))
    return str(tmp_path)


def test_gaps_in_news_are_counted(tmp_path):
    rng = random.Random(0)
    lines = [
        news_line(1, "food", rng, title="Soup\x85and bread"),  # which Python would take for the end of a line
        news_line(2, "food", rng, title="", abstract="Only an abstract."),
        news_line(3, "food", rng, title="", abstract=""),
        "N4\t\t\t\t\t\t\t",
        news_line(1, "food", rng, title="Again"),
    ]
    where = folder_of(tmp_path, lines, ["x"])
    texts, notes = read_news(where, ["title"])
    assert texts == {"N1": "Soup\x85and bread", "N2": "Only an abstract.", "N3": "food-sub", "N4": ""}
    assert [note.partition(": ")[2] for note in notes] == [
        "3 of 5 news without title",
        "1 news without any text; all of them get one vector",
        "1 lines with the id of a line before were left out",
    ]
    texts, _ = read_news(where, ["category", "title"])
    assert texts["N1"] == "food. Soup\x85and bread" and texts["N2"] == "food"


def test_gaps_in_behaviors_are_counted(tmp_path):
    where = folder_of(
        tmp_path, ["x"], ["1\tU1\tt\tN1 N9\tN1-0 N2-1", "2\tU1\tt\t\tN9-1 N1-0", "3\tU2\tt\tN9\tN1-0", ""]
    )
    rows, notes = read_behaviors(where, {"N1": "", "N2": ""})
    assert [row["source"] for row in rows] == [["N1"], [], []]
    assert rows[0]["candidates"] == ["N1", "N2"] and rows[0]["clicked"] == [0, 1] and rows[0]["target"] == ["N2"]
    assert [note.partition(": ")[2] for note in notes] == [
        "2 impressions of users without a history; they are told apart by nothing",
        "2 news of histories are in no news.tsv and were left out",
        "1 candidates are in no news.tsv; they rank last",
    ]


@pytest.mark.parametrize(
    ("news_lines", "impressions", "message"),
    [
        (["N1\tfood"], ["x"], r"news.tsv, row 1: 2 cells in a table of 8 columns"),
        ([], ["x"], r"news.tsv: the file is empty"),
        (["N1\ta\tb\tc\td"], ["1\tU\tt\tN1"], r"behaviors.tsv, row 1: 4 cells in a table of 5 columns"),
        (["N1\ta\tb\tc\td"], ["1\tU\tt\t\tN1 N2-0"], r"impression 1: 'N1' is not of the form N123-1, .* without l"),
        (["N1\ta\tb\tc\td"], ["1\tU\tt\t\tN1-2"], r"'N1-2' is not of the form N123-1"),
    ],
)
def test_other_forms_are_one_line(tmp_path, news_lines, impressions, message):
    where = folder_of(tmp_path, news_lines, impressions)
    with pytest.raises(ValueError, match=message) as error:
        read_behaviors(where, read_news(where, ["title"])[0])
    assert "\n" not in str(error.value)


def test_prediction_file_is_in_the_competitions_form():
    rows = [{"impression": "7"}, {"impression": "9"}, {"impression": "11"}]
    text = prediction_text(rows, [[0.1, 0.9, 0.5], [2.0, float("nan"), 3.0, 2.0], [0.0]])
    assert text == "7 [3,1,2]\n9 [2,4,1,3]\n11 [1]\n"


def test_a_split_without_labels_is_predicted_and_not_scored(learned, tmp_path):
    lines = (learned[0] / "test" / "behaviors.tsv").read_text().splitlines()[:3]
    where = folder_of(tmp_path, (learned[0] / "test" / "news.tsv").read_text().splitlines(), lines)
    again = {"model_name_or_path": learned[0] / "out", "use_cpu": True, "disable_tqdm": True, "do_predict": True}
    scored = news(**again, test_dir=where, output_dir=tmp_path / "scored")
    bare = [line.replace("-0", "").replace("-1", "") for line in lines]
    (tmp_path / "behaviors.tsv").write_text("\n".join(bare))
    results = news(**again, test_dir=where, output_dir=tmp_path / "bare")
    assert "test_auc" in scored and not [name for name in results if "auc" in name]
    found = (tmp_path / "bare" / "prediction.txt").read_text()
    assert found == (tmp_path / "scored" / "prediction.txt").read_text()
    for line, impression in zip(found.splitlines(), lines, strict=True):
        number, _, ranks = line.partition(" ")
        shown = impression.split("\t")[4].split()
        assert number == impression.split("\t")[0] and sorted(json.loads(ranks)) == list(range(1, len(shown) + 1))
    with pytest.raises(ValueError, match=r"--validation_dir .*: impressions without labels .* --test_dir"):
        news(**again | {"do_predict": False, "do_eval": True}, validation_dir=where, output_dir=tmp_path / "out")


def test_what_cant_be_read_or_learned_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"news.tsv: no such file"):
        read_news(str(tmp_path), ["title"])
    (tmp_path / "news.tsv").write_bytes(b"N1\ta\tb\tc\td\nN2\t\xff")
    with pytest.raises(ValueError, match=r"news.tsv, line 2: can't be read as UTF-8"):
        read_news(str(tmp_path), ["title"])
    where = folder_of(tmp_path, ["N1\ta\tb\tc\td"], ["1\tU\tt\t\tN1-0"])
    with pytest.raises(ValueError, match="No impression has both a click and news that weren't clicked; nothing to l"):
        news(**SMALL, train_dir=where, output_dir=tmp_path / "out", max_steps=1)
    made = NewsRecommendation(NewsArguments(test_dir=where), 0)
    with pytest.raises(ValueError, match="nothing can be scored"):
        made.score([[0.5]], [{"clicked": [0]}])
    with pytest.raises(ValueError, match="--label_smoothing_factor"):
        made.loss_function(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "news_recommendation needs data: name MIND's folders by --train_dir"),
        ({"test_dir": "x", "num_non_clicks": 0}, "--num_non_clicks 0: it must be 1 or more"),
        ({"test_dir": "x", "max_predict_samples": 0}, "--max_predict_samples 0"),
        ({"test_dir": "x", "text_fields": ["titel"]}, "--text_fields titel: no such field; choose from title"),
    ],
)
def test_bad_flags_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        NewsArguments(**settings)


def test_a_language_model_reads_titles(tmp_path):
    from modeling_deepseek import DeepSeekForCausalLM
    from tests.modeling.conftest import tiny

    tiny("tiny_llm", DeepSeekForCausalLM).save_pretrained(tmp_path / "llm")
    made = NewsRecommendation(NewsArguments(train_dir=str(write(tmp_path / "train", 1, 3))), 0)
    fields = made.config_fields(made.load_splits(), {"model_type": "deepseek"})
    model = DeepSeekForRecommendation.from_pretrained(tmp_path / "llm", **fields)
    assert model.config.num_items == 1 and model.config.item_text_length == 32
