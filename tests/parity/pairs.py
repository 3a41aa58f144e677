"""A native model of transformers and ours with the same weights, handed over as an official checkpoint folder."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import modeling_deepseek
from tests.parity.cases import BASES, CASES

HEADS = {
    "CausalLM": (AutoModelForCausalLM, modeling_deepseek.DeepSeekForCausalLM),
    "SequenceClassification": (
        AutoModelForSequenceClassification,
        modeling_deepseek.DeepSeekForSequenceClassification,
    ),
    "TokenClassification": (AutoModelForTokenClassification, modeling_deepseek.DeepSeekForTokenClassification),
}
# grouped_mm, transformers' default for experts, refuses some of the widths in cases.py
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
SCRATCH: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


@dataclass(frozen=True)
class Pair:
    """`native` wrote `folder`, `ours` was loaded from it; `info` is what the loader said."""

    native: PreTrainedModel
    ours: PreTrainedModel
    folder: Path
    info: dict

    @property
    def vocab_size(self) -> int:
        return self.native.config.vocab_size


def native_config(name: str, **overrides):
    """The native config of a row of `CASES`."""
    model_type, fields = CASES[name]
    return AutoConfig.for_model(model_type, **{**BASES[model_type], **json.loads(json.dumps(fields)), **overrides})


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Give norms, biases and routers values at which a mistake in them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias") or name.endswith("gate.weight"):  # e_score_correction_bias, a buffer, among them
            parameter.copy_(0.3 * noise)
        elif name.endswith("embed_tokens.weight"):  # a generated pad of zeros would let all keys of an indexer tie
            parameter[model.config.pad_token_id] = 0.2 * noise[model.config.pad_token_id]


@functools.cache
def pair_of(name: str, head: str = "CausalLM") -> Pair:
    """The pair of a row of `CASES`, made once per process."""
    native_auto, our_class = HEADS[head]
    seed = list(CASES).index(name)
    torch.manual_seed(seed)
    native = native_auto.from_config(native_config(name), **EAGER).eval()
    randomise(native, seed)
    SCRATCH.append(tempfile.TemporaryDirectory())
    folder = Path(SCRATCH[-1].name)
    native.save_pretrained(folder)
    ours, info = our_class.from_pretrained(folder, output_loading_info=True, **EAGER)
    return Pair(native, ours.eval(), folder, info)


def token_ids(pair: Pair, batch: int = 3, length: int = 13, seed: int = 11) -> torch.Tensor:
    """[batch, length] ids of ordinary tokens (no bos, eos or pad)."""
    return torch.randint(3, pair.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, lengths: tuple[int, ...] = (13, 7, 4)) -> torch.Tensor:
    """[B, T] attention mask with rows of these lengths, zeros on the given side."""
    longest = max(lengths)
    rows = []
    for length in lengths:
        zeros, ones = [0] * (longest - length), [1] * length
        rows.append(zeros + ones if side == "left" else ones + zeros)
    return torch.tensor(rows)
