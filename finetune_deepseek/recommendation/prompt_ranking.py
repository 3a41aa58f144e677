"""Ranking by prompt: a language model that is shown the titles of a history ranks candidate titles.

Either by asking about each ("yes" against "no", as TALLRec does, Bao et al., arXiv 2305.00447), or by the likelihood
of its title as what comes next. Any causal model will do as it is; training, in full or by LoRA, is on few rows of
history, candidate and answer. Data, baselines and scores are those of task.py, over each user's candidates.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..data.sources import Rows
from ..training.arguments import ModelArguments
from ..training.eval_loss import Predicted
from ..training.optimization import IGNORED_LABEL
from ..training.task import CausalCollator, Task
from .arguments import RecommendationArguments
from .baselines import BASELINES
from .items.catalogue import PADDING, PADDING_TOKEN
from .items.interactions import SplitRows
from .items.titles import read_titles, with_titles
from .scores import ranking_scores, target_ranks
from .task import Recommendation

# Letters: B users, C candidates, P tokens before a candidate, T tokens of a candidate and what follows it.
YES, NO = " yes", " no"
TEMPLATES = {
    "yes_no": "Chosen so far, oldest first: {history}\nWould {candidate} be chosen next? Answer:",
    "likelihood": "Chosen so far, oldest first: {history}\nChosen next: {candidate}\n",
}
ROWS_PER_PASS = 256  # candidates that are read at once
MODEL_SETTINGS = ("max_length", "scoring", "prompt_template", "title_separator")


@dataclass
class PromptRankingArguments(RecommendationArguments):
    """Which interactions, titles and candidates, and how the model is asked."""

    max_length: int = field(default=10, metadata={"help": "Titles of a history that the prompt shows, the last ones."})
    titles_file: str | None = field(
        default=None, metadata={"help": "File of --item_column and --title_column; without it, ids are the titles."}
    )
    title_column: str = field(default="title", metadata={"help": "Column of the title."})
    candidates_column: str | None = field(
        default=None,
        metadata={"help": "Column of the items to rank, in validation and test files; without it they are drawn."},
    )
    num_candidates: int = field(
        default=20, metadata={"help": "The target and so many less one unseen items, drawn at random."}
    )
    scoring: Literal["yes_no", "likelihood"] = field(
        default="yes_no", metadata={"help": "Ask about each candidate, or take the likelihood of its title."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt, with {history} and after it {candidate}; without it, one that fits --scoring."},
    )
    title_separator: str = field(default="; ", metadata={"help": "Stands between the titles of a history."})
    examples_per_history: int = field(
        default=1, metadata={"help": "Items of each training history that are learned, the last ones."}
    )
    negatives: int = field(
        default=1, metadata={"help": "Unseen items, drawn at random, that are learned as no for each yes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items_file:
            raise ValueError("--items_file: titles for the prompt come in by --titles_file.")
        if self.sasrec:
            raise ValueError("--sasrec: train it by `finetune recommendation`; it ranks all items, not candidates.")
        if self.compare_with:
            raise ValueError("--compare_with: ranks of other runs may be over other candidates; leave it out.")
        if self.candidates_column and not (self.data_dir or self.validation_file or self.test_file):
            raise ValueError("--candidates_column is of files of histories: name --data_dir or --test_file.")
        self.prompt_template = (self.prompt_template or TEMPLATES[self.scoring]).replace("\\n", "\n")
        before, history, after = self.prompt_template.partition("{history}")
        if not history or after.count("{candidate}") != 1 or "{history}" in after or "{candidate}" in before:
            raise ValueError(
                f"--prompt_template {self.prompt_template!r}: it needs {{history}} once, then {{candidate}} once."
            )


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
        yes, no = ([*self.tokens([text])[0], tokenizer.eos_token_id] for text in (YES, NO))
        shared = next((place for place, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
        if shared is None:
            raise ValueError(
                f"This tokenizer doesn't tell {YES!r} from {NO!r}; name another, or --scoring likelihood."
            )
        self.shared = yes[:shared]  # the prompt's, for they decide nothing
        self.answers = (yes[shared], no[shared])

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def history(self, titles: Sequence[str]) -> list[int]:
        """[P] tokens up to the candidate."""
        shown = self.arguments.title_separator.join(titles[-self.arguments.max_length :])
        ids = self.tokenizer(self.before.replace("{history}", shown))["input_ids"]
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def candidates(self, titles: Sequence[str]) -> list[list[int]]:
        """[T] tokens of each candidate and of what stands behind it."""
        ids = self.tokens([self.gap + title + self.after for title in titles])
        return [row + self.shared for row in ids] if self.is_question else ids


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
        cache = copy.deepcopy(first.cache)  # reading a candidate writes into it
        cache.batch_repeat_interleave(times)
        before = prefix_mask.repeat_interleave(times, 0)
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat((before, mask), dim=1),
            position_ids=(before.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0),
            cache=cache,
            use_cache=True,
            logits_to_keep=1 if answers else 0,
        ).logits
        if answers:
            yes, no = logits[:, -1, list(answers)].float().unbind(-1)
            found = yes - no
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
    return sorted(zip(candidates, scores[0].tolist(), strict=True), key=lambda pair: -pair[1])


class PromptRanking(Recommendation):
    """See the module. Rows are those of `Recommendation`, the scored ones with `candidates`."""

    name = "prompt_ranking"
    arguments_class = PromptRankingArguments
    arguments: PromptRankingArguments
    auto_class: Any = AutoModelForCausalLM
    tokenizer_class = None  # type: ignore[assignment]
    peft_task_type = "CAUSAL_LM"
    recipe = Path(__file__).parents[1] / "examples" / "prompt_ranking.yaml"
    examples = """examples:
  deepseek-hf finetune prompt_ranking --model_name_or_path deepseek-ai/deepseek-llm-7b-base --use_peft \\
      --interactions_file ratings.csv --titles_file movies.csv --max_train_samples 64 --output_dir runs/few-shot
      LoRA on 64 users
  deepseek-hf predict prompt_ranking deepseek-ai/deepseek-llm-7b-base --interactions_file ratings.csv \\
      --titles_file movies.csv --scoring likelihood
      the model as it is"""

    def __init__(self, arguments: PromptRankingArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        self.given: dict[str, list[list[str]]] = {}  # candidates in files, by split
        self.every_item: list[str] = []
        self.titles: dict[str, str] = {}
        self.prompt: Prompt  # known with the tokenizer

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        splits = super().load_splits()
        items = set(super().tokenizer_texts(splits)) | {
            item for lists in self.given.values() for c in lists for item in c
        }
        self.every_item, arguments = sorted(items), self.arguments
        titles: dict[str, str] = {}
        if arguments.titles_file:
            titles = read_titles(arguments.titles_file, arguments.item_column, arguments.title_column)
        self.titles, untitled = with_titles(self.every_item, titles)
        if untitled and titles:
            self._note(f"{untitled:,} of {len(items):,} items have no title; their ids stand in")
        for split in ("validation", "test"):
            if split in splits:
                candidates = self._candidates(split, list(splits[split]))
                splits[split] = cast(Dataset, splits[split]).add_column("candidates", candidates)
        return splits

    def _read_split_files(self) -> SplitRows:
        """As the parent's, and the candidates of the scored splits into `given`."""
        self.candidates_column = self.arguments.candidates_column or ""
        splits = super()._read_split_files()
        if self.candidates_column:
            self.given = {split: [row["candidates"] for row in splits[split]] for split in set(splits) - {"train"}}
        return splits

    def _candidates(self, split: str, rows: list[dict[str, Any]]) -> list[list[str]]:
        """The items to rank for each row: those of the file, or the target among drawn ones."""
        if split in self.given:
            lists = self.given[split][: len(rows)]
            if missing := sum(row["target"] not in items for row, items in zip(rows, lists, strict=True)):
                self._note(
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
            self._note(f"{split}: {short:,} of {len(rows):,} users have fewer than --num_candidates unseen items")
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

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        return Task.new_tokenizer(self, arguments, splits)

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        return {}

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

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:  # type: ignore[override]
        return PromptCollator(cast(int, tokenizer.pad_token_id), self.prompt.is_question)

    def loss_function(self, label_smoothing: float) -> None:
        return None  # the language model's own, which is smoothed where asked for

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """Cross entropies of the target among the candidates, and [B, 1 + C]: its rank and the candidates' places,
        best first, -1 where there are fewer."""
        check_causal(model)
        parts = {name: inputs[name] for name in ("prefix_ids", "prefix_mask", "suffix_ids", "suffix_mask")}
        scores = candidate_scores(model, **parts, answers=self.prompt.answers if self.prompt.is_question else None)
        targets = inputs["target"]
        losses = torch.nn.functional.cross_entropy(scores, targets, ignore_index=-1, reduction="none")
        order = scores.argsort(dim=1, descending=True)
        order = order.masked_fill(scores.gather(1, order).isneginf(), -1)
        padded = torch.nn.functional.pad(scores, (1, 0), value=float("-inf"))
        ranks = target_ranks(padded, targets + 1, torch.zeros_like(targets)[:, None], PADDING)
        return Predicted(losses, targets >= 0, torch.cat((ranks[:, None], order), dim=1))

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        return [{"rank": int(row[0]), "order": row[1:][row[1:] >= 0].tolist()} for row in outputs.astype(int)]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        counts = sorted({len(row["candidates"]) for row in rows})
        number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        kind = "given" if self.given else f"drawn (seed {self.seed})"
        return ranking_scores(np.array([prediction["rank"] for prediction in predictions])) | {
            "ranking_signature": f"ranking of {number} {kind} candidates per user, ties against us"
        }

    def _baselines(self, train: Rows | None, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Ranks of the same targets among the same candidates by each baseline, if there are training rows."""
        if not self.arguments.baselines or not isinstance(train, Dataset):
            return {}
        numbers = {item: number for number, item in enumerate([PADDING_TOKEN, *self.every_item])}
        histories = [[numbers[item] for item in history] for history in train["source"]]
        ranks = {}
        for name, baseline_class in BASELINES.items():
            baseline, found = baseline_class(histories, len(numbers)), []
            for row in rows:
                scores = np.asarray(baseline.scores([[numbers[item] for item in row["source"]]]))[0]
                own = torch.tensor([[0.0, *(float(scores[numbers[item]]) for item in row["candidates"])]])
                place = row["candidates"].index(row["target"]) + 1 if row["target"] in row["candidates"] else PADDING
                found.append(int(target_ranks(own, torch.tensor([place]), torch.zeros(1, 1, dtype=torch.long))))
            ranks[name] = np.array(found)
        return ranks

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        asked = "the odds of yes against no" if arguments.scoring == "yes_no" else "the likelihood of the title"
        card = super().card_data()
        del card["code"]
        return card | {
            "title": "ranking by prompt",
            "pipeline_tag": "text-generation",
            "prompt": self._text(self.every_item[:2], self.every_item[-1]),
            "prediction": f"candidates by {asked}",
            "preprocessing": f"prompt {arguments.prompt_template!r}, at most {arguments.max_length} titles",
            "settings": {"task": self.name} | {name: getattr(arguments, name) for name in MODEL_SETTINGS},
        }
