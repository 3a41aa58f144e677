"""Generative reading: the model is given question and passage, and writes the answer, or at once its end for none."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from ..data.sources import Rows, progress
from ..training.optimization import IGNORED_LABEL
from ..training.task import CausalCollator, beam_search
from .windows import Layout


class GenerativeReader:
    """Features, collator and predictions of generative question answering; see `Task` for what they are.

    A prompt is the window of extractive reading with a line's end in place of its last token. A passage that is longer
    is cut at its end.
    """

    auto_class = AutoModelForCausalLM
    peft_task_type = "CAUSAL_LM"

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.note: Callable[[str], Any] = print

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, layout: Layout, is_training: bool) -> Dataset:
        """`input_ids` and `labels` of prompt and answer, with the loss on the answer; for evaluation `prompt_ids`.

        Training questions whose answer stands in the part that is cut off are left out, and counted.
        """
        arguments, cut, lost = self.arguments, 0, 0

        def encode(batch: dict[str, list]) -> dict[str, list]:
            nonlocal cut, lost
            prompts, answers = [], []
            columns = (batch[name] for name in ("source", "context", "answers", "starts", "target"))
            for question, context, texts, starts, target in zip(*columns, strict=True):
                passage = layout.encoder.passage(context)
                before, after = layout.around(question)
                after = [*after[:-1], *layout.separator]
                room = arguments.max_seq_length - len(before) - len(after) - arguments.max_answer_length
                if room < 1:
                    raise ValueError(
                        f"--max_seq_length {arguments.max_seq_length}: question and answer leave no token for the "
                        "passage; raise it, or lower --max_question_length or --max_answer_length."
                    )
                cut += len(passage.ids) > room
                end = passage.offsets[room - 1][1] if len(passage.ids) > room else len(context)
                if is_training and texts:
                    there = [t for t, s in zip(texts, starts, strict=True) if s >= 0 and s + len(t) <= end]
                    if not there:
                        lost += 1
                        continue
                    target = there[0]
                prompts.append([*before, *passage.ids[:room], *after])
                answers.append([*layout.encoder.ids(target)[: arguments.max_answer_length - 1], *layout.end])
            pairs = list(zip(prompts, answers, strict=True))
            features: dict[str, list] = {
                "input_ids": [prompt + answer for prompt, answer in pairs],
                "labels": [[IGNORED_LABEL] * len(prompt) + answer for prompt, answer in pairs],
                "length": [len(prompt) + len(answer) for prompt, answer in pairs],
            }
            return features if is_training else features | {"prompt_ids": prompts}

        features = rows.map(
            encode, batched=True, remove_columns=list(rows.column_names or []), **progress(rows, "tokenize")
        )
        if cut:
            line = f"cut {cut:,} of {len(rows):,} passages to --max_seq_length {arguments.max_seq_length}"
            self.note(line + f"; left out {lost:,} training questions without an answer in the rest" * bool(lost))
        if not len(features):
            raise ValueError("No training question has its answer in its passage, so there is nothing to learn.")
        return cast(Dataset, features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:
        return CausalCollator(cast(int, tokenizer.pad_token_id))

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        return beam_search(tokenizer, self.arguments.max_answer_length, num_beams)

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        ids = np.where(outputs == IGNORED_LABEL, tokenizer.pad_token_id, outputs)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
