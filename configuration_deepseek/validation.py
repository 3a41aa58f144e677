"""What `DeepSeekConfig` refuses: words that nobody knows and values that clash, in one line that names them."""

import math
from typing import Any

from .drafts import validate_drafts
from .requiring import require, require_word
from .sharing import SHARING_WORDS, validate_sharing

COMPRESSED_WORDS = ("swa", "hca", "csa", *SHARING_WORDS)
ATTENTION_WORDS = ("mha", "mla", "dsa", *COMPRESSED_WORDS)
FEED_FORWARD_WORDS = ("dense", "moe", "hash_moe")
RESIDUAL_WORDS = ("add", "mhc", "mhc_shifted")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
SCORING_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
POOLINGS = ("mean", "last_token", "latent")
ITEM_LOSSES = ("softmax", "sampled_softmax", "gbce")
ITEM_TEXT_ENCODER_WORDS = ("trunk", "bag_of_words")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
IMAGE_STEMS = ("patch", "conv", "conv_lstm")
BOX_PREDICTIONS = ("grid", "set")
ATTENTION_DIRECTIONS = ("causal", "prefix", "bidirectional")


def validate(config: Any) -> None:
    """Refuse a config that cannot work, naming the values that clash."""
    validate_sizes(config)
    require_word("attention_direction", config.attention_direction, ATTENTION_DIRECTIONS)
    validate_layers(config)
    words = config.specs
    if any(spec.attention in ("mla", "dsa") for spec in words):
        validate_mla(config)
    require(
        config.index_topk is None or config.kv_lora_rank is not None or config.compress_ratios is not None,
        f"index_topk={config.index_topk} asks for sparse attention, but kv_lora_rank is None; set kv_lora_rank, or "
        "index_topk=None",
    )
    if any(spec.attention == "dsa" for spec in words):
        validate_indexer(config)
    if any(spec.attention == "mha" for spec in words):
        validate_mha(config)
    if any(spec.attention in COMPRESSED_WORDS for spec in words):
        validate_compressed(config)
    if any(spec.feed_forward in ("moe", "hash_moe") for spec in words):
        validate_moe(config)
    residuals = sorted({config.residual_word, *(spec.residual for spec in words)})
    require(len(residuals) == 1, f"layer_specs has residuals {residuals}; layers hand on one kind of state, say one")
    require(
        ("mhc_shifted" in residuals) == (config.kv_source_layer_ids is not None),
        f"layer_specs has the residual {residuals[0]!r}, which clashes with kv_source_layer_ids="
        f"{config.kv_source_layer_ids}; 'mhc_shifted' goes with shared entries, and with nothing else",
    )
    if residuals != ["add"]:
        validate_streams(config)
    validate_drafts(config)
    validate_rope_words(config)
    validate_recommendation(config)
    validate_embedding(config)
    validate_images(config)


def validate_sizes(config: Any) -> None:
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
        require(getattr(config, name) > 0, f"{name}={getattr(config, name)} must be positive")
    layers = config.num_hidden_layers
    require(
        layers > 0 or layers == 0 and config.image_stem is not None,
        f"num_hidden_layers={layers} must be positive; a model of images (image_stem) may have none",
    )
    for name in ("attention_dropout", "hidden_dropout"):
        value = getattr(config, name)
        require(0 <= value < 1, f"{name}={value} must be at least 0 and below 1")
    for name in ("num_nextn_predict_layers", "mtp_loss_weight"):
        require(getattr(config, name) >= 0, f"{name}={getattr(config, name)} must be at least 0")
    require(
        not config.mtp_loss_weight or config.num_nextn_predict_layers > 0,
        f"mtp_loss_weight={config.mtp_loss_weight} clashes with num_nextn_predict_layers=0: there is nothing to "
        "train; set the number of prediction layers, or the weight to 0",
    )


def validate_layers(config: Any) -> None:
    require(config.moe_layer_freq >= 1, f"moe_layer_freq={config.moe_layer_freq} must be at least 1")
    if config.compress_ratios is not None:
        validate_ratios(config)
    validate_sharing(config)
    if config.layer_specs is None:
        return
    require(
        len(config.layer_specs) == config.num_hidden_layers,
        f"layer_specs has {len(config.layer_specs)} entries but num_hidden_layers={config.num_hidden_layers}; "
        "give one pair of words per layer",
    )
    for i, spec in enumerate(config.layer_specs):
        require(len(spec) in (2, 3), f"layer_specs[{i}]={spec} must be a pair (attention, feed_forward)")
        for word, known in zip(spec, (ATTENTION_WORDS, FEED_FORWARD_WORDS, RESIDUAL_WORDS), strict=False):
            require_word(f"layer_specs[{i}]", word, known)
        require(
            spec[0] not in ("mla", "dsa") or config.kv_lora_rank is not None,
            f"layer_specs[{i}] says {spec[0]!r} but kv_lora_rank is None; set kv_lora_rank, or say 'mha'",
        )
        require(
            (spec[0] in COMPRESSED_WORDS) == (config.compress_ratios is not None),
            f"layer_specs[{i}] says {spec[0]!r}, which clashes with compress_ratios={config.compress_ratios!r:.40}; "
            "swa, csa and hca, and no others, go with compress_ratios",
        )
        shares = config.kv_source_layer_ids is not None
        require(
            not (shares or spec[0] in SHARING_WORDS) or (shares and spec[0] == config.attention_word(i)),
            f"layer_specs[{i}] says {spec[0]!r}, but by kv_source_layer_ids={config.kv_source_layer_ids} and "
            f"index_source_layer_ids it is {config.attention_word(i)!r}; leave layer_specs out",
        )
        require(
            config.compress_ratios is None or (spec[0] == "swa") == (config.compress_ratios[i] == 0),
            f"layer_specs[{i}] says {spec[0]!r} but compress_ratios[{i}] does not; 0 is 'swa', others 'csa' or 'hca'",
        )
        require(
            spec[0] != "dsa" or config.index_topk is not None,
            f"layer_specs[{i}] says 'dsa' but index_topk is None; set index_topk, or say 'mla'",
        )
        require(
            spec[1] == "dense" or config.n_routed_experts is not None,
            f"layer_specs[{i}] says {spec[1]!r} but n_routed_experts is None; set n_routed_experts, or say 'dense'",
        )


def validate_ratios(config: Any) -> None:
    ratios = config.compress_ratios
    require(
        len(ratios) >= config.num_hidden_layers,
        f"compress_ratios has {len(ratios)} entries but num_hidden_layers={config.num_hidden_layers}; give one per "
        "layer",
    )
    least = 2 if config.kv_source_layer_ids is None else 1
    for i, ratio in enumerate(ratios):
        require(
            ratio == 0 or ratio >= least,
            f"compress_ratios[{i}]={ratio} is no ratio; 0 is a sliding window alone, else it is at least {least} "
            f"token{'s' if least > 1 else ''}",
        )
    for name in ("kv_lora_rank", "use_qk_norm", "attention_bias", "attention_out_bias"):
        require(
            not getattr(config, name),
            f"{name}={getattr(config, name)} clashes with compress_ratios; unset one of them",
        )


def validate_compressed(config: Any) -> None:
    """Of compressed attention: its widths, and what it can't be combined with."""
    names = ("sliding_window", "q_lora_rank", "head_dim", "qk_rope_head_dim", "o_groups", "o_lora_rank")
    ratios = config.compress_ratios[: config.num_hidden_layers]
    for name in (*names, *(("compress_rope_theta",) if any(ratios) else ())):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive where there are compress_ratios")
    require(
        config.num_key_value_heads == 1,
        f"num_key_value_heads={config.num_key_value_heads} clashes with compress_ratios: all heads share one key; "
        "set 1",
    )
    require(
        config.num_attention_heads % config.o_groups == 0,
        f"num_attention_heads={config.num_attention_heads} is no multiple of o_groups={config.o_groups}; change one "
        "of them",
    )
    widths = ["head_dim"]
    if any(spec.attention in ("csa", *SHARING_WORDS) for spec in config.specs):
        validate_indexer(config)
        widths.append("index_head_dim")
    for name in widths:
        require(
            config.qk_rope_head_dim % 2 == 0 and config.qk_rope_head_dim <= getattr(config, name),
            f"qk_rope_head_dim={config.qk_rope_head_dim} must be even and at most {name}={getattr(config, name)}",
        )
    require(
        config.attention_direction == "causal",
        f"attention_direction={config.attention_direction!r} clashes with compress_ratios: entries are made of what "
        "came before; use 'causal'",
    )
    require(
        config.rope_parameters["rope_type"] != "dynamic",
        "rope_parameters['rope_type']='dynamic' clashes with compress_ratios: entries are rotated once; use 'yarn'",
    )


def validate_streams(config: Any) -> None:
    for name in ("hc_mult", "hc_sinkhorn_iters", "hc_eps"):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive for residual streams")


def validate_mla(config: Any) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        require(getattr(config, name) > 0, f"{name}={getattr(config, name)} must be positive")
    for name in ("use_qk_norm", "attention_out_bias"):
        require(not getattr(config, name), f"{name} belongs to multi-head attention; unset it, or kv_lora_rank")
    if config.q_lora_rank is not None:
        require(config.q_lora_rank > 0, f"q_lora_rank={config.q_lora_rank} must be positive, or None for no latent")
    require(
        config.qk_rope_head_dim % 2 == 0,
        f"qk_rope_head_dim={config.qk_rope_head_dim} is odd, but rotary pairs need an even width; make it even",
    )
    require(
        config.num_key_value_heads == config.num_attention_heads,
        f"num_key_value_heads={config.num_key_value_heads} clashes with num_attention_heads="
        f"{config.num_attention_heads}: latent attention has no grouped heads; make them equal",
    )


def validate_indexer(config: Any) -> None:
    for name in ("index_n_heads", "index_head_dim", "index_topk"):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive for sparse attention")
    require(
        config.q_lora_rank is not None,
        "q_lora_rank is None, but the indexer of sparse attention reads the query latent; set q_lora_rank, or "
        "index_topk=None",
    )
    require(
        config.index_head_dim >= config.qk_rope_head_dim,
        f"index_head_dim={config.index_head_dim} has no room for qk_rope_head_dim={config.qk_rope_head_dim}; make it "
        "at least as wide",
    )


def validate_mha(config: Any) -> None:
    require(
        config.num_key_value_heads > 0 and config.num_attention_heads % config.num_key_value_heads == 0,
        f"num_attention_heads={config.num_attention_heads} is no multiple of num_key_value_heads="
        f"{config.num_key_value_heads}; change one of them",
    )
    require(
        config.head_dim > 0 and config.head_dim % 2 == 0,
        f"head_dim={config.head_dim} (hidden_size={config.hidden_size}, num_attention_heads="
        f"{config.num_attention_heads}) is odd, but rotary pairs need an even width; make it even",
    )


def validate_moe(config: Any) -> None:
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive where there are experts")
    require(
        top_k <= experts,
        f"num_experts_per_tok={top_k} exceeds n_routed_experts={experts}; choose at most {experts} experts",
    )
    require_word("scoring_func", config.scoring_func, SCORING_FUNCTIONS)
    require_word("topk_method", config.topk_method, TOPK_METHODS)
    require(
        (config.topk_method == "noaux_tc") == (config.scoring_func in ("sigmoid", "sqrtsoftplus")),
        f"scoring_func={config.scoring_func!r} clashes with topk_method={config.topk_method!r}; use 'sigmoid' with "
        "'noaux_tc', and 'softmax' with 'greedy' or 'group_limited_greedy'",
    )
    require(config.num_hash_layers >= 0, f"num_hash_layers={config.num_hash_layers} must be at least 0")
    limit = config.swiglu_limit
    require(limit is None or limit > 0, f"swiglu_limit={limit} must be positive, or None for no limit")
    if config.topk_method == "greedy":
        return
    require(
        experts % config.n_group == 0,
        f"n_routed_experts={experts} is no multiple of n_group={config.n_group}; change one of them",
    )
    require(
        config.topk_group <= config.n_group,
        f"topk_group={config.topk_group} exceeds n_group={config.n_group}; choose at most {config.n_group} groups",
    )
    reachable = experts // config.n_group * config.topk_group
    require(
        top_k <= reachable,
        f"num_experts_per_tok={top_k} exceeds the {reachable} experts in topk_group={config.topk_group} of "
        f"n_group={config.n_group} groups; raise topk_group or lower num_experts_per_tok",
    )
    require(
        config.topk_method != "noaux_tc" or experts // config.n_group >= 2,
        f"n_group={config.n_group} leaves one of n_routed_experts={experts} per group, but noaux_tc ranks groups "
        "by their two best; lower n_group",
    )


def validate_rope_words(config: Any) -> None:
    rope = config.rope_parameters
    require_word("rope_parameters['rope_type']", rope["rope_type"], ROPE_TYPES)
    for name in ("rope_theta", "original_max_position_embeddings"):
        value = rope.get(name, 1)
        require(isinstance(value, (int, float)) and value > 0, f"{name}={value} must be positive")
    if rope["rope_type"] != "default":
        factor = rope.get("factor")
        require(
            isinstance(factor, (int, float)) and factor >= 1,
            f"rope_parameters['factor']={factor} must be a number of at least 1 for rope_type={rope['rope_type']!r}",
        )


def validate_recommendation(config: Any) -> None:
    if config.item_loss is not None:
        require_word("item_loss", config.item_loss, ITEM_LOSSES)
    require_word("item_text_encoder", config.item_text_encoder, ITEM_TEXT_ENCODER_WORDS)
    require(config.num_item_negatives > 0, f"num_item_negatives={config.num_item_negatives} must be positive")
    require(0 <= config.gbce_calibration <= 1, f"gbce_calibration={config.gbce_calibration} must be between 0 and 1")
    for name in ("num_item_neighbors", "item_neighbor_weight", "item_transition_weight"):
        require(getattr(config, name) >= 0, f"{name}={getattr(config, name)} must not be negative")
    require(config.item_neighbor_window > 0, f"item_neighbor_window={config.item_neighbor_window} must be positive")
    for name in ("user_features", "context_features"):
        validate_features(config, name, getattr(config, name))
    if config.num_items is None:
        return
    for name in ("num_items", "item_text_length"):
        require(getattr(config, name) > 0, f"{name}={getattr(config, name)} must be positive")
    require(
        config.tie_item_embeddings,
        f"num_items={config.num_items} clashes with tie_item_embeddings=False: items of text are scored by the "
        "vectors that they are read by; leave tie_item_embeddings, or unset num_items",
    )
    require(
        config.pooling != "latent",
        f"num_items={config.num_items} clashes with pooling='latent', which items of text can't have; set mean or "
        "last_token",
    )


def validate_features(config: Any, name: str, columns: Any) -> None:
    if columns is None:
        return
    is_table = isinstance(columns, dict) and all(isinstance(values, list) for values in columns.values())
    require(is_table, f"{name} must be columns with lists of their known values, or None; it is {columns!r:.60}")
    for column, values in columns.items():
        require(values, f"{name}[{column!r}] has no values; name those that are known, or leave the column out")
        seen: set[str] = set()
        for value in values:
            require(isinstance(value, str), f"{name}[{column!r}] has {value!r}, which is no text; quote it")
            require(value not in seen, f"{name}[{column!r}] has the value {value!r} twice; leave one out")
            seen.add(value)


def validate_embedding(config: Any) -> None:
    require_word("pooling", config.pooling, POOLINGS)
    temperature = config.contrastive_temperature
    require(temperature > 0, f"contrastive_temperature={temperature} must be positive")
    for size in config.matryoshka_sizes or ():
        require(
            0 < size <= config.hidden_size,
            f"matryoshka_sizes has {size}, which must be between 1 and hidden_size={config.hidden_size}",
        )
    if config.pooling == "latent":
        heads = config.num_pooling_heads
        require(config.num_pooling_latents > 0, f"num_pooling_latents={config.num_pooling_latents} must be positive")
        require(
            heads > 0 and config.hidden_size % heads == 0,
            f"num_pooling_heads={heads} must divide hidden_size={config.hidden_size}",
        )


def validate_images(config: Any) -> None:
    if config.image_stem is None:
        return
    require_word("image_stem", config.image_stem, IMAGE_STEMS)
    require(
        config.compress_ratios is None,
        f"image_stem={config.image_stem!r} clashes with compress_ratios: images have no order that entries "
        "could be made of; unset one of them",
    )
    for name in ("num_channels", "patch_size"):
        require(getattr(config, name) > 0, f"{name}={getattr(config, name)} must be positive")
    channels, pooling = config.conv_channels, config.conv_pooling
    require(
        len(channels) == len(pooling) > 0,
        f"conv_channels={channels} and conv_pooling={pooling} must be lists of equal length, a number for each "
        "convolution",
    )
    for name in ("conv_channels", "conv_pooling"):
        require(min(getattr(config, name)) > 0, f"{name}={getattr(config, name)} must be positive numbers")
    require(
        config.image_stem != "conv_lstm" or config.hidden_size % 2 == 0,
        f"hidden_size={config.hidden_size} is odd, but the LSTM of image_stem='conv_lstm' gives half of it in each "
        "direction; make it even",
    )
    require_word("box_prediction", config.box_prediction, BOX_PREDICTIONS)
    require(config.num_detection_tokens > 0, f"num_detection_tokens={config.num_detection_tokens} must be positive")
    if config.box_stride is not None:
        require(
            config.box_prediction == "grid" and config.image_stem != "patch",
            f"box_stride={config.box_stride} needs box_prediction='grid' and a stem with convolutions; unset it",
        )
        strides = {math.prod(pooling[:number]) for number in range(len(pooling) + 1)}
        require(
            config.box_stride in strides,
            f"box_stride={config.box_stride} is no stride of conv_pooling={pooling}; those are "
            f"{', '.join(map(str, sorted(strides)))}",
        )
    require(0 < config.nms_threshold <= 1, f"nms_threshold={config.nms_threshold} must be above 0 and at most 1")
