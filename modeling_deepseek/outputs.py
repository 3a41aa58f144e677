"""What forwards return: transformers' outputs, with the cache under both its words."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .transformers_names import answers_to_both


@answers_to_both
@dataclass
class DeepSeekModelOutput(MoeModelOutputWithPast):
    """transformers' output of a trunk, and `state_before_norm` [B, S, D] if it was asked for."""

    state_before_norm: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output of a language model, and `mtp_loss`: mean loss of the prediction layers, not weighted."""

    mtp_loss: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekSequenceOutput(SequenceClassifierOutputWithPast):
    """transformers' output of a model that gives one vector of scores per sequence."""
