"""Fine-tuning: one training path on Trainer and PEFT (training/run.py) and the tasks that it serves.

A task is a room with a subclass of `training.task.Task`, the dataclass of its flags, and one line here.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a task's class is, and the dataclass of its flags, in a file that imports nothing heavy."""

    task: str
    flags: str


def _entry(room: str, name: str, flags: str, file: str = "task") -> Entry:
    return Entry(f"{__name__}.{room}.{file}:{name}", f"{__name__}.{room}.arguments:{flags}")


TASKS = {
    "language_modeling": _entry("language", "LanguageModeling", "LanguageModelingArguments"),
    "conversation": _entry("language.conversation", "Conversation", "ConversationArguments"),
    "translation": _entry("translation", "Translation", "TranslationArguments"),
    "classification": _entry("classification", "Classification", "ClassificationArguments"),
    "image_classification": _entry("images", "ImageClassification", "ImageArguments"),
    "image_generation": _entry("drawing", "ImageGeneration", "ImageGenerationArguments"),
    "object_detection": _entry("images.detection", "ObjectDetection", "DetectionArguments"),
    "question_answering": _entry("question_answering", "QuestionAnswering", "QuestionAnsweringArguments"),
    "embedding": _entry("retrieval", "Embedding", "EmbeddingArguments"),
    "recommendation": _entry("recommendation", "Recommendation", "RecommendationArguments"),
    "news_recommendation": _entry("recommendation", "NewsRecommendation", "NewsArguments", "news"),
    "generative_recommendation": _entry(
        "recommendation", "GenerativeRecommendation", "GenerativeRecommendationArguments", "generative"
    ),
    "prompt_ranking": _entry("recommendation", "PromptRanking", "PromptRankingArguments", "prompt_ranking"),
}
