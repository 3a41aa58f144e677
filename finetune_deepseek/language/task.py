"""Causal language modelling: documents in, a model that continues them out; from random weights or continued.

Training sees blocks of packed documents (packing.py), evaluation windows in which every token is counted once
(windows.py). Of the test split some texts are continued too, and shown beside what really follows.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.fault_report import Report
from ..data.sources import Rows, progress
from ..training.optimization import IGNORED_LABEL
from ..training.scoring.eval_loss import Predicted
from ..training.task import CausalCollator, Task, beam_search, lower
from ..training.trainer_arguments import TrainingArguments
from .arguments import LanguageModelingArguments
from .documents import (
    CHUNK,
    COUNTED,
    FAULTS,
    BlockStream,
    census,
    census_text,
    check_documents,
    document_ids,
    load_documents,
    num_bytes,
    packer,
)
from .packing import LEAST, PackedCollator
from .windows import windows

BLOCK = 1024  # tokens, where a model has more positions and no other number is asked for
TOKENIZER_TRAINING_DOCUMENTS = 200_000


class LanguageCollator:
    """Batches of blocks, of windows with their `row` and `bytes`, or of prompts.

    Args:
        width: of blocks, for all processes' batches of a stream are made in one; None for that of the longest.
    """

    def __init__(self, pad_token_id: int, width: int | None = None) -> None:
        self.blocks, self.prompts, self.width = PackedCollator(pad_token_id), CausalCollator(pad_token_id), width

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        first = features[0]
        if "prompt_ids" in first:
            return self.prompts([{name: row[name] for name in ("prompt_ids", "row")} for row in features])
        batch = self.blocks(features, None if "row" in first else self.width)
        scored = [name for name in ("row", "bytes") if name in first]
        return batch | {name: torch.tensor([row[name] for row in features]) for name in scored}


def evenly(found: list[Any], number: int) -> list[Any]:
    """So many of a list, the first and the last among them; all if there aren't more."""
    places = np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int)
    return [found[place] for place in places]


class LanguageModeling(Task):
    """See the module. Rows are documents, each a `text`."""

    name = "language_modeling"
    arguments_class = LanguageModelingArguments
    next_command = "deepseek-hf generate {folder} PROMPT"
    fault_names = FAULTS

    def __init__(self, arguments: LanguageModelingArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        self.counts: dict[str, dict[str, int]] = {}
        self.census = ""

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        return load_documents(self.arguments)

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        """Documents that are there twice, or in training too; of a stream nothing is known."""
        return check_documents(splits)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        for row in islice(splits["train"], TOKENIZER_TRAINING_DOCUMENTS):
            yield row["text"]

    # -- features --

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that sees what it is to predict."""
        direction = getattr(model.config, "attention_direction", "causal")
        if direction == "bidirectional":
            raise ValueError(f"attention_direction {direction}: each token would see the next, which it predicts.")

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Blocks of as many tokens as asked for.

        Raises:
            ValueError: if the model hasn't as many positions.
        """
        asked = self.arguments.max_seq_length
        if asked is not None and asked > positions:
            raise ValueError(
                f"--max_seq_length {asked}: the model has {positions} positions; lower it, or raise "
                "max_position_embeddings by --config_overrides."
            )
        self.arguments.max_seq_length = asked or min(BLOCK, positions)
        lower(self.arguments, positions, max_new_tokens=max(1, positions // 2))
        lower(self.arguments, positions, prompt_tokens=positions - self.arguments.max_new_tokens)

    @property
    def block_size(self) -> int:
        self.arguments.max_seq_length = self.arguments.max_seq_length or BLOCK  # a model without a limit
        return self.arguments.max_seq_length

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Blocks (see `packed_rows`) for training, windows with their `bytes` for evaluation."""
        if not is_training:
            return self._windows(rows, tokenizer)
        blocks_of = packer(tokenizer, self.block_size, self.arguments.packing)
        if not isinstance(rows, Dataset):
            print(f"a stream, so its documents aren't counted; blocks of {self.block_size:,} tokens")
            return cast(Rows, BlockStream(rows, blocks_of, self.seed))
        blocks = rows.map(blocks_of, batched=True, batch_size=CHUNK, remove_columns=["text"], **progress(rows, "pack"))
        self.counts["train"] = census(blocks, self.block_size)
        self.census = census_text(self.counts["train"], self.block_size)
        print(f"training data: {self.census}")
        return blocks.remove_columns(list(COUNTED))

    def _windows(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        size, stride = self.block_size, self.arguments.eval_stride
        if stride is not None and stride >= size:
            raise ValueError(f"--eval_stride {stride}: give less than a window's {size} tokens (--max_seq_length).")

        def cut(batch: dict[str, list]) -> dict[str, list]:
            found = [
                (ids[start:end], counted - start, 0 if start else num_bytes(text))
                for text, ids in zip(batch["text"], document_ids(tokenizer, batch["text"]), strict=True)
                for start, end, counted in windows(len(ids), size, stride)
            ]
            return {
                "input_ids": [ids for ids, *_ in found],
                "labels": [[IGNORED_LABEL] * context + ids[context:] for ids, context, _ in found],
                "pieces": [[len(ids)] for ids, *_ in found],
                "length": [len(ids) for ids, *_ in found],
                "bytes": [text for *_, text in found],
            }

        found = rows.map(cut, batched=True, remove_columns=["text"], **progress(rows, "tokenize"))
        tokens = sum(found["length"])
        print(f"held-out data: {len(rows):,} document(s), {sum(found['bytes']):,} bytes, {len(found):,} windows")
        if tokens < size:
            print(f"these are {tokens:,} tokens, less than a block of {size:,}: their score says little")
        return cast(Dataset, found)

    def prompts(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The beginnings of documents and what follows; of a single document, of parts of it."""
        number, length = self.arguments.max_continuations, self.arguments.prompt_tokens
        if not number:
            return None
        span = length + self.arguments.max_new_tokens
        documents = document_ids(tokenizer, rows[:number]["text"])
        parts = [
            ids[start : min(start + span, len(ids) - 1)]
            for ids in documents
            for start in ([0] if len(rows) > 1 else range(0, len(ids) - LEAST, span))
        ]
        chosen = evenly(parts, number)
        given, following = ([part[place] for part in chosen] for place in (slice(length), slice(length, None)))
        return Dataset.from_dict(
            {
                "prompt_ids": given,
                "length": [*map(len, given)],
                "source": tokenizer.batch_decode(given, skip_special_tokens=True),
                "target": tokenizer.batch_decode(following, skip_special_tokens=True),
            }
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> LanguageCollator:
        width = self.block_size if self.arguments.streaming else None
        return LanguageCollator(cast(int, tokenizer.pad_token_id), width)

    def max_steps(self, args: TrainingArguments) -> int | None:
        """So many that whole blocks hold --tokens_budget."""
        if self.arguments.tokens_budget is None:
            return None
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(self.arguments.tokens_budget / (rows * self.block_size))

    # -- scores and reports --

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        return beam_search(tokenizer, self.arguments.max_new_tokens, num_beams)

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The windows' losses in nats, with the bytes of text that begin in them."""
        read = {name: value for name, value in inputs.items() if name != "bytes"}
        return super().predict_batch(model, read)._replace(bytes=inputs.get("bytes"))

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Nothing: what a text goes on with is one of many, and the loss says how likely it was."""
        return {}

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        stride = "" if arguments.eval_stride is None else f", stride {arguments.eval_stride}"
        return {
            "language": None,
            "pipeline_tag": "text-generation",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": {
                "perplexity": ("perplexity", "perplexity"),
                "bits_per_byte": ("bits_per_byte", "bits per byte"),
            },
            "dataset_name": arguments.data_name,
            "baseline": "-",
            "title": "language modelling",
            "prompt": "Once",
            "data": f"Training data: {self.census}." if self.census else "",
            "preprocessing": f"documents with a token in front and one at the end, in blocks of {self.block_size} "
            f"tokens ({arguments.packing}), each document seeing itself alone; scores: windows of {self.block_size} "
            f"tokens{stride}, every token but the one in front counted once, bytes of the text in UTF-8",
        }
