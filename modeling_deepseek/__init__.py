"""DeepSeek models for transformers. Importing this package registers them with the Auto classes."""

from configuration_deepseek import DeepSeekConfig

from .modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
    DeepSeekForRecommendation,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekModel,
    DeepSeekPreTrainedModel,
)
from .register import AutoModelForEmbedding, AutoModelForRecommendation, register

register()

__all__ = [
    "AutoModelForEmbedding",
    "AutoModelForRecommendation",
    "DeepSeekConfig",
    "DeepSeekForCausalLM",
    "DeepSeekForEmbedding",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForRecommendation",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
    "DeepSeekModel",
    "DeepSeekPreTrainedModel",
    "register",
]
