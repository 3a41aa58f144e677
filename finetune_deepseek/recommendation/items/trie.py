"""The trie of all items' codes, and beam search that never leaves it.

The trie isn't held as nodes. With the codes in order and each read as one number, the items below a prefix are an
interval, and the running count of the items that may be chosen says which intervals have any. So everything is a few
tensor operations, for any number of items. Letters: N items in the order of their codes, L digits, B users, M beams.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

IMPOSSIBLE = -1e8  # beam search fills up with beams of about -1e9, and what isn't allowed has minus infinity


class CodeTrie:
    """Codes [N, L], digits from 0, in lexical order and all different.

    Raises:
        ValueError: if they aren't, or would be numbers of more than 63 bits.
    """

    def __init__(self, codes: torch.Tensor) -> None:
        self.sizes: list[int] = [int(size) + 1 for size in codes.max(0).values]
        places = [math.prod(self.sizes[level + 1 :]) for level in range(len(self.sizes))]
        if self.sizes[0] * places[0] >= 2**63:
            raise ValueError(f"codes of {self.sizes} digits don't fit into 63 bits; use fewer levels or centres.")
        self.places = torch.tensor(places, device=codes.device)
        self.keys = (codes * self.places).sum(1)  # [N]
        if not bool((self.keys[1:] > self.keys[:-1]).all()):
            raise ValueError("codes must be in order and all different.")

    @property
    def depth(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> "CodeTrie":
        self.places, self.keys = self.places.to(device), self.keys.to(device)
        return self

    def _keys(self, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] numbers of prefixes [R, d], and which of them are made of digits that there are."""
        level = digits.shape[1]
        sizes = torch.tensor(self.sizes[:level], device=digits.device)
        return (digits * self.places[:level]).sum(1), ((digits >= 0) & (digits < sizes)).all(1)

    def allowed_digits(self, digits: torch.Tensor, choosable: torch.Tensor) -> torch.Tensor:
        """Which digit may follow each prefix: one below which an item is choosable.

        Args:
            digits: [B * M, d], the prefixes of each user's beams.
            choosable: [B, N + 1], how many of the first n items the user may get.

        Returns:
            [B * M, K] booleans, K being the number of digits of that level.
        """
        level, users = digits.shape[1], choosable.shape[0]
        keys, valid = self._keys(digits)
        steps = torch.arange(self.sizes[level] + 1, device=digits.device) * self.places[level]
        borders = torch.searchsorted(self.keys, keys[:, None] + steps)  # [B * M, K + 1]
        counts = choosable.gather(1, borders.view(users, -1)).view(borders.shape)
        return (counts[:, 1:] > counts[:, :-1]) & valid[:, None]

    def find(self, codes: torch.Tensor) -> torch.Tensor:
        """[R] places of the items with codes [R, L], -1 for a code that no item has."""
        keys, valid = self._keys(codes)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(valid & (self.keys[place] == keys), place, -1)


class TrieLogitsProcessor(LogitsProcessor):
    """Lets through the tokens of digits that lead to an item which the user may get.

    Args:
        prompt_length: tokens before the first digit.
        first_tokens: the token of digit 0, for each level; the other digits' tokens follow it.
        choosable: [B, N] booleans.
    """

    def __init__(
        self, trie: CodeTrie, prompt_length: int, first_tokens: Sequence[int], choosable: torch.Tensor
    ) -> None:
        self.trie, self.prompt_length, self.first_tokens = trie, prompt_length, first_tokens
        self.offsets = torch.tensor(first_tokens, device=choosable.device)
        self.choosable = torch.nn.functional.pad(choosable.int().cumsum(1), (1, 0))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # type: ignore[override]
        """Tokens [B * M, S] and their log-probabilities [B * M, V]."""
        tokens = input_ids[:, self.prompt_length :]
        level = tokens.shape[1]
        allowed = self.trie.allowed_digits(tokens - self.offsets[:level], self.choosable)
        span = slice(self.first_tokens[level], self.first_tokens[level] + self.trie.sizes[level])
        kept = torch.full_like(scores, float("-inf"))
        kept[:, span] = scores[:, span].masked_fill(~allowed, float("-inf"))
        return kept  # type: ignore[return-value]


@torch.no_grad()
def beam_items(
    model: Any,
    trie: CodeTrie,
    first_tokens: Sequence[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    choosable: torch.Tensor,
    num_beams: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items that beam search finds after prompts [B, S], padded on the left, best first.

    Args:
        choosable: [B, N] booleans.

    Returns:
        Places of the items [B, M] and the logarithms of the codes' probabilities [B, M]; -1 and minus infinity where
        there are fewer. With num_beams at least N the ranking is exact.
    """
    beams = max(2, num_beams)  # with one, transformers searches greedily and gives no scores
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        logits_processor=LogitsProcessorList([TrieLogitsProcessor(trie, input_ids.shape[1], first_tokens, choosable)]),
        generation_config=GenerationConfig(
            max_new_tokens=trie.depth,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,  # all are of one length
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    tokens = generated.sequences[:, input_ids.shape[1] :]
    tokens = torch.nn.functional.pad(
        tokens, (0, trie.depth - tokens.shape[1])
    )  # it ends early if nothing is choosable
    codes = tokens - torch.tensor(first_tokens, device=input_ids.device)
    scores = generated.sequences_scores.float()
    is_found = scores > IMPOSSIBLE
    items = trie.find(codes).masked_fill(~is_found, -1)
    scores = scores.masked_fill(~is_found, float("-inf"))
    return items.view(-1, beams)[:, :num_beams], scores.view(-1, beams)[:, :num_beams]
