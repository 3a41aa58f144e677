"""Text to ids and back: the tokenizer, its training, chat formats, and control tokens kept out of users' text."""

from typing import Any

from .answer_parsing import AnswerParser
from .chat import CHAT_TEMPLATES, template_name
from .chat_encoding import AnsweredChat, encode_answers, encode_chat, generation_prompt
from .control_tokens import Control, control_tokens, encode_parts, encode_text
from .tokenization_deepseek import DeepSeekTokenizer
from .training import train_tokenizer

__all__ = [
    "CHAT_TEMPLATES",
    "AnswerParser",
    "AnsweredChat",
    "Control",
    "DeepSeekProcessor",
    "DeepSeekTokenizer",
    "control_tokens",
    "encode_answers",
    "encode_chat",
    "encode_parts",
    "encode_text",
    "generation_prompt",
    "template_name",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    """`DeepSeekProcessor`, imported when it is asked for: it brings what transformers has for images."""
    if name != "DeepSeekProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .processing_deepseek import DeepSeekProcessor

    return DeepSeekProcessor
