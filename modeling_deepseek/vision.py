"""Stands in for the config's file of this name, which takes its place beside the model code in a saved folder."""

from configuration_deepseek.vision import vision_fields

__all__ = ["vision_fields"]
