"""An embedding model inside sentence-transformers: the same vectors, saved and opened again, and a retrieval task."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from configuration_deepseek import preset  # noqa: E402
from finetune_deepseek.retrieval.encoding import encode  # noqa: E402
from finetune_deepseek.retrieval.lexical import retrieval_scores  # noqa: E402
from finetune_deepseek.retrieval.sentence_module import SentenceModule, prompts, write_modules  # noqa: E402
from finetune_deepseek.training.scoring.ranks import ranks_of  # noqa: E402
from modeling_deepseek import DeepSeekForEmbedding  # noqa: E402
from tokenization_deepseek import train_tokenizer  # noqa: E402

XQUAD_R = Path(__file__).parents[3] / "shared" / "data" / "xquad_r"
TEXTS = ["the red fox", "a bird", "one two three birds in a tree"]


@pytest.fixture(scope="module")
def retriever():
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.2}
    prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    return DeepSeekForEmbedding(preset("tiny_v3", **ids, **prefixes)).eval(), tokenizer


def check(opened, model, tokenizer):
    for encoder, prefix in (("encode_query", "query: "), ("encode_document", "passage: "), ("encode", "")):
        expected = encode(model, tokenizer, TEXTS, prefix).numpy()
        np.testing.assert_allclose(getattr(opened, encoder)(TEXTS), expected, rtol=1e-4, atol=1e-5)


def test_given_as_a_module_it_makes_the_same_vectors(retriever, tmp_path):
    model, tokenizer = retriever
    opened = st.SentenceTransformer(
        modules=[SentenceModule(model, tokenizer)], prompts=prompts(model.config), device="cpu"
    )
    check(opened, model, tokenizer)
    assert opened.encode(TEXTS, truncate_dim=8).shape == (3, 8)
    opened.save(str(tmp_path / "saved"))
    check(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True), model, tokenizer)


def test_a_folder_of_ours_is_opened_by_its_modules_json(retriever, tmp_path):
    model, tokenizer = retriever
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_modules(tmp_path)
    check(st.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True), model, tokenizer)


@pytest.mark.skipif(not XQUAD_R.is_dir(), reason="XQuAD-R is not beside the repository")
def test_an_information_retrieval_task_gives_our_own_scores(retriever):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model, tokenizer = retriever
    rows, sentences = (
        list(map(json.loads, gzip.decompress((XQUAD_R / f"en.{name}.jsonl.gz").read_bytes()).splitlines()))
        for name in ("queries", "corpus")
    )
    rows = rows[:40]
    gold = {row["doc_id"] for row in rows}
    sentences = [row for row in sentences if row["doc_id"] in gold]
    queries = {row["query_id"]: row["question"] for row in rows}
    corpus = {row["doc_id"]: row["text"] for row in sentences}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, {row["query_id"]: {row["doc_id"]} for row in rows}, mrr_at_k=[len(corpus)], name="xquad"
    )
    opened = st.SentenceTransformer(
        modules=[SentenceModule(model, tokenizer)], prompts=prompts(model.config), device="cpu"
    )
    results = evaluator(opened)
    places = {name: place for place, name in enumerate(corpus)}
    similar = (
        encode(model, tokenizer, list(queries.values()), "query: ")
        @ encode(model, tokenizer, list(corpus.values()), "passage: ").T
    )
    ours = retrieval_scores(ranks_of(similar.numpy(), np.array([places[row["doc_id"]] for row in rows])))
    assert results["xquad_cosine_accuracy@1"] == pytest.approx(ours["r@1"])
    assert results["xquad_cosine_accuracy@10"] == pytest.approx(ours["r@10"])
    assert results[f"xquad_cosine_mrr@{len(corpus)}"] == pytest.approx(ours["mrr"])
