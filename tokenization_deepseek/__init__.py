"""Text to ids and back: the tokenizer, its training, and the chat formats."""

from .chat import CHAT_TEMPLATES
from .tokenization_deepseek import DeepSeekTokenizer
from .training import train_tokenizer

__all__ = ["CHAT_TEMPLATES", "DeepSeekTokenizer", "train_tokenizer"]
