"""The texts that a translation model is shown, as tokens, and what it generates, as text."""

from collections.abc import Iterable
from string import Formatter
from typing import cast

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokenization_deepseek import Control, encode_parts, encode_text

from ..training.task import CausalCollator, beam_search, generated_texts
from .arguments import TranslationArguments
from .moses import moses_lower


class Prompts:
    """What a translation model is shown and how its answer is read, in training and after it."""

    name = "translation"  # of the task, as cards have it

    def __init__(self, arguments: TranslationArguments) -> None:
        self.arguments = arguments
        self.is_prepared = arguments.preprocess == "moses_lower"

    def prepared(self, text: str, language: str) -> str:
        """The text as --preprocess wants it."""
        return moses_lower(language)(text) if self.is_prepared else text

    def prompt(self, source: str, source_lang: str, target_lang: str) -> str:
        """The text that the model continues with the translation."""
        return "".join(self.prompt_parts(source, source_lang, target_lang))

    def prompt_parts(self, source: str, source_lang: str, target_lang: str) -> list[str]:
        """The prompt in parts, those of the template as such: control tokens count in them alone."""
        values = {"source_lang": Control(source_lang), "target_lang": Control(target_lang), "source": source.strip()}
        pieces = Formatter().parse(self.arguments.prompt_template)
        return [part for literal, name, *_ in pieces for part in (Control(literal), values[name] if name else "")]

    def encode_prompts(
        self, rows: Iterable[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        """Token ids of the prompts of sources with their source and target languages."""
        end = tokenizer.eos_token_id
        encoded = encode_parts(tokenizer, [self.prompt_parts(*row) for row in rows])
        # Some tokenizers end every text.
        return [ids[:-1] if ids[-1] == end else ids for ids in encoded["input_ids"]]

    def encode_targets(self, targets: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        encoded = encode_text(tokenizer, list(targets), add_special_tokens=False)
        return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:
        return CausalCollator(cast(int, tokenizer.pad_token_id))

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        arguments = self.arguments
        return beam_search(tokenizer, arguments.max_target_length, num_beams, arguments.stop_text)

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        stop = self.arguments.stop_text
        texts = generated_texts(outputs, tokenizer)
        return [text.partition(stop)[0].strip() for text in texts] if stop else texts
