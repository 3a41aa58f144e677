"""Features of users and contexts: reading, what is counted or refused, and a run of both verbs on a tiny file."""

import json
import random
import zipfile
from collections import Counter

import pandas as pd
import pytest
import torch

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.arguments import GenerativeRecommendationArguments, RecommendationArguments
from finetune_deepseek.recommendation.items.catalogue import item_tokenizer
from finetune_deepseek.recommendation.items.feature_columns import known_values, number_values, read_users
from finetune_deepseek.recommendation.items.interactions import (
    ML_100K,
    ML_100K_USERS,
    as_dataset,
    by_time,
    leave_one_out,
    ml_100k,
    ml_100k_columns,
)
from finetune_deepseek.recommendation.serving import load
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import AutoModelForRecommendation
from tests.small_runs import flags

from ..test_recommendation import SMALL

USERS, LENGTH = 60, 8  # as many pairs as steps, so that no item comes again
SHORT = {"max_steps": 90, "max_length": 3}


def write(folder):
    """Users go around a ring of pairs of items; which of a pair is next, the way says, a column of interactions."""
    draw = random.Random(0)
    rows = []
    for user in range(USERS):
        for step in range(LENGTH):
            way = draw.choice("lr")
            rows.append(
                f"u{user},{(user + step) % LENGTH} {way},{step},{way},{'' if step == 2 and user == 3 else 'web'}"
            )
    (folder / "clicks.csv").write_text("user_id,item_id,timestamp,way,device\n" + "\n".join(rows))
    people = [f"u{user},{'FM'[user % 2]},{20 + user % 3}" for user in range(1, USERS)] + ["u1,M,99", ",F,20", "u99,F,"]
    (folder / "users.csv").write_text("user_id,gender,age\n" + "\n".join(people))
    return {"interactions_file": folder / "clicks.csv"}


def run(argv=(), **settings):
    return run_stages(
        Recommendation, parse_command("recommendation", RecommendationArguments, [*argv, *flags(settings)])
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    data = write(folder) | {
        "users_file": folder / "users.csv", "user_feature_columns": ["gender", "age"],
        "context_columns": ["way", "device"],
    }  # fmt: skip
    return folder, run(**SMALL, **data, output_dir=folder / "out", **SHORT), data


def test_a_context_that_decides_the_item_is_learned(learned, tmp_path):
    folder, results, _ = learned
    assert results["test_ndcg@10"] == results["eval_ndcg@10"] == 1
    without = run(**SMALL, interactions_file=folder / "clicks.csv", output_dir=tmp_path / "out", **SHORT)
    assert without["test_ndcg@10"] < 0.95


def test_files_and_card_of_a_run_with_features(learned):
    folder, _, _ = learned
    out = folder / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["user_features"] == {"age": ["20", "21", "22"], "gender": ["F", "M"]}
    assert config["context_features"] == {"device": ["web"], "way": ["l", "r"]}
    card = (out / "README.md").read_text()
    for line in (
        "users.csv: 1 rows without a user were left out",
        "users.csv: 1 rows of a user of a row before were left out",
        "users.csv: 1 values of 'age' are empty and count as none",
        "users.csv: 1 of 60 users have no row; their features count as none",
        "interactions: 1 values of 'device' are empty and count as none",
        "user features: age (3 values), gender (2 values)",
        "context features: device (1 values), way (2 values)",
        "user_features={'age': '20', 'gender': 'F'}, context_features={'device': 'web', 'way': 'l'}))",
    ):
        assert line in card, line
    line = json.loads((out / "generated_predictions.jsonl").read_text().splitlines()[0])
    assert len(line["contexts"]) == len(line["source"]) + 1 and line["target"].endswith(line["contexts"][-1][0])


def test_a_saved_model_is_scored_again_and_trained_on(learned, tmp_path, capsys):
    folder, results, data = learned
    names = ("interactions_file", "users_file")
    files = [f"--{name}={data[name]}" for name in names] + ["--use_cpu=True", "--disable_tqdm=True"]
    assert guarded(["recommendation", str(folder / "out"), *files, f"--output_dir={tmp_path / 'a'}"], "predict") == 0
    again = json.loads((tmp_path / "a" / "all_results.json").read_text())
    assert again["test_ndcg@10"] == results["test_ndcg@10"]
    capsys.readouterr()
    settings = {
        "model_name_or_path": folder / "out", "interactions_file": data["interactions_file"], "use_cpu": True,
        "disable_tqdm": True, "do_train": True, "do_predict": True, "max_steps": 1, "max_length": 3,
    }  # fmt: skip
    run(**settings, context_columns=["way"], output_dir=tmp_path / "b")
    out = capsys.readouterr().out
    assert "age, gender: read by the model, but not given; it counts as none" in out
    assert "device: read by the model, but not given" in out
    with pytest.raises(ValueError, match=r"--context_columns: the model reads no column 'timestamp'; it reads dev"):
        run(**settings, context_columns=["timestamp"], output_dir=tmp_path / "c")


def test_an_adapter_learns_the_table_of_features_whole(learned, tmp_path):
    """On a base without features, too."""
    folder, results, data = learned
    settings = {"use_cpu": True, "disable_tqdm": True, "max_length": 3}
    run(
        **settings, preset="tiny_llm", interactions_file=data["interactions_file"], max_steps=1,
        output_dir=tmp_path / "base",
    )  # fmt: skip
    for base in (folder / "out", tmp_path / "base"):
        lora = tmp_path / f"lora-{base.name}"
        first = run(
            **settings, **data, model_name_or_path=base, use_peft=True, lora_target=["attention"], max_steps=2,
            do_train=True, do_predict=True, output_dir=lora,
        )  # fmt: skip
        assert json.loads((lora / "adapter_config.json").read_text())["modules_to_save"] == ["side_features"]
        again = run(**settings, **data, model_name_or_path=lora, do_train=False, do_predict=True,
                    output_dir=tmp_path / f"again-{base.name}")  # fmt: skip
        assert again["test_ndcg@10"] == first["test_ndcg@10"]
        row = json.loads((lora / "generated_predictions.jsonl").read_text().splitlines()[3])
        number = int(row["user"][1:])
        user = {"gender": "FM"[number % 2], "age": 20 + number % 3}
        contexts = [dict(zip(["way", "device"], context, strict=True)) for context in row["contexts"][1:]]
        found = load(str(lora)).recommend(row["source"], 20, user_features=user, context_features=contexts)
        assert number and [item for item, _ in found] == row["prediction"]["items"][: len(found)]


# -- features of histories --


def frame(*rows):
    return pd.DataFrame(rows, columns=["user", "item", "time", "context"])


EVENTS = frame(*(("a", f"i{n}", float(n), (f"c{n}",)) for n in range(5)), ("b", "i0", 9.0, ("c9",)))


def test_leave_one_out_keeps_the_context_of_each_item_and_of_the_target():
    splits, _ = leave_one_out(EVENTS)
    assert [row["contexts"] for row in splits["train"]] == [[("c0",), ("c1",), ("c2",)], [("c9",)]]
    assert splits["validation"][0]["contexts"] == [("c0",), ("c1",), ("c2",), ("c3",)]
    assert splits["test"][0]["contexts"] == [(f"c{n}",) for n in range(5)] and splits["test"][0]["target"] == "i4"
    assert "contexts" not in leave_one_out(EVENTS.drop(columns="context"))[0]["train"][0]


def test_a_split_by_time_keeps_them_too():
    splits, _ = by_time(EVENTS, 0.4)
    (row,) = splits["validation"]
    assert row["target"] == f"i{len(row['source'])}" and row["contexts"][-1] == (f"c{len(row['source'])}",)


def test_windows_carry_the_context_of_the_next_item_also_past_an_unknown_one():
    made = Recommendation(RecommendationArguments(max_length=2, context_columns=["day"], interactions_file="x"), 0)
    rows = as_dataset([{"user": "a", "source": list("pqxrs"), "target": "t", "contexts": [[c] for c in "012345"]}])
    fields, _ = made.side.config_fields(rows, {})
    assert fields == {"context_features": {"day": list("012345")}}
    catalogue = item_tokenizer(set("pqrst"), 0)  # x is not in it
    numbers = dict(zip("012345", range(1, 7), strict=True))
    features = made.features(rows, catalogue, is_training=True)
    assert features["input_ids"][0] == catalogue.convert_tokens_to_ids(list("qrs"))
    assert features["context_features"][0] == [[numbers["3"]], [numbers["4"]], [numbers["5"]]]
    assert features["context_features"][1] == [[numbers["1"]], [numbers["3"]]]
    batch = made.collator(catalogue)(list(features))
    assert batch["context_features"].shape == (2, 3, 1) and batch["context_features"][1, 2, 0] == 0
    scored = made.features(rows, catalogue, is_training=False)
    assert scored["context_features"] == [[[numbers["4"]], [numbers["5"]]]] and scored["length"] == [2]


def test_values_that_training_does_not_show_count_as_none(capsys):
    unknown = Counter()
    assert number_values({"day": {"Mo": 1}, "age": {"25": 2}}, {"day": "Su", "age": 25.0}, unknown) == [0, 2]
    assert number_values({"day": {"Mo": 1}}, None, unknown) == [0] and +unknown == {"day": 1}
    made = Recommendation(RecommendationArguments(context_columns=["day"], interactions_file="x"), 0)
    rows = [{"user": "a", "source": ["p", "q"], "target": "r", "contexts": [["0"], ["1"], ["2"]]}]
    made.side.config_fields(as_dataset([row | {"contexts": row["contexts"][:2]} for row in rows]), {})
    made.features(as_dataset(rows), item_tokenizer(set("pqr"), 0), is_training=False)
    assert "1 values of 'day' are unknown to the model and count as none" in capsys.readouterr().out


def test_movielens_brings_its_users(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        wheel.writestr(ML_100K, head + "".join(f"1\t{n}\t3\t{n}\n2\t{n}\t4\t{n}\n" for n in range(4)))
        wheel.writestr(ML_100K_USERS, "user_id:token\tage:token\tgender:token\n1\t24\tM\n2\t53\tF\n")
    assert ml_100k_columns(ML_100K_USERS, [tmp_path])["gender"] == ["M", "F"]
    assert ml_100k([tmp_path], ["rating"])["context"].tolist()[:2] == [("3",), ("4",)]
    monkeypatch.chdir(tmp_path)
    made = Recommendation(RecommendationArguments(dataset_name="ml-100k", user_feature_columns=["gender"]), 0)
    splits = made.load_splits()
    assert made.side.users == {"1": {"gender": "M"}, "2": {"gender": "F"}}
    assert made.config_fields(splits, {})["user_features"] == {"gender": ["F", "M"]}


def test_ready_histories_have_users_too(tmp_path):
    for split in ("train", "test"):
        rows = [{"user_id": user, "items": ["p", "q"], "target": "r"} for user in (1, 2)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "users.json").write_text(json.dumps([{"user_id": 1, "age": 30.0}, {"user_id": 2, "age": None}]))
    where = {"data_dir": str(tmp_path), "users_file": str(tmp_path / "users.json")}
    made = Recommendation(RecommendationArguments(**where, user_feature_columns=["age"]), 0)
    splits = made.load_splits()
    assert made.config_fields(splits, {})["user_features"] == {"age": ["30"]}
    catalogue = made.new_tokenizer(None, splits)
    features = made.features(splits["test"], catalogue, is_training=False)
    assert features["user_features"] == [[1], [0]]
    assert made.collator(catalogue)(list(features))["user_features"].tolist() == [[1], [0]]


# -- what is refused --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users_file": "u.csv"}, "--users_file u.csv: name its columns to read by --user_feature_columns"),
        ({"user_feature_columns": ["a"]}, "--user_feature_columns: name the file that has them by --users_file"),
        ({"context_columns": ["a"], "data_dir": "x"}, "--context_columns: ready histories have no columns per item"),
        ({"context_columns": ["a"], "sasrec": True}, "--context_columns: SASRec reads no features"),
    ],
)
def test_flags_without_effect_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        RecommendationArguments(**settings)
    with pytest.raises(ValueError, match="--context_columns: a generative recommender reads no features"):
        GenerativeRecommendationArguments(context_columns=["a"])


@pytest.mark.parametrize(
    ("users", "settings", "message"),
    [
        ("user_id,gendre\nu1,F", {}, r"no column 'gender'.*Set --user_feature_columns \(did you mean 'gendre'\?\)"),
        ("user,gender\nu1,F", {}, "no column 'user_id'.*Set --user_column"),
        ("user_id,gender\n", {}, "users.csv: no users"),
        ("user_id,gender\nx,F", {}, "none of the 60 users of the interactions has a row there"),
        ("user_id,gender\nu1,F", {"context_columns": ["wey"]}, r"no column 'wey'.*Set --context_columns \(did you"),
        ("user_id,gender\nu1,", {}, "--user_feature_columns gender: no row of the training data has a value there"),
    ],
)
def test_users_that_cant_be_read_are_one_line(tmp_path, users, settings, message):
    data = write(tmp_path)
    (tmp_path / "users.csv").write_text(users)
    data |= {"users_file": str(tmp_path / "users.csv"), "user_feature_columns": ["gender"]} | settings
    made = Recommendation(
        RecommendationArguments(**{k: v if isinstance(v, list) else str(v) for k, v in data.items()}), 0
    )
    with pytest.raises(ValueError, match=message) as error:
        made.config_fields(made.load_splits(), {})
    assert "\n" not in str(error.value)


def test_values_that_no_other_row_has_are_refused():
    rows = [[f"{number / 7:.4f}"] for number in range(1001)]
    with pytest.raises(
        ValueError, match="--context_columns age: 1,001 different numbers.*bin them into at most 1,000"
    ):
        known_values(rows, ["age"], "context_columns")
    assert len(known_values(rows[1:], ["age"], "x")["age"]) == 1000
    texts = [[f"about {age}"] for (age,) in rows]
    assert len(known_values(texts, ["age"], "x")["age"]) == 1001
    with pytest.raises(ValueError, match=r"x, row 1: 'likes' is \"\['a'\]\", not one value"):
        read_users({"user_id": [1], "likes": [["a"]]}, "user_id", ["likes"], "x")


def test_a_sasrec_that_is_trained_on_refuses_features():
    made = Recommendation(RecommendationArguments(context_columns=["way"], interactions_file="x"), 0)
    with pytest.raises(ValueError, match="SASRec reads no features"):
        made.side.config_fields(None, {"model_type": "sasrec"})


# -- the verb --


def verb(capsys, *argv):
    code = guarded(list(map(str, argv)), "recommend")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_recommend_by_the_context_of_the_request(learned, tmp_path, capsys):
    folder, _, _ = learned
    (tmp_path / "items.json").write_text(json.dumps({"u1": ["0 l", "1 r"], "u7": ["2 l"], "new": ["3 r"]}))
    arguments = (folder / "out", "--history", tmp_path / "items.json", "--k", 1, "--users_file", folder / "users.csv")
    for way in "lr":
        code, out, err = verb(capsys, *arguments, "--context", f"way={way}", "device=web")
        best = {line["user"]: line["items"][0] for line in map(json.loads, out.splitlines())}
        assert code == 0 and best == {"u1": f"2 {way}", "u7": f"3 {way}", "new": f"4 {way}"}
        assert "1 of 3 users have no row; their features count as none" in err
    _, _, err = verb(capsys, *arguments, "--context", "way=up")
    assert "1 values of 'way' are unknown to the model and count as none" in err


def test_contexts_of_a_history_are_read_with_it(learned, tmp_path, capsys):
    folder, _, _ = learned
    out = tmp_path / "all.parquet"
    code, _, err = verb(
        capsys, folder / "out", "--history", folder / "clicks.csv", "--context", "way=l", "--output", out, "--k", 2
    )
    assert code == 0 and "no column" not in err and len(pd.read_parquet(out)) == 2 * USERS
    recommender = load(str(folder / "out"))
    rows = pd.read_csv(folder / "clicks.csv", dtype=str).query("user_id == 'u5'")
    ways = [{"way": way, "device": "web"} for way in [*rows["way"][1:], "l"]]
    ways[-1] = {"way": "l"}
    best = recommender.recommend(list(rows["item_id"]), k=2, context_features=ways)
    table = pd.read_parquet(out).query("user == 'u5'")
    assert table["score"].tolist() == pytest.approx([score for _, score in best], rel=1e-4)


def test_columns_that_a_history_lacks_are_said(learned, tmp_path, capsys):
    (tmp_path / "few.csv").write_text("user_id,item_id,timestamp,device\nu5,0 l,1,web\nu5,1 r,2,watch\n")
    code, out, err = verb(
        capsys, learned[0] / "out", "--history", tmp_path / "few.csv", "--context", "way=r", "--k", 1
    )
    assert code == 0 and json.loads(out)["items"] == ["2 r"]
    assert "without --users_file of age, gender: counts as none" in err
    assert "without --context of device: counts as none" in err
    assert "no column 'way'; it counts as none" in err and "1 values of 'device' are unknown to the model" in err


def test_explanations_of_a_model_with_features(learned, tmp_path, capsys):
    recommender = load(str(learned[0] / "out"))
    history, given = ["0 l", "1 r", "2 l"], {"user_features": {"gender": "F"}, "context_features": {"way": "r"}}
    best = recommender.recommend(history, k=1, **given)[0][0]
    assert best == "3 r"
    shares = dict(recommender.explain(history, best, steps=200, **given))
    model, side = recommender.model, recommender.model.side_features
    numbers = torch.tensor([recommender.number(history)[0]])
    features = {"user_features": torch.tensor([[0, side.user_numbers["gender"]["F"]]]),
                "context_features": torch.zeros(1, 3, 2, dtype=torch.long)}  # fmt: skip
    features["context_features"][0, -1, 1] = side.context_numbers["way"]["r"]
    with torch.no_grad():
        average = model.get_input_embeddings().weight.mean(0).expand(1, 3, -1)
        whole = model(numbers, **features).logits[0, recommender.numbers[best]]
        empty = model(inputs_embeds=average, **features).logits[0, recommender.numbers[best]]
    assert list(shares) == history and sum(shares.values()) == pytest.approx(float(whole - empty), rel=0.02, abs=0.02)
    weights = dict(recommender.explain(history, best, "attention", **given))
    assert list(weights) == history and 0 < sum(weights.values()) < 1
    (tmp_path / "items.json").write_text(json.dumps(history))
    arguments = (learned[0] / "out", "--history", tmp_path / "items.json", "--context", "way=r", "--explain")
    shown = json.loads(verb(capsys, *arguments, "integrated_gradients")[1])["integrated_gradients"]
    assert shown["of"] == best and set(shown["history"]) == set(history)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context", "wey=l"], "--context: the model reads no column 'wey' (did you mean 'way'?); it reads device"),
        (["--context", "way"], "--context way: write it as column=value"),
        (["--users_file", "{folder}/sex.csv"], "no column 'age', which the model reads; it has user_id, sex"),
        (["--users_file", "{folder}/none.csv"], "none.csv"),
    ],
)
def test_bad_features_of_a_request_are_one_line(learned, tmp_path, capsys, more, message):
    (tmp_path / "items.json").write_text('["0 l"]')
    (tmp_path / "sex.csv").write_text("user_id,sex\nu1,F\n")
    more = [argument.format(folder=tmp_path) for argument in more]
    code, out, err = verb(capsys, learned[0] / "out", "--history", tmp_path / "items.json", *more)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("deepseek-hf: error:") and message in last


def test_features_are_refused_in_python(learned, tmp_path, capsys):
    recommender = load(str(learned[0] / "out"))
    with pytest.raises(ValueError, match=r"user_features: the model reads no column 'gendre' \(did you mean 'gender'"):
        recommender.recommend(["0 l"], user_features={"gendre": "F"})
    with pytest.raises(ValueError, match="context_features has 2 contexts for a history of 1 items"):
        recommender.recommend(["0 l"], context_features=[{}, {}])
    with pytest.raises(ValueError, match="user_features has 1 rows for 2 histories"):
        recommender.recommend([["0 l"], ["0 r"]], user_features=[{}])
    recommender.recommend([["0 l"], ["0 r"]], user_features=[{"gender": "X"}, {"age": 20}])
    assert "1 values of 'gender' are unknown to the model and count as none" in capsys.readouterr().err
    assert AutoModelForRecommendation.from_pretrained(learned[0] / "out").side_features.context_numbers["way"]
