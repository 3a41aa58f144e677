"""DeepSeek models for transformers. Importing this package registers them with the Auto classes."""

from configuration_deepseek import DeepSeekConfig

from .detection_head import DeepSeekForObjectDetection
from .embedding_head import DeepSeekForEmbedding
from .image_heads import DeepSeekForImageClassification
from .image_text_head import DeepSeekForImageTextToText
from .language_heads import (
    DeepSeekForCausalLM,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
)
from .modeling_deepseek import DeepSeekModel
from .pretrained import DeepSeekPreTrainedModel
from .recommendation_head import DeepSeekForRecommendation
from .register import AutoModelForEmbedding, AutoModelForRecommendation, register

register()

__all__ = [
    "AutoModelForEmbedding",
    "AutoModelForRecommendation",
    "DeepSeekConfig",
    "DeepSeekForCausalLM",
    "DeepSeekForEmbedding",
    "DeepSeekForImageClassification",
    "DeepSeekForImageTextToText",
    "DeepSeekForObjectDetection",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForRecommendation",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
    "DeepSeekModel",
    "DeepSeekPreTrainedModel",
    "register",
]
