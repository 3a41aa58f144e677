"""Stands in for the config's file, which takes this name beside the model code in a saved folder."""

from configuration_deepseek import DeepSeekConfig

__all__ = ["DeepSeekConfig"]
