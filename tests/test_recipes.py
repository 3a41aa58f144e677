"""The commands of docs/recipes run, one after the other, and both languages show the same ones."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_readme import ROOT, blocks, commands

from finetune_deepseek import __main__ as command
from tests.recommendation.simulated_news import write as write_news

RECIPES = ("docs/recipes.md", "docs/recipes.zh-CN.md")
EXAMPLES = sorted(path.name for path in (ROOT / "finetune_deepseek" / "examples").glob("*.yaml"))
ROWS = [{"en": "one", "de": "eins"}, {"en": "two", "de": "zwei"}, {"en": "three", "de": "drei"}]
CHINESE = [{"en": "one", "zh": "一"}, {"en": "two", "zh": "二"}, {"en": "three", "zh": "三"}]
READING = [
    {"id": name, "context": "Ann is in Rome.", "question": f"Where is {name}?", "answers": answers}
    for name, answers in (
        ("Ann", {"text": ["Rome"], "answer_start": [10]}),
        ("A.", {"text": ["Rome"], "answer_start": [10]}),
    )
]
POEMS = [{"text": "red fox", "author": "b"}, {"text": "blue bird", "author": "a"}, {"text": "red", "author": "b"}]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"so\n#### {number}"}]}
    for number, text in enumerate(("one plus one", "two plus two", "three"))
]
INSTRUCTIONS = [{"instruction": "add", "input": "one and one", "output": "two"}]
QUESTIONS = [{"query": "what is red", "passage": "a fox"}, {"query": "what is blue", "passage": "the sky"}]
PETS = ("pets/train", "pets/validation", "pets/test", "more_pets/test")
# Appended, so it wins.
QUIET = ["--use_cpu", "True", "--disable_tqdm", "True"]
SMALL = [
    *QUIET,
    "--max_steps",
    "1",
    *("--eval_strategy", "steps", "--save_strategy", "steps", "--save_total_limit", "1"),
]
SHORT = ["--max_target_length", "8", "--generation_num_beams", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data that the recipes name."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "finetune_deepseek").symlink_to(ROOT / "finetune_deepseek")
    data = {
        "en_de": ROWS,
        "domain": ROWS,
        "en_zh": CHINESE,
        "poems": POEMS,
        "reading": READING,
        "questions": QUESTIONS,
        "texts": POEMS,
        "chats": CHATS,
        "instructions": INSTRUCTIONS,
    }
    for name, rows in data.items():
        (folder / "data" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            is_flat = name in ("poems", "reading", "questions", "texts", "chats", "instructions")
            lines = [json.dumps(row if is_flat else {"translation": row}, ensure_ascii=False) for row in rows]
            (folder / "data" / name / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "data" / "optdigits").mkdir()
    digits = [{"pixels": [(number * place) % 17 for place in range(64)], "label": number % 3} for number in range(9)]
    for split in ("train", "test"):
        (folder / "data" / "optdigits" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, digits)))
    (folder / "data" / "emoji").mkdir()
    emoji = [{"image": [[number, 9], [9, 200]], "caption_en": "a heart", "caption_zh": "心"} for number in range(3)]
    for split in ("train", "validation", "test"):
        (folder / "data" / "emoji" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, emoji)))
    for place in (f"{pets}/{label}" for label in ("cat", "dog") for pets in PETS):
        (folder / "data" / place).mkdir(parents=True)
        Image.effect_noise((20, 16), 50).save(folder / "data" / place / "1.png")
    for split in ("train", "valid", "test"):
        place = folder / "data" / "cells" / split
        place.mkdir(parents=True)
        Image.effect_noise((32, 24), 50).save(place / "1.png")
        objects = {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cell"}],
                   "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 9, 8]}]}  # fmt: skip
        (place / "annotations.json").write_text(json.dumps(objects))
    ratings = [f"{user},{(user + step) % 5},{step},Sa" for user in range(8) for step in range(4)]
    (folder / "data" / "ratings.csv").write_text("\n".join(["userId,movieId,timestamp,weekday", *ratings]))
    users = [f"{user},{'FM'[user % 2]},artist" for user in range(8)]
    (folder / "data" / "users.csv").write_text("\n".join(["userId,gender,occupation", *users]))
    movies = [f"{number},A film of part {number},comedy" for number in range(5)]
    (folder / "data" / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]))
    (folder / "items.json").write_text('["1", "2"]')
    (folder / "new.json").write_text('{"today": "A film of part 6"}')
    write_news(folder / "data" / "MINDsmall_train", 1, 4)
    write_news(folder / "data" / "MINDsmall_dev", 31, 4)
    (folder / "data" / "german.txt").write_text("eins\nzwei\n")
    (folder / "data" / "corpus.txt").write_text("A red fox.\n\nA blue bird\nsings.\n")
    (folder / "english.txt").write_text("one\n\ntwo\n")
    (folder / "notes").mkdir()
    (folder / "notes/where.txt").write_text("It is there.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def small(verb: str, task: str, *rest: str) -> list[str]:
    if verb == "pretrain":
        steps = ["--max_steps", "12", "--vocab_size", "300"]  # so many that each milestone has one
        return [*QUIET, *([] if "--tokens_budget" in rest else steps)]
    if verb != "finetune":
        return [] if verb in ("generate", "translate", "recommend", "answer", "draw") else QUIET
    if task == "news_recommendation":  # MIND's small set has no third part to evaluate on
        return [*QUIET, "--max_steps", "1", "--vocab_size", "300"]
    random_weights = [] if "--model_name_or_path" in rest else ["--vocab_size", "300"]
    return [*SMALL, *random_weights, *(SHORT if task == "translation" else [])]


def test_both_languages_show_the_same_code():
    english, chinese = ((commands(name), [*blocks(name, "json"), *blocks(name, "python")]) for name in RECIPES)
    assert english == chinese
    assert {argv[1] for argv in english[0]} == {
        "finetune",
        "evaluate",
        "predict",
        "pretrain",
        "generate",
        "translate",
        "recommend",
        "answer",
        "draw",
    }


def test_every_example_is_a_recipe_and_every_flag_is_there():
    text = (ROOT / RECIPES[0]).read_text("utf-8")
    assert sorted(set(re.findall(r"examples/(\w+\.yaml)", text))) == EXAMPLES
    for name in RECIPES:
        assert f"]({Path(name).name})" in (ROOT / RECIPES[RECIPES[0] == name]).read_text("utf-8")
        assert name in (ROOT / Path(name).name.replace("recipes", "README")).read_text("utf-8")


def test_recipes_run_in_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for argv in commands(RECIPES[0]):
        assert argv[0] == "deepseek-hf"
        monkeypatch.setattr(sys, "argv", [*argv, *small(*argv[1:])])
        assert command.main() == 0, f"{argv}\n{capsys.readouterr().err[-2000:]}"
    results = json.loads((folder / "runs/en-de-zh/all_results.json").read_text())
    assert {f"test_chrf2_{pair}" for pair in ("en-de", "en-zh", "de-en", "zh-en")} <= set(results)
    assert "test_bleu_tokenized" in json.loads((folder / "runs/en-de-moses/all_results.json").read_text())
    assert "test_bleu_tokenized" in json.loads((folder / "runs/predict-en-de/all_results.json").read_text())
    assert json.loads((folder / "runs/en-de-more/all_results.json").read_text())["train_samples"] >= 3
    assert (folder / "runs/en-de-lora/adapter_model.safetensors").is_file()
    assert "eval_chrf2" in json.loads((folder / "runs/evaluate-en-de/all_results.json").read_text())
    answers = json.loads((folder / "runs/predict-chat/all_results.json").read_text())
    assert answers["test_answers_expected"] == 3 and "test_answer_accuracy_high" in answers
    movies = json.loads((folder / "runs/movies/all_results.json").read_text())
    assert {"above_sasrec_hr@10", "popularity_ndcg@10"} <= set(movies)
    assert "test_hr@10" in json.loads((folder / "runs/movie-texts/all_results.json").read_text())
    config = json.loads((folder / "runs/movie-features/config.json").read_text())
    assert config["user_features"] == {"gender": ["F", "M"], "occupation": ["artist"]}
    news = [json.loads((folder / f"runs/{name}/all_results.json").read_text()) for name in ("news", "predict-news")]
    assert news[0]["test_auc"] == pytest.approx(news[1]["test_auc"])
    retriever = json.loads((folder / "runs/retriever/all_results.json").read_text())
    assert {"test_mrr", "tfidf_mrr", "fused_mrr"} <= set(retriever)
    for code in blocks(RECIPES[0], "python"):
        exec(code, {})
    assert "where.txt:1 It is there." in capsys.readouterr().out
    assert (folder / "recommended.parquet").is_file() and (folder / "hearts.png").is_file()
    assert (folder / "completions.jsonl").read_text("utf-8").count("\n") == 3
    assert (folder / "german.txt").read_text("utf-8").count("\n") == 3
    assert (folder / "chinese.txt").read_text("utf-8").count("\n") == 3
