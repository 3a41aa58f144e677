"""The weights of a checkpoint: official names and shapes, those stored twice, those that releases quantize.

Module names are those of the official V3 checkpoints, with routed experts one by one. The names and shapes here are
what files are held against where no model is built, which takes seconds of imports; the model's own constructors take
the same widths from the config, and a test holds both together. Travels to the Hub with configuration_deepseek.py.
Letters: D hidden width, E routed experts, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from .vision import vision_shapes

Shapes: TypeAlias = dict[str, tuple[int, ...]]

LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
SHARED_WITH = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
SCALE = "weight_scale_inv"
# The weights that the releases quantize: not norms, router, embedding, head, eh_proj, compressors, and the indexer's
# weights_proj.
QUANTIZED = re.compile(
    r".*\.(?:self_attn\.(?:\w+_proj\w*|w\w+)|self_attn\.indexer\.(?:wq_b|wk)|mlp\.(?:.*\.)?(?:gate|up|down)_proj"
    r"|engram\.(?:embed|wkv)|[eh]_proj|main_proj)\.weight"
)
ROUTED = re.compile(r".*\.mlp\.experts\.\d+\.(?:gate|up|down)_proj\.weight")


ENGRAM_IDS = "engram_ids"  # of the tokens, which releases leave to the tokenizer
ENGRAM_TABLE = "engram.embed.weight"
ROW_BLOCK = [1, 32]  # of FP4, and of tables of n-grams


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that doesn't fit the model; a RuntimeError too, because transformers raises that."""


def is_quantized_in_releases(name: str, config: Any) -> bool:
    """Whether releases of this kind of model quantize a weight; V4.1 leaves the projection to index keys as it is."""
    is_shared_key = config.kv_source_layer_ids is not None and name.endswith("indexer.wk.weight")
    return QUANTIZED.fullmatch(name) is not None and not is_shared_key


def block_of(name: str, block: list[int]) -> list[int]:
    """The block of a weight's scales, where `block` is that of the others."""
    return ROW_BLOCK if name.endswith(ENGRAM_TABLE) else block


def grid_of(shape: Sequence[int], block: list[int]) -> list[int]:
    """How many blocks a quantized weight [R, C] has along each dimension."""
    return [-(-size // step) for size, step in zip(shape, block, strict=True)]


# Prediction layers ---------------------------------------------------------------------------------------------------


def shared_mtp_keys(config: Any) -> dict[str, str]:
    """Keys of the copies in prediction layers -> the key of the weight that they repeat; V4 stores none."""
    if config.compress_ratios is not None:
        return {}
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    layers = range(first, first + count)
    return {f"model.layers.{i}.{name}": shared for i in layers for name, shared in SHARED_WITH.items()}


def take_mtp_keys(weights: dict[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a checkpoint into what the trunk and the heads have, and the keys of prediction layers."""
    rest: dict[str, Any] = {}
    ahead: dict[str, Any] = {}
    first = config.num_hidden_layers
    for key, entry in weights.items():
        layer = LAYER.match(key)
        is_ahead = layer is not None and first <= int(layer[1]) < first + config.num_nextn_predict_layers
        (ahead if is_ahead else rest)[key] = entry
    return rest, ahead


def are_other_predictions(ahead: Iterable[str], config: Any) -> bool:
    """Whether keys of prediction layers are of draft stages (DSpark) where the config has none, or the other way."""
    keys = list(ahead)
    return bool(keys) and any(".main_proj." in key for key in keys) != (config.dspark_block_size is not None)


# Names and shapes ----------------------------------------------------------------------------------------------------


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,)}


def _mha(config: Any) -> Shapes:
    width, query, key, bias = config.hidden_size, config.mha_query_width, config.mha_key_width, config.attention_bias
    norms = _norm("q_norm", config.head_dim) | _norm("k_norm", config.head_dim) if config.use_qk_norm else {}
    return {
        **_linear("q_proj", query, width, bias),
        **_linear("k_proj", key, width, bias),
        **_linear("v_proj", key, width, bias),
        **_linear("o_proj", width, query, config.mha_out_bias),
        **norms,
    }


def _mla(config: Any) -> Shapes:
    width, latent, bias = config.hidden_size, config.kv_lora_rank, config.attention_bias
    query = _linear("q_proj", config.mla_query_width, width)
    if rank := config.q_lora_rank:
        query = _linear("q_a_proj", rank, width, bias) | _norm("q_a_layernorm", rank)
        query |= _linear("q_b_proj", config.mla_query_width, rank)
    return {
        **query,
        **_linear("kv_a_proj_with_mqa", config.mla_latent_width, width, bias),
        **_norm("kv_a_layernorm", latent),
        **_linear("kv_b_proj", config.mla_up_width, latent),
        **_linear("o_proj", width, config.mla_value_width, bias),
    }


def _dsa(config: Any) -> Shapes:
    width, index = config.hidden_size, config.index_head_dim
    return {
        **_mla(config),
        **_linear("indexer.wq_b", config.index_query_width, config.q_lora_rank),
        **_linear("indexer.wk", index, width),
        **_norm("indexer.k_norm", index),
        "indexer.k_norm.bias": (index,),
        **_linear("indexer.weights_proj", config.index_n_heads, width),
    }


def _swa(config: Any) -> Shapes:
    width, latent, head = config.hidden_size, config.q_lora_rank, config.head_dim
    return {
        **_linear("wq_a", latent, width),
        **_norm("q_norm", latent),
        **_linear("wq_b", config.mha_query_width, latent),
        **_linear("wkv", head, width),
        **_norm("kv_norm", head),
        **_linear("wo_a", config.o_latent_width, config.o_group_width),
        **_linear("wo_b", width, config.o_latent_width),
        "attn_sink": (config.num_attention_heads,),
    }


def _compressor(config: Any, ratio: int, width: int, inner: int, prefix: str = "") -> Shapes:
    return {
        **_linear(f"{prefix}compressor.wkv", inner, config.hidden_size),
        **_linear(f"{prefix}compressor.wgate", inner, config.hidden_size),
        **_norm(f"{prefix}compressor.norm", width),
        f"{prefix}compressor.ape": (ratio, inner),
    }


def _hca(config: Any, ratio: int) -> Shapes:
    return _swa(config) | _compressor(config, ratio, config.head_dim, config.head_dim)


def _csa(config: Any, ratio: int) -> Shapes:
    head, index = config.head_dim, config.index_head_dim
    return {
        **_swa(config),
        **_compressor(config, ratio, head, 2 * head),
        **_linear("indexer.wq_b", config.index_query_width, config.q_lora_rank),
        **_linear("indexer.weights_proj", config.index_n_heads, config.hidden_size),
        **_compressor(config, ratio, index, 2 * index, "indexer."),
    }


def _csa2_reuse(config: Any, ratio: int) -> Shapes:
    return _swa(config)


def _csa2_reindex(config: Any, ratio: int) -> Shapes:
    return {
        **_swa(config),
        **_linear("indexer.wq_b", config.index_query_width, config.q_lora_rank),
        **_linear("indexer.weights_proj", config.index_n_heads, config.hidden_size),
    }


def _csa2_full(config: Any, ratio: int) -> Shapes:
    width, head, index = config.hidden_size, config.head_dim, config.index_head_dim
    return {
        **_csa2_reindex(config, ratio),
        **_linear("compressor.wkv", head, width),
        **(_linear("compressor.wgate", head, width) if ratio > 1 else {}),
        **_norm("compressor.norm", head),
        **_linear("indexer.wk", index, head),
        **_norm("indexer.k_norm", index),
    }


def _engram(config: Any, rows: int) -> Shapes:
    width, streams = config.hidden_size, config.hc_mult
    return {
        "engram.embed.weight": (rows, config.engram_head_dim),
        **_linear("engram.wkv", (streams + 1) * width, config.engram_width),
        "engram.q_weight": (streams, width),
        "engram.k_weight": (streams, width),
    }


def _mlp(config: Any, inner: int, prefix: str = "") -> Shapes:
    width, bias = config.hidden_size, config.mlp_bias
    return {
        **_linear(f"{prefix}gate_proj", inner, width, bias),
        **_linear(f"{prefix}up_proj", inner, width, bias),
        **_linear(f"{prefix}down_proj", width, inner, bias),
    }


def _dense(config: Any) -> Shapes:
    return _mlp(config, config.intermediate_size)


def _moe(config: Any) -> Shapes:
    experts = config.n_routed_experts
    chooses: Shapes = {"gate.e_score_correction_bias": (experts,)} if config.topk_method == "noaux_tc" else {}
    if chooses and config.image_token_id is not None:
        chooses["gate.e_score_correction_bias_vl"] = (experts,)
    return chooses | _experts(config)


def _hash_moe(config: Any) -> Shapes:
    return {"gate.tid2eid": (config.vocab_size, config.num_experts_per_tok), **_experts(config)}


def _experts(config: Any) -> Shapes:
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    shapes = _linear("gate", experts, width)
    for expert in range(experts):
        shapes |= _linear(f"experts.{expert}.gate_proj", inner, width)
        shapes |= _linear(f"experts.{expert}.up_proj", inner, width)
        shapes |= _linear(f"experts.{expert}.down_proj", width, inner)
    shared = _mlp(config, config.shared_expert_width, "shared_experts.") if config.n_shared_experts else {}
    return shapes | shared


def _streams(prefix: str, config: Any, coefficients: int, scales: int) -> Shapes:
    width = config.hc_mult * config.hidden_size
    return {f"{prefix}.fn": (coefficients, width), f"{prefix}.base": (coefficients,), f"{prefix}.scale": (scales,)}


def _mhc(config: Any) -> Shapes:
    coefficients = config.hc_mult * (2 + config.hc_mult)
    return _streams("attn_hc", config, coefficients, 3) | _streams("ffn_hc", config, coefficients, 3)


ATTENTIONS: dict[str, Callable[..., Shapes]] = {"mha": _mha, "mla": _mla, "dsa": _dsa, "swa": _swa, "dspark": _swa}
COMPRESSING: dict[str, Callable[[Any, int], Shapes]] = {
    **{"hca": _hca, "csa": _csa},
    **{"csa2_full": _csa2_full, "csa2_reindex": _csa2_reindex, "csa2_reuse": _csa2_reuse},
}
FEED_FORWARDS: dict[str, Callable[[Any], Shapes]] = {"dense": _dense, "moe": _moe, "hash_moe": _hash_moe}
RESIDUALS: dict[str, Callable[[Any], Shapes]] = {"add": lambda config: {}, "mhc": _mhc, "mhc_shifted": _mhc}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _layer(config: Any, spec: Any, ratio: int = 0, engram_rows: int = 0) -> Shapes:
    attention = COMPRESSING[spec.attention](config, ratio) if ratio else ATTENTIONS[spec.attention](config)
    return {
        **(_engram(config, engram_rows) if engram_rows else {}),
        **_under("self_attn.", attention),
        **_under("mlp.", FEED_FORWARDS[spec.feed_forward](config)),
        **RESIDUALS[spec.residual](config),
        **_norm("input_layernorm", config.hidden_size),
        **_norm("post_attention_layernorm", config.hidden_size),
    }


def _trunk(config: Any) -> Shapes:
    ratios = config.compress_ratios or [0] * config.num_hidden_layers
    rows = [config.engram_rows(i) for i in range(config.num_hidden_layers)]
    words = list(zip(config.specs, ratios[: config.num_hidden_layers], rows, strict=True))
    kinds = {kind: _layer(config, *kind) for kind in words}
    layers = [_under(f"layers.{i}.", kinds[kind]) for i, kind in enumerate(words)]
    shapes = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)} | _norm("norm", config.hidden_size)
    if config.residual_word == "mhc":
        shapes |= _streams("hc_head", config, config.hc_mult, 1)
    for layer in layers:
        shapes |= layer
    return shapes | ({ENGRAM_IDS: (config.vocab_size,)} if any(rows) else {})


def _joins_streams(config: Any) -> Shapes:
    width = config.hidden_size
    head = _streams("hc_head", config, config.hc_mult, 1)
    return _linear("e_proj", width, width) | _linear("h_proj", width, width) | head


JOINS: dict[str, Callable[[Any], Shapes]] = {
    "add": lambda config: _linear("eh_proj", config.hidden_size, 2 * config.hidden_size),
    "mhc": _joins_streams,
}


def _draft_stage(config: Any, stage: int) -> Shapes:
    """What a draft stage has beside its layer: the first reads the trunk, the last writes tokens."""
    width, rank, vocab = config.hidden_size, config.dspark_markov_rank, config.vocab_size
    shapes: Shapes = {}
    if stage == 0:
        shapes |= _linear("main_proj", width, len(config.dspark_target_layer_ids) * width) | _norm("main_norm", width)
    if stage == config.num_nextn_predict_layers - 1:
        has_weights = config.residual_word == "mhc"
        shapes |= _norm("shared_head.norm", width)
        shapes |= _streams("hc_head", config, config.hc_mult, 1) if has_weights else {}
        shapes |= _linear("markov_head.markov_w1", vocab, rank) | _linear("markov_head.markov_w2", vocab, rank)
        shapes |= _linear("confidence_head.proj", 1, width + rank)
    return shapes


def _prediction(config: Any, depth: int) -> Shapes:
    """What a prediction layer has beside its layer."""
    if config.dspark_block_size is not None:
        return _draft_stage(config, depth)
    norms: Shapes = {}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        norms |= _norm(name, config.hidden_size)
    return norms | JOINS[config.prediction_word](config)


def _predictions(config: Any) -> Shapes:
    """Prediction layers, as the model holds them, without copies of embedding and head."""
    first, ahead = config.num_hidden_layers, dict[str, tuple[int, ...]]()
    if config.dspark_block_size is None and config.prediction_word not in JOINS:  # V4.1 has no others
        return {}
    sizes = config.experts_at(first)
    for depth in range(config.num_nextn_predict_layers):
        shapes = _layer(sizes, config.prediction_spec) | _prediction(config, depth)
        ahead |= _under(f"model.layers.{first + depth}.", shapes)
    return ahead


def _language(config: Any) -> Shapes:
    head = {} if config.tie_word_embeddings else _linear("lm_head", config.vocab_size, config.hidden_size)
    return head | _predictions(config)


def _questions(config: Any) -> Shapes:
    kinds = config.type_vocab_size
    types = {"token_type_embeddings.weight": (kinds, config.hidden_size)} if kinds else {}
    return types | _linear("qa_outputs", 2, config.hidden_size, bias=True)


def _pooled(config: Any) -> Shapes | None:
    return None if config.pooling == "latent" else {}


def _items(config: Any) -> Shapes | None:
    if config.num_items is not None or config.user_features or config.context_features or config.num_item_neighbors:
        return None
    return {} if config.tie_item_embeddings else _linear("item_head", config.vocab_size, config.hidden_size)


def _images_and_text(config: Any) -> Shapes | None:
    return None if config.vision_config is None else _language(config) | vision_shapes(config)


HEADS: dict[str, Callable[[Any], Shapes | None]] = {
    "Model": lambda config: {},
    "ForCausalLM": _language,
    "ForImageTextToText": _images_and_text,
    "ForSequenceClassification": lambda config: _linear("score", config.num_labels, config.hidden_size),
    "ForTokenClassification": lambda config: _linear("score", config.num_labels, config.hidden_size, bias=True),
    "ForQuestionAnswering": _questions,
    "ForEmbedding": _pooled,
    "ForRecommendation": _items,
    "ForImageClassification": lambda config: None,
    "ForObjectDetection": lambda config: None,
}


def weights_of(config: Any, head: str) -> Shapes | None:
    """What a checkpoint holds of a model with this config, without copies of shared weights.

    Args:
        head: of `HEADS`.

    Returns:
        Name -> shape; None for heads with parts of their own (pooling by latents, items of text, side features,
        counts, stems of images), of which the model itself has to be asked, and for the head of images and text where
        no tower is described.
    """
    own = HEADS[head](config) if head in HEADS else None
    return None if own is None else _under("" if head == "Model" else "model.", _trunk(config)) | own


# Names in V4's releases ----------------------------------------------------------------------------------------------

# Each table is read in both directions: what begins so in a release -> ours.
V4_TOP = {
    "embed.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
    "hc_head_": "model.hc_head.",
}
V4_LAYER = {  # the longer first
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "hc_attn_": "attn_hc.",
    "hc_ffn_": "ffn_hc.",
    "attn.": "self_attn.",
    "ffn.": "mlp.",
}
V4_PREDICTION = {**V4_LAYER, "hc_head_": "hc_head.", "norm.": "shared_head.norm."}
# as V4.1 has them, where V4 has our names
V41_PREDICTION = {"markov_head.embed.": "markov_head.markov_w1.", "markov_head.head.": "markov_head.markov_w2."}
V4_EXPERT = {"w1.": "gate_proj.", "w3.": "up_proj.", "w2.": "down_proj."}
V4_PARTS = re.compile(r"(.*?experts\.(?:\d+\.)?)?(.*)")  # of a name in a layer: up to an expert, and what it has
V4_RELEASE = re.compile(r"(?:model\.)?layers\.\d+\.(?:attn|ffn)\.|embed\.weight$|mtp\.\d+\.")
# What transformers writes otherwise when it saves such a model.
V4_OF_TRANSFORMERS = {
    "model.": "",
    "embed_tokens.": "embed.",
    "hc_head.hc_": "hc_head_",
    ".attn.norm.": ".attn.kv_norm.",
}


def _exchanged(name: str, table: dict[str, str]) -> str:
    """The name with its beginning as the table has it."""
    for begin, other in table.items():
        if name.startswith(begin):
            return other + name.removeprefix(begin)
    return name


def _back(table: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}


def from_v4_name(name: str, num_hidden_layers: int) -> str:
    """A name of V4's releases as ours; prediction layers, `mtp.0` and on, stand behind the others.

    >>> from_v4_name("mtp.0.ffn.experts.3.w1.scale", 43)
    'model.layers.43.mlp.experts.3.gate_proj.weight_scale_inv'
    """
    for theirs, released in V4_OF_TRANSFORMERS.items():
        name = name.replace(theirs, released, 1)
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "mtp"):
        return _exchanged(name, V4_TOP)
    layer, _, part = rest.partition(".")
    offset, table = (num_hidden_layers, V4_PREDICTION | V41_PREDICTION) if kind == "mtp" else (0, V4_LAYER)
    before, own = _parts(_exchanged(part, table))
    own = _exchanged(own, V4_EXPERT) if before else own
    if own.endswith(".scale") and not own.startswith(("attn_hc.", "ffn_hc.", "hc_head.")):
        own = own.removesuffix("scale") + SCALE
    return f"model.layers.{int(layer) + offset}.{before}{own}"


def to_v4_name(name: str, num_hidden_layers: int, predictions: dict[str, str] = V4_PREDICTION) -> str:
    """The inverse of `from_v4_name`; `predictions`: the names of what prediction layers have."""
    match = LAYER.match(name)
    if match is None:
        return _exchanged(name, _back(V4_TOP))
    layer = int(match[1])
    before, own = _parts(name[match.end() :])
    own = _exchanged(own, _back(V4_EXPERT)) if before else own
    own = own.removesuffix(SCALE) + "scale" if own.endswith(SCALE) else own
    if layer < num_hidden_layers:
        return f"layers.{layer}.{_exchanged(before + own, _back(V4_LAYER))}"
    return f"mtp.{layer - num_hidden_layers}.{_exchanged(before + own, _back(predictions))}"


def _parts(name: str) -> tuple[str, str]:
    match = V4_PARTS.fullmatch(name)
    return (match[1] or "", match[2]) if match else ("", name)


Entry = TypeVar("Entry")


def with_our_names(weights: dict[str, Entry], config: Any) -> dict[str, Entry]:
    """The entries of a checkpoint under our names, be they a V4 release's, transformers' of one, or ours already."""
    if not any(V4_RELEASE.match(name) for name in weights):
        return weights
    return {from_v4_name(name, config.num_hidden_layers): entry for name, entry in weights.items()}


def with_release_names(weights: dict[str, Entry], config: Any) -> dict[str, Entry]:
    """The entries under the names that releases of this kind of model have."""
    if config.compress_ratios is None:
        return weights
    weights = {name: entry for name, entry in weights.items() if not name.endswith(ENGRAM_IDS)}
    predictions = V4_PREDICTION | ({} if config.kv_source_layer_ids is None else V41_PREDICTION)
    return {to_v4_name(name, config.num_hidden_layers, predictions): entry for name, entry in weights.items()}
