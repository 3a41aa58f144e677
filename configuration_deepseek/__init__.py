"""What a DeepSeek model is: the config, named sizes, and the published config.json files as tables."""

from .configuration_deepseek import DeepSeekConfig, LayerSpec
from .presets import PRESETS, preset

__all__ = ["PRESETS", "DeepSeekConfig", "LayerSpec", "preset"]
