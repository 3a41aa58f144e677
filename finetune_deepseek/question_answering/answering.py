"""`deepseek-hf answer`: questions answered from a folder or file of texts, each with the passage that says so.

The best passages are found by words, vectors or both (retrieval.py), put in another order by a reranker if there is
one, and read by a model of the question answering task. An answer's score, from 0 to 1, is the product of

- the evidence, how well its passage fits the question: the reranker's score, else that of the search (see
  `retrieval.FoundPassage`);
- the confidence of the reader: extractive, the share of the best span against no answer, a softmax over the two;
  generative, the geometric mean of the probabilities of the answer's tokens.

Below `--min_score` the answer is none.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..commands.flags import parse_verb
from ..data.files import read_lines, write_text
from ..retrieval.passage_index import PassageIndex, Retriever
from ..retrieval.reranker import Reranker
from ..training import model_card
from ..training.arguments import ModelArguments
from ..training.batches import batches_by_length
from ..training.loading import load_model, load_tokenizer, saved_config
from .extractive import ExtractiveReader
from .floors import floor_answers
from .task import MODEL_SETTINGS, QuestionAnswering, QuestionAnsweringArguments

EXAMPLES = """examples:
  deepseek-hf answer runs/question_answering --knowledge notes "Where does Ann live?"
  deepseek-hf answer --knowledge notes.md "安住在哪里？"
      without a model: the sentence of the best passage that has most words of the question
  deepseek-hf answer runs/question_answering --knowledge notes --input questions.txt --output answers.jsonl
  deepseek-hf answer runs/question_answering --knowledge notes --retriever runs/embedding \\
      --reranker runs/reranker "Where does Ann live?"

A reranker is trained on rows of question, passage and label (no, yes):
  deepseek-hf finetune classification --preset tiny_v3 --data_dir pairs --text_column question \\
      --text_pair_column passage --output_dir runs/reranker"""
NONE = "no answer"
OTHER_HEADS = {  # what a model of another kind is for
    "SequenceClassification": " (a classifier goes to --reranker, or deepseek-hf predict classification)",
    "Embedding": " (an embedding model goes to --retriever)",
    "Recommendation": " (a recommender goes to deepseek-hf recommend)",
}
AROUND = 60  # characters shown on each side of an answer


@dataclass
class AnswerArguments:
    """What to ask, where to look, and how to read."""

    knowledge: str | None = field(
        default=None,
        metadata={"help": "Folder or file of texts (.txt, .md, .rst) and tables (json, jsonl, csv, parquet)."},
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the index; it is brought up to date with --knowledge, which may be left out if the "
            "index is there. Without it, a hidden folder beside the knowledge."
        },
    )
    input: str | None = field(default=None, metadata={"help": "UTF-8 file with one question per line."})
    output: str | None = field(default=None, metadata={"help": "File for one JSON object per question."})
    k: int = field(default=5, metadata={"help": "Passages that are read for a question."})
    mode: Literal["bm25", "dense", "fused"] | None = field(
        default=None,
        metadata={
            "help": "Find passages by words, by vectors, or by words, parts of words and vectors; fused with "
            "--retriever, else bm25."
        },
    )
    retriever: str | None = field(
        default=None, metadata={"help": "Embedding model for dense and fused: a folder or a Hub id."}
    )
    vector_search: Literal["torch", "faiss"] = field(
        default="torch", metadata={"help": "What compares vectors; the results are the same."}
    )
    reranker: str | None = field(
        default=None, metadata={"help": "Classifier of question and passage that puts the passages in order."}
    )
    min_score: float = field(default=0.1, metadata={"help": "An answer with a lower score, from 0 to 1, is none."})
    batch_size: int = field(default=8, metadata={"help": "Passages that are read at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto takes the checkpoint's."}
    )
    questions: list[str] = field(default_factory=list, init=False)  # the words that are no flags

    def __post_init__(self) -> None:
        if not self.knowledge and not self.index:
            raise ValueError("--knowledge: name the folder or file to answer from.")
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be 1 or more.")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"--min_score {self.min_score:g}: it must be from 0 to 1.")
        if self.mode == "dense" and not self.retriever:
            raise ValueError("--mode dense needs --retriever, an embedding model.")
        if self.vector_search == "faiss" and not self.retriever:
            raise ValueError("--vector_search faiss needs --retriever, an embedding model.")
        if self.mode == "bm25" and self.retriever:
            raise ValueError("--retriever has no effect with --mode bm25; leave one of them out.")

    @property
    def index_folder(self) -> Path:
        if self.index:
            return Path(self.index)
        knowledge = Path(self.knowledge or "").resolve()
        return knowledge.with_name(f".{knowledge.name}.{'vectors' if self.retriever else 'words'}.index")


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


# Reading -------------------------------------------------------------------------------------------------------------


class SentenceReader:
    """Without a model: the sentence with most words of the question, in full confidence."""

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
        return [(text, 1.0) for text in floor_answers("overlap_sentence", _rows(pairs), seed=0)]


class Reader:
    """A saved model of the question answering task, extractive or generative, by its card."""

    def __init__(self, task: QuestionAnswering, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8):
        self.task, self.model, self.tokenizer, self.batch_size = task, model, tokenizer, batch_size

    @classmethod
    def load(cls, name: str, revision: str = "main", dtype: str = "float32", batch_size: int = 8) -> "Reader":
        """From a folder or the Hub.

        Raises:
            ValueError: if the model was made for another task, or there is none.
        """
        settings = model_card.run_settings(name, revision, QuestionAnswering.name)
        settings = {key: value for key, value in settings.items() if key in MODEL_SETTINGS}
        heads = saved_config(name, revision).get("architectures") or []
        if not settings:
            is_span_head = any("QuestionAnswering" in head for head in heads)
            if heads and not is_span_head and not any("CausalLM" in head for head in heads):
                use = next((advice for part, advice in OTHER_HEADS.items() if part in heads[0]), "")
                raise ValueError(
                    f"{name} is a {heads[0]}, which answers no questions; name a question answering model{use}."
                )
            settings["answer_mode"] = "extractive" if is_span_head else "generative"
        task = QuestionAnswering(QuestionAnsweringArguments(**settings), seed=0)
        arguments = ModelArguments(model_name_or_path=name, model_revision=revision, dtype=dtype)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(arguments, task, {}, None)
        model = load_model(arguments, task, tokenizer, {}, is_trained=False).eval()
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        return cls(task, model, tokenizer, batch_size)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
        """The answer ("" for none) to each question from its passage, and the confidence in it."""
        with redirect_stdout(sys.stderr):  # what a task reports of its data; standard output is for answers
            features: Any = self.task.features(Dataset.from_list(_rows(pairs)), self.tokenizer, is_training=False)
        collate = self.task.collator(self.tokenizer)
        read = self._point if isinstance(self.task.reader, ExtractiveReader) else self._write
        found: list[tuple[str, float]] = [("", 0.0)] * len(pairs)
        for chosen in batches_by_length(features["length"], self.batch_size):
            batch = collate([features[number] | {"row": number} for number in chosen])
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            for number, result in zip(chosen, read(batch), strict=True):
                found[number] = result
        return found

    def _point(self, batch: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
        _, output = self.task.reader.predict_batch(self.model, batch)
        texts = self.task.decode(output.cpu().numpy(), self.tokenizer)
        ids = [self.task.reader.examples[int(number)].id for number in batch["example"]]
        margins = np.array([self.task.reader.null_margins[name] for name in ids])
        shares = 1 / (1 + np.exp(np.clip(margins, -60, 60)))
        return list(zip(texts, shares.tolist(), strict=True))

    def _write(self, batch: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
        config: Any = self.task.generation_config(self.tokenizer, 1)
        output = self.model.generate(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            generation_config=config,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, batch["prompt_ids"].shape[1] :]
        logits = torch.stack(output.logits, dim=1).float()  # [B, T, V]
        chosen = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        ended = (new == config.eos_token_id).cumsum(1)
        is_own = (ended == 0) | ((ended == 1) & (new == config.eos_token_id))  # the end is part of an answer
        means = (chosen * is_own).sum(1) / is_own.sum(1)
        texts = self.task.decode(new.cpu().numpy(), self.tokenizer)
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
            passages.sort(key=lambda passage: -passage.evidence)
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
        elif best.score < min_score:
            best = replace(best, answer=None, start=None)
        answers.append(best)
        report(1)
    return answers


def shown(answer: Answer) -> str:
    """An answer as lines for people."""
    lines = [f"{answer.answer or NONE}   (score {answer.score:.2f})"]
    if answer.start is not None and answer.answer:
        end = answer.start + len(answer.answer)
        before, after = answer.passage[: answer.start], answer.passage[end:]
        before = ("…" if len(before) > AROUND else "") + before[-AROUND:]
        after = after[:AROUND] + ("…" if len(after) > AROUND else "")
        text = f"{before}[{answer.answer}]{after}"
    else:
        text = answer.passage[: 2 * AROUND] + ("…" if len(answer.passage) > 2 * AROUND else "")
    if answer.source:
        lines.append(f"  {answer.source}: {' '.join(text.split())}")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[str, AnswerArguments]:
    """The model ("" for none) and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    words = list(argv)
    if words and words[0].startswith("--") and words[0] != "--help":
        words = ["", *words]
    return parse_verb(
        "answer", AnswerArguments, words, '[MODEL] --knowledge PATH [--flag value ...] "QUESTION" ...', EXAMPLES,
        words="questions",
    )  # fmt: skip


def answer(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf answer` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    questions = arguments.questions or [line for line in read_lines(arguments.input) if line.strip()]
    if not questions:
        raise ValueError("There is no question; write it at the end, in quotes, or name a file by --input.")
    disable_progress_bar()  # the bar of loading weights; ours counts questions
    retriever = Retriever.load(arguments.retriever) if arguments.retriever else None
    reader = Reader.load(name, arguments.model_revision, arguments.dtype, arguments.batch_size) if name else None
    reranker = Reranker.load(arguments.reranker) if arguments.reranker else None
    use_faiss = arguments.vector_search == "faiss"
    index = PassageIndex.open(arguments.index_folder, arguments.knowledge, retriever, use_faiss=use_faiss)
    with tqdm(total=len(questions), desc="answer", unit="question", file=sys.stderr) as bar:
        answers = answer_questions(
            questions, index, reader or SentenceReader(), arguments.k, arguments.mode, reranker, arguments.min_score,
            bar.update,
        )  # fmt: skip
    if arguments.output:
        lines = [json.dumps(asdict(found), ensure_ascii=False) + "\n" for found in answers]
        write_text(Path(arguments.output), "".join(lines))
        return
    for found in answers:
        heading = f"{found.question}\n" if len(answers) > 1 else ""
        sys.stdout.buffer.write(f"{heading}{shown(found)}\n".encode())
    sys.stdout.flush()
