"""Drawing: images as tokens that a causal language model writes after a caption."""

from typing import Any

__all__ = ["Drawer"]


def __getattr__(name: str) -> Any:
    """`Drawer`, on demand: the flags of this room are read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .drawer import Drawer

    return Drawer
