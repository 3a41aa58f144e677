"""The recommendation task and the verb `recommend`, on users who walk around a ring of items."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import finetune_deepseek
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.arguments import RecommendationArguments
from finetune_deepseek.recommendation.baselines import baseline_ranks, baselines_of
from finetune_deepseek.recommendation.items.catalogue import item_tokenizer
from finetune_deepseek.recommendation.items.interactions import as_dataset
from finetune_deepseek.recommendation.recommender import Recommender
from finetune_deepseek.recommendation.report import read_ranks, run_names
from finetune_deepseek.recommendation.sasrec import SASRecForRecommendation
from finetune_deepseek.recommendation.serving import load
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.scoring.ranks import ranks
from modeling_deepseek import AutoModelForRecommendation, DeepSeekForRecommendation
from tests.small_runs import flags

EXAMPLE = Path(finetune_deepseek.__file__).parent / "examples" / "recommendation.yaml"
RING = 12
SMALL = {
    "preset": "tiny_llm",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "warmup_steps": 0,
}


def item(number):
    return f"item {number % RING}"


def write_ring(path, users=24, length=7):
    """Each user goes from some item to the next and the next."""
    rows = [f"u{user},{item(user * 5 + step)},{step}" for user in range(users) for step in range(length)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows))
    return path


def recommendation(argv=(), **settings):
    return run_stages(
        Recommendation, parse_command("recommendation", RecommendationArguments, [*argv, *flags(settings)])
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learned the ring, and its results."""
    folder = tmp_path_factory.mktemp("ring")
    path = write_ring(folder / "ring.csv")
    results = recommendation(**SMALL, interactions_file=path, output_dir=folder / "out", max_steps=60)
    return folder, results


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_name"])
def test_a_data_set_has_two_flags(flag):
    argv = ["--preset", "tiny_llm", flag, "ml-100k", "--output_dir", "out"]
    (stage,) = parse_command("recommendation", RecommendationArguments, argv)
    assert stage.data.dataset_name == "ml-100k" and "dataset_name" in stage.given


def test_the_ring_is_learned(learned):
    folder, results = learned
    assert results["test_hr@5"] == 1 and results["test_ndcg@10"] > 0.9
    assert results["eval_hr@10"] == 1
    assert results["test_hr@10_low"] == 1
    assert results["popularity_ndcg@10"] == results["baseline_ndcg@10"] < results["transitions_ndcg@10"]
    assert results["above_popularity_ndcg@10"] == pytest.approx(
        results["test_ndcg@10"] - results["popularity_ndcg@10"]
    )
    assert results["above_popularity_ndcg@10_p"] < 0.01
    assert results["test_ranking_signature"] == "full ranking of 12 items, history excluded, ties against us"
    assert results["test_samples"] == results["eval_samples"] == 24


def test_files_of_a_run(learned):
    folder, results = learned
    out = folder / "out"
    lines = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert lines[0]["user"] == "u0" and lines[0]["target"] == item(6) and len(lines[0]["source"]) == 6
    assert lines[0]["prediction"]["items"][lines[0]["prediction"]["rank"] - 1] == item(6)
    assert not set(lines[0]["source"]) & set(lines[0]["prediction"]["items"])
    ranks = pd.read_csv(out / "user_ranks.csv")
    assert list(ranks) == ["user", "target", "rank", "popularity", "transitions", "item_knn"]
    assert ranks["rank"].tolist() == [line["prediction"]["rank"] for line in lines]
    assert np.mean(ranks["rank"] <= 10) == results["test_hr@10"]
    card = (out / "README.md").read_text()
    assert "AutoModelForRecommendation.from_pretrained" in card and "| popularity |" in card
    assert "24 users, 12 items, 168 interactions" in card


def test_the_saved_folder_opens(learned):
    out = learned[0] / "out"
    model = AutoModelForRecommendation.from_pretrained(out)
    assert type(model) is DeepSeekForRecommendation and model.config.vocab_size == RING + 1
    assert model.config.pad_token_id == 0 and model.config.max_position_embeddings == 50
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        assert loader.from_pretrained(out).get_vocab() == PreTrainedTokenizerFast.from_pretrained(out).get_vocab()
    with pytest.warns(UserWarning, match="use DeepSeekForRecommendation.from_pretrained"):
        AutoModel.from_pretrained(out)


def test_evaluate_predict_and_training_on(learned, tmp_path):
    folder, results = learned
    again = {"model_name_or_path": folder / "out", "use_cpu": True, "disable_tqdm": True}
    data = {"interactions_file": folder / "ring.csv"}
    scored = recommendation(**again, **data, output_dir=tmp_path / "a", do_train=False, do_predict=True)
    assert scored["test_hr@5"] == results["test_hr@5"] and "test_loss" in scored
    more = recommendation(**again, **data, output_dir=tmp_path / "b", max_steps=2, do_train=True)
    assert more["train_samples"] == 24


def test_new_items_of_another_file_are_counted(learned, tmp_path, capsys):
    folder, _ = learned
    rows = [{"items": [item(1), "new"], "target": item(2)}, {"items": [item(4)], "target": "newer"}]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    results = recommendation(
        model_name_or_path=folder / "out", test_file=path, output_dir=tmp_path / "out", use_cpu=True, disable_tqdm=True
    )
    out = capsys.readouterr().out
    assert "left out 1 items of histories that are not in the model's catalogue" in out
    assert "1 of 2 targets are not in the model's catalogue; they rank last" in out
    assert results["test_samples"] == 2 and results["test_hr@10"] == 0.5 and "popularity_hr@10" not in results


def test_sasrec_is_trained_on_the_same_path_and_compared(learned, tmp_path):
    folder, results = learned
    data = {"interactions_file": folder / "ring.csv"}
    other = recommendation(**SMALL, **data, output_dir=tmp_path / "sasrec", sasrec=True, max_steps=60)
    assert other["test_hr@5"] == 1
    model = AutoModelForRecommendation.from_pretrained(tmp_path / "sasrec")
    assert type(model) is SASRecForRecommendation and model.config.hidden_size == 32
    assert load(str(tmp_path / "sasrec")).recommend([item(3), item(4)], k=1)[0][0] == item(5)
    compared = recommendation(
        model_name_or_path=folder / "out", **data, compare_with=[tmp_path / "sasrec"], do_predict=True, do_train=False,
        output_dir=tmp_path / "out", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert compared["sasrec_ndcg@10"] == pytest.approx(other["test_ndcg@10"])
    assert compared["above_sasrec_ndcg@10"] == pytest.approx(results["test_ndcg@10"] - other["test_ndcg@10"])


def test_each_run_that_is_compared_keeps_its_name(tmp_path):
    folders = [tmp_path / name for name in ("a/model", "b/model", "popularity", "test", "c/other")]
    found = list(run_names(list(map(str, folders))).values())
    root = tmp_path.name
    assert found == ["a/model", "b/model", f"{root}/popularity", f"{root}/test", "other"]
    with pytest.raises(ValueError, match="a run is named twice"):
        run_names([str(folders[0]), f"{folders[0]}/"])


def test_runs_of_one_name_are_both_compared(learned, tmp_path):
    """Two of the name of a baseline, which keeps its own; the second with every target last."""
    folder, results = learned
    ranks = pd.read_csv(folder / "out" / "user_ranks.csv", dtype={"user": str})
    for name, column in (("a", ranks["rank"]), ("b", 999)):
        (tmp_path / name / "popularity").mkdir(parents=True)
        ranks.assign(rank=column).to_csv(tmp_path / name / "popularity" / "user_ranks.csv", index=False)
    compared = recommendation(
        model_name_or_path=folder / "out", interactions_file=folder / "ring.csv", do_predict=True, do_train=False,
        compare_with=[tmp_path / "a" / "popularity", tmp_path / "b" / "popularity"],
        output_dir=tmp_path / "out", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert compared["a/popularity_ndcg@10"] == pytest.approx(results["test_ndcg@10"])
    assert compared["b/popularity_ndcg@10"] == 0
    assert compared["popularity_ndcg@10"] == results["popularity_ndcg@10"] == compared["baseline_ndcg@10"]


def test_sasrec_equals_a_plain_one():
    """Against torch's own encoder layers with the same weights."""
    from finetune_deepseek.recommendation.sasrec import SASRecConfig

    torch.manual_seed(0)
    config = SASRecConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, max_position_embeddings=6)
    model = SASRecForRecommendation(config).eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    hidden = model.embed_tokens(ids) * 8**0.5 + model.embed_positions.weight[:4]
    mask = torch.full((4, 4), float("-inf")).triu(1)
    for block in model.layers:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True, norm_first=True, layer_norm_eps=1e-8)
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv_proj.weight, "self_attn.in_proj_bias": block.qkv_proj.bias,
                "self_attn.out_proj.weight": block.o_proj.weight, "self_attn.out_proj.bias": block.o_proj.bias,
                "linear1.weight": block.up_proj.weight, "linear1.bias": block.up_proj.bias,
                "linear2.weight": block.down_proj.weight, "linear2.bias": block.down_proj.bias,
                "norm1.weight": block.input_layernorm.weight, "norm1.bias": block.input_layernorm.bias,
                "norm2.weight": block.post_attention_layernorm.weight,
                "norm2.bias": block.post_attention_layernorm.bias,
            }
        )  # fmt: skip
        hidden = layer.train()(hidden, src_mask=mask)
    last = model.norm(hidden)[[0, 1], [3, 1]]
    got = model(ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(got, last @ model.embed_tokens.weight.T, rtol=1e-5, atol=1e-6)


def test_lora_on_a_recommender(learned, tmp_path):
    folder, _ = learned
    results = recommendation(
        model_name_or_path=folder / "out", interactions_file=folder / "ring.csv", output_dir=tmp_path, use_peft=True,
        lora_target=["attention"], max_steps=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert results["test_hr@5"] == 1 and results["parameters_trainable_share"] < 0.5


def test_long_histories_are_learned_whole(tmp_path):
    made = Recommendation(RecommendationArguments(max_length=4), seed=0)
    rows = as_dataset([{"user": "a", "source": [item(n) for n in range(11)], "target": None}])
    catalogue = item_tokenizer({item(n) for n in range(RING)}, 0)
    features = made.features(rows, catalogue, is_training=True)
    numbers = catalogue.convert_tokens_to_ids(rows[0]["source"])
    assert list(features["input_ids"]) == [numbers[6:11], numbers[2:7], numbers[0:3]]
    batch = made.collator(catalogue)(list(features))
    learned = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(learned) == sorted(numbers[1:])  # each once


def test_item_numbers_carry_no_order():
    items = [f"{n:04}" for n in range(400)]
    catalogue = item_tokenizer(set(items), 0)
    numbers = np.array(catalogue.convert_tokens_to_ids(items))
    assert sorted(numbers) == list(range(1, 401)) and catalogue.pad_token_id == 0
    assert abs(np.corrcoef(numbers, np.arange(400))[0, 1]) < 0.15
    assert item_tokenizer(set(items), 0).get_vocab() == catalogue.get_vocab()
    assert item_tokenizer(set(items), 1).get_vocab() != catalogue.get_vocab()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interactions_file": "a", "dataset_name": "b"}, "are ways to name data; use one"),
        ({"k_core": 0}, "--k_core 0: it must be 1 or more"),
        ({"max_length": 1}, "--max_length 1"),
        ({"time_share": 0.5}, "--time_share 0.5"),
    ],
)
def test_bad_flags_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        RecommendationArguments(**settings)


def test_what_cant_be_trained_on_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="The catalogue has 1 items"):
        item_tokenizer({"a"}, 0)
    with pytest.raises(ValueError, match="An item is named <padding>"):
        item_tokenizer({"a", "<padding>"}, 0)
    with pytest.raises(ValueError, match="--compare_with .*: no user_ranks.csv of a scored run there"):
        read_ranks(str(tmp_path))
    path = write_ring(tmp_path / "short.csv", users=3, length=2)
    with pytest.raises(ValueError, match="No user has enough interactions"):
        recommendation(**SMALL, interactions_file=path, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="--label_smoothing_factor"):
        Recommendation(RecommendationArguments(), 0).loss_function(0.1)


def test_a_run_of_other_users_is_refused_before_training(tmp_path, monkeypatch):
    path = write_ring(tmp_path / "ring.csv")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/user_ranks.csv").write_text("user,target,rank\nnobody,1,1\n")
    monkeypatch.setattr("finetune_deepseek.training.run.train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match="--compare_with other: that run has scored other users"):
        recommendation(**SMALL, interactions_file=path, output_dir=tmp_path / "out", compare_with=[tmp_path / "other"])


def test_the_example_runs_small(tmp_path):
    small = {"num_train_epochs": 1, "max_train_samples": 60, "max_eval_samples": 30, "max_predict_samples": 40}
    argv = [str(EXAMPLE), *flags({"output_dir": tmp_path, "use_cpu": True, "disable_tqdm": True} | small)]
    results = recommendation(argv)
    assert results["test_samples"] == 40
    for name in ("popularity", "transitions", "item_knn", "sasrec"):
        assert {f"{name}_hr@10", f"above_{name}_ndcg@10_p"} <= set(results)
    assert "simulated users" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_s3rec_files_are_read_as_published():
    data = os.environ.get("DEEPSEEK_HF_DATA")
    if not data or not (Path(data) / "lastfm_s3rec").is_dir():
        pytest.skip("DEEPSEEK_HF_DATA names no folder with lastfm_s3rec")
    made = Recommendation(RecommendationArguments(data_dir=str(Path(data) / "lastfm_s3rec")), seed=0)
    splits = made.load_splits()
    assert {name: len(rows) for name, rows in splits.items()} == dict.fromkeys(splits, 1090)
    assert len(set(made.tokenizer_texts(splits))) == 3646
    assert sum(map(len, splits["train"]["source"])) + 2 * 1090 == 52551
    catalogue = made.new_tokenizer(None, splits)
    made.features(splits["test"], catalogue, is_training=False)
    ranks = baselines_of(splits["train"], list(splits["test"]), made.numbers)
    measured = {"popularity": (0.0385, 0.0180), "transitions": (0.0422, 0.0235), "item_knn": (0.0890, 0.0434)}
    for name, (hit, gain) in measured.items():
        scores = made.score([{"rank": rank} for rank in ranks[name]], [])
        assert [scores["hr@10"], scores["ndcg@10"]] == pytest.approx([hit, gain], abs=0.0001), name
    # The published .0440 / .0203 of popularity counts the validation items too.
    histories = [[catalogue.get_vocab()[item] for item in row] for row in splits["test"]["source"]]
    targets = [catalogue.get_vocab()[item] for item in splits["test"]["target"]]
    known = made.score([{"rank": r} for r in baseline_ranks(histories, histories, targets, 3647)["popularity"]], [])
    assert [known["hr@10"], known["ndcg@10"]] == pytest.approx([0.0440, 0.0203], abs=0.0003)


# -- the verb --


def run_verb(capsys, *argv):
    code = guarded(list(map(str, argv)), "recommend")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_recommend_prints_lines(learned, tmp_path, capsys):
    histories = tmp_path / "items.json"
    histories.write_text(
        json.dumps({"ann": [item(3), item(4)], "bob": [item(0), "unheard of"], "eve": ["unheard of"]})
    )
    code, out, err = run_verb(capsys, learned[0] / "out", "--history", histories, "--k", 3)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["user"] for line in lines] == ["ann", "bob"]
    assert lines[0]["items"][0] == item(5) and lines[1]["items"][0] == item(1)
    assert lines[0]["scores"] == sorted(lines[0]["scores"], reverse=True) and len(lines[0]["items"]) == 3
    assert "left out 2 items" in err and "1 of 3 users have no known item and get nothing, first 'eve'" in err


def test_recommend_prints_utf8_to_a_pipe_of_another_encoding(learned, tmp_path, monkeypatch):
    (tmp_path / "items.json").write_text(json.dumps({"Zoë 安": [item(3)]}))
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, "cp1252"))
    assert guarded([str(learned[0] / "out"), "--history", str(tmp_path / "items.json")], "recommend") == 0
    assert json.loads(pipe.getvalue())["user"] == "Zoë 安"


def test_recommend_one_history_with_a_filter(learned, tmp_path, capsys):
    (tmp_path / "items.json").write_text(json.dumps([item(3), item(4)]))
    (tmp_path / "allowed.txt").write_text(f"{item(9)}\n{item(3)}\n")
    arguments = (learned[0] / "out", "--history", tmp_path / "items.json", "--filter", tmp_path / "allowed.txt")
    assert json.loads(run_verb(capsys, *arguments)[1])["items"] == [item(9)]
    with_seen = json.loads(run_verb(capsys, *arguments, "--exclude_seen", "false")[1])
    assert sorted(with_seen["items"]) == [item(3), item(9)]


def test_recommend_by_faiss_prints_the_same(learned, tmp_path, capsys):
    (tmp_path / "items.json").write_text(json.dumps([item(3), item(4)]))
    arguments = (learned[0] / "out", "--history", tmp_path / "items.json", "--k", 4)
    exact = json.loads(run_verb(capsys, *arguments)[1])
    found = json.loads(run_verb(capsys, *arguments, "--index", "faiss")[1])
    assert found["items"] == exact["items"] and found["scores"] == pytest.approx(exact["scores"], rel=1e-5)


def test_a_large_catalogue_is_scored_for_few_users_at_once(learned, tmp_path, capsys, monkeypatch):
    arguments = (learned[0] / "out", "--history", learned[0] / "ring.csv", "--k", 2)
    whole = run_verb(capsys, *arguments)[1]
    monkeypatch.setattr("finetune_deepseek.recommendation.requests.SCORES_AT_ONCE", 3 * RING)
    lines = run_verb(capsys, *arguments)[1].splitlines()
    for ours, theirs in zip(map(json.loads, lines), map(json.loads, whole.splitlines()), strict=True):
        assert ours["items"] == theirs["items"] and ours["scores"] == pytest.approx(theirs["scores"], rel=1e-5)


def test_a_whole_user_base_goes_to_parquet(learned, tmp_path, capsys):
    folder = learned[0]
    output = tmp_path / "all.parquet"
    code, out, err = run_verb(
        capsys, folder / "out", "--history", folder / "ring.csv", "--output", output, "--batch_size", 5, "--k", 2
    )
    assert code == 0 and "48 recommendations for 24 users" in out and "recommend: 100%" in err
    table = pd.read_parquet(output)
    assert list(table) == ["user", "rank", "item", "score"] and len(table) == 48
    first = table[table["rank"] == 1].set_index("user")["item"]
    assert sum(first[f"u{user}"] == item(user * 5 + 7) for user in range(24)) > 12  # one place further than trained
    assert not list(tmp_path.glob(".*"))


def test_explanations(learned, tmp_path, capsys):
    recommender = load(str(learned[0] / "out"))
    history = [item(3), item(4)]
    best = recommender.recommend(history, k=1)[0][0]
    shares = dict(recommender.explain(history, best, steps=200))
    with torch.no_grad():
        average = recommender.model.get_input_embeddings().weight.mean(0).expand(1, 2, -1)
        numbers = torch.tensor([recommender.number(history)[0]])
        target = recommender.numbers[best]
        whole = recommender.model(numbers).logits[0, target]
        empty = recommender.model(inputs_embeds=average, attention_mask=torch.ones(1, 2)).logits[0, target]
    assert sum(shares.values()) == pytest.approx(float(whole - empty), rel=0.01)
    assert shares[item(4)] > shares[item(3)]  # on the ring the last item decides
    weights = dict(recommender.explain(history, best, "attention"))
    assert list(weights) == history and sum(weights.values()) == pytest.approx(1, abs=1e-4)
    (tmp_path / "items.json").write_text(json.dumps(history))
    code, out, _ = run_verb(
        capsys, learned[0] / "out", "--history", tmp_path / "items.json", "--explain", "integrated_gradients"
    )
    shown = json.loads(out)["integrated_gradients"]
    assert code == 0 and shown["of"] == best and list(shown["history"]) == [item(4), item(3)]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('["x"]', [], "No history holds an item that the model knows"),
        ('["item 1"]', ["--k", "0"], "--k 0: it must be 1 or more"),
        ('["item 1"]', ["--kk", "3"], "unexpected argument '--kk' (did you mean '--k'?)"),
        ('["item 1"]', ["--filter", "{folder}/none"], "no such file"),
        ('["item 1"]', ["--filter", "{folder}/empty.txt"], "names no item"),
        ('["item 1"]', ["--filter", "{folder}/other.txt"], "the filter leaves nothing: none of its 1 items"),
        ('["item 1"', [], "broken JSON"),
        ('["item 1"]', ["--output", "{folder}/none/out.parquet"], "no such folder to write to"),
        ('{"": ["item 1"], "b": ["item 2"]}', [], "a user without a name; mend the file"),
        ('{"b ": ["item 1"], "b": ["item 2"]}', [], "2 histories of user 'b'; keep one"),
        ('["item 1"]', ["--new_items", "{folder}/nameless.json"], "an item without an id; name it"),
        (None, [], "no such file"),
    ],
)
def test_bad_requests_are_one_line(learned, tmp_path, capsys, content, more, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.txt").write_text("nothing we have\n")
    (tmp_path / "nameless.json").write_text('{" ": "a text"}')
    if content is not None:
        (tmp_path / "items.json").write_text(content)
    more = [argument.format(folder=tmp_path) for argument in more]
    code, out, err = run_verb(capsys, learned[0] / "out", "--history", tmp_path / "items.json", *more)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("deepseek-hf: error:") and message in last


def test_a_history_is_refused_in_python(learned):
    recommender = load(str(learned[0] / "out"))
    assert isinstance(recommender, Recommender)
    with pytest.raises(ValueError, match="history 0 has 1 items, none of which the model knows"):
        recommender.recommend(["unheard of"])
    rows = recommender.recommend([[item(1)], [item(2)]], k=1)
    assert [row[0][0] for row in rows] == [item(2), item(3)]


# -- items of text --


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The ring again, each item described by a text, and a run that has read them."""
    folder = tmp_path_factory.mktemp("texts")
    ring = write_ring(folder / "ring.csv", users=12)
    rows = [{"item_id": item(n), "title": f"word{n}", "tags": [f"tag{n // 2}", "all"]} for n in range(RING - 1)]
    rows += [{"item_id": "cold", "title": "word5", "tags": ["tag2", "all"]}, {"item_id": item(1), "title": "again"}]
    rows += [{"item_id": None, "title": "nobody"}, {"item_id": "mute", "title": None}]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = recommendation(
        **SMALL | {"learning_rate": 0.005}, interactions_file=ring, items_file=folder / "items.jsonl",
        text_columns=["title", "tags"], vocab_size=320, max_text_length=12, output_dir=folder / "out", max_steps=50,
        config_overrides="initializer_range=0.1",
    )  # fmt: skip
    return folder, results


def test_items_of_text_are_learned_and_a_cold_one_goes_with_its_words(texts):
    folder, results = texts
    assert results["test_hr@5"] == 1 and "popularity_hr@10" in results
    assert "full ranking of 14 items" in results["test_ranking_signature"]  # the cold and the mute one are there too
    recommender = load(str(folder / "out"))
    best = [name for name, _ in recommender.recommend([item(3), item(4)], k=3)]
    assert {item(5), "cold"} <= set(best)
    recommender.add_items({"new": "word5. tag2, all"})
    scores = dict(recommender.recommend([item(3), item(4)], k=14))
    assert scores["new"] == pytest.approx(scores["cold"], rel=1e-4)
    card = (folder / "out" / "README.md").read_text()
    for line in (
        "items.jsonl: 1 rows without an item id were left out",
        "items.jsonl: 1 rows with the id of a row before were left out",
        "items.jsonl: 1 items without any text; all of them get one vector",
        "1 items of the interactions have no row in items.jsonl",
        "14 items were added to the catalogue, 0 of them cut",
    ):
        assert line in card


def test_a_model_of_texts_is_scored_again_with_its_texts(texts, tmp_path):
    folder, results = texts
    settings = {
        "model_name_or_path": folder / "out", "interactions_file": folder / "ring.csv", "do_train": False,
        "do_predict": True, "output_dir": tmp_path / "out", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    again = recommendation(**settings, items_file=folder / "items.jsonl", text_columns=["title", "tags"])
    assert again["test_ndcg@10"] == pytest.approx(results["test_ndcg@10"])
    with pytest.raises(ValueError, match="The items of this model are texts: name them by --items_file"):
        recommendation(**settings | {"output_dir": tmp_path / "other"})


def test_items_of_text_begin_with_an_svd_where_they_have_vectors_of_their_own(texts, tmp_path, capsys):
    folder, _ = texts
    settings = SMALL | {
        "interactions_file": folder / "ring.csv", "items_file": folder / "items.jsonl", "text_columns": ["title"],
        "vocab_size": 320, "max_text_length": 12, "output_dir": tmp_path / "out", "max_steps": 1,
        "learning_rate": 1e-9, "init_items": "svd",
    }  # fmt: skip
    with pytest.raises(ValueError, match="item_id_embeddings=true; add it"):
        recommendation(**settings)
    recommendation(**settings, config_overrides="item_id_embeddings=true,item_text_encoder=bag_of_words")
    assert "SVD of the training histories and the items' words" in capsys.readouterr().out
    recommender = load(str(tmp_path / "out"))
    vectors = recommender.model.item_texts.identities.weight
    cold, same_title = (vectors[recommender.numbers[name]] for name in ("cold", item(5)))
    assert cold @ same_title > 0.2 * cold.norm() * same_title.norm() > 0  # nobody had it, but its title is item 5's


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"item_id": null, "title": "x"}', {}, "items.jsonl: no items"),
        ('{"item": 1, "title": "x"}', {}, "no column 'item_id'.*Set --item_column"),
        ('{"item_id": 1, "titel": "x"}', {}, r"no column 'title'.*Set --text_columns \(did you mean"),
        ('{"item_id": "<padding>", "title": "x"}', {}, "An item is named <padding>"),
        ('{"item_id": 1, "title": "x"}', {"sasrec": True}, "--items_file: SASRec reads no texts"),
    ],
)
def test_texts_that_cant_be_used_are_one_line(tmp_path, content, settings, message):
    (tmp_path / "items.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Recommendation(RecommendationArguments(items_file=str(tmp_path / "items.jsonl"), **settings), 0).load_splits()
    assert "\n" not in str(error.value)


def test_sasrec_says_that_it_cant_be_explained():
    from finetune_deepseek.recommendation.sasrec import SASRecConfig

    recommender = Recommender(SASRecForRecommendation(SASRecConfig(vocab_size=3)), item_tokenizer({"a", "b"}, 0))
    with pytest.raises(ValueError, match="SASRecForRecommendation can't be explained"):
        recommender.explain(["a"], "b")


def test_bfloat16_training_is_scored_in_float32(tmp_path, monkeypatch):
    """bfloat16 scores would tie by the thousand, and a tie counts against the target."""
    seen = []
    monkeypatch.setattr(
        "finetune_deepseek.recommendation.task.ranks",
        lambda scores, *rest: seen.append(torch.any(scores != scores.bfloat16())) or ranks(scores, *rest),
    )
    path = write_ring(tmp_path / "ring.csv")
    recommendation(**SMALL, interactions_file=path, output_dir=tmp_path / "out", max_steps=1, bf16=True)
    assert seen and all(seen)


def test_sasrec_learns_from_histories_of_more_than_its_length(tmp_path):
    path = write_ring(tmp_path / "ring.csv")
    settings = SMALL | {"sasrec": True, "max_length": 4, "max_steps": 2}
    assert recommendation(**settings, interactions_file=path, output_dir=tmp_path / "out")["test_hr@20"] == 1


@pytest.mark.parametrize("sasrec", [False, True])
def test_new_models_begin_with_an_svd_where_asked(tmp_path, capsys, sasrec):
    path = write_ring(tmp_path / "ring.csv")
    settings = SMALL | {"interactions_file": path, "max_steps": 1, "init_items": "svd", "learning_rate": 1e-9}
    recommendation(**settings, sasrec=sasrec, output_dir=tmp_path / "out")
    assert "begin with those of an SVD" in capsys.readouterr().out
    model = load(tmp_path / "out").model
    assert model.item_embeddings()[1:].std() > 2 * model.config.initializer_range
