"""Checkpoints on disk: what they are, merged with adapters, written in the forms that others read."""
