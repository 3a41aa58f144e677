"""Embedding: queries and passages to vectors that are near each other where a passage answers a query.

Training is contrastive: each query's passage among all passages of the batch. Scores are counted over all passages of
the split, beside TF-IDF, BM25, and their fusion with the model, whose weights are chosen on the validation split.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_deepseek import AutoModelForEmbedding
from modeling_deepseek.contrastive import matryoshka_loss

from ..data.cells import Column, typed
from ..data.sources import Rows, joined, named, read_splits
from ..training.model_card import table
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import best_first, right_ranks
from ..training.task import CausalCollator, Scores, Task, lower, prefixed
from .arguments import CONFIG_FLAGS, FUSED, EmbeddingArguments
from .encoding import token_ids
from .lexical import (
    BM25,
    DEFAULT_WEIGHTS,
    best_weights,
    fused_scores,
    has_bm25,
    part_terms,
    retrieval_scores,
    right_places,
    tfidf_scores,
)

SHOWN_PASSAGES = 5  # kept per scored query


class EmbeddingCollator(CausalCollator):
    """Queries, and the passages of the batch, each once: a second copy would be a negative of its own query."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        batch["input_ids"], batch["attention_mask"] = self._pad([f["query_ids"] for f in features])
        places: dict[tuple[int, ...], int] = {}
        labels = [places.setdefault(tuple(f["passage_ids"]), len(places)) for f in features]
        for feature in features:
            for negative in feature.get("negative_ids") or ():
                places.setdefault(tuple(negative), len(places))
        batch["labels"] = torch.tensor(labels)
        if "other_ids" in features[0]:
            right = torch.zeros(len(features), len(places), dtype=torch.bool)
            for row, feature in enumerate(features):
                known = [places.get(tuple(ids)) for ids in [feature["passage_ids"], *feature["other_ids"]]]
                right[row, [place for place in known if place is not None]] = True
            batch["right_passages"] = right
        batch["passage_input_ids"], batch["passage_attention_mask"] = self._pad([list(ids) for ids in places])
        for name in ("row", "query_number", "passage_number"):
            if name in features[0]:
                batch[name] = torch.tensor([f[name] for f in features])
        return batch


def right_texts(queries: Sequence[str], passages: Sequence[str]) -> dict[str, list[str]]:
    """The passages of each query, in their order, each once."""
    right: dict[str, dict[str, None]] = {}
    for query, passage in zip(queries, passages, strict=True):
        right.setdefault(query, {})[passage] = None
    return {query: [*texts] for query, texts in right.items()}


class Embedding(Task):
    """See the module. Rows are `source` (the query), `target` (its passage), and `negatives` where there are any."""

    name = "embedding"
    next_command = 'deepseek-hf answer --retriever {folder} --knowledge PATH "QUESTION"'
    arguments_class = EmbeddingArguments
    auto_class = AutoModelForEmbedding
    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, arguments: EmbeddingArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.prefixes = ("", "")  # of queries and passages, known with the model
        self.config: Any = None  # the model's
        self.passages: list[str] = []  # of the scored splits, each once per split
        self.queries: list[str] = []  # of the scored splits
        self.targets: list[int] = []  # the number of each one's passage
        self.weights = tuple(arguments.fusion_weights or ())
        # Query number -> passage numbers, scores, and which of them are right.
        self.similarities: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.table = ""

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        splits: dict[str, Rows] = {}
        for split, parts in read_splits(self.arguments).items():
            splits[split] = joined([self._read_rows(part.rows, part.where) for part in parts], self.seed)
            if split == "train" and len(set(splits[split]["target"])) < 2:
                raise ValueError(f"{named(parts)}: there is only one passage, so there is nothing to tell apart.")
        return splits

    def _read_rows(self, raw: Mapping[str, Sequence[Any]], where: str) -> Dataset:
        """Rows of query, passage and negatives; rows without one of the first two are left out, and counted aloud.

        Raises:
            ValueError: if there are no rows, no such columns, or a cell that isn't text.
        """
        names = (self.arguments.query_column, self.arguments.passage_column, self.arguments.negatives_column)
        wanted = [Column(names[0], "text", "query_column"), Column(names[1], "text", "passage_column")]
        if names[2]:
            wanted.append(Column(names[2], "texts", "negatives_column"))
        columns = typed(raw, wanted, where)
        count = len(columns[names[0]])
        if not count:
            raise ValueError(f"{where}: no rows.")
        rows: dict[str, list[Any]] = {"source": [], "target": [], "negatives": []}
        negatives = columns[names[2]] if names[2] else [[]] * count
        for query, passage, others in zip(columns[names[0]], columns[names[1]], negatives, strict=True):
            if query and query.strip() and passage and passage.strip():
                rows["source"].append(query.strip())
                rows["target"].append(passage.strip())
                bare = (text.strip() for text in others or ())
                rows["negatives"].append([text for text in bare if text and text != passage.strip()])
        if not rows["source"]:
            raise ValueError(f"{where}: no row has both a {names[0]!r} and a {names[1]!r}.")
        if left_out := count - len(rows["source"]):
            print(f"{where}: left out {left_out:,} of {count:,} rows without query or passage")
        return Dataset.from_dict(rows)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from splits["train"]["source"]
        yield from dict.fromkeys(splits["train"]["target"])

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """The flags that were given; the model keeps its own of the others."""
        given = {name: getattr(self.arguments, name) for name in CONFIG_FLAGS}
        fields = {name: saved[name] for name in CONFIG_FLAGS if saved.get(name) is not None}
        fields |= {name: value for name, value in given.items() if value is not None}
        return fields

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = model.config
        self.prefixes = (model.config.query_prefix, model.config.passage_prefix)

    # -- features --

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        lower(self.arguments, positions, max_query_length=positions, max_passage_length=positions)

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Token ids of query, passage and negatives; for evaluation also the numbers of query and passage."""
        arguments = self.arguments
        queries, cut_queries = token_ids(tokenizer, rows["source"], self.prefixes[0], arguments.max_query_length)
        distinct = list(dict.fromkeys([*rows["target"], *(t for others in rows["negatives"] for t in others)]))
        encoded, cut_passages = token_ids(tokenizer, distinct, self.prefixes[1], arguments.max_passage_length)
        ids = dict(zip(distinct, encoded, strict=True))
        if cut_queries or cut_passages:
            print(
                f"cut {cut_queries:,} of {len(queries):,} queries to --max_query_length {arguments.max_query_length}, "
                f"{cut_passages:,} of {len(distinct):,} passages to --max_passage_length "
                f"{arguments.max_passage_length} tokens"
            )
        passages = [ids[text] for text in rows["target"]]
        right = right_texts(rows["source"], rows["target"])
        features: dict[str, list[Any]] = {
            "query_ids": queries,
            "passage_ids": passages,
            "length": [max(map(len, pair)) for pair in zip(queries, passages, strict=True)],
        }
        if is_training:
            others = [[ids[text] for text in texts] for texts in rows["negatives"]]
            if arguments.negatives_column:
                features["negative_ids"] = others
            if len(right) < len(rows["source"]):
                pairs = zip(rows["source"], rows["target"], strict=True)
                features["other_ids"] = [[ids[t] for t in right[query] if t != text] for query, text in pairs]
            # At most: passages that several rows share stand in a batch once.
            features["sizes"] = [
                [[1, len(query)], [1 + len(more), max(map(len, [passage, *more]))]]
                for query, passage, more in zip(queries, passages, others, strict=True)
            ]
        else:
            numbers = {text: len(self.passages) + n for n, text in enumerate(dict.fromkeys(rows["target"]))}
            features["query_number"] = list(range(len(self.queries), len(self.queries) + len(queries)))
            features["passage_number"] = [numbers[text] for text in rows["target"]]
            self.passages += numbers
            self.queries += rows["source"]
            self.targets += features["passage_number"]
        return Dataset.from_dict(features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> EmbeddingCollator:
        return EmbeddingCollator(cast(int, tokenizer.pad_token_id))

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        if label_smoothing:
            raise ValueError("--label_smoothing_factor: the contrastive loss has none; leave it out.")
        return None

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """[B, 2 + 2 D]: numbers and vectors of query and passage."""
        numbers = torch.stack([inputs.pop(name) for name in ("query_number", "passage_number")], dim=1)
        outputs = model(**inputs)
        passages = outputs.passage_embeddings[inputs["labels"]]
        return Predicted(outputs=torch.cat((numbers.float(), outputs.embeddings.float(), passages.float()), dim=1))

    def split_loss(self, outputs: np.ndarray) -> float:
        """The contrastive loss of all queries over all passages of the split: within batches it would depend on their
        size, and on how many processes there are."""
        queries, passages, targets, distinct = vectors(outputs)
        asked = [self.queries[number] for number in outputs[:, 0].astype(int)]
        right = torch.from_numpy(right_places(asked, targets, len(distinct)))
        given, found, own = (torch.from_numpy(part) for part in (queries, passages, targets))
        temperature, sizes = self.config.contrastive_temperature, self.config.matryoshka_sizes
        return float(matryoshka_loss(given, found, own, temperature, sizes, right))

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """The ranks of a query's right passages among all passages of the rows, and the best passages."""
        queries, passages, targets, distinct = vectors(outputs)
        scores, numbers = queries @ passages.T, outputs[:, 0].astype(int)
        best = best_first(scores)[:, :SHOWN_PASSAGES]
        right = right_places([self.queries[number] for number in numbers], targets, len(distinct))
        predictions = []
        for number, row, is_right, chosen in zip(numbers, scores, right, best, strict=True):
            self.similarities[int(number)] = distinct, row, is_right
            texts = [self.passages[distinct[place]] for place in chosen]
            ranks = right_ranks(row, is_right).tolist()
            predictions.append({"query_number": int(number), "ranks": ranks, "passages": texts})
        return predictions

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Each query once, however many rows name a passage of it."""
        pairs = zip(rows, predictions, strict=True)
        ranks = {row["source"]: prediction["ranks"] for row, prediction in pairs}
        sizes = f"{len(ranks):,} queries, {len({row['target'] for row in rows}):,} passages of the split"
        return retrieval_scores([*ranks.values()]) | {
            "retrieval_signature": f"{sizes}, all of a query's right passages count, ties against us"
        }

    def after_evaluation(self) -> Scores:
        """Choose the weights of the fused ranking, unless they are given.

        Queries that stand with several passages are left out, unless all do: they can't say which one is meant.
        """
        if self.weights or not self.arguments.lexical_baselines or not has_bm25():
            return Scores({})
        numbers = sorted(self.similarities)
        asked = Counter(query for query, _ in {(self.queries[n], self.targets[n]) for n in numbers})
        telling = [number for number in numbers if asked[self.queries[number]] == 1] or numbers
        rankings, targets = self._rankings(telling)
        self.weights = best_weights([rankings[name] for name in FUSED], targets, is_sparing=True)
        named_weights = dict(zip(FUSED, self.weights, strict=True))
        named = ", ".join(f"{name} {weight:g}" for name, weight in named_weights.items())
        text = f"{len(telling):,} of {len(numbers):,} queries chose the weights of the fused ranking: {named}"
        scores = self._judged(telling, fused_scores([rankings[name] for name in FUSED], self.weights))
        count = {"fusion_queries": len(telling)}
        return Scores(prefixed("eval_fused", scores) | prefixed("fusion_weight", named_weights) | count, text=text)

    def _judged(self, numbers: Sequence[int], scores: np.ndarray) -> dict[str, float]:
        """Of a ranking's scores [Q, P], each query counted once."""
        rows = zip(numbers, scores, strict=True)
        return retrieval_scores(
            [*{self.queries[n]: right_ranks(row, self.similarities[n][2]) for n, row in rows}.values()]
        )

    def _rankings(self, numbers: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Scores [Q, P] of queries by each way, over the passages of their split, and the places [Q] of their own."""
        found = self.similarities[numbers[0]][0]
        passages, queries = [self.passages[number] for number in found], [self.queries[n] for n in numbers]
        targets = np.searchsorted(found, [self.targets[number] for number in numbers])
        rankings = {"dense": np.stack([self.similarities[number][1] for number in numbers])}
        if has_bm25():
            for name, ranking in (("bm25", BM25(passages)), ("parts", BM25(passages, part_terms))):
                rankings[name] = np.stack([ranking.scores(query) for query in queries])
        return rankings, targets

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """TF-IDF, BM25 and the model fused with BM25, over the same passages."""
        if not self.arguments.lexical_baselines:
            return Scores({})
        of_queries = {row["source"]: p["query_number"] for row, p in zip(rows, predictions, strict=True)}
        queries, numbers = zip(*of_queries.items(), strict=True)
        rankings, _ = self._rankings(numbers)
        passages = [self.passages[number] for number in self.similarities[numbers[0]][0]]
        methods = {"model": rankings["dense"], "tfidf": tfidf_scores(queries, passages)}
        if "bm25" in rankings:
            methods["bm25"] = rankings["bm25"]
            weights = self.weights or DEFAULT_WEIGHTS
            methods["fused"] = fused_scores([rankings[name] for name in FUSED], weights)
        found = {name: self._judged(numbers, scores) for name, scores in methods.items()}
        self.table = table(
            ["", "R@1", "R@10", "MRR"], [[n, *(f"{x:.4f}" for x in s.values())] for n, s in found.items()]
        )
        text = f"{len(numbers):,} queries, {len(passages):,} passages\n{self.table}"
        if "bm25" not in rankings:
            text += '\nBM25 and the fused ranking are left out: pip install "deepseek-hf[retrieval]" brings them'
        results: dict[str, Any] = {}
        for name in ("tfidf", "bm25", "fused"):
            results |= prefixed(name, found.get(name, {}))
        results |= prefixed("baseline", found.get("bm25", found["tfidf"]))  # the card's second column
        return Scores(results, text=text)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "language": None,
            "pipeline_tag": "sentence-similarity",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": {name: (name, name.upper()) for name in retrieval_scores(np.ones(1))},
            "dataset_name": arguments.data_name,
            "baseline": "BM25" if has_bm25() else "TF-IDF",
            "title": "embedding",
            "code": CARD_CODE,
            "head": "Embedding",
            "prompt": "",
            "prediction": "passages by the product of their vectors with the query's",
            "data": self.table,
            "preprocessing": f"queries of at most {arguments.max_query_length} tokens, passages of "
            f"{arguments.max_passage_length}",
        }

    def settings(self) -> dict[str, Any]:
        """Those of the flags, and the weights that were chosen."""
        return super().settings() | {"fusion_weights": list(self.weights) or None}


def vectors(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a split's outputs the queries' vectors [Q, D], those of the passages [P, D], each once, the place of each
    query's passage among them [Q], and the passages' numbers [P]."""
    numbers, first, targets = np.unique(outputs[:, 1].astype(int), return_index=True, return_inverse=True)
    queries, passages = np.split(outputs[:, 2:], 2, axis=1)
    return queries, passages[first], targets, numbers


CARD_CODE = """from finetune_deepseek.encoding import encode
{imports}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
{opening}
queries = encode(model, tokenizer, ["What is it?"], model.config.query_prefix)
passages = encode(model, tokenizer, ["This.", "That."], model.config.passage_prefix)
print(queries @ passages.T)"""
