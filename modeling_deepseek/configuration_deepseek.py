"""Stands in for the config's file, which takes this name beside the model code in a saved folder."""

from configuration_deepseek.configuration_deepseek import HEADS_BY_OWN_AUTO_CLASS, DeepSeekConfig

__all__ = ["HEADS_BY_OWN_AUTO_CLASS", "DeepSeekConfig"]
