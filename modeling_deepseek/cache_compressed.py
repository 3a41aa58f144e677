"""What compressed attention (DeepSeek-V4) keeps between calls: a window of keys, entries, and what becomes entries.

| word                          | attention | window        | pending                       | entries       |
|-------------------------------|-----------|---------------|-------------------------------|---------------|
| `deepseek_window`             | swa       | [B, n + 7, W] | -                             | -             |
| `deepseek_compressed`         | hca       | [B, n + 7, W] | [B, m + 7, 2 W]               | [B, T / m, W] |
| `deepseek_compressed_indexed` | csa       | [B, n + 7, W] | [B, 2 m + 7, 4 W], twice (*)  | twice (*)     |

(*) once of the head's width and once of the indexer's.
n is the window, m the ratio, W the width of a head; 8 rows are spare. Keys are values too. Window and pending are few
rows, copied at each call; entries grow in place. Rows of a batch may differ in how many tokens they have
(row_tokens.py): what is kept is right-aligned, and entries lie from the left, each with the rank of its last token.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .row_tokens import RowTokens

SPARE = 8  # so many last tokens can be taken back at any time
NEVER = 2**62  # the rank of the last token of an entry that isn't there yet
GROWTH = 16  # a full tensor grows by one part in so many: an entry is copied as often, and little lies empty
SLACK = 10  # and what is kept of a longer tensor is copied out of it, if that is longer by more than such a part


class Entries:
    """Compressed rows [B, E, W] in a tensor that grows a little when full."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None

    def make_room(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """At least `count` places, for rows like these [B, *, W]; what is there stays."""
        data = self.data
        have = 0 if data is None else data.shape[1]
        frozen = data is not None and data.is_inference() and not torch.is_inference_mode_enabled()
        if data is None or have < count or frozen or torch.is_grad_enabled():
            room = max(count, have + have // GROWTH) if have < count else have
            grown = like.new_zeros(like.shape[0], room - have, like.shape[2])
            self.data = grown if data is None else torch.cat((data, grown), dim=1)
        return self.data  # type: ignore[return-value]

    def append(self, rows: torch.Tensor, first: int) -> None:
        """Put rows [B, N, W] at the places from `first` on."""
        if torch.is_grad_enabled():  # autograd may have saved the old ones: nothing is written beside them
            before = rows[:, :0] if self.data is None else self.data[:, :first]
            self.data = torch.cat((before, rows), dim=1)
        else:
            self.make_room(rows, first + rows.shape[1])[:, first : first + rows.shape[1]] = rows

    def scatter(self, rows: torch.Tensor, places: torch.Tensor, count: int) -> None:
        """Put rows [B, N, W] at places [B, N], below `count`."""
        data, index = self.make_room(rows, count), places.unsqueeze(-1).expand_as(rows)
        self.data = data.scatter(1, index, rows) if torch.is_grad_enabled() else data.scatter_(1, index, rows)


class WindowLayer(DynamicLayer):
    """The last keys of sliding windows, and the count of what came by."""

    _layer_type = "deepseek_window"

    def __init__(self, **kwargs):
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Be as new."""
        self.seen = 0
        self.totals: torch.Tensor | None = None
        self.starts: torch.Tensor | None = None
        self.rolls: dict[str, torch.Tensor] = {}  # name -> [B, kept, W]
        self.entries: dict[str, Entries] = {}
        self.ends: torch.Tensor | None = None  # [B, E], where rows differ
        self.ratio = 0
        self.removable = 0  # last columns that are tokens in every row
        self.kept_for: dict[str, int] = {}
        self.record_past = False
        self.keys = self.values = None
        self.is_initialized = False

    # A call: roll for each kind of row, emit for each kind of entry, then finish ------------------------------------

    def roll(self, name: str, rows: torch.Tensor, keep: int, tokens: RowTokens) -> torch.Tensor:
        """Rows [B, S, W] behind the last `keep` of those before: [B, K + S, W], right-aligned. The last are kept."""
        before = self.rolls.get(name, rows[:, :0])
        joined = torch.cat((before, rows), dim=1)
        if tokens.has_padding:
            joined = tokens.aligned(joined, before.shape[1])
        self.kept_for[name] = keep
        kept = joined if self.record_past else joined[:, max(joined.shape[1] - keep - SPARE, 0) :]
        # a slice of a long prompt would hold all of it
        is_most = SLACK * (joined.shape[1] - kept.shape[1]) <= kept.shape[1]
        self.rolls[name] = kept if is_most else kept.clone()
        return joined[:, max(before.shape[1] - keep, 0) :]

    def emit(self, name: str, rows: torch.Tensor, places: torch.Tensor | None, tokens: RowTokens) -> torch.Tensor:
        """New entries [B, N, W] behind those before, or at places [B, N]: all of them [B, E, W]."""
        entries = self.entries.setdefault(name, Entries())
        count = (tokens.seen + tokens.length) // self.ratio
        if places is None:
            if rows.shape[1]:
                entries.append(rows, count - rows.shape[1])
        else:
            entries.scatter(rows, places, count + rows.shape[1])
        return rows[:, :0] if entries.data is None else entries.data[:, :count]

    def finish(self, tokens: RowTokens, like: torch.Tensor) -> None:
        """Count the call's tokens; `like` are its keys, right-aligned."""
        self.is_initialized, self.device = True, like.device
        self.keys = self.values = self.rolls["keys"].unsqueeze(1)
        differ_now = tokens.has_padding or not (tokens.are_columns or tokens.seen)
        self.removable = 0 if differ_now else self.removable + tokens.length
        self.seen = tokens.seen + tokens.length
        self.totals, self.starts = tokens.totals_after(), tokens.starts_after()

    def known_ends(self, tokens: RowTokens) -> torch.Tensor:
        """[B, E] ranks of the last tokens of the entries so far, for rows that differ; NEVER where there is none."""
        count = tokens.seen // self.ratio
        if self.ends is not None:
            return self.ends
        ends = torch.arange(count, device=tokens.device) * self.ratio + self.ratio - 1
        return ends.unsqueeze(0).expand(len(tokens.ranks), -1)

    # transformers' interface -----------------------------------------------------------------------------------------

    def update(self, key_states, value_states, *args, **kwargs):
        """Refused: this layer keeps what is made of keys, and is filled by attention_compressed.py."""
        raise ValueError("compressed attention fills its cache itself; hand the cache to the model")

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        self.forget()

    def activate_past_recording(self) -> None:
        """Keep all rows from now on, until `crop` says which are wanted no more."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, given as a negative number; 0 lets go of what was kept for taking back.

        Raises:
            ValueError: for more tokens than can be taken back.
        """
        if not self.is_initialized:
            return
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        after = self.seen - remove
        are_kept = [roll.shape[1] - remove >= min(self.kept_for[name], after) for name, roll in self.rolls.items()]
        if remove > self.removable or not all(are_kept):
            raise ValueError(
                f"{remove} tokens cannot be taken back from a cache of compressed attention, which has let go of what "
                "they displaced, or they hold padding; call activate_past_recording() on the cache before they come"
            )
        for name, roll in self.rolls.items():
            end = roll.shape[1] - remove
            self.rolls[name] = roll[:, max(end - self.kept_for[name] - SPARE, 0) : end].clone()
        self.seen, self.removable = after, self.removable - remove
        if self.totals is not None:
            self.totals = self.totals - remove
            if self.ends is not None:
                self.ends = self.ends.masked_fill(self.ends >= self.totals.unsqueeze(-1), NEVER)
                self.ends = self.ends[:, : self.seen // self.ratio]
        self.keys = self.values = self.rolls["keys"].unsqueeze(1)

    def _change_rows(self, change) -> None:
        if not self.is_initialized:
            return
        self.rolls = {name: change(roll) for name, roll in self.rolls.items()}
        for entries in self.entries.values():
            entries.data = None if entries.data is None else change(entries.data)
        for name in ("totals", "starts", "ends"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))
        self.keys = self.values = self.rolls["keys"].unsqueeze(1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these rows, as beams went."""
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._change_rows(lambda rows: rows[indices])


class CompressedLayer(WindowLayer):
    """A window, and entries of m tokens each."""

    _layer_type = "deepseek_compressed"


class IndexedCompressedLayer(WindowLayer):
    """A window, entries, and the indexer's entries by which they are chosen."""

    _layer_type = "deepseek_compressed_indexed"


WORDS = tuple(layer._layer_type for layer in (WindowLayer, CompressedLayer, IndexedCompressedLayer))


def _refuse_static(self, *args, **kwargs):
    raise ValueError(
        "compressed attention has no static cache: what it keeps grows by one entry in so many tokens; use "
        "cache_implementation='dynamic'"
    )


class StaticWindowLayer(StaticLayer):
    """Refused."""

    _layer_type = "deepseek_window"
    __init__ = _refuse_static


class StaticCompressedLayer(StaticLayer):
    """Refused."""

    _layer_type = "deepseek_compressed"
    __init__ = _refuse_static


class StaticIndexedCompressedLayer(StaticLayer):
    """Refused."""

    _layer_type = "deepseek_compressed_indexed"
    __init__ = _refuse_static


def layer_of(cache: Cache, layer_idx: int) -> WindowLayer:
    """The layer of a cache; one that was made without a config, and is empty, gets it now.

    Raises:
        ValueError: if the cache is of another kind, which can't hold entries.
    """
    if getattr(cache, "offloading", False):
        raise ValueError("compressed attention has no offloaded cache; use cache_implementation='dynamic'")
    if cache.layer_class_to_replicate is not None:  # made without a config
        while len(cache.layers) <= layer_idx:
            cache.layers.append(WindowLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    # transformers' table has the layers of that copy of this file which was imported last
    is_other_copy = getattr(layer, "_layer_type", None) in WORDS and not isinstance(layer, WindowLayer)
    if (type(layer) is DynamicLayer and not layer.is_initialized) or (is_other_copy and not layer.seen):
        layer = cache.layers[layer_idx] = WindowLayer()
    if not isinstance(layer, WindowLayer):
        raise ValueError(
            f"layer {layer_idx} of the cache is a {type(layer).__name__}, which cannot hold the entries of compressed "
            "attention; give DynamicCache(config=model.config), or none"
        )
    return layer
