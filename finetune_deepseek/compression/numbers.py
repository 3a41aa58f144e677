"""Weights of 8 or 4 bits, by torchao: whole numbers with a scale for each row, or for each 32 neighbours of a row.

Linear layers of decoder layers get the word that is asked for; routed experts become linear layers for it. Embeddings
and head get 8 bits where they are two tables that are only looked up and multiplied by. All else stays as it is:
router, norms, biases, stems, small heads. config.json says so in transformers' own form (`quantization_config`).
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.utils import is_torchao_available

from configuration_deepseek import DeepSeekConfig

from .rebuilding import prefix_of

GROUP = 32  # neighbours in a row that share a scale at 4 bits; rows that aren't whole groups get 8 bits
NOT_COPIED = (
    "config.json",
    "training_args.bin",
    "trainer_state.json",
    "*_results.json",
    "README.md",
    "*.py",
    "*.safetensors*",
)


def check_torchao() -> None:
    """Refuse to begin without torchao.

    Raises:
        ValueError: saying how to get it.
    """
    if not is_torchao_available():
        raise ValueError('--int8 and --int4 need torchao 0.16 or later: pip install "deepseek-hf[compress]"')


def write_smaller(model_class: Any, source: Path, destination: Path, word: str | None, dtype: str) -> None:
    """Write a saved model again, in a type, with numbers of fewer bits if a word of `NUMBERS` is given, and what lies
    beside."""
    shutil.copytree(source, destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    quantization = None if word is None else quantization_of(model_class, source, word)
    fused = {} if word is None else {"fused_experts": False}
    model = model_class.from_pretrained(source, dtype=dtype, quantization_config=quantization, **fused)
    model.save_pretrained(destination)


def quantization_of(model_class: Any, folder: Path, word: str) -> TorchAoConfig:
    """What transformers is told of the weights of a saved model."""
    from torchao.quantization import FqnToConfig

    with torch.device("meta"):
        model = model_class(DeepSeekConfig.from_pretrained(folder, fused_experts=False))
    inside = re.escape(f"{prefix_of(model)}layers.") + r"\d+\."
    words: dict[str, list[str]] = {}
    for name, width in linear_names(model, inside).items():
        words.setdefault("int8" if word == "int4" and width % GROUP else word, []).append(name)
    kinds = {rf"re:{inside}(?:.*\.)?(?:{'|'.join(names)})": kind_of(own) for own, names in words.items()}
    tables = table_names(model)
    kinds |= {name: kind_of("table") for name in tables}
    return TorchAoConfig(FqnToConfig(kinds), include_input_output_embeddings=bool(tables))


def linear_names(model: nn.Module, inside: str) -> dict[str, int]:
    """The last parts of the names of linear layers inside, and the widths of their rows; 1 where they differ."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and re.match(inside, name):
            last = name.rpartition(".")[2]
            found[last] = module.in_features if found.get(last, module.in_features) == module.in_features else 1
    return found


def table_names(model: Any) -> list[str]:
    """Embeddings and head of a language model that has two of its own; others multiply by their embeddings."""
    is_language_model = hasattr(model, "lm_head") and not model.config.tie_word_embeddings
    return [f"{prefix_of(model)}embed_tokens", "lm_head"] if is_language_model else []


def kind_of(word: str) -> Any:
    """torchao's class for a word."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )

    kinds = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "int8-dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
        "int4": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(GROUP),
        ),
        "table": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
    }
    return kinds[word]()
