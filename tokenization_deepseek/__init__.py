"""Text to ids and back: the tokenizer, its training, chat formats, and control tokens kept out of users' text."""

from .chat import CHAT_TEMPLATES
from .control_tokens import Control, control_tokens, encode_chat, encode_parts, encode_text
from .tokenization_deepseek import DeepSeekTokenizer
from .training import train_tokenizer

__all__ = [
    "CHAT_TEMPLATES",
    "Control",
    "DeepSeekTokenizer",
    "control_tokens",
    "encode_chat",
    "encode_parts",
    "encode_text",
    "train_tokenizer",
]
