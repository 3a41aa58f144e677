"""Makes the Auto classes of transformers know ours. Stays at home: a saved folder says the same by its auto_map."""

from collections import OrderedDict
from typing import Any

from peft.utils import constants
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForObjectDetection,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.configuration_deepseek import HEADS_BY_OWN_AUTO_CLASS
from configuration_deepseek.official import SOURCES
from tokenization_deepseek import DeepSeekTokenizer
from tokenization_deepseek.processing_deepseek import DeepSeekProcessor

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
from .recommendation_head import DeepSeekForRecommendation


class AutoModelForEmbedding(_BaseAutoModelClass):
    """The Auto class for embedding models, which transformers has none for."""

    _model_mapping: Any = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForRecommendation(_BaseAutoModelClass):
    """The Auto class for recommenders, which transformers has none for."""

    _model_mapping: Any = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


MODELS_BY_AUTO_CLASS = {
    AutoModel: DeepSeekModel,
    AutoModelForCausalLM: DeepSeekForCausalLM,
    AutoModelForEmbedding: DeepSeekForEmbedding,
    AutoModelForImageClassification: DeepSeekForImageClassification,
    AutoModelForImageTextToText: DeepSeekForImageTextToText,
    AutoModelForObjectDetection: DeepSeekForObjectDetection,
    AutoModelForQuestionAnswering: DeepSeekForQuestionAnswering,
    AutoModelForRecommendation: DeepSeekForRecommendation,
    AutoModelForSequenceClassification: DeepSeekForSequenceClassification,
    AutoModelForTokenClassification: DeepSeekForTokenClassification,
}


# Published types that transformers has classes of its own for. llama and qwen stay with it: they are not only ours.
NATIVE_TYPES = tuple(word for word in SOURCES if word.startswith("deepseek_"))


# Our modules in place of those that PEFT's defaults name of llama. Latent attention has no keys and values of its own,
# and an adapter on the projection to the latent, unlike one on that from it, leaves decoding as fast as it is.
OURS_FOR = {
    "q_proj": ["q_proj", "q_b_proj", "self_attn.wq_b"],  # not the indexer's
    "k_proj": ["k_proj", "kv_a_proj_with_mqa", "self_attn.wkv"],
    "v_proj": ["v_proj", "kv_a_proj_with_mqa", "self_attn.wkv"],
}


def register_default_targets() -> None:
    """Let PEFT's methods find modules where none are named, as by `LoraConfig()`: queries and values of multi-head
    attention, queries and latents of latent attention."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            ours = [module for word in table["llama"] for module in OURS_FOR.get(word, [word])]
            table[DeepSeekConfig.model_type] = list(dict.fromkeys(ours))


def register(native: bool = False) -> None:
    """Register config, models and tokenizer under model_type "deepseek", as importing the package does.

    Args:
        native: let AutoConfig and AutoModel* give our classes for checkpoints of `NATIVE_TYPES` too, so that scripts
            which know only Auto classes run ours. `False` gives these types back to transformers.
    """
    AutoConfig.register(DeepSeekConfig.model_type, DeepSeekConfig, exist_ok=True)
    AutoTokenizer.register(DeepSeekConfig, tokenizer_class=DeepSeekTokenizer, exist_ok=True)
    AutoProcessor.register(DeepSeekConfig, DeepSeekProcessor, exist_ok=True)
    DeepSeekConfig.register_for_auto_class()
    DeepSeekProcessor.register_for_auto_class()
    register_default_targets()
    for auto_class, model_class in MODELS_BY_AUTO_CLASS.items():
        auto_class.register(DeepSeekConfig, model_class, exist_ok=True)
        # A folder of a head without an Auto class in transformers is opened by AutoModel where this package isn't.
        is_own = auto_class.__name__ in HEADS_BY_OWN_AUTO_CLASS
        model_class.register_for_auto_class(AutoModel if is_own else auto_class)
    for model_type in NATIVE_TYPES:
        # AutoConfig.register wants the class to bear the type; what is registered beside the table goes before it.
        if native:
            CONFIG_MAPPING.register(model_type, DeepSeekConfig, exist_ok=True)
        elif CONFIG_MAPPING._extra_content.get(model_type) is DeepSeekConfig:
            del CONFIG_MAPPING._extra_content[model_type]
