"""What a DeepSeek model is: the config, named sizes, and the published config.json files as tables."""

from typing import TYPE_CHECKING, Any

from .presets import PRESETS, preset

if TYPE_CHECKING:
    from .configuration_deepseek import DeepSeekConfig
    from .fields import LayerSpec

__all__ = ["PRESETS", "DeepSeekConfig", "LayerSpec", "preset"]


def __getattr__(name: str) -> Any:
    """`DeepSeekConfig` and `LayerSpec`, imported when they are asked for: they bring torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import configuration_deepseek, fields

    return getattr(fields if name == "LayerSpec" else configuration_deepseek, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
