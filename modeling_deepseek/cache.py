"""What attention keeps between calls: cache layers that grow in place.

| word                      | attention | keys                         | values                  |
|---------------------------|-----------|------------------------------|-------------------------|
| `deepseek_kv`             | mha       | [B, key/value heads, T, W]   | the same                |
| `deepseek_latent`         | mla       | [B, 1, T, latent + rotary]   | [B, 1, T, 0]            |
| `deepseek_latent_indexed` | dsa       | [B, 1, T, latent + rotary]   | [B, 1, T, index width]  |

The latent and the shared rotary key of a token stand side by side in one row, so that absorbed decode reads the
buffer as it lies (keys = whole rows, values = their first columns) and never copies it. The words are our own:
transformers' table of cache layers is process-wide. Each word has a dynamic and a static layer.
"""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from transformers import __version__
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

CACHE_IMPLEMENTATIONS = ("dynamic", "static", "offloaded", "offloaded_static")


def refuse_cache_implementation(word: str | None) -> None:
    """Raise ValueError for a `cache_implementation` of `generate` that our layers cannot be kept in."""
    if word is not None and word not in CACHE_IMPLEMENTATIONS:
        supported = ", ".join(map(repr, CACHE_IMPLEMENTATIONS))
        raise ValueError(f"cache_implementation {word!r} is not supported by DeepSeek models; use one of {supported}")
    if word is not None and "offloaded" in word and not torch.accelerator.is_available():
        raise ValueError(f"cache_implementation {word!r} needs an accelerator, and there is none; use 'dynamic'")


def takes_cache(forward: Callable) -> Callable:
    """Decorate a forward with an argument `cache`, outermost: it takes `past_key_values` too, the word before
    transformers 5.24, shows both in its signature (`generate` looks there), and lets no cache pass unread.

    Raises:
        TypeError: for a cache under another word, which `**kwargs` would swallow; for one under both words; for the
            tuples that were caches before transformers 5.
    """

    @wraps(forward)
    def with_cache(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            older = kwargs.pop("past_key_values")
            if older is not None and kwargs.get("cache") is not None:
                raise TypeError(
                    f"{type(self).__name__} got a cache and past_key_values, two words for one; give cache"
                )
            kwargs["cache"] = kwargs.get("cache") if older is None else older
        for word, value in kwargs.items():
            if isinstance(value, Cache) and word != "cache":
                raise TypeError(
                    f"{type(self).__name__} (transformers {__version__}) got its cache under the unknown name {word!r}"
                    " and would not read it; give it as cache, and if generate called, install the newest deepseek-hf"
                )
        if isinstance(kwargs.get("cache"), (tuple, list)):
            raise TypeError(f"{type(self).__name__} got a tuple as cache; give a Cache of transformers")
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    words = [*signature.parameters.values()]
    older = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Cache | None)
    with_cache.__signature__ = signature.replace(parameters=[*words[:-1], older, words[-1]])  # type: ignore[attr-defined]
    return with_cache


def refuse_foreign_rows(cache: Cache, layer_idx: int, rows: torch.Tensor) -> None:
    """Raise ValueError for a latent cache that others have put keys and values of heads into."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.ndim == 4 and keys.shape[1::2] != rows.shape[1::2]:
        raise ValueError(
            f"the cache holds keys of {keys.shape[1]} heads with {keys.shape[3]} numbers where multi-head latent "
            f"attention keeps one row of {rows.shape[3]}; it was made for another model, or by PEFT's prefix tuning, "
            "which has no form for latents: take PromptTuningConfig, or LoRA"
        )


class _Buffer:
    """[B, H, capacity, W] of which the first `length` rows count; doubles when full, so that a step costs O(1)."""

    def __init__(self, first_rows: torch.Tensor):
        self.data = first_rows

    def append(self, length: int, rows: torch.Tensor) -> torch.Tensor:
        """Write rows [B, H, S, W] behind the first `length`; returns a view of all length + S."""
        end = length + rows.shape[-2]
        frozen = self.data.is_inference() and not torch.is_inference_mode_enabled()  # refuses to be written to
        if end > self.data.shape[-2] or frozen:
            grown = rows.new_empty(*rows.shape[:2], max(end, 2 * self.data.shape[-2]), rows.shape[-1])
            grown[:, :, :length] = self.data[:, :, :length]
            self.data = grown
        self.data[:, :, length:end] = rows
        return self.data[:, :, :end]


class GrowingLayer(DynamicLayer):
    """Keys and values of multi-head attention, in buffers that double."""

    _layer_type = "deepseek_kv"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._key_buffer, self._value_buffer = _Buffer(self.keys), _Buffer(self.values)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, S, W] states; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            # Autograd may have saved the old rows (for the query's gradient, where keys and values need none):
            # writing beside them in the same storage would invalidate them.
            self.keys = torch.cat((self.keys, key_states), dim=-2)
            self.values = torch.cat((self.values, value_states), dim=-2)
            return self.keys, self.values
        length = self.keys.shape[-2]
        self._adopt()
        self.keys = self._key_buffer.append(length, key_states)
        self.values = self._value_buffer.append(length, value_states)
        return self.keys, self.values

    def _adopt(self) -> None:
        # reorder, crop, select, offload and our own concatenation replace keys and values behind the buffers' backs.
        if self.keys.data_ptr() != self._key_buffer.data.data_ptr() or not _rows_of(self.keys, self._key_buffer.data):
            self._key_buffer, self._value_buffer = _Buffer(self.keys), _Buffer(self.values)

    def offload(self) -> None:
        """Move to the CPU, the buffers too: they would keep the accelerator's memory."""
        super().offload()
        if self.is_initialized:
            self._adopt()

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.keys.shape[-2] if self.is_initialized else 0


def _rows_of(view: torch.Tensor, data: torch.Tensor) -> bool:
    return view.stride() == data.stride() and view.shape[:2] == data.shape[:2]


class LatentLayer(GrowingLayer):
    """Latents and shared rotary keys of multi-head latent attention (arXiv 2405.04434, section 2.1.2).

    `up_projection` is kept here by attention_mla.py where it had to be computed, with the state of what it stands for.
    """

    _layer_type = "deepseek_latent"
    up_projection: tuple[tuple, torch.Tensor | None] | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.up_projection = None
        super().reset()


class IndexedLatentLayer(LatentLayer):
    """Latent rows as keys, and the indexer's keys as values (sparse attention, arXiv 2512.02556, section 2.1)."""

    _layer_type = "deepseek_latent_indexed"


class StaticKeyValueLayer(StaticLayer):
    """Keys and values of multi-head attention in tensors of a fixed length, for compiled generation."""

    _layer_type = "deepseek_kv"


class StaticLatentLayer(StaticLayer):
    """Latents and rotary keys in a tensor of a fixed length, for compiled generation."""

    _layer_type = "deepseek_latent"
    up_projection: tuple[tuple, torch.Tensor | None] | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.up_projection = None
        super().reset()


class StaticIndexedLatentLayer(StaticLatentLayer):
    """Latent rows and the indexer's keys in tensors of a fixed length, for compiled generation."""

    _layer_type = "deepseek_latent_indexed"
