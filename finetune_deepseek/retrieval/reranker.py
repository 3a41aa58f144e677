"""A reranker: one score for a question and a passage together, by a classifier that reads both.

It is trained by the classification task with `--text_column question --text_pair_column passage`, which makes one text
of the two by `pair_text`. The label says whether the passage answers the question: two labels of which the second in
order means yes (0 and 1, no and yes), or a number from 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from tokenization_deepseek import encode_text

from ..data.words import pair_text
from ..training.batches import batches_by_length
from ..training.loading import saved_tokenizer, served_model
from ..training.saved import Saved


@dataclass(frozen=True)
class Reranker:
    """A sequence classifier with one output or two, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, source: str, revision: str = "main") -> "Reranker":
        """From a folder or the Hub, a model or an adapter.

        Raises:
            ValueError: if there is no such model, or it has more than two labels.
        """
        saved = Saved.open("reranker", source, revision)
        saved.check_task("classification", "SequenceClassification")
        model, tokenizer = served_model(saved, AutoModelForSequenceClassification), saved_tokenizer(saved)
        if model.config.num_labels > 2:
            raise ValueError(
                f"--reranker {source}: it has {model.config.num_labels} labels; train one with two, no and yes, or "
                "with a number."
            )
        return cls(model, tokenizer)

    @torch.no_grad()
    def scores(self, question: str, passages: Sequence[str], batch_size: int = 32) -> list[float]:
        """From 0 to 1 for each passage; what is longer than the model is cut at its end."""
        limit = self.model.config.max_position_embeddings
        texts = [pair_text(question, text) for text in passages]
        rows = [ids[:limit] for ids in encode_text(self.tokenizer, texts)["input_ids"]]
        found = [0.0] * len(rows)
        for chosen in batches_by_length([len(row) for row in rows], batch_size):
            chosen_rows = [torch.tensor(rows[number]) for number in chosen]
            mask = pad_sequence([torch.ones_like(row) for row in chosen_rows], batch_first=True)
            ids = pad_sequence(chosen_rows, batch_first=True, padding_value=self.model.config.pad_token_id or 0)
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
            if self.model.config.num_labels == 2:
                shares = logits.softmax(-1)[:, 1]
            elif self.model.config.problem_type == "regression":
                shares = logits[:, 0].clamp(0, 1)
            else:
                shares = logits[:, 0].sigmoid()
            for number, share in zip(chosen, shares.tolist(), strict=True):
                found[number] = share
        return found
