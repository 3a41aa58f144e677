"""Ranking by prompt: a language model that is shown the titles of a history ranks candidate titles.

Either by asking about each ("yes" against "no", as TALLRec does, Bao et al., arXiv 2305.00447), or by the likelihood
of its title as what comes next. Any causal model will do as it is; training, in full or by LoRA, is on few rows of
history, candidate and answer. Data and scores are those of items/histories.py and report.py, over each user's
candidates.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_deepseek.transformers_names import CACHE_WORD
from tokenization_deepseek import Control, encode_parts

from ..data.sources import Rows
from ..training.optimization import IGNORED_LABEL
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import highest, ranks, ranks_of
from ..training.task import CausalCollator, Scores, Task
from .arguments import PromptRankingArguments
from .baselines import BASELINES
from .items.catalogue import PADDING_TOKEN
from .items.histories import Histories, Notes, items_of
from .items.titles import read_titles, with_titles
from .report import RankingReport, ranks_in
from .scores import ranking_scores

# Letters: B users, C candidates, P tokens before a candidate, T tokens of a candidate and what follows it.
YES, NO = " yes", " no"
ROWS_PER_PASS = 256  # candidates that are read at once


class Prompt:
    """A template in two parts, so that the first is read once for all candidates.

    The parts are tokenized apart, in training too: what the model reads doesn't depend on how it is computed.
    """

    def __init__(self, arguments: PromptRankingArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self.is_question = arguments.scoring == "yes_no"
        before, _, self.after = cast(str, arguments.prompt_template).partition("{candidate}")
        self.before = before.rstrip(" ")
        self.gap = before[len(self.before) :]  # as most tokenizers begin a word
        yes, no = ([*self.tokens([[text]])[0], tokenizer.eos_token_id] for text in (YES, NO))
        shared = next((place for place, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
        if shared is None:
            raise ValueError(
                f"This tokenizer doesn't tell {YES!r} from {NO!r}; name another, or --scoring likelihood."
            )
        self.shared = yes[:shared]  # the prompt's, for they decide nothing
        self.answers = (yes[shared], no[shared])

    def tokens(self, rows: list[list[str]]) -> list[list[int]]:
        return encode_parts(self.tokenizer, rows, add_special_tokens=False)["input_ids"] if rows else []

    def history(self, titles: Sequence[str]) -> list[int]:
        """[P] tokens up to the candidate."""
        shown = self.arguments.title_separator.join(titles[-self.arguments.max_length :])
        start, _, end = self.before.partition("{history}")
        ids = encode_parts(self.tokenizer, [Control(start), shown, Control(end)])["input_ids"]
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def candidates(self, titles: Sequence[str]) -> list[list[int]]:
        """[T] tokens of each candidate and of what stands behind it."""
        ids = self.tokens([[self.gap, title, Control(self.after)] for title in titles])
        return [row + self.shared for row in ids] if self.is_question else ids


@contextmanager
def exact_odds(model: Any, answers: tuple[int, int] | None) -> Iterator[list[torch.Tensor]]:
    """Collects the log odds of the answers [R] after the last token of each forward; nothing without answers.

    The last product is taken again in float32, for two tokens: in bfloat16 most candidates would tie. In a hook, for
    there the weights are whole where processes divide them.
    """
    odds: list[torch.Tensor] = []

    def look(head: Any, args: tuple[torch.Tensor], _: Any) -> None:
        states, chosen = args[0][:, -1], list(cast(tuple[int, int], answers))
        with torch.autocast(states.device.type, enabled=False):
            if type(head) is torch.nn.Linear:
                bias = None if head.bias is None else head.bias[chosen].float()
                pair = torch.nn.functional.linear(states.float(), head.weight[chosen].float(), bias)
            else:  # with an adapter on it
                pair = head.forward(states.to(head.weight.dtype))[:, chosen].float()
        odds.append(pair[:, 0] - pair[:, 1])

    handle = model.get_output_embeddings().register_forward_hook(look) if answers else None
    try:
        yield odds
    finally:
        if handle:
            handle.remove()


@torch.no_grad()
def candidate_scores(
    model: Any,
    prefix_ids: torch.Tensor,
    prefix_mask: torch.Tensor,
    suffix_ids: torch.Tensor,
    suffix_mask: torch.Tensor,
    answers: tuple[int, int] | None,
) -> torch.Tensor:
    """[B, C]: the log odds of the answers after each candidate, or the log-likelihood of its tokens without answers.

    Each prefix is read once, and the candidates go on from copies of its cache.

    Args:
        prefix_ids: [B, P], padded on the left.
        suffix_ids: [B, C, T], padded on the left for answers, on the right without. A row without tokens is no
            candidate, and gets minus infinity.
    """
    users, count, _ = suffix_ids.shape
    first = model(
        input_ids=prefix_ids,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    scores, step = [], max(1, ROWS_PER_PASS // users)
    for start in range(0, count, step):
        ids = suffix_ids[:, start : start + step].flatten(0, 1)
        mask = suffix_mask[:, start : start + step].flatten(0, 1)
        times = len(ids) // users
        cache = copy.deepcopy(first[CACHE_WORD])  # reading a candidate writes into it
        cache.batch_repeat_interleave(times)
        before = prefix_mask.repeat_interleave(times, 0)
        with exact_odds(model, answers) as odds:
            logits = model(
                input_ids=ids,
                attention_mask=torch.cat((before, mask), dim=1),
                position_ids=(before.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0),
                **{CACHE_WORD: cache},
                use_cache=True,
                logits_to_keep=1 if answers else 0,
            ).logits
        if odds:
            found = odds[0]
        else:
            logits = torch.cat((first.logits[:, -1:].repeat_interleave(times, 0), logits[:, :-1]), dim=1)
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
            found = -(losses * mask).sum(1)
        scores.append(found.view(users, times))
    return torch.cat(scores, dim=1).masked_fill(~suffix_mask.bool().any(2), float("-inf"))


class PromptCollator(CausalCollator):
    """Rows for training; for evaluation prefixes on the left and candidates as `candidate_scores` takes them."""

    def __init__(self, pad_token_id: int, is_question: bool) -> None:
        super().__init__(pad_token_id)
        self.is_question = is_question

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "prefix_ids" not in features[0]:
            return super().__call__(features)
        batch: dict[str, torch.Tensor] = {
            name: torch.tensor([f[name] for f in features]) for name in ("row", "target") if name in features[0]
        }
        batch["prefix_ids"], batch["prefix_mask"] = self._pad([f["prefix_ids"] for f in features], left=True)
        width = max(len(f["suffix_ids"]) for f in features)
        rows = [ids for f in features for ids in (f["suffix_ids"] + [[]] * width)[:width]]
        for name, padded in zip(("suffix_ids", "suffix_mask"), self._pad(rows, left=self.is_question), strict=True):
            batch[name] = padded.view(len(features), width, -1)
        return batch


def check_causal(model: Any) -> None:
    """Refuse a model whose prompts can't be continued from a cache, token by token.

    Raises:
        ValueError: naming its `attention_direction`.
    """
    direction = getattr(model.config, "attention_direction", "causal")
    if direction != "causal":
        raise ValueError(f"A model with attention_direction {direction!r} can't rank by prompt; take a causal one.")


def rank(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[str],
    candidates: Sequence[str],
    scoring: Literal["yes_no", "likelihood"] = "yes_no",
    prompt_template: str | None = None,
) -> list[tuple[str, float]]:
    """Candidate titles with their scores, best first, for the titles of a history.

    Raises:
        ValueError: without history or candidates, or for a template or model that doesn't fit.
    """
    if not history or not candidates:
        raise ValueError("ranking needs the titles of a history, and candidates")
    check_causal(model)
    arguments = PromptRankingArguments(
        scoring=scoring, prompt_template=prompt_template, max_length=max(2, len(history))
    )
    prompt = Prompt(arguments, tokenizer)
    row = {"prefix_ids": prompt.history(history), "suffix_ids": prompt.candidates(candidates)}
    batch = PromptCollator(tokenizer.pad_token_id or 0, prompt.is_question)([row])
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    was_training = model.training
    try:
        scores = candidate_scores(model.eval(), **inputs, answers=prompt.answers if prompt.is_question else None)
    finally:
        model.train(was_training)
    _, order = highest(scores[0], len(candidates))
    return [(candidates[place], float(scores[0, place])) for place in order.tolist()]


class PromptRanking(Task):
    """See the module. Rows are those of `Histories`, the scored ones with `candidates`."""

    name = "prompt_ranking"
    next_command = "deepseek-hf recommend {folder} --history FILE"
    arguments_class = PromptRankingArguments
    arguments: PromptRankingArguments

    def __init__(self, arguments: PromptRankingArguments, seed: int) -> None:
        self.arguments, self.seed, self.notes = arguments, seed, Notes()
        self.source = Histories(arguments, seed, self.notes, candidates_column=arguments.candidates_column)
        self.ranking = RankingReport(arguments)
        self.every_item: list[str] = []
        self.titles: dict[str, str] = {}
        self.prompt: Prompt  # known with the tokenizer

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        splits, arguments = self.source.read(), self.arguments
        given = {item for lists in self.source.candidates.values() for items in lists for item in items}
        self.every_item = sorted({*items_of(splits), *given})
        titles: dict[str, str] = {}
        if arguments.titles_file:
            titles = read_titles(arguments.titles_file, arguments.item_column, arguments.title_column)
        self.titles, untitled = with_titles(self.every_item, titles)
        if untitled and titles:
            self.notes.say(f"{untitled:,} of {len(self.every_item):,} items have no title; their ids stand in")
        for split in ("validation", "test"):
            if split in splits:
                candidates = self._candidates(split, list(splits[split]))
                splits[split] = cast(Dataset, splits[split]).add_column("candidates", candidates)
        return splits

    def _candidates(self, split: str, rows: list[dict[str, Any]]) -> list[list[str]]:
        """The items to rank for each row: those of the file, or the target among drawn ones."""
        if split in self.source.candidates:
            lists = self.source.candidates[split][: len(rows)]
            if missing := sum(row["target"] not in items for row, items in zip(rows, lists, strict=True)):
                self.notes.say(
                    f"{split}: {missing:,} of {len(rows):,} targets aren't among their candidates; they rank last"
                )
            return lists
        lists = []
        for number, row in enumerate(rows):
            rng = random.Random(f"{self.seed} {split} {number}")
            items = [
                row["target"],
                *self._unseen(rng, {*row["source"], row["target"]}, self.arguments.num_candidates - 1),
            ]
            rng.shuffle(items)
            lists.append(items)
        if short := sum(len(items) < self.arguments.num_candidates for items in lists):
            self.notes.say(f"{split}: {short:,} of {len(rows):,} users have fewer than --num_candidates unseen items")
        return lists

    def _unseen(self, rng: random.Random, seen: set[str], count: int) -> list[str]:
        drawn = rng.sample(self.every_item, min(len(self.every_item), count + len(seen)))
        return [item for item in drawn if item not in seen][:count]

    # -- model and features --

    def _training_rows(self, rows: Rows) -> Iterator[tuple[list[str], str, bool]]:
        """History, candidate, and whether it came next."""
        for number, items in enumerate(rows["source"]):
            rng = random.Random(f"{self.seed} train {number}")
            for place in range(max(1, len(items) - self.arguments.examples_per_history), len(items)):
                yield items[:place], items[place], True
                if self.arguments.scoring == "yes_no":
                    for other in self._unseen(rng, set(items), self.arguments.negatives):
                        yield items[:place], other, False

    def _text(self, history: list[str], candidate: str) -> str:
        shown = self.arguments.title_separator.join(
            self.titles[item] for item in history[-self.arguments.max_length :]
        )
        text = cast(str, self.arguments.prompt_template)
        return text.replace("{history}", shown).replace("{candidate}", self.titles[candidate])

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        for history, candidate, is_next in self._training_rows(splits["train"]):
            yield self._text(history, candidate) + (YES if is_next else NO) * (self.arguments.scoring == "yes_no")
        yield from self.titles.values()

    def settings(self) -> dict[str, Any]:
        """Those of the flags, and of the histories."""
        return super().settings() | self.source.settings()

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """For training `input_ids` and `labels`, the loss being on the answer or on the title; for evaluation
        `prefix_ids`, `suffix_ids` of the candidates, and `target`, the place of the target among them or -1.

        Raises:
            ValueError: if no training history has two items.
        """
        prompt = self.prompt = Prompt(self.arguments, tokenizer)
        features: list[dict[str, Any]] = []
        if is_training:
            for history, candidate, is_next in self._training_rows(rows):
                read = prompt.history([self.titles[item] for item in history])
                learned = prompt.candidates([self.titles[candidate]])[0]
                if prompt.is_question:
                    read, learned = read + learned, [prompt.answers[not is_next]]
                labels = [IGNORED_LABEL] * len(read) + learned
                features.append({"input_ids": read + learned, "labels": labels, "length": len(labels)})
            if not features:
                raise ValueError("No training history has two items, so there is nothing to learn.")
            return Dataset.from_list(features)
        suffixes = dict(zip(self.titles, prompt.candidates(list(self.titles.values())), strict=True))
        for row in rows:
            prefix, items = prompt.history([self.titles[item] for item in row["source"]]), row["candidates"]
            suffix = [suffixes[item] for item in items]
            target = items.index(row["target"]) if row["target"] in items else -1
            length = len(prefix) + max(map(len, suffix))
            features.append({"prefix_ids": prefix, "suffix_ids": suffix, "target": target, "length": length})
        return Dataset.from_list(features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:
        return PromptCollator(cast(int, tokenizer.pad_token_id), self.prompt.is_question)

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """Cross entropies of the target among the candidates, and [B, 1 + C]: its rank and the candidates' places,
        best first, -1 where there are fewer."""
        check_causal(model)
        parts = {name: inputs[name] for name in ("prefix_ids", "prefix_mask", "suffix_ids", "suffix_mask")}
        scores = candidate_scores(model, **parts, answers=self.prompt.answers if self.prompt.is_question else None)
        targets = inputs["target"]
        losses = torch.nn.functional.cross_entropy(scores, targets, ignore_index=-1, reduction="none")
        is_candidate = inputs["suffix_mask"].bool().any(2)
        _, order = highest(scores, scores.shape[1])
        order = order.masked_fill(~is_candidate.gather(1, order), -1)
        found = ranks(scores, targets, last=is_candidate.sum(1) + 1)
        return Predicted(losses, targets >= 0, torch.cat((found[:, None], order), dim=1))

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        return [{"rank": int(row[0]), "order": row[1:][row[1:] >= 0].tolist()} for row in outputs.astype(int)]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        counts = sorted({len(row["candidates"]) for row in rows})
        number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        kind = "given" if self.source.candidates else f"drawn (seed {self.seed})"
        return ranking_scores(ranks_in(predictions)) | {
            "ranking_signature": f"ranking of {number} {kind} candidates per user, ties against us"
        }

    def _baselines(self, train: Rows | None, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Ranks of the same targets among the same candidates by each baseline, if there are training rows."""
        if not self.arguments.baselines or not isinstance(train, Dataset):
            return {}
        numbers = {item: number for number, item in enumerate([PADDING_TOKEN, *self.every_item])}
        histories = [[numbers[item] for item in history] for history in train["source"]]
        found: dict[str, np.ndarray] = {}
        for name, baseline_class in BASELINES.items():
            baseline, column = baseline_class(histories, len(numbers)), []
            for row in rows:
                scores = np.asarray(baseline.scores([[numbers[item] for item in row["source"]]]))[0]
                own = np.array([[float(scores[numbers[item]]) for item in row["candidates"]]])
                place = row["candidates"].index(row["target"]) if row["target"] in row["candidates"] else -1
                column.append(int(ranks_of(own, np.array([place]))[0]))
            found[name] = np.array(column)
        return found

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Beside the baselines."""
        return self.ranking.scores(predictions, rows, self._baselines(train, rows))

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        asked = "the odds of yes against no" if arguments.scoring == "yes_no" else "the likelihood of the title"
        return self.ranking.card(self.notes) | {
            "title": "ranking by prompt",
            "pipeline_tag": "text-generation",
            "prompt": self._text(self.every_item[:2], self.every_item[-1]),
            "prediction": f"candidates by {asked}",
            "preprocessing": f"prompt {arguments.prompt_template!r}, at most {arguments.max_length} titles",
        }
