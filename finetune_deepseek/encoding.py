"""The name under which saved cards import the encoding of texts."""

from .retrieval.encoding import encode

__all__ = ["encode"]
