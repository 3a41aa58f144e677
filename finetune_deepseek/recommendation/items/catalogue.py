"""The catalogue of a task whose items are texts: which number an item has, and the folder that keeps it.

The model holds the texts' tokens under numbers (modeling_deepseek/item_texts.py); the ids stand in a tokenizer with
one token per item, in a folder beside the tokenizer of the words.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...data.cells import Column, typed
from ...data.table import read_columns
from ...retrieval.encoding import token_ids

PADDING, PADDING_TOKEN = 0, "<padding>"
CATALOGUE_FOLDER = "catalogue"


def catalogue_tokenizer(items: list[str]) -> PreTrainedTokenizerFast:
    """One token per item, numbered from 1 in the order given; 0 is the padding."""
    vocabulary = {token: number for number, token in enumerate([PADDING_TOKEN, *items])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token=PADDING_TOKEN)


def item_tokenizer(items: set[str], seed: int) -> PreTrainedTokenizerFast:
    """One token per item: number 0 is the padding, the others follow the hash of seed and id.

    Raises:
        ValueError: for an empty catalogue, or an item that is named like the padding.
    """
    if len(items) < 2:
        raise ValueError(f"The catalogue has {len(items)} items; recommending needs two or more.")
    if PADDING_TOKEN in items:
        raise ValueError(f"An item is named {PADDING_TOKEN}, which stands for no item; rename it.")
    ordered = sorted(items, key=lambda item: hashlib.blake2b(f"{seed} {item}".encode(), digest_size=8).digest())
    return catalogue_tokenizer(ordered)


def read_items(path: str, item_column: str, text_columns: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Texts by item id out of a file, and a line for each kind of gap; several columns are joined by ". ".

    Raises:
        ValueError: if the file can't be read, has no such column, or no item.
    """
    wanted = [Column(name, "words", "text_columns") for name in text_columns]
    columns = typed(read_columns(path), [Column(item_column, "id", "item_column"), *wanted], path)
    texts: dict[str, str] = {}
    nameless = repeated = 0
    for item, *cells in zip(columns[item_column], *(columns[name] for name in text_columns), strict=True):
        nameless += item is None
        repeated += item in texts
        if item is None or item in texts:
            continue
        texts[item] = ". ".join(cell for cell in cells if cell)
    if not texts:
        raise ValueError(f"{path}: no items.")
    counts = {
        "rows without an item id were left out": nameless,
        "rows with the id of a row before were left out": repeated,
        "items without any text; all of them get one vector": sum(not text for text in texts.values()),
    }
    return texts, [f"{Path(path).name}: {count:,} {what}" for what, count in counts.items() if count]


class TextCatalogue:
    """`texts` by item id, and `numbers`, which are known once a model has taken the texts.

    `folder` is that of the saved model, if any, in whose catalogue they go on.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.numbers: dict[str, int] = {}
        self.folder: Path | None = None

    def config_fields(self, saved: dict[str, Any], max_text_length: int) -> dict[str, Any]:
        """Fields of a new model's config; a model that has items keeps its own."""
        return {} if saved.get("num_items") else {"num_items": 1, "item_text_length": max_text_length}

    def prepare(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
        """Give the model the items that it lacks; what that was."""
        if model.config.num_items > 1:
            assert self.folder is not None
            self.numbers = dict(PreTrainedTokenizerFast.from_pretrained(self.folder / CATALOGUE_FOLDER).get_vocab())
        else:
            self.numbers = {PADDING_TOKEN: PADDING}
        new = [item for item in self.texts if item not in self.numbers]
        if not new:
            return "the model has all items in its catalogue"
        rows, cut = token_ids(tokenizer, [self.texts[item] for item in new], "", model.config.item_text_length)
        self.numbers |= dict(zip(new, model.add_items(rows).tolist(), strict=True))
        return f"{len(new):,} items were added to the catalogue, {cut:,} of them cut to the model's text length"

    @property
    def items(self) -> list[str]:
        """In the order of their numbers, the padding first."""
        return sorted(self.numbers, key=self.numbers.__getitem__)

    def save(self, folder: Path) -> None:
        catalogue_tokenizer(self.items[1:]).save_pretrained(str(folder / CATALOGUE_FOLDER))
