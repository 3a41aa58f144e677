"""Makes the Auto classes of transformers know ours. Stays at home: a saved folder says the same by its auto_map."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from configuration_deepseek import DeepSeekConfig
from tokenization_deepseek import DeepSeekTokenizer

from .modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekModel,
)

MODELS_BY_AUTO_CLASS = {
    AutoModel: DeepSeekModel,
    AutoModelForCausalLM: DeepSeekForCausalLM,
    AutoModelForQuestionAnswering: DeepSeekForQuestionAnswering,
    AutoModelForSequenceClassification: DeepSeekForSequenceClassification,
    AutoModelForTokenClassification: DeepSeekForTokenClassification,
}


def register() -> None:
    """Register config, models and tokenizer under model_type "deepseek"; transformers' own types stay untouched."""
    AutoConfig.register(DeepSeekConfig.model_type, DeepSeekConfig, exist_ok=True)
    AutoTokenizer.register(DeepSeekConfig, tokenizer_class=DeepSeekTokenizer, exist_ok=True)
    DeepSeekConfig.register_for_auto_class()
    for auto_class, model_class in MODELS_BY_AUTO_CLASS.items():
        auto_class.register(DeepSeekConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)
