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
    """transformers' output of a trunk, and `draft_states`, what prediction layers read of each token, if asked for."""

    draft_states: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output of a language model, `mtp_loss`: mean loss of the prediction layers, not weighted, and
    `draft_states` as the trunk's."""

    mtp_loss: torch.Tensor | None = None
    draft_states: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekSequenceOutput(SequenceClassifierOutputWithPast):
    """transformers' output of a model that gives one vector of scores per sequence."""
