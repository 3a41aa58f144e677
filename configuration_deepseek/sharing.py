"""What V4.1 adds to a config: layers that read what another layer made, n-grams that are looked up, and images.

    layer                                  0  1   2  3 .. 7   8 ..   20  21 ..  24  25 ..
    ratio                                  0  0   2  2        2      1   1      1   1
    kv_source_layer_ids: makes entries     .  .   x  .        x      x   .      .   .       the others read its
    index_source_layer_ids: chooses        .  .   x  .        x      x   .      x   .       the others take its choice
    attention                              swa    full reuse  full   full reuse reindex reuse

The file travels to the Hub with configuration_deepseek.py.
"""

from dataclasses import dataclass
from typing import Any

from .requiring import require

FULL, REINDEX, REUSE = "csa2_full", "csa2_reindex", "csa2_reuse"
SHARING_WORDS = (FULL, REINDEX, REUSE)
ENGRAM_SIZES = (
    *("engram_max_ngram_size", "engram_vocab_size", "engram_n_heads", "engram_head_dim"),
    "engram_compressed_vocab_size",
)


@dataclass(kw_only=True, repr=False)
class SharingFields:
    """Fields of V4.1, by their published names.

    Shared entries (CSA2; needs the fields of compressed attention, and hc_mult)
        kv_source_layer_ids: selects it; the layers that make entries, of ratio tokens each, which the layers behind
            them read too, up to the next such layer. With it a ratio may be 1, streams are mixed by what the previous
            sub-layer found (residual.py), and query heads are not normalised.
        index_source_layer_ids: the layers whose indexer chooses index_topk entries, for the layers behind them too.
        candidate_source_layer_id: the layer whose indexer also chooses blocks of entries, outside of which later
            layers don't look; `None` or -1: there is none. candidate_topk_blocks, candidate_block_size: how many, of
            how many entries each.
    Engram (n-gram memory; arXiv 2601.07372)
        engram_layer_ids, engram_num_embeddings: layers that look n-grams up, and how many rows each one's table has.
        engram_max_ngram_size: 2-grams up to these are looked up, each by engram_n_heads hashes; a row has
            engram_head_dim numbers. engram_vocab_size: each hash has a range of its own, the next prime from here.
        engram_compressed_vocab_size: so many ids there are where tokens that differ in case, accents or spaces alone
            are one. engram_pad_token_id: the token that stands where there is none.
    Images among the tokens
        image_token_id: stands at an image's places; experts of such tokens are chosen with a second bias.
        vision_config: the vision tower's fields, as published.
    """

    kv_source_layer_ids: list[int] | None = None
    index_source_layer_ids: list[int] | None = None
    candidate_source_layer_id: int | None = None
    candidate_topk_blocks: int | None = None
    candidate_block_size: int | None = None
    engram_layer_ids: list[int] | None = None
    engram_num_embeddings: list[int] | None = None
    engram_max_ngram_size: int | None = None
    engram_vocab_size: int | None = None
    engram_n_heads: int | None = None
    engram_head_dim: int | None = None
    engram_compressed_vocab_size: int | None = None
    engram_pad_token_id: int | None = None
    image_token_id: int | None = None
    vision_config: dict | None = None

    def sharing_word(self, layer_idx: int, ratio: int) -> str:
        """The attention of a layer of such a model."""
        if layer_idx in (self.kv_source_layer_ids or ()):
            return FULL
        if layer_idx in (self.index_source_layer_ids or ()):
            return REINDEX
        return REUSE if ratio else "swa"

    @property
    def candidate_source(self) -> int | None:
        """The layer that chooses blocks, if there is one."""
        layer = self.candidate_source_layer_id
        return None if layer is None or layer < 0 else layer

    @property
    def engram_columns(self) -> int:
        """Hashes of a token: n-gram sizes times heads."""
        return (int(self.engram_max_ngram_size or 1) - 1) * int(self.engram_n_heads or 0)

    @property
    def engram_width(self) -> int:
        """What a token's rows have together."""
        return self.engram_columns * int(self.engram_head_dim or 0)

    def engram_rows(self, layer_idx: int) -> int:
        """Rows of a layer's table; 0: it has none."""
        layers = self.engram_layer_ids or []
        return (self.engram_num_embeddings or [])[layers.index(layer_idx)] if layer_idx in layers else 0


def validate_sharing(config: Any) -> None:
    """Refuse sources that break an invariant, and tables of n-grams that can't be."""
    if config.engram_layer_ids:
        validate_engram(config)
    if config.kv_source_layer_ids is None:
        require(
            config.index_source_layer_ids is None and config.candidate_source is None,
            "index_source_layer_ids and candidate_source_layer_id choose of shared entries, but kv_source_layer_ids "
            "is None; name the layers that make them, or unset these",
        )
        return
    require(
        config.compress_ratios is not None,
        f"kv_source_layer_ids={config.kv_source_layer_ids} but compress_ratios is None; give one ratio per layer",
    )
    require(config.num_hash_layers == 0, f"num_hash_layers={config.num_hash_layers} clashes with kv_source_layer_ids")
    require(
        config.hc_mult is not None,
        "hc_mult is None, but layers that share entries (kv_source_layer_ids) have residual streams; set hc_mult",
    )
    validate_sources(config)
    validate_candidates(config)


def _validate_ids(name: str, ids: list[int] | None) -> None:
    ordered = ids == sorted(set(ids or [])) and all(layer >= 0 for layer in ids or [])
    require(ids is not None and ordered, f"{name}={ids} must be layers in ascending order, each once")


def validate_sources(config: Any) -> None:
    """Each layer that reads has a source before it, of its own ratio."""
    makers, choosers = config.kv_source_layer_ids, config.index_source_layer_ids
    _validate_ids("kv_source_layer_ids", makers)
    _validate_ids("index_source_layer_ids", choosers)
    for layer in makers:
        require(
            layer in choosers,
            f"layer {layer} of kv_source_layer_ids is not in index_source_layer_ids={choosers}: who makes entries "
            "must choose of them, for an older choice is of others; add it",
        )
    source = None
    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        require(
            ratio > 0 or layer not in choosers,
            f"layer {layer} is a source (kv_source_layer_ids, index_source_layer_ids), but compress_ratios[{layer}]=0 "
            "has no entries; give it a ratio, or take it out",
        )
        source = layer if layer in makers else source
        require(
            ratio == 0 or source is not None,
            f"compress_ratios[{layer}]={ratio} reads entries, but none before it is in kv_source_layer_ids={makers}",
        )
        require(
            ratio == 0 or ratio == config.compress_ratios[source or 0],
            f"compress_ratios[{layer}]={ratio} but the layer whose entries it reads, {source}, has "
            f"{config.compress_ratios[source or 0]}; make them equal, or add {layer} to kv_source_layer_ids",
        )


def validate_candidates(config: Any) -> None:
    """Blocks are of the entries that all later layers read, and hold as many as are chosen."""
    layer = config.candidate_source
    if layer is None:
        return
    require(
        layer in config.kv_source_layer_ids,
        f"candidate_source_layer_id={layer} is not in kv_source_layer_ids={config.kv_source_layer_ids}; it must be",
    )
    later = [source for source in config.kv_source_layer_ids if source > layer]
    require(
        not later or layer >= config.num_hidden_layers,
        f"candidate_source_layer_id={layer} comes before {later} of kv_source_layer_ids, whose entries are others; "
        "name the last one",
    )
    for name in ("candidate_topk_blocks", "candidate_block_size"):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive with candidate_source_layer_id")


def validate_engram(config: Any) -> None:
    """Of tables of n-grams."""
    layers, rows = config.engram_layer_ids, config.engram_num_embeddings
    _validate_ids("engram_layer_ids", layers)
    require(
        config.kv_source_layer_ids is not None,
        f"engram_layer_ids={layers} but kv_source_layer_ids is None; n-grams are written into streams of that kind",
    )
    require(
        rows is not None and len(rows) == len(layers) and min(rows) > 0,
        f"engram_num_embeddings={rows} must have a positive number of rows for each of engram_layer_ids={layers}",
    )
    for name in ENGRAM_SIZES:
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive with engram_layer_ids")
    require(
        config.engram_max_ngram_size > 1, f"engram_max_ngram_size={config.engram_max_ngram_size} must be 2 or more"
    )
    pad = config.engram_pad_token_id
    require(
        pad is not None and 0 <= pad < config.vocab_size,
        f"engram_pad_token_id={pad} must be below vocab_size={config.vocab_size}",
    )
