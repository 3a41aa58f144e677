"""The embedding task: rows, batches, scores over the split's passages, and a run that learns."""

import contextlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.export import export_bundle
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.retrieval.arguments import FUSED, EmbeddingArguments
from finetune_deepseek.retrieval.encoding import encode, token_ids
from finetune_deepseek.retrieval.passage_index import Retriever
from finetune_deepseek.retrieval.task import Embedding, EmbeddingCollator
from finetune_deepseek.training.batches import TokenBatchSampler
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.saved import Saved
from modeling_deepseek import DeepSeekForEmbedding
from tests.small_runs import TINY, flags
from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

ROWS = [
    ("what is red", "a fox is red"),
    ("where is the bird", "the bird sits in a tree"),
    ("who has a fox", "a fox is red"),
    ("什么是海", "海是蓝色的水"),
]
ONE = np.array([[1.0, 0.0]])
OURS = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}


def write(path, rows, **names):
    names = {"query": "query", "passage": "passage"} | names
    lines = [json.dumps({names["query"]: q, names["passage"]: p}, ensure_ascii=False) for q, p in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def run(folder, rows, **settings):
    path = write(folder / "rows.jsonl", rows)
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    settings = OURS | files | {"output_dir": folder / "out", "max_steps": 30} | settings
    return run_stages(Embedding, parse_command("embedding", EmbeddingArguments, flags(settings)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    fields = {"query_prefix": "q: ", "passage_prefix": "p: ", "matryoshka_sizes": [8, 32], "pooling": "last_token"}
    return folder, run(folder, ROWS, per_device_train_batch_size=4, **fields)


def test_a_run_learns_which_passage_answers(learned):
    folder, results = learned
    assert results["test_r@1"] == results["test_r@10"] == results["test_mrr"] == results["eval_mrr"] == 1.0
    assert {"tfidf_mrr", "fused_mrr", "baseline_r@1"} <= set(results)
    assert results["test_retrieval_signature"] == (
        "4 queries, 3 passages of the split, all of a query's right passages count, ties against us"
    )
    lines = [json.loads(line) for line in (folder / "out/generated_predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["prediction"]["passages"][0] for line in lines] == [passage for _, passage in ROWS]
    card = (folder / "out/README.md").read_text("utf-8")
    assert "| fused |" in card and "AutoModelForEmbedding" in card
    saved = Saved.open(None, str(folder / "out"))
    assert saved.settings["max_passage_length"] == 128 and "max_passage_length" not in card  # what positions there are


def test_fusion_weights_are_chosen_on_validation_and_kept(learned, tmp_path):
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    folder, results = learned
    weights = tuple(results[f"fusion_weight_{name}"] for name in FUSED)
    assert sum(weights) == pytest.approx(1) and results["eval_fused_mrr"] == 1.0
    assert Retriever.load(str(folder / "out")).weights == weights
    given = run(tmp_path, ROWS, max_steps=1, fusion_weights=[1, 0, 0])
    assert given["fused_mrr"] == given["bm25_mrr"] and "fusion_weight_bm25" not in given
    assert Retriever.load(str(tmp_path / "out")).weights == (1, 0, 0)


def test_queries_of_several_passages_choose_no_weights(monkeypatch, tmp_path):
    task = Embedding(EmbeddingArguments(validation_file="unread"), seed=0)
    task.queries, task.targets = ["who?", "what is red", "who?", "who?"], [0, 0, 1, 1]
    task.similarities = dict.fromkeys(range(4), (np.arange(2), np.ones(2), np.array([True, False])))
    seen = []

    def rankings(numbers):
        seen.append(numbers)
        return dict.fromkeys(FUSED, np.tile([1.0, 0.0], (len(numbers), 1))), np.zeros(len(numbers), dtype=int)

    monkeypatch.setattr(task, "_rankings", rankings)
    assert task.after_evaluation().numbers["fusion_queries"] == 1 and seen == [[1]]
    task.weights, task.queries[1] = (), "who?"
    assert task.after_evaluation().numbers["fusion_queries"] == 4


def test_the_saved_model_keeps_its_prefixes_and_gives_the_same_ranking(learned):
    folder = learned[0] / "out"
    model, tokenizer = DeepSeekForEmbedding.from_pretrained(folder), DeepSeekTokenizer.from_pretrained(folder)
    assert (model.config.query_prefix, model.config.passage_prefix) == ("q: ", "p: ")
    assert model.config.pooling == "last_token" and model.config.matryoshka_sizes == [8, 32]
    queries, passages = [q for q, _ in ROWS], [p for _, p in ROWS]
    for size in (None, 8):
        ours = encode(model, tokenizer, queries, model.config.query_prefix, size=size)
        theirs = encode(model, tokenizer, passages, model.config.passage_prefix, size=size)
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(4))
        best = (ours @ theirs.T).argmax(1)
        assert [passages[place] for place in best] == passages


def test_evaluation_reads_the_prefixes_from_the_model(learned, tmp_path):
    again = run(tmp_path, ROWS, preset=None, vocab_size=None, model_name_or_path=learned[0] / "out", do_predict=True)
    assert again["test_mrr"] == 1.0


def test_hard_negatives_are_read_and_trained_on(tmp_path):
    rows = [{"query": q, "passage": p, "no": n} for (q, p), n in zip(ROWS, (["x"], [], "a tree", None), strict=True)]
    task = Embedding(EmbeddingArguments(train_file="unread", negatives_column="no"), seed=0)
    splits = {"train": task._read_rows({name: [row[name] for row in rows[:2]] for name in rows[0]}, "train")}
    assert splits["train"]["negatives"][:] == [["x"], []]
    (tmp_path / "negatives.jsonl").write_text(
        "\n".join(json.dumps({"query": q, "passage": p, "no": ["a tree", "x"]}) for q, p in ROWS)
    )
    path = str(tmp_path / "negatives.jsonl")
    settings = OURS | {"train_file": path, "output_dir": tmp_path / "out", "max_steps": 2, "negatives_column": "no"}
    results = run_stages(Embedding, parse_command("embedding", EmbeddingArguments, flags(settings)))
    assert results["train_samples"] == 4 and np.isfinite(results["train_loss"])


def test_both_towers_count_among_the_tokens_of_a_batch():
    """What a batch of up to 60 tokens holds, as the collator pads it; once 60 of the longer side alone."""
    rows = [(f"why {'so ' * n}", f"because {'of that ' * n}") for n in range(1, 12)]
    task = Embedding(EmbeddingArguments(train_file="unread", negatives_column="no"), seed=0)
    tokenizer = train_tokenizer([text for row in rows for text in row], 300)
    columns = {"source": [q for q, _ in rows], "target": [p for _, p in rows]}
    columns["negatives"] = [["a longer text that is no answer"] * (n % 3) for n in range(11)]
    features = task.features(Dataset.from_dict(columns), tokenizer, is_training=True)
    collate, batches = task.collator(tokenizer), list(TokenBatchSampler(features["sizes"], 60, seed=0))
    assert sorted(row for batch in batches for row in batch) == list(range(11)) and max(map(len, batches)) > 1
    for batch in batches:
        padded = collate([features[row] for row in batch])
        tokens = padded["input_ids"].numel() + padded["passage_input_ids"].numel()
        assert tokens <= 60 or len(batch) == 1


def test_a_batch_holds_each_passage_once():
    rows = [
        {"query_ids": [1], "passage_ids": [5, 6], "negative_ids": [[7], [8, 9, 10]]},
        {"query_ids": [2, 3], "passage_ids": [7], "negative_ids": [[5, 6]]},
        {"query_ids": [4], "passage_ids": [5, 6], "negative_ids": []},
    ]
    batch = EmbeddingCollator(0)(rows)
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["passage_input_ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert batch["passage_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["input_ids"].tolist() == [[1, 0], [2, 3], [4, 0]]


def test_a_batch_says_which_passages_answer_its_queries():
    """Those of the data set that stand in the batch: the first query's other one does, as the second's own."""
    rows = [([3], [10], [[11], [12]]), ([4], [11], []), ([5], [13], [])]
    features = [dict(zip(("query_ids", "passage_ids", "other_ids"), row, strict=True)) for row in rows]
    batch = EmbeddingCollator(0)(features)
    assert batch["right_passages"].int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_the_loss_of_a_split_takes_no_right_passage_for_a_negative():
    task = Embedding(EmbeddingArguments(), 0)
    task.config = preset("tiny_llm", contrastive_temperature=1.0)
    task.queries, task.passages = ["a", "a", "b"], ["p", "q", "r"]
    vectors = np.eye(3)
    outputs = np.concatenate((np.arange(3)[:, None], np.arange(3)[:, None], vectors, vectors), axis=1)
    ahead, behind = math.log(1 + math.exp(-1)), math.log(1 + 2 * math.exp(-1))
    assert task.split_loss(outputs) == pytest.approx((2 * ahead + behind) / 3)


def test_ranks_count_ties_against_the_passage():
    task = Embedding(EmbeddingArguments(test_file="unread"), seed=0)
    task.passages, task.queries = ["none", "a", "b"], ["x", "y", "z"]
    vectors = [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]]  # both passages are the same vector
    outputs = np.array([[n, 1 + n % 2, *vector] for n, vector in enumerate(vectors)], dtype=np.float32)
    predictions = task.decode(outputs, None)
    assert [prediction["ranks"] for prediction in predictions] == [[2], [2], [2]]
    assert predictions[0]["passages"] == ["a", "b"]
    assert task.score(predictions, [{"source": query, "target": "a"} for query in "xyz"])["mrr"] == 0.5


def judged(rows, scores):
    """The scores of a split of (query, passage) rows, and of a ranking [Q, P] that takes the model's place."""
    task = Embedding(EmbeddingArguments(test_file="unread"), seed=0)
    task.queries, texts = [query for query, _ in rows], dict.fromkeys(passage for _, passage in rows)
    task.passages = [*texts]
    task.targets = [task.passages.index(passage) for _, passage in rows]
    units, places = np.eye(len(texts)), {query: place for place, query in enumerate(dict.fromkeys(task.queries))}
    numbers = [[n, target] for n, target in enumerate(task.targets)]
    outputs = np.hstack([numbers, [scores[places[q]] for q in task.queries], [units[t] for t in task.targets]])
    predictions = task.decode(outputs, None)
    by_rows = task.score(predictions, [{"source": query, "target": passage} for query, passage in rows])
    return by_rows, task._judged(range(len(rows)), np.array([scores[places[query]] for query, _ in rows]))


def test_all_right_passages_of_a_query_count():
    """A query with two of them, at ranks 1 and 3, and one whose passage is second: by hand, as trec_eval counts."""
    rows = [("a", "p"), ("a", "q"), ("b", "r")]
    found, floor = judged(rows, [[0.9, 0.1, 0.5], [0.8, 0.1, 0.7]])
    assert found["r@1"] == pytest.approx((1 / 2 + 0) / 2) and found["r@10"] == 1
    assert found["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert {name: found[name] for name in floor} == floor


def test_as_trec_eval_counts():
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval is not installed")
    generator = np.random.default_rng(0)
    pairs = {(f"q{generator.integers(9)}", f"p{generator.integers(40)}") for _ in range(60)}
    rows = sorted(pairs)
    queries = [*dict.fromkeys(query for query, _ in rows)]
    passages = [*dict.fromkeys(passage for _, passage in rows)]
    scores = generator.permutation(len(queries) * len(passages)).reshape(len(queries), -1) / 1000
    found, floor = judged(rows, scores)
    relevant = {query: {p: 1 for q, p in rows if q == query} for query in queries}
    ranked = {q: dict(zip(passages, row.tolist(), strict=True)) for q, row in zip(queries, scores, strict=True)}
    theirs = pytrec_eval.RelevanceEvaluator(relevant, {"recall.1,10", "recip_rank"}).evaluate(ranked).values()
    for ours, name in {"r@1": "recall_1", "r@10": "recall_10", "mrr": "recip_rank"}.items():
        assert found[ours] == pytest.approx(np.mean([one[name] for one in theirs])) == floor[ours]


def test_every_text_ends_with_the_end_of_text():
    tokenizer = train_tokenizer(["one two birds three"] * 3, 300)
    rows, cut = token_ids(tokenizer, ["one", "one two birds three " * 9], "q: ", 12)
    assert [row[-1] for row in rows] == [tokenizer.eos_token_id] * 2 and cut == 1 and len(rows[1]) == 12
    assert tokenizer.decode(rows[0], skip_special_tokens=True).strip() == "q: one"


def test_order_and_batches_dont_change_the_vectors(learned):
    folder = learned[0] / "out"
    model, tokenizer = DeepSeekForEmbedding.from_pretrained(folder), DeepSeekTokenizer.from_pretrained(folder)
    texts = [passage for _, passage in ROWS] * 11
    together = encode(model.train(), tokenizer, texts, "")
    assert model.training
    alone = torch.cat([encode(model, tokenizer, [text], "") for text in texts[:4]])
    torch.testing.assert_close(together[:4], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[4:8], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([("q", "p")], {"query_column": "qurey"}, "no column 'qurey'.*--query_column.*query"),
        ([("q", " "), ("", "p")], {}, "no row has both a 'query' and a 'passage'"),
        ([("q", 7), ("r", 8)], {}, "row 1: 'passage' is '7', not a text"),
        ([("q", "p"), ("r", "p")], {}, "there is only one passage"),
        (ROWS, {"max_query_length": 1}, "--max_query_length 1: it must be 2 or more"),
        (ROWS, {"fusion_weights": [1, 2]}, "--fusion_weights: three numbers are needed"),
        (ROWS, {"fusion_weights": [1, -1, 1]}, "each must be 0 or more"),
        (ROWS, {"pooling": "men"}, "pooling has the unknown word 'men'; did you mean 'mean'"),
        (ROWS, {"label_smoothing_factor": 0.1}, "--label_smoothing_factor: the contrastive loss has none"),
    ],
)
def test_bad_input_is_one_line(rows, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, rows, **settings)
    assert "\n" not in str(error.value)


def test_one_text_is_one_vector_and_no_text_none(learned):
    folder = learned[0] / "out"
    model, tokenizer = DeepSeekForEmbedding.from_pretrained(folder), DeepSeekTokenizer.from_pretrained(folder)
    assert encode(model, tokenizer, [], "q: ").shape == (0, 32)
    assert encode(model, tokenizer, (), "q: ", size=8).shape == (0, 8)
    one = encode(model, tokenizer, "hello", "q: ")
    assert one.shape == (32,) and torch.equal(one, encode(model, tokenizer, ["hello"], "q: ")[0])
    assert encode(model, tokenizer, "hello", "q: ", size=8).shape == (8,)


@pytest.mark.parametrize("pooling", ["last_token", "latent"])
def test_an_adapter_is_trained_and_scored_again(learned, tmp_path, pooling):
    """The base doesn't know the adapter's pooling and prefix: the adapter does, and latents lie beside it."""
    settings = {"preset": None, "vocab_size": None, "model_name_or_path": learned[0] / "out", "use_peft": True}
    fields = {
        "pooling": pooling,
        "query_prefix": "other: ",
        "lora_r": 2,
        "max_steps": 3,
        "output_dir": tmp_path / "adapter",
    }
    results = run(tmp_path, ROWS, **settings, **fields)
    saved = Saved.open(None, str(tmp_path / "adapter"))
    fields = ("pooling", "query_prefix", "passage_prefix")
    assert [saved.config[name] for name in fields] == [pooling, "other: ", "p: "]
    assert saved.changes.keys() <= {"pooling", "query_prefix", "num_pooling_latents", "pad_token_id"}
    again = parse_command(
        "embedding",
        EmbeddingArguments,
        flags(
            {
                "model_name_or_path": tmp_path / "adapter",
                "test_file": tmp_path / "rows.jsonl",
                "output_dir": tmp_path / "again",
                "use_cpu": True,
                "disable_tqdm": True,
            }
        ),
        defaults=saved.settings_for("embedding", EmbeddingArguments),
    )
    assert run_stages(Embedding, again)["test_loss"] == pytest.approx(results["test_loss"], rel=1e-4)

    # Served, exported, and by the card's own lines it is the same model.
    adapter = PeftModel.from_pretrained(
        DeepSeekForEmbedding.from_pretrained(learned[0] / "out", pooling=pooling, query_prefix="other: "),
        tmp_path / "adapter",
    ).eval()
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path / "adapter")
    expected = encode(adapter, tokenizer, ["what is red", "who has a fox"], "other: ")
    retriever = Retriever.load(str(tmp_path / "adapter"))
    assert retriever.model.config.pooling == pooling
    assert torch.allclose(retriever.encode(["what is red", "who has a fox"], is_query=True), expected, atol=1e-5)
    export_bundle(learned[0] / "out", tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = Retriever.load(str(tmp_path / "merged"))
    assert Saved.open(None, str(tmp_path / "merged")).task == "embedding"
    assert torch.allclose(merged.encode(["what is red", "who has a fox"], is_query=True), expected, atol=1e-5)
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", (tmp_path / "adapter/README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "out").symlink_to(learned[0] / "out")
    with contextlib.chdir(tmp_path):
        exec(code, names)
    assert names["model"].config.query_prefix == "other: "
    found = encode(names["model"].eval(), tokenizer, ["what is red", "who has a fox"], "other: ")
    assert torch.allclose(found, expected, atol=1e-5)


def test_training_reads_the_prefixes_that_the_model_keeps():
    """Those of --config_overrides too, which no flag names."""
    task = Embedding(EmbeddingArguments(train_file="unread"), 0)
    fields = task.config_fields({}, {})
    config = preset("tiny_v3", query_prefix="q: ", passage_prefix="p: ", **fields)
    task.prepare_model(SimpleNamespace(config=config), None)
    assert task.prefixes == ("q: ", "p: ")
