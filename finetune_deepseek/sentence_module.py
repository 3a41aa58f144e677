"""The name under which saved folders (modules.json) find their module."""

from .retrieval.sentence_module import SentenceModule, prompts, write_modules

__all__ = ["SentenceModule", "prompts", "write_modules"]
