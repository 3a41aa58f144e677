"""DeepSeek models for transformers. Importing this package registers them with the Auto classes."""

from configuration_deepseek import DeepSeekConfig

from .modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekModel,
    DeepSeekPreTrainedModel,
)
from .register import register

register()

__all__ = [
    "DeepSeekConfig",
    "DeepSeekForCausalLM",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
    "DeepSeekModel",
    "DeepSeekPreTrainedModel",
    "register",
]
