"""How large the cache of a model is, by its formulas: what each token adds, and what doesn't grow.

    mha         keys and values                     2 * heads of them * width
    mla, dsa    latent and rotary key               kv_lora_rank + qk_rope_head_dim; dsa also index_head_dim
    swa         keys of the window, no growth       (n - 1 + 8) * width
    hca         the same, and an entry each m       width / m; what becomes the next entry doesn't grow
    csa         the same, with the indexer's        (width + index_head_dim) / m
    csa2_full   the same; csa2_reindex and csa2_reuse read it, and have a window alone

In bfloat16, of one sequence. Of what becomes entries the last tokens are kept, contents and gates in float32. Eight
more tokens are kept than are read (cache_compressed.py), to be taken back. Layers with n-grams keep ids.
"""

from configuration_deepseek.fields import DeepSeekFields
from configuration_deepseek.sharing import FULL, REINDEX, REUSE

LENGTHS = (131_072, 1_048_576)
BYTES, BYTES_PENDING, BYTES_ID, SPARE = 2, 4, 8, 8


def ratio_of(config: DeepSeekFields, layer: int) -> int:
    """How many tokens an entry of the layer stands for; 0: it has none of its own."""
    if config.compress_ratios is None or config.specs[layer].attention in (REINDEX, REUSE):
        return 0
    return config.compress_ratios[layer]


def cached_width(attention: str, config: DeepSeekFields) -> int:
    """Numbers that one layer keeps of a token, or of an entry."""
    if attention == "mha":
        return 2 * config.mha_key_width
    index = int(config.index_head_dim or 0) if attention in ("dsa", "csa", FULL) else 0
    return index + (config.mla_latent_width if config.compress_ratios is None else int(config.head_dim or 0))


def per_token(config: DeepSeekFields, layer: int) -> float:
    """Bytes that each further token adds to a layer's part."""
    attention = config.specs[layer].attention
    if config.compress_ratios is None:
        return BYTES * cached_width(attention, config)
    ratio = ratio_of(config, layer)
    return BYTES * cached_width(attention, config) / ratio if ratio else 0.0


def fixed_bytes(config: DeepSeekFields, layer: int) -> int:
    """Bytes of a layer's part that long sequences have once: the window, and tokens that are no entry yet."""
    if config.compress_ratios is None:
        return 0
    window = BYTES * (int(config.sliding_window or 1) - 1 + SPARE) * int(config.head_dim or 0)
    if config.engram_rows(layer):
        window += BYTES_ID * (int(config.engram_max_ngram_size or 1) - 1 + SPARE)
    attention, ratio = config.specs[layer].attention, ratio_of(config, layer)
    if attention == FULL:
        parts = BYTES if ratio == 1 else 2 * BYTES_PENDING  # a block of one token has no gate
        return window + parts * (ratio - 1 + SPARE) * int(config.head_dim or 0)
    tokens, times = {"csa": (2 * ratio - 1 + SPARE, 4), "hca": (ratio - 1 + SPARE, 2)}.get(attention, (0, 0))
    return window + BYTES_PENDING * tokens * times * cached_width(attention, config)


def by_attention(config: DeepSeekFields) -> dict[str, float]:
    """Kind of attention -> bytes that each further token adds, in all layers of it together."""
    sums: dict[str, float] = {}
    for layer, spec in enumerate(config.specs):
        sums[spec.attention] = sums.get(spec.attention, 0) + per_token(config, layer)
    return sums


def cache_bytes(config: DeepSeekFields, tokens: int) -> int:
    """All of it after so many tokens, more than the window holds."""
    layers = range(config.num_hidden_layers)
    return round(sum(tokens * per_token(config, layer) + fixed_bytes(config, layer) for layer in layers))
