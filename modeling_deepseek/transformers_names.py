"""Where transformers 5.23 says `past_key_values`, 5.24 says `cache`; this package is written in the words of 5.24.

This file serves 5.23 and is deleted, with its imports turned into transformers' own, the day that version is dropped.
Which words hold is read from a mask builder's signature, here and nowhere else.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import __version__, masking_utils, modeling_layers
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_WORDS = ("cache", "past_key_values")
_known = [word for word in CACHE_WORDS if word in inspect.signature(masking_utils.create_causal_mask).parameters]
if not _known:
    raise ImportError(
        f"transformers {__version__} calls the cache none of {', '.join(CACHE_WORDS)}; install the newest deepseek-hf"
    )
CACHE_WORD = _known[0]
SPEAKS_NEW = CACHE_WORD == "cache"


def in_library_words(function: Callable) -> Callable:
    """A function of transformers that takes `cache`, whatever it calls it itself."""
    if SPEAKS_NEW:
        return function

    @wraps(function)
    def renamed(*args, **kwargs):
        if "cache" in kwargs:
            if kwargs.get(CACHE_WORD) is not None:
                raise TypeError(f"give cache or {CACHE_WORD}, not both")
            kwargs[CACHE_WORD] = kwargs.pop("cache")
        return function(*args, **kwargs)

    return renamed


create_causal_mask = in_library_words(masking_utils.create_causal_mask)
create_masks_for_generate = in_library_words(masking_utils.create_masks_for_generate)


def answers_to_both(output_class: type) -> type:
    """Decorate a dataclass of outputs, so that it has its cache by both words, as 5.24's have."""
    if SPEAKS_NEW:
        return output_class
    parent: Any = output_class

    def plain(key: Any) -> Any:
        return CACHE_WORD if key == "cache" else key

    init = parent.__init__

    @wraps(init)
    def renaming_init(self, *args, **kwargs):
        init(self, *args, **{plain(key): value for key, value in kwargs.items()})

    parent.__init__ = renaming_init
    parent.cache = property(lambda self: getattr(self, CACHE_WORD))
    parent.__getitem__ = lambda self, key: super(parent, self).__getitem__(plain(key))
    parent.__contains__ = lambda self, key: super(parent, self).__contains__(plain(key))
    parent.get = lambda self, key, default=None: super(parent, self).get(plain(key), default)
    return output_class


class _CheckpointedLayer(modeling_layers.GradientCheckpointingLayer):
    """As 5.24's: a layer that will be replayed in the backward pass keeps no cache, and without gradients none is."""

    _checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether this call is to be replayed."""
        return self._checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._checkpointing = value

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training and kwargs.get("cache") is not None:
            logger.warning_once("Caching is incompatible with gradient checkpointing. Setting `cache=None`.")
            kwargs["cache"] = None
        return super().__call__(*args, **kwargs)


GradientCheckpointingLayer: Any = modeling_layers.GradientCheckpointingLayer if SPEAKS_NEW else _CheckpointedLayer
