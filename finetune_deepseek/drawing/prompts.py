"""Captions to the tokens that an image follows, and how the tokens of an image are drawn.

    <BOS> a red heart <｜image｜> | <｜image▁17｜> <｜image▁3｜> ...

Without its caption an image follows <｜image｜> alone, which is what transformers' classifier-free guidance
(arXiv 2306.17806) sees beside the prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokenization_deepseek import encode_text

from ..training.batches import RowDraws
from ..training.optimization import IGNORED_LABEL
from ..training.task import ONLY_IDS, CausalCollator


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """The tokens of captions, with what the tokenizer puts in front of a text."""
    if not captions:
        return []
    found = encode_text(tokenizer, [" ".join(caption.split()) for caption in captions])["input_ids"]
    end = tokenizer.eos_token_id  # some tokenizers end every text
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]


def prompts_of(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], most: int, begin: int) -> list[list[int]]:
    """Prompts of captions, each of `most` tokens at most and then the id that begins an image."""
    return [[*ids[:most], begin] for ids in encode_captions(tokenizer, captions)]


def drawing_config(
    tokenizer: PreTrainedTokenizerBase,
    ids: range,
    length: int,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    **options: Any,
) -> GenerationConfig:
    """How to draw exactly so many tokens, of those ids alone; `options` are more of a generation config's."""
    everything = range(max(len(tokenizer), ids.stop))
    drawn = {"temperature": temperature, "top_k": 0} if temperature else {}
    return GenerationConfig(
        do_sample=bool(temperature),
        max_new_tokens=length,
        min_new_tokens=length,
        suppress_tokens=[number for number in everything if number not in ids],
        guidance_scale=None if guidance_scale == 1 else guidance_scale,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(drawn | options if temperature else {}),
        **ONLY_IDS,
    )


class CaptionCollator:
    """Batches of images behind one of their captions, or of prompts to be drawn.

    A training row gets a caption of its own choice in each epoch, and at a share of the times none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dropout: float, seed: int) -> None:
        self.padded, self.dropout, self.draws = CausalCollator(int(tokenizer.pad_token_id)), dropout, RowDraws(seed)

    def set_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "prompt_ids" in features[0]:
            return self.padded([{name: row[name] for name in ("prompt_ids", "row")} for row in features])
        return self.padded([self._behind_caption(row) for row in features])

    def _behind_caption(self, row: dict[str, Any]) -> dict[str, Any]:
        prompts, image = row["prompts"], row["image_ids"]
        prompt = prompts[0]
        if "row" not in row:
            draw = self.draws.of(row["number"])
            prompt = draw.choice(prompts)
            prompt = prompt[-1:] if draw.random() < self.dropout else prompt
        found = {"input_ids": [*prompt, *image], "labels": [IGNORED_LABEL] * len(prompt) + list(image)}
        return found | ({"row": row["row"]} if "row" in row else {})


def training_rows(prompts: list[list[list[int]]], images: Any) -> Dataset:
    """Features of rows with one or several prompts each and images [N, h * w] of ids."""
    longest = [max(map(len, own)) for own in prompts]
    return Dataset.from_dict(
        {
            "prompts": prompts,
            "image_ids": images,
            "length": [length + images.shape[1] for length in longest],
            "number": list(range(len(prompts))),
        }
    )
