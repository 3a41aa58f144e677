"""Tiny language models with a tokenizer, in memory and in folders."""

import io
import sys

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from configuration_deepseek import PRESETS, preset
from finetune_deepseek import __main__ as command
from finetune_deepseek.language.serving.language_model import LanguageModel
from finetune_deepseek.language.serving.sampling import Sampling
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import one_thread  # noqa: F401
from tokenization_deepseek import CHAT_TEMPLATES, train_tokenizer

TINY = [name for name in PRESETS if name.startswith("tiny_")]
TEXTS = ["hello world, how are you today?", "你好，世界！今天天气很好。", "one two three four five six seven"] * 3


def tiny(name: str, tokenizer, **changes) -> DeepSeekForCausalLM:
    """Random weights, large enough that what was read before decides what is written, and no end of text."""
    torch.manual_seed(0)
    fields = {"initializer_range": 0.2, "vocab_size": len(tokenizer), "eos_token_id": None, **changes}
    return DeepSeekForCausalLM(preset(name, **fields)).eval()


@pytest.fixture(scope="session")
def trained():
    """A tokenizer in the format of V3."""
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def tokenizer(trained, tmp_path_factory):
    """The same, one's own to change."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save_pretrained(folder)
    return type(trained).from_pretrained(folder)


@pytest.fixture
def lm(tokenizer):
    """A model of V3's kind that never ends a text by itself."""
    return endless(tiny("tiny_v3", tokenizer), tokenizer)


class Endless(LanguageModel):
    """Its texts end where `eos_token_id` of the generation config says, nowhere at first."""

    @property
    def ends(self):
        return [end for end in super().ends if end != self.tokenizer.eos_token_id or self.defaults.eos_token_id == end]


def endless(model, tokenizer) -> LanguageModel:
    return Endless("tiny", model, tokenizer)


@pytest.fixture(scope="session")
def folders(trained, tmp_path_factory):
    """Saved models: `v3`, `v3.1` and `v2` with a chat format, `plain` without."""
    place = tmp_path_factory.mktemp("models")
    for name, words in (("v3", "tiny_v3"), ("v3.1", "tiny_v3"), ("v2", "tiny_llm"), ("plain", "tiny_v2")):
        trained.chat_template = CHAT_TEMPLATES.get(name)
        trained.save_pretrained(place / name)
        tiny(words, trained).save_pretrained(place / name)
    trained.chat_template = CHAT_TEMPLATES["v3"]
    return place


@pytest.fixture
def main(monkeypatch, capfd):
    """Run `deepseek-hf ...` with text on standard input; gives exit code, standard output, standard error."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", *map(str, argv)])
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin))
        )
        capfd.readouterr()
        code = command.main()
        return code, *capfd.readouterr()

    return run


class Scripted(LogitsProcessor):
    """Lets a model write given tokens and nothing else."""

    def __init__(self, ids):
        self.ids, self.step = ids, 0

    def __call__(self, input_ids, scores):
        token = self.ids[min(self.step, len(self.ids) - 1)]
        self.step += 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


@pytest.fixture
def script(monkeypatch, trained):
    """Give it the texts of the answers to come; behind them the model writes what it will."""
    texts = []

    def processors(self, streams):
        if not texts:
            return LogitsProcessorList()
        return LogitsProcessorList([Scripted(trained(texts.pop(0), add_special_tokens=False).input_ids)])

    monkeypatch.setattr(Sampling, "processors", processors)
    return texts.extend
