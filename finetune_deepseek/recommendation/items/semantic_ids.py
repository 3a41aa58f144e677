"""The catalogue of a generative recommender: items written as the digits of semantic IDs, as a tokenizer."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from modeling_deepseek.whole_folders import current

from ...data.files import read_json, write_text
from .catalogue import PADDING, PADDING_TOKEN

# Letters: B users, M beams, N items, L digits.
START, START_TOKEN = 1, "<start>"
CODES_FILE = "semantic_ids.json"


class SemanticIdTokenizer(PreTrainedTokenizerFast):
    """Digits as tokens, and the catalogue: `items`, in the order of their `codes`.

    Item number n, 0 being the padding, is `items[n - 1]`; `first_tokens[l]` is the token of digit 0 at level l.
    """

    items: list[str]
    codes: torch.Tensor  # [N, L]
    first_tokens: list[int]

    @classmethod
    def of_codes(cls, items: Sequence[str], codes: np.ndarray) -> "SemanticIdTokenizer":
        """The tokenizer of a catalogue with distinct codes [N, L]."""
        order = np.lexsort(codes.T[::-1])
        tokens = [f"<{level}:{digit}>" for level, top in enumerate(codes.max(0)) for digit in range(top + 1)]
        vocabulary = {token: number for number, token in enumerate([PADDING_TOKEN, START_TOKEN, *tokens])}
        tokenizer = cls(
            tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token=PADDING_TOKEN, bos_token=START_TOKEN
        )
        tokenizer.set_catalogue([items[number] for number in order], torch.from_numpy(codes[order]))
        return tokenizer

    # Not by an __init__ of our own: from_pretrained would give such a class further tokens.
    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, revision: str = "main", **kwargs: Any) -> "SemanticIdTokenizer":  # type: ignore[override]
        """From a folder or the Hub.

        Raises:
            OSError: if it has no codes of items.
        """
        name = current(name, CODES_FILE)
        tokenizer = super().from_pretrained(name, *args, revision=revision, **kwargs)
        content = read_json(Path(str(cached_file(name, CODES_FILE, revision=revision))))
        tokenizer.set_catalogue(content["items"], torch.tensor(content["codes"]))
        return tokenizer

    def set_catalogue(self, items: list[str], codes: torch.Tensor) -> None:
        self.items, self.codes = items, codes
        sizes = (codes.max(0).values + 1).tolist()
        self.first_tokens = [START + 1 + sum(sizes[:level]) for level in range(len(sizes))]
        self.item_tokens = (codes + torch.tensor(self.first_tokens)).tolist()

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        path = Path(save_directory) / CODES_FILE
        write_text(path, json.dumps({"items": self.items, "codes": self.codes.tolist()}, ensure_ascii=False))
        return super()._save_pretrained(save_directory, (*file_names, str(path)), *args, **kwargs)

    @property
    def numbers(self) -> dict[str, int]:
        """Item numbers by id, the padding's too, as item_tokenizer's vocabulary."""
        return {PADDING_TOKEN: PADDING} | {item: number for number, item in enumerate(self.items, start=1)}

    def history(self, numbers: Iterable[int]) -> list[int]:
        """The tokens of a history of item numbers."""
        return [START, *(token for number in numbers for token in self.item_tokens[number - 1])]


def choosable_items(seen: torch.Tensor, num_items: int) -> torch.Tensor:
    """[B, N] booleans: items whose numbers aren't in `seen` [B, S], filled up with the padding."""
    left = torch.ones(len(seen), num_items + 1, dtype=torch.bool, device=seen.device)
    return left.scatter_(1, seen, False)[:, 1:]
