"""Generative recommendation, on users who walk around a ring of items."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import finetune_deepseek
from configuration_deepseek import preset
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.arguments import GenerativeRecommendationArguments, RecommendationArguments
from finetune_deepseek.recommendation.generative import GenerativeRecommendation
from finetune_deepseek.recommendation.item_vectors import neighbour_vectors, read_item_vectors
from finetune_deepseek.recommendation.items.interactions import as_dataset
from finetune_deepseek.recommendation.items.semantic_ids import CODES_FILE, SemanticIdTokenizer
from finetune_deepseek.recommendation.serving import GenerativeRecommender, load
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForEmbedding
from tests.small_runs import flags
from tokenization_deepseek import train_tokenizer

from .test_recommendation import RING, SMALL, item, write_ring

EXAMPLE = Path(finetune_deepseek.__file__).parent / "examples" / "generative_recommendation.yaml"
CODES = np.array([[1, 0, 0], [0, 2, 0], [0, 1, 1], [0, 1, 0]])
MTP = '{"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.3}'


def generative(argv=(), **settings):
    arguments = GenerativeRecommendationArguments
    return run_stages(
        GenerativeRecommendation, parse_command("generative_recommendation", arguments, [*argv, *flags(settings)])
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learned the ring with two-digit codes, and its results."""
    folder = tmp_path_factory.mktemp("ring")
    path = write_ring(folder / "ring.csv")
    results = generative(
        **SMALL, interactions_file=path, output_dir=folder / "out", max_steps=100, num_levels=2, codebook_size=4,
        num_beams=RING, config_overrides=MTP,
    )  # fmt: skip
    return folder, results


def test_the_ring_is_learned(learned, capsys):
    folder, results = learned
    assert results["test_hr@5"] == 1 and results["test_ndcg@10"] > 0.9 and results["eval_hr@10"] == 1
    assert results["popularity_ndcg@10"] < results["test_ndcg@10"] and results["above_popularity_ndcg@10_p"] < 0.01
    assert results["test_loss"] < 0.5
    assert "by a beam of 12" in results["test_ranking_signature"]
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["mtp_loss_weight"] == 0.3
    lines = [json.loads(line) for line in (folder / "out" / "generated_predictions.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["prediction"]["items"][line["prediction"]["rank"] - 1] == line["target"]
        assert not set(line["source"]) & set(line["prediction"]["items"])
        assert len(line["prediction"]["items"]) == RING - 6  # all that are left
    card = (folder / "out" / "README.md").read_text()
    assert "share a code with another" in card and "from finetune_deepseek.recommend import load" in card


def test_the_saved_folder_recommends(learned, tmp_path, capsys):
    folder = learned[0]
    recommender = load(str(folder / "out"))
    assert type(recommender) is GenerativeRecommender and recommender.model.num_beams == RING
    rows = recommender.recommend([[item(3), item(4)], [item(0), "unheard of"]], k=3)
    assert [row[0][0] for row in rows] == [item(5), item(1)] and len(rows[0]) == 3
    assert rows[0][0][1] > rows[0][1][1]
    assert recommender.recommend([item(3)], filter=[item(8), item(3)]) == [(item(8), pytest.approx(-9, abs=9))]
    assert len(recommender.recommend([item(3)], k=99, exclude_seen=False)) == RING
    with pytest.raises(ValueError, match="nothing is left to recommend for row 0"):
        recommender.recommend([item(3)], filter=[item(3)])
    (tmp_path / "items.json").write_text(json.dumps([item(3), item(4)]))
    argv = [str(folder / "out"), "--history", str(tmp_path / "items.json"), "--k", "1"]
    assert guarded(argv, "recommend") == 0
    assert json.loads(capsys.readouterr().out)["items"] == [item(5)]
    assert guarded([*argv, "--explain", "attention"], "recommend") == 2
    assert "can't say what carried an item" in capsys.readouterr().err


def test_predict_and_lora_on_a_saved_model(learned, tmp_path):
    folder, results = learned
    data = {"model_name_or_path": folder / "out", "interactions_file": folder / "ring.csv", "num_beams": RING}
    quiet = {"use_cpu": True, "disable_tqdm": True}
    again = generative(**data, **quiet, output_dir=tmp_path / "a", do_train=False, do_predict=True)
    assert again["test_ndcg@10"] == results["test_ndcg@10"]
    lora = {"use_peft": True, "lora_target": ["attention"], "max_steps": 2}
    adapted = generative(**data, **quiet, **lora, output_dir=tmp_path / "b")
    assert adapted["test_hr@5"] == 1 and adapted["parameters_trainable_share"] < 0.5


def test_a_narrow_beam_ranks_the_rest_last(learned, tmp_path):
    folder, results = learned
    narrow = generative(
        model_name_or_path=folder / "out", interactions_file=folder / "ring.csv", num_beams=1, do_predict=True,
        do_train=False, output_dir=tmp_path, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    for line in lines:
        found = line["prediction"]["items"] == [line["target"]]
        assert len(line["prediction"]["items"]) == 1 and line["prediction"]["rank"] == (1 if found else RING - 6)
    assert narrow["test_hr@5"] == np.mean([line["prediction"]["rank"] == 1 for line in lines])


def test_features_are_the_items_digits():
    made = GenerativeRecommendation(GenerativeRecommendationArguments(max_length=2), seed=0)
    tokenizer = SemanticIdTokenizer.of_codes(["d", "c", "b", "a"], CODES)
    assert tokenizer.items == ["a", "b", "c", "d"] and tokenizer.first_tokens == [2, 4, 7]
    assert tokenizer.convert_ids_to_tokens([0, 1, 3, 4, 8]) == ["<padding>", "<start>", "<0:1>", "<1:0>", "<2:1>"]
    rows = as_dataset([{"user": "u", "source": ["a", "d", "b", "x"], "target": "c"}])
    train = made.features(rows, tokenizer, is_training=True)
    assert train["input_ids"][0] == [1, 2, 5, 7, 3, 4, 7, 2, 5, 8]
    assert train["labels"][0] == [-100] * 4 + [3, 4, 7, 2, 5, 8] and train["length"][0] == 10
    scored = made.features(rows, tokenizer, is_training=False)[0]
    assert scored["input_ids"] == [1, 3, 4, 7, 2, 5, 8] and scored["target_ids"] == [2, 6, 7]
    assert scored["seen"] == [1, 4, 2] and scored["target"] == 3


def test_the_tokenizer_is_saved_with_its_codes(tmp_path):
    SemanticIdTokenizer.of_codes(["d", "c", "b", "ä"], CODES).save_pretrained(tmp_path)
    opened = SemanticIdTokenizer.from_pretrained(tmp_path)
    assert opened.items == ["ä", "b", "c", "d"] and opened.codes.tolist() == sorted(CODES.tolist())
    assert opened.pad_token_id == 0 and opened.bos_token_id == 1 and len(opened) == 9
    (tmp_path / "semantic_ids.json").unlink()
    with pytest.raises(OSError, match="semantic_ids.json"):
        SemanticIdTokenizer.from_pretrained(tmp_path)


def test_codes_of_a_trained_recommender(tmp_path, capsys):
    path = write_ring(tmp_path / "ring.csv")
    argv = flags({**SMALL, "interactions_file": path, "output_dir": tmp_path / "trained", "max_steps": 2})
    run_stages(Recommendation, parse_command("recommendation", RecommendationArguments, argv))
    items, vectors = read_item_vectors(str(tmp_path / "trained"), None, {})
    assert sorted(items) == sorted(map(item, range(RING))) and vectors.shape == (RING, 32)
    results = generative(
        **SMALL, interactions_file=path, item_vectors=tmp_path / "trained", codebook_size=3, num_levels=1, max_steps=1,
        output_dir=tmp_path / "out", compare_with=[tmp_path / "trained"],
    )  # fmt: skip
    assert re.search(r"\d+ items share a code with another, so a last digit tells them apart", capsys.readouterr().out)
    assert "above_trained_ndcg@10" in results
    tokenizer = SemanticIdTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.codes.unique(dim=0)) == RING and tokenizer.codes.shape[1] == 2


def test_vectors_of_an_embedding_model_read_the_titles(tmp_path):
    tokenizer = train_tokenizer(["red fox", "blue bird"] * 9, 300, "v3")
    torch.manual_seed(0)
    DeepSeekForEmbedding(preset("tiny_llm", vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    items, vectors = read_item_vectors(str(tmp_path), None, {"1": "red fox", "2": "blue bird", "3": "red fox"})
    assert items == ["1", "2", "3"] and vectors.shape == (3, 32)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)


@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_vectors_of_a_file(ending, tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = tmp_path / f"vectors{ending}"
    np.save(path, matrix) if ending == ".npy" else save_file({"vectors": torch.tensor(matrix)}, path)
    (tmp_path / "ids.json").write_text('["x", 5, "z"]')
    (tmp_path / "ids.txt").write_text("x\n5\nz\n")
    for name in ("ids.json", "ids.txt"):
        items, vectors = read_item_vectors(str(path), str(tmp_path / name), {})
        assert items == ["x", "5", "z"] and (vectors == matrix).all()
    for ids, message in (
        ("x\n5\n", "for the 2 ids"),
        ("x\nx\ny", "1 ids are there twice"),
        ("[1,", "Expecting value"),
        ('["x", "", "y", "z"]', "number 2 is no id; each vector needs one"),  # the others would move up
    ):
        (tmp_path / "wrong.txt").write_text(ids)
        with pytest.raises(ValueError, match=message) as caught:
            read_item_vectors(str(path), str(tmp_path / "wrong.txt"), {})
        assert "\n" not in str(caught.value)


def test_neighbours_get_like_vectors():
    histories = [["a", "b", "c"], ["b", "a", "c"], ["x", "y", "z"], ["y", "x", "z"]] * 3
    vectors = neighbour_vectors(histories, ["a", "b", "c", "new", "x", "y", "z"], seed=0)
    norms = np.linalg.norm(vectors, axis=1)
    assert norms[3] == 0 and (norms[[0, 1, 4, 5]] > 0).all()
    cosine = (vectors / np.maximum(norms, 1e-9)[:, None]) @ vectors.T
    assert cosine[0, 1] > cosine[0, 4] and cosine[4, 5] > cosine[4, 1]


def test_items_without_a_vector_are_counted(tmp_path, capsys):
    path = write_ring(tmp_path / "ring.csv")
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(RING, 4)))
    ids = [item(number) for number in range(1, RING)] + ["never seen"]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    generative(
        **SMALL, interactions_file=path, item_vectors=tmp_path / "vectors.npy", item_ids_file=tmp_path / "ids.json",
        output_dir=tmp_path / "out", max_steps=1, num_beams=RING,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "1 of 12 items have no vector and so no code; they can't be recommended" in out
    assert "left out 24 items of histories" in out or "items of histories that are not in the model's catalogue" in out
    assert "targets are not in the model's catalogue; they rank last" in out
    assert "never seen" in SemanticIdTokenizer.from_pretrained(tmp_path / "out").items


def test_mtp_takes_part_in_training_only(learned):
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(
        preset("tiny_llm", vocab_size=9, num_nextn_predict_layers=1, mtp_loss_weight=0.3, **tokens)
    )
    ids = torch.tensor([[1, 2, 5, 7, 3, 4, 7, 2, 5, 8]])
    losses = [model.train(mode)(ids, labels=ids) for mode in (True, False)]
    assert losses[0].loss > losses[1].loss and losses[0].mtp_loss > 0
    assert type(AutoModelForCausalLM.from_pretrained(learned[0] / "out")) is DeepSeekForCausalLM


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_levels": 0}, "--num_levels 0: it must be 1 or more"),
        ({"codebook_size": 1}, "--codebook_size 1: it must be 2 or more"),
        ({"num_beams": 0}, "--num_beams 0"),
        ({"sasrec": True}, "--sasrec: train it by `finetune recommendation`"),
        ({"items_file": "x.csv"}, "--items_file: texts come in by --titles_file"),
        ({"item_vectors": "x.npy"}, "--item_vectors x.npy: add --item_ids_file"),
        (
            {"item_vectors": "x.npy", "item_ids_file": "y"},
            "--item_vectors x.npy with --item_ids_file y: .*No such file",
        ),
        ({"item_vectors": "./none"}, "--item_vectors ./none: no such folder"),
        ({"item_vectors": "./none", "item_ids_file": "y"}, "leave it out"),
        ({"generation_num_beams": 4}, "--generation_num_beams: items are searched by --num_beams"),
    ],
)
def test_bad_input_is_one_line(settings, message, tmp_path):
    path = write_ring(tmp_path / "ring.csv")
    with pytest.raises(ValueError, match=message) as caught:
        generative(**SMALL, interactions_file=path, output_dir=tmp_path / "out", max_steps=1, **settings)
    assert "\n" not in str(caught.value)


def test_the_example_runs_small(tmp_path):
    small = {"num_train_epochs": 1, "max_train_samples": 60, "max_eval_samples": 20, "max_predict_samples": 20}
    quiet = {"output_dir": tmp_path, "use_cpu": True, "disable_tqdm": True, "codebook_size": 8}
    results = generative([str(EXAMPLE), *flags(quiet | small)])
    assert results["test_samples"] == 20 and "above_item_knn_ndcg@10_p" in results
    assert "simulated users" in (tmp_path / "README.md").read_text()


def test_damaged_codes_are_told_by_their_file(tmp_path):
    SemanticIdTokenizer.of_codes(["d", "c", "b", "a"], CODES).save_pretrained(tmp_path)
    (tmp_path / CODES_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"{CODES_FILE} is damaged"):
        SemanticIdTokenizer.from_pretrained(tmp_path)
