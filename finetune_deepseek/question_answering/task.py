"""Question answering: a passage and a question in; the stretch of it that is the answer, or a written answer, out.

Data has SQuAD's format, nested or flat (squad.py), with or without questions that have no answer; without data the
embedded facts about territories are asked for (territories.py). `--answer_mode` chooses between extractive reading by
a span head (extractive.py) and generative reading by a language model (written.py). Scores stand beside three
floors.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from configuration_deepseek.official import SOURCES

from ..data.arguments import SPLITS
from ..data.fault_report import Report, finding
from ..data.files import json_text
from ..data.languages import HAN
from ..data.scripts import looks_mojibake
from ..data.sources import DatasetColumns, Part, Rows, joined, named, read_splits
from ..training.scoring.eval_loss import Predicted
from ..training.task import Scores, Task, lower, prefixed
from .arguments import NBEST_FILE, QuestionAnsweringArguments
from .extractive import ExtractiveReader
from .floors import FLOORS, NAMES, floor_answers
from .metrics import CmrcScores, SquadScores
from .squad import FAULTS, Questions, simplifier
from .territories import territory_rows
from .windows import PIECES, TOKEN_TYPES, Layout
from .written import GenerativeReader

READERS: dict[str, Any] = {"extractive": ExtractiveReader, "generative": GenerativeReader}
METRICS = {
    "exact_match": ("exact_match", "exact match"),
    "f1": ("f1", "F1"),
    "has_answer_exact_match": ("exact_match", "exact match, with an answer"),
    "has_answer_f1": ("f1", "F1, with an answer"),
    "no_answer_f1": ("f1", "F1, without an answer"),
}


class QuestionAnswering(Task):
    """See the module. Rows are `source`, the question, `target`, an answer or nothing, and `COLUMNS` of squad.py."""

    name = "question_answering"
    next_command = 'deepseek-hf answer {folder} --knowledge PATH "QUESTION"'
    fault_names = FAULTS
    arguments_class = QuestionAnsweringArguments

    def __init__(self, arguments: QuestionAnsweringArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.reader: Any = READERS[arguments.answer_mode](arguments)
        self.auto_class, self.peft_task_type = self.reader.auto_class, self.reader.peft_task_type
        self.simplify = simplifier() if arguments.convert_to_simplified else None
        self.where: dict[str, str] = {}  # what to call a split in messages
        self.questions: dict[str, Questions] = {}
        self.direction = "causal"
        self.table = ""

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        splits: dict[str, Rows] = {}
        for split, parts in self._parts().items():
            self.where[split] = named(parts)
            questions = Questions(self.arguments.version_2_with_negative, self.simplify)
            rows = [questions.read(part.rows, part.where, self.arguments.limits[split]) for part in parts]
            self.questions[split] = questions
            splits[split] = joined(rows, self.seed)
        self._choose_metric(splits)
        return splits

    def _parts(self) -> dict[str, list[Part]]:
        if not self.arguments.is_embedded:
            return read_splits(self.arguments)
        rows = territory_rows(self.arguments.version_2_with_negative)
        sets = {split: DatasetColumns(Dataset.from_list(rows[split])) for split in SPLITS}
        return {split: [Part(f"territories, split {split}", columns)] for split, columns in sets.items()}

    def _choose_metric(self, splits: dict[str, Rows]) -> None:
        kind = self.arguments.score_by
        if kind == "auto":
            text = "".join(splits[min(splits, key=SPLITS[::-1].index)]["target"])
            kind = "characters" if 2 * len(re.findall(f"[{HAN}]", text)) > len(text) else "words"
        self.metric = (CmrcScores if kind == "characters" else SquadScores)(self.arguments.version_2_with_negative)

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        report: Report = {}
        train = set(splits["train"]["context"]) if "train" in splits else set()
        layout = self._layout(tokenizer)
        for split, rows in splits.items():
            contexts, sources = list(rows["context"]), list(rows["source"])
            pairs = list(zip(sources, contexts, strict=True))
            again = [pair for pair, count in Counter(pairs).items() for _ in range(count - 1)]
            report[split] = {"rows": len(pairs)} | {
                name: finding(texts) for name, texts in self.questions[split].faults.items()
            }
            report[split] |= {
                "duplicate_questions": finding(again),
                "replacement_characters": finding(pair for pair in pairs if any("\ufffd" in text for text in pair)),
                "mojibake": finding(pair for pair in pairs if any(map(looks_mojibake, pair))),
            }
            if self.arguments.answer_mode == "extractive":
                report[split]["split_tokens"] = finding(self._split_answers(rows, layout))
            if train and split != "train":
                report[split]["passages_in_train"] = finding(pair for pair in pairs if pair[1] in train)
        return report

    def _split_answers(self, rows: Rows, layout: Layout) -> Iterator[tuple[str, str]]:
        for question, context, answers, starts in zip(
            rows["source"], rows["context"], rows["answers"], rows["starts"], strict=True
        ):
            passage = layout.encoder.passage(context)
            for answer, start in zip(answers, starts, strict=True):
                bare = answer.strip()
                begin = start + answer.find(bare)
                if start >= 0 and not passage.is_whole(begin, begin + len(bare)):
                    yield question, answer
                    break

    # -- tokenizer and model --

    def _layout(self, tokenizer: PreTrainedTokenizerBase) -> Layout:
        if not hasattr(self, "layout"):
            self.layout = Layout(tokenizer, self.arguments, self.arguments.characters_apart)
        return self.layout

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        train = splits["train"]
        for text in [*dict.fromkeys(train["context"]), *train["source"]]:
            yield from PIECES.findall(text) if self.arguments.characters_apart else [text]

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """`attention_direction`, the kinds of tokens, and for random weights the number of positions.

        Raises:
            ValueError: if a direction or kinds are asked of a model that has none.
        """
        asked = self.arguments.attention_direction
        if saved.get("type_vocab_size") == TOKEN_TYPES and self.arguments.answer_mode == "extractive":
            self.arguments.mark_matches = True  # what has been told of them goes on so
        types = {"type_vocab_size": TOKEN_TYPES} if self.arguments.mark_matches else {}
        if not saved:
            # docs/results.md, question_placement: causal reading learns fastest
            default = "causal" if self.arguments.answer_mode == "extractive" else "prefix"
            self.direction = asked or default
            positions = self.arguments.max_seq_length
            return {"attention_direction": self.direction, "max_position_embeddings": positions, **types}
        kind = saved.get("model_type")
        if kind not in SOURCES:
            self._refuse_for_others(kind)
        known = saved.get("attention_direction") or "causal"
        self.direction = asked or known
        return types | ({"attention_direction": self.direction} if self.direction != known else {})

    def _refuse_for_others(self, model_type: Any) -> None:
        """Raises ValueError for what is asked for, but only models of ours have."""
        asked = self.arguments.attention_direction
        if asked not in (None, "causal"):
            raise ValueError(
                f"--attention_direction {asked}: a model of model_type {model_type!r} is causal; leave it out."
            )
        if self.arguments.mark_matches:
            raise ValueError(f"--mark_matches: a model of model_type {model_type!r} reads no marks; leave it out.")

    def check_native(self, fields: dict[str, Any]) -> None:
        direction = fields.get("attention_direction", "causal")
        if direction != "causal":
            raise ValueError(f"--attention_direction {direction}: transformers' class is causal; leave out --native.")
        if fields.get("type_vocab_size"):
            raise ValueError("--mark_matches: transformers' class reads no marks; leave out --native.")

    def model_config(self, config: Any) -> Any:
        if not hasattr(type(config), "attention_direction"):
            self._refuse_for_others(config.model_type)
            self.direction = "causal"
            vars(config).pop("attention_direction", None)  # it has no effect there, and would be saved as if it had
        return config

    # -- features --

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """The other lengths keep their share of a window, where it has become smaller."""
        asked = self.arguments.max_seq_length
        lower(self.arguments, positions, self.reader.note, max_seq_length=positions)
        if asked > positions:
            shares = {
                name: getattr(self.arguments, name) * positions // asked
                for name in ("doc_stride", "max_question_length")
            }
            lower(self.arguments, positions, self.reader.note, **shares)

    def afresh(self, note: Callable[[str], Any]) -> "QuestionAnswering":
        """This task without anything of the rows that it has read, its notes on rows going to `note`."""
        task = copy(self)
        task.reader = type(self.reader)(self.arguments)
        task.reader.note = note
        vars(task).pop("layout", None)
        return task

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        return self.reader.features(rows, tokenizer, self._layout(tokenizer), is_training)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return self.reader.collator(tokenizer)

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        if label_smoothing and self.arguments.answer_mode == "extractive":
            raise ValueError("--label_smoothing_factor: the loss over places has none; leave it out.")
        return None

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig | None:
        if not isinstance(self.reader, GenerativeReader):
            return None
        return self.reader.generation_config(tokenizer, num_beams)

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        if isinstance(self.reader, GenerativeReader):
            return super().predict_batch(model, inputs)
        return self.reader.predict_batch(model, inputs)

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return self.reader.decode(outputs, tokenizer)

    # -- scores and reports --

    def score(self, predictions: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.metric.compute(predictions=predictions, references=[row["answers"] for row in rows]) or {}

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[str] | None:
        return floor_answers("overlap_sentence", rows, self.seed)

    def report(self, predictions: list[str], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """The floors' scores, for SQuAD 2 the best threshold, and `NBEST_FILE`."""
        model = self.score(predictions, rows)
        floors = {name: self.score(floor_answers(name, rows, self.seed), rows) for name in FLOORS}
        results: dict[str, Any] = {}
        for name, scores in floors.items():
            results |= prefixed(f"floor_{name}", {key: v for key, v in scores.items() if not isinstance(v, str)})
        lines = ["| | exact match | F1 |", "|---|---|---|"]
        named_scores = {"model": model} | {NAMES[name]: scores for name, scores in floors.items()}
        lines += [f"| {name} | {s['exact_match']:.2f} | {s['f1']:.2f} |" for name, s in named_scores.items()]
        self.table = "\n".join(lines)
        above = all(model["f1"] > scores["f1"] for scores in floors.values())
        if not above:
            self.table += "\n\nThe model is not above every floor: it has not learned to read."
        results["above_floors"] = above
        files = {}
        if isinstance(self.reader, ExtractiveReader):
            ids = [row["id"] for row in rows]
            files[NBEST_FILE] = json_text({name: self.reader.nbest[name] for name in ids})
            if self.arguments.version_2_with_negative:
                results |= prefixed("test", self._best_threshold(rows))
        return Scores(results, files=files, text=self.table)

    def _best_threshold(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The best F1 over all thresholds, and the threshold; chosen on the scored rows, so an upper bound."""
        margins, gains, silent = [], [], 0.0
        for row in rows:
            spoken = next((answer["text"] for answer in self.reader.nbest[row["id"]] if answer["text"]), "")
            nothing = self.metric.one("", row["answers"])[1]
            silent += nothing
            margins.append(self.reader.null_margins[row["id"]])
            gains.append(self.metric.one(spoken, row["answers"])[1] - nothing)
        order = np.argsort(margins, kind="stable")
        totals = silent + np.concatenate([[0.0], np.cumsum(np.array(gains)[order])])
        best = int(totals.argmax())
        threshold = margins[order[best - 1]] if best else margins[order[0]] - 1
        return {"best_f1": 100 * float(totals[best]) / len(rows), "best_f1_threshold": float(threshold)}

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        is_extractive = arguments.answer_mode == "extractive"
        question, context = "What is the capital of France?", "The capital of France is Paris."
        before = f"{question}\n{context}"
        after = f"\n{question}" if arguments.question_placement == "both" else ""
        card: dict[str, Any] = {
            "language": None,
            "pipeline_tag": "question-answering" if is_extractive else "text-generation",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": METRICS,
            "dataset_name": arguments.data_name or "facts about territories (embedded)",
            "baseline": NAMES["overlap_sentence"],
            "title": f"{arguments.answer_mode} question answering",
            "prompt": before + after + ("<｜end▁of▁sentence｜>" if is_extractive else "\n"),
            "data": self.table,
            "preprocessing": f"question {'before' if not after else 'before and after'} the passage, attention "
            f"{self.direction}, at most {arguments.max_seq_length} tokens"
            + (f", windows sharing {arguments.doc_stride}" if is_extractive else "")
            + ", Chinese characters apart" * arguments.characters_apart
            + ", converted to Simplified Chinese" * arguments.convert_to_simplified,
        }
        if is_extractive:
            card |= {
                "head": "QuestionAnswering",
                "usage": USAGE,
                "prediction": f"the best span of at most {arguments.max_answer_length} tokens"
                + (
                    f", or none (threshold {arguments.null_score_diff_threshold:g})"
                    if arguments.version_2_with_negative
                    else ""
                ),
            }
        return card


USAGE = """outputs = model(**inputs)
start, end = outputs.start_logits[0, :-1].argmax(), outputs.end_logits[0, :-1].argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""
