"""Stands in for the config's file of this name, which takes its place beside the model code in a saved folder."""

from configuration_deepseek.weight_names import (
    LAYER,
    ROW_BLOCK,
    SCALE,
    CheckpointError,
    are_other_predictions,
    block_of,
    grid_of,
    shared_mtp_keys,
    take_mtp_keys,
    with_our_names,
)

__all__ = [
    "LAYER",
    "ROW_BLOCK",
    "SCALE",
    "CheckpointError",
    "are_other_predictions",
    "block_of",
    "grid_of",
    "shared_mtp_keys",
    "take_mtp_keys",
    "with_our_names",
]
