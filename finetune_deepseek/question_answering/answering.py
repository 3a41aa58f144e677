"""Questions answered from a folder or file of texts, each with the passage that says so.

The best passages are found by words, vectors or both (passage_index.py), put in another order by a reranker if there
is one, and read by a model of the question answering task. An answer's score, from 0 to 1, is the product of

- the evidence, how well its passage fits the question: the reranker's score, else that of the search (see
  `passage_index.FoundPassage`);
- the confidence of the reader: extractive, the share of the best span against no answer, a softmax over the two;
  generative, the geometric mean of the probabilities of the answer's tokens.

Below `--min_score` the answer is none.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..retrieval.passage_index import PassageIndex
from ..retrieval.reranker import Reranker
from ..training.arguments import ModelArguments
from ..training.batches import batches_by_length
from ..training.loading import load_model, load_tokenizer
from ..training.saved import Saved
from ..training.scoring.ranks import highest
from .arguments import QuestionAnsweringArguments
from .extractive import ExtractiveReader
from .floors import floor_answers
from .task import QuestionAnswering

OTHER_HEADS: dict[str | None, str] = {  # what a model of another kind is for
    "SequenceClassification": " (a classifier goes to --reranker, or deepseek-hf predict classification)",
    "Embedding": " (an embedding model goes to --retriever)",
    "Recommendation": " (a recommender goes to deepseek-hf recommend)",
}


@dataclass(frozen=True)
class Answer:
    """An answer, or None; `passage` and `source` are where it stands, or what came nearest."""

    question: str
    answer: str | None
    score: float
    evidence: float
    confidence: float
    passage: str
    source: str
    start: int | None  # of the answer in the passage, in characters; None if it isn't there word by word


def note(text: str) -> None:
    """Tell it on standard error, for standard output is for answers."""
    print(text, file=sys.stderr)


# Reading -------------------------------------------------------------------------------------------------------------


class SentenceReader:
    """Without a model: the sentence with most words of the question, in full confidence."""

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
        return [(text, 1.0) for text in floor_answers("overlap_sentence", _rows(pairs), seed=0)]


class Reader:
    """A saved model of the question answering task, extractive or generative, as it was trained."""

    def __init__(self, task: QuestionAnswering, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8):
        self.task, self.model, self.tokenizer, self.batch_size = task, model, tokenizer, batch_size

    @classmethod
    def load(cls, name: str, revision: str = "main", dtype: str = "float32", batch_size: int = 8) -> "Reader":
        """From a folder or the Hub.

        Raises:
            ValueError: if the model was made for another task, or there is none.
        """
        saved = Saved.open(None, name, revision).require_model()
        if saved.head in OTHER_HEADS:
            raise ValueError(
                f"{name} is a {saved.architecture or saved.head}, which answers no questions; name a question "
                f"answering model{OTHER_HEADS[saved.head]}."
            )
        settings = saved.settings_for(QuestionAnswering.name, QuestionAnsweringArguments)
        if not settings:
            saved.check_task(QuestionAnswering.name, saved.head or "CausalLM")
            settings["answer_mode"] = "extractive" if saved.head == "QuestionAnswering" else "generative"
        task = QuestionAnswering(QuestionAnsweringArguments(**settings), seed=0)
        arguments = ModelArguments(model_name_or_path=name, model_revision=revision, dtype=dtype)  # type: ignore[arg-type]
        arguments.saved = saved
        tokenizer = load_tokenizer(arguments, task, {}, None)
        model = load_model(arguments, task, tokenizer, {}, is_trained=False).eval()
        if positions := getattr(model.config, "max_position_embeddings", None):
            task.reader.note = note
            task.fit_lengths(positions, tokenizer)
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        return cls(task, model, tokenizer, batch_size)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
        """The answer ("" for none) to each question from its passage, and the confidence in it."""
        task = self.task.afresh(note)
        features: Any = task.features(Dataset.from_list(_rows(pairs)), self.tokenizer, is_training=False)
        collate = task.collator(self.tokenizer)
        read = self._point if isinstance(task.reader, ExtractiveReader) else self._write
        found: list[tuple[str, float]] = [("", 0.0)] * len(pairs)
        for chosen in batches_by_length(features["length"], self.batch_size):
            batch = collate([features[number] | {"row": number} for number in chosen])
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            for number, result in zip(chosen, read(task, batch), strict=True):
                found[number] = result
        return found

    def _point(self, task: QuestionAnswering, batch: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
        outputs = task.reader.predict_batch(self.model, batch).outputs
        texts = task.decode(outputs.cpu().numpy(), self.tokenizer)
        ids = [task.reader.examples[number].id for number in batch["example"].tolist()]
        margins = np.array([task.reader.null_margins[name] for name in ids])
        shares = 1 / (1 + np.exp(np.clip(margins, -60, 60)))
        return list(zip(texts, shares.tolist(), strict=True))

    def _write(self, task: QuestionAnswering, batch: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
        config: Any = task.generation_config(self.tokenizer, 1)
        config.output_logits = config.return_dict_in_generate = True
        output = self.model.generate(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            generation_config=config,
            tokenizer=self.tokenizer,
        )
        new = output.sequences[:, batch["prompt_ids"].shape[1] :]
        logits = torch.stack(output.logits, dim=1).float()  # [B, T, V]
        chosen = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        ended = (new == config.eos_token_id).cumsum(1)
        is_own = (ended == 0) | ((ended == 1) & (new == config.eos_token_id))  # the end is part of an answer
        means = (chosen * is_own).sum(1) / is_own.sum(1)
        texts = task.decode(new.cpu().numpy(), self.tokenizer)
        return list(zip(texts, means.exp().tolist(), strict=True))


def _rows(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "source": question, "context": passage, "answers": [], "starts": [], "target": ""}
        for number, (question, passage) in enumerate(pairs)
    ]


# Answering -----------------------------------------------------------------------------------------------------------


def answer_questions(
    questions: Sequence[str],
    index: PassageIndex,
    reader: Callable[[Sequence[tuple[str, str]]], list[tuple[str, float]]],
    k: int = 5,
    mode: Literal["bm25", "dense", "fused"] | None = None,
    reranker: Reranker | None = None,
    min_score: float = 0.1,
    report: Callable[[int], Any] = lambda count: None,
) -> list[Answer]:
    """One answer per question, in their order.

    Args:
        reader: a `Reader`, or what else gives an answer ("" for none) and a confidence for (question, passage).
        k: passages that are read.
        mode: see `PassageIndex.search`.
        report: is told the number of questions that are done.

    Raises:
        ValueError: if a question is empty, or the index can't be searched that way.
    """
    empty = next((number for number, question in enumerate(questions, start=1) if not question.strip()), None)
    if empty is not None:
        raise ValueError(f"question {empty} is empty.")
    answers = []
    for question in questions:
        passages = index.search(question, k, mode)
        if reranker and passages:
            scores = reranker.scores(question, [passage.text for passage in passages])
            passages = [replace(passage, evidence=score) for passage, score in zip(passages, scores, strict=True)]
            passages = [passages[place] for place in highest(torch.tensor(scores), len(scores))[1].tolist()]
        results = reader([(question, passage.text) for passage in passages]) if passages else []
        best: Answer | None = None
        for passage, (text, confidence) in zip(passages, results, strict=True):
            score = passage.evidence * confidence if text else 0.0
            start = passage.text.find(text) if text else -1
            found = Answer(
                question, text or None, score, passage.evidence, confidence, passage.text, passage.source,
                start if start >= 0 else None,
            )  # fmt: skip
            best = found if best is None or found.score > best.score else best
        if best is None:
            best = Answer(question, None, 0.0, 0.0, 0.0, "", "", None)
        elif not best.score >= min_score:  # nor where it is no number
            best = replace(best, answer=None, start=None)
        answers.append(best)
        report(1)
    return answers
