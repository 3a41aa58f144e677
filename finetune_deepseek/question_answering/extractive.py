"""Extractive reading: an answer is a stretch of the passage, whose first and last token the model points at.

A span's score is the sum of its two logits (Devlin et al., arXiv 1810.04805, section 4.2). No answer scores as the
window's last token alone: there it is the first, which a causal model can't use, since it sees only itself. Every span
of at most `max_answer_length` tokens is looked at.

Letters: B rows, W windows, T tokens of a window, L tokens of an answer, N best.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from ..data.sources import Rows, progress
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import highest
from ..training.task import CausalCollator
from .windows import Layout, Passage

NOWHERE = 1 << 30  # beyond any window: such positions are left out of the loss
WINDOWS_AT_ONCE = 64
TRAINING_COLUMNS = ("input_ids", "token_type_ids", "start_positions", "end_positions")
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WINDOW_COLUMNS = ("input_ids", "token_type_ids", "begins", "firsts", "counts", "start_positions", "end_positions")
OUTPUT_HEAD, OUTPUT_SPAN = 2, 3  # columns of a prediction: example and null score; first and last token and score


class Example(NamedTuple):
    """What a prediction about a row is decoded by."""

    id: str
    passage: Passage


class WindowCollator(CausalCollator):
    """Pads windows on the right. For evaluation a feature is a row with all of its windows, which come flat.

    Args:
        has_types: whether the model is told of what kind tokens are.
    """

    def __init__(self, pad_token_id: int, has_types: bool = False) -> None:
        super().__init__(pad_token_id)
        self.has_types = has_types

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        if "begins" in features[0]:
            # First of all, for Trainer takes the first tensor's rows for the batch's.
            batch["example"] = torch.tensor([f["example"] for f in features])
            batch["row"] = torch.tensor([f["row"] for f in features])
            owners = [number for number, f in enumerate(features) for _ in f["input_ids"]]
            batch["owner"] = torch.tensor(owners)
            flat = {name: [value for f in features for value in f[name]] for name in WINDOW_COLUMNS}
            batch |= {name: torch.tensor(flat[name]) for name in ("begins", "firsts", "counts")}
        else:
            flat = {name: [f[name] for f in features] for name in TRAINING_COLUMNS}
        batch["input_ids"], batch["attention_mask"] = self._pad(flat["input_ids"])
        if self.has_types:
            batch["token_type_ids"] = self._pad(flat["token_type_ids"])[0] * batch["attention_mask"]
        return batch | {name: torch.tensor(flat[name]) for name in ("start_positions", "end_positions")}


def window_losses(logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[W], each window's loss on the place of its answer's first or last token, 0 where that is unknown.

    Padding is no place to point at: with it the loss would depend on the longest window of the batch.

    Args:
        logits, mask: [W, T].
        positions: [W].
    """
    outside = logits.shape[1]
    logits = logits.masked_fill(mask == 0, float("-inf"))
    return torch.nn.functional.cross_entropy(
        logits, positions.clamp(max=outside), ignore_index=outside, reduction="none"
    )


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, is_passage: torch.Tensor, longest: int, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The N best spans of each window that lie in the passage: scores, first and last tokens, all [W, N].

    Where there are fewer than N the scores are -inf.

    Args:
        start_logits, end_logits, is_passage: [W, T].
        longest: tokens of an answer, L.
    """
    longest = min(longest, start_logits.shape[1])
    starts = start_logits.float().masked_fill(~is_passage, float("-inf"))
    ends = end_logits.float().masked_fill(~is_passage, float("-inf"))
    ends = torch.nn.functional.pad(ends, (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)  # [W, T, L]
    scores = (starts[:, :, None] + ends).flatten(1)
    found = min(number, scores.shape[1])
    top, places = highest(scores, found)
    first = places // longest
    top = torch.nn.functional.pad(top, (0, number - found), value=float("-inf"))
    first, last = (torch.nn.functional.pad(p, (0, number - found)) for p in (first, first + places % longest))
    return top, first, last


class ExtractiveReader:
    """Features, collator and predictions of extractive question answering; see `Task` for what they are."""

    auto_class = AutoModelForQuestionAnswering
    peft_task_type = "QUESTION_ANS"

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.note: Callable[[str], Any] = print
        self.examples: list[Example] = []
        self.nbest: dict[str, list[dict[str, Any]]] = {}  # by id, of the latest predictions
        self.null_margins: dict[str, float] = {}  # score of no answer above the best span

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, layout: Layout, is_training: bool) -> Dataset:
        """For training one feature per window, for evaluation one per row with its windows; `length` is a window's."""
        return self._training(cast(Dataset, rows), layout) if is_training else self._evaluation(rows, layout)

    def _windows(self, question: str, passage: Passage, answer: str, start: int, layout: Layout) -> dict[str, list]:
        """The windows of a row and where the answer is in each: at the last token of one that doesn't hold it.

        An answer that is nowhere in the passage gives `NOWHERE`.
        """
        place = passage.tokens_of(start, start + len(answer)) if start >= 0 else None
        found: dict[str, list] = {name: [] for name in WINDOW_COLUMNS}
        for window in layout.windows(question, passage):
            nothing = NOWHERE if answer and place is None else len(window.input_ids) - 1
            positions = [nothing, nothing]
            if place and window.first <= place[0] and place[1] < window.first + window.length:
                positions = [token - window.first + window.begin for token in place]
            for name, value in zip(found, (*window, *positions), strict=True):
                found[name].append(value)
        return found

    def _training(self, rows: Dataset, layout: Layout) -> Dataset:
        def encode(batch: dict[str, list]) -> dict[str, list]:
            features: dict[str, list] = {name: [] for name in TRAINING_COLUMNS}
            columns = (batch[name] for name in ("source", "context", "answers", "starts"))
            for question, context, answers, starts in zip(*columns, strict=True):
                # SQuAD trains on one answer; take the first that is in the passage.
                known = next(((a, s) for a, s in zip(answers, starts, strict=True) if s >= 0), None)
                if answers and known is None:
                    continue
                answer, start = known or ("", -1)
                windows = self._windows(question, layout.encoder.passage(context), answer, start, layout)
                for number, first in enumerate(windows["start_positions"]):
                    if first != NOWHERE:
                        for name in TRAINING_COLUMNS:
                            features[name].append(windows[name][number])
            return features | {"length": [len(ids) for ids in features["input_ids"]]}

        features = rows.map(encode, batched=True, remove_columns=rows.column_names, **progress(rows, "tokenize"))
        if not len(features):
            raise ValueError("No training question has its answer in its passage, so there is nothing to learn.")
        self.note(f"{len(rows):,} training questions make {len(features):,} windows")
        return features

    def _evaluation(self, rows: Rows, layout: Layout) -> Dataset:
        features: list[dict[str, Any]] = []
        for row in rows:
            passage = layout.encoder.passage(row["context"])
            known = next(((a, s) for a, s in zip(row["answers"], row["starts"], strict=True) if s >= 0), None)
            answer, start = known or ((row["answers"] or [""])[0], -1)
            windows = self._windows(row["source"], passage, answer, start, layout)
            length = max(map(len, windows["input_ids"]))
            features.append({"example": len(self.examples), "length": length} | windows)
            self.examples.append(Example(row["id"], passage))
        return Dataset.from_list(features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> WindowCollator:
        return WindowCollator(cast(int, tokenizer.pad_token_id), self.arguments.mark_matches)

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The losses of each row's windows, and for each row [2 + 3 N]: its example, the score of no answer, and the
        spans."""
        owner, losses, found = inputs["owner"], [], []
        names = ["input_ids", "attention_mask", "start_positions", "end_positions", "begins", "firsts", "counts"]
        names += ["token_type_ids"] * ("token_type_ids" in inputs)
        for parts in zip(*(inputs[name].split(WINDOWS_AT_ONCE) for name in names), strict=True):
            chunk = dict(zip(names, parts, strict=True))
            outputs = model(**{name: chunk[name] for name in MODEL_INPUTS if name in chunk})
            start_logits, end_logits = outputs["start_logits"].float(), outputs["end_logits"].float()
            mask = chunk["attention_mask"]
            start_losses = window_losses(start_logits, chunk["start_positions"], mask)
            losses.append((start_losses + window_losses(end_logits, chunk["end_positions"], mask)) / 2)
            found.append(self._spans(start_logits, end_logits, chunk))
        scores, starts, ends, nulls = (torch.cat(part) for part in zip(*found, strict=True))
        # By masks, since picking a row's windows would wait for the device to say how many there are.
        is_mine = owner == torch.arange(len(inputs["example"]), device=owner.device)[:, None]  # [B, W]
        mine = scores.masked_fill(~is_mine[..., None], float("-inf")).flatten(1)  # [B, W * N]
        top, order = highest(mine, self.arguments.n_best_size)
        spans = torch.stack([starts.flatten()[order].float(), ends.flatten()[order].float(), top], 2)
        null = nulls.masked_fill(~is_mine, float("inf")).amin(1)
        rows = torch.cat([torch.stack([inputs["example"].float(), null], 1), spans.flatten(1)], 1)
        is_learned = (inputs["start_positions"] < NOWHERE).float()
        sums, counts = (
            values.new_zeros(len(rows)).index_add(0, owner, values) for values in (torch.cat(losses), is_learned)
        )
        return Predicted(sums, counts, rows)

    def _spans(
        self, start_logits: torch.Tensor, end_logits: torch.Tensor, chunk: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Scores, first and last tokens in the passage of each window's best spans [W, N], and its score of no answer
        [W]."""
        begins, mask, longest = chunk["begins"][:, None], chunk["attention_mask"], self.arguments.max_answer_length
        places = torch.arange(mask.shape[1], device=mask.device)
        is_passage = (places >= begins) & (places < begins + chunk["counts"][:, None])
        top, first, last = best_spans(start_logits, end_logits, is_passage, longest, self.arguments.n_best_size)
        final = mask.sum(1, keepdim=True) - 1
        null = (start_logits.gather(1, final) + end_logits.gather(1, final))[:, 0]
        shift = chunk["firsts"][:, None] - begins
        return top, first + shift, last + shift, null

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The text of each row's best span, or nothing where no answer is better by more than the threshold."""
        texts = []
        for row in outputs:
            example = self.examples[int(row[0])]
            spans = row[OUTPUT_HEAD:].reshape(-1, OUTPUT_SPAN)
            answers = list(distinct_spans(spans[np.isfinite(spans[:, 2])], example.passage))
            top = answers[0]["score"] if answers else -np.inf
            margin = float(row[1] - top)
            if self.arguments.version_2_with_negative:
                answers = sorted(
                    [*answers, {"text": "", "start": -1, "score": float(row[1])}], key=lambda answer: -answer["score"]
                )
            self.null_margins[example.id] = margin
            self.nbest[example.id] = with_probabilities(answers)
            is_null = self.arguments.version_2_with_negative and margin > self.arguments.null_score_diff_threshold
            spoken = [answer["text"] for answer in answers if answer["text"]]
            texts.append("" if is_null or not spoken else spoken[0])
        return texts


def distinct_spans(spans: np.ndarray, passage: Passage) -> Any:
    """Text, place in the passage and score of spans [N, 3], the best of each text."""
    seen: set[str] = set()
    for first, last, score in spans:
        start, end = passage.offsets[int(first)][0], passage.offsets[int(last)][1]
        text = passage.text[start:end]
        if text.strip() and text not in seen:
            seen.add(text)
            yield {"text": text, "start": start, "score": float(score)}


def with_probabilities(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers with the softmax of their scores."""
    if not answers:
        return []
    scores = np.array([answer["score"] for answer in answers])
    weights = np.exp(scores - scores.max())
    shares = weights / weights.sum()
    return [answer | {"probability": float(share)} for answer, share in zip(answers, shares, strict=True)]
