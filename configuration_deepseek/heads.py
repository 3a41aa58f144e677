"""The heads that a config may name: their classes, Auto classes and files.

The file travels to the Hub with configuration_deepseek.py.
"""

HEADS_BY_AUTO_CLASS = {
    "AutoModelForCausalLM": "DeepSeekForCausalLM",
    "AutoModelForSequenceClassification": "DeepSeekForSequenceClassification",
    "AutoModelForTokenClassification": "DeepSeekForTokenClassification",
    "AutoModelForQuestionAnswering": "DeepSeekForQuestionAnswering",
}
# Heads without an Auto class in transformers. Ours exists only where this package does: a process without it reaches
# them by AutoModel.
HEADS_BY_OWN_AUTO_CLASS = {
    "AutoModelForEmbedding": "DeepSeekForEmbedding",
    "AutoModelForRecommendation": "DeepSeekForRecommendation",
}
IMAGE_HEADS_BY_AUTO_CLASS = {
    "AutoModelForImageClassification": "DeepSeekForImageClassification",
    "AutoModelForObjectDetection": "DeepSeekForObjectDetection",
}
# Beside the heads for text, on which it stands: the vision tower with the language model.
VISION_HEADS_BY_AUTO_CLASS = {"AutoModelForImageTextToText": "DeepSeekForImageTextToText"}
FILES_BY_CLASS = {
    "DeepSeekModel": "modeling_deepseek",
    **dict.fromkeys(HEADS_BY_AUTO_CLASS.values(), "language_heads"),
    "DeepSeekForImageTextToText": "image_text_head",
    "DeepSeekForImageClassification": "image_heads",
    "DeepSeekForObjectDetection": "detection_head",
    "DeepSeekForEmbedding": "embedding_head",
    "DeepSeekForRecommendation": "recommendation_head",
}
