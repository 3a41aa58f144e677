"""XQuAD-R by TF-IDF, BM25, vectors and their fusion: trains the retriever of a YAML file, writes docs/results.md.

    python benchmarks/reading_data.py --data ../shared/data --output runs/results/reading
    python benchmarks/xquad_r.py benchmarks/xquad_r.yaml --data ../shared/data --output runs/results

What is measured is `PassageIndex`, which `deepseek-hf answer` searches by.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from compare import RESULTS, fill, read_table, run, write_table, write_whole
from reading_data import read

from finetune_deepseek.data.table import read_columns
from finetune_deepseek.retrieval.lexical import (
    BM25,
    WORDS_ALONE,
    best_weights,
    fused_scores,
    part_terms,
    retrieval_scores,
    tfidf_scores,
)
from finetune_deepseek.retrieval.passage_index import Passage, PassageIndex, Retriever
from finetune_deepseek.training.scoring.ranks import ranks_of
from finetune_deepseek.training.stages.predictions import data_hash
from finetune_deepseek.training.task import prefixed

LANGUAGES = {"en": "English", "zh": "Chinese"}


def passages(corpus: list[dict[str, Any]], key: str) -> dict[str, str]:
    """Text by the name in column `key`; a paragraph is its sentences with a space between."""
    found: dict[str, str] = {}
    for row in corpus:
        found[row[key]] = f"{found[row[key]]} {row['text']}" if row[key] in found else row["text"]
    return found


def scores(retriever: Retriever, texts: dict[str, str], queries: list[dict[str, Any]], key: str) -> dict[str, float]:
    """R@1, R@10 and MRR by each way."""
    questions, names = [row["question"] for row in queries], list(texts)
    targets = np.array([names.index(row[key]) for row in queries])
    embeddings = retriever.encode(list(texts.values()), is_query=False)
    index = PassageIndex([Passage(text, name) for name, text in texts.items()], embeddings, retriever, {})
    found = {"tfidf": tfidf_scores(questions, list(texts.values()))}
    found |= {mode: np.stack([index.scores(q, mode) for q in questions]) for mode in ("bm25", "dense", "fused")}
    found["words"] = fused_scores([found["bm25"], np.stack([index.parts.scores(q) for q in questions])], WORDS_ALONE)
    results: dict[str, float] = {}
    for name, ranking in found.items():
        results |= prefixed(name, retrieval_scores(ranks_of(ranking, targets)))
    return results


def best_words(validation: Path) -> tuple[float, ...]:
    """The best weights of BM25 of words and of parts on validation questions that stand with one passage only."""
    columns = read_columns(str(validation))
    pairs = list(zip(columns["query"], columns["passage"], strict=True))
    texts = list(dict.fromkeys(columns["passage"]))
    asked = Counter(query for query, _ in set(pairs))
    pairs = [pair for pair in pairs if asked[pair[0]] == 1]
    targets = np.array([texts.index(passage) for _, passage in pairs])
    rankings = [BM25(texts), BM25(texts, part_terms)]
    return best_weights([np.stack([r.scores(query) for query, _ in pairs]) for r in rankings], targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="YAML file of the retriever's training and of the table")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for models, logs and results")
    arguments = parser.parse_args()
    table = read_table(arguments.table)
    folder = arguments.output / table["name"]
    places = {"data": str(arguments.data), "runs": str(folder), "here": str(arguments.table.parent)}
    (seed,) = table["seeds"]
    model = folder / f"retriever_seed_{seed}"
    training = run(table["task"], {**table["common"], "seed": seed}, model, places)
    retriever = Retriever.load(str(model))
    corpora, queries = (
        {language: read(arguments.data / "xquad_r" / f"{language}.{part}.jsonl.gz") for language in LANGUAGES}
        for part in ("corpus", "queries")
    )
    data = {"test_data_hash": data_hash([corpora, queries])}
    rows: dict[tuple[str, int], Any] = {}
    for language, name in LANGUAGES.items():
        for kind, key in (("paragraphs", "paragraph_id"), ("sentences", "doc_id")):
            texts = passages(corpora[language], key)
            rows[f"{name} {kind}", seed] = scores(retriever, texts, queries[language], key) | data
    validation = Path(fill(table["common"]["validation_file"], places))
    table["text"] += notes(training, retriever.weights, best_words(validation))
    record = RESULTS.with_name("results") / f"{table['name']}.json"
    named = {f"{name} {seed}": results for (name, seed), results in rows.items()}
    write_whole(record, json.dumps({"training": training, "rows": named}, indent=1, sort_keys=True) + "\n")
    write_table(table, arguments.table, {}, rows)


def notes(training: dict[str, Any], weights: tuple[float, ...], words: tuple[float, ...]) -> str:
    """What the retriever is and how its weights were chosen, as Markdown lines."""
    bm25, parts, dense = weights
    return (
        f"\nThe retriever has {training['parameters_total']:,} parameters. The weights are BM25 {bm25:g}, "
        f"parts of words {parts:g}, vectors {dense:g},\nby {training['fusion_queries']:,} questions (R@1 "
        f"{training['eval_fused_r@1']:.3f}, MRR {training['eval_fused_mrr']:.3f}). Without vectors the best are BM25 "
        f"{words[0]:g},\nparts of words {words[1]:g}; by default {WORDS_ALONE[0]:g} and {WORDS_ALONE[1]:g}.\n"
    )


if __name__ == "__main__":
    main()
