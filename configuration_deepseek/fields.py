"""The fields of a DeepSeek config and what follows from them.

Apart from `DeepSeekConfig` so that they can be read where neither torch nor transformers is imported, which takes
seconds (plain.py). The file travels to the Hub with configuration_deepseek.py.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from .drafts import DRAFTING, DraftFields, derive_drafts
from .official import attention_of_ratio
from .sharing import SharingFields
from .validation import require, validate_layers
from .weight_names import Shapes, weights_of

CACHE_LAYER_TYPES = {
    "mha": "deepseek_kv",
    "mla": "deepseek_latent",
    "dsa": "deepseek_latent_indexed",
    "swa": "deepseek_window",
    "hca": "deepseek_compressed",
    "csa": "deepseek_compressed_indexed",
    "csa2_full": "deepseek_compressed_indexed",
    "csa2_reindex": "deepseek_window",
    "csa2_reuse": "deepseek_window",
}


class LayerSpec(NamedTuple):
    """The mechanisms of one decoder layer, by words that validation.py knows."""

    attention: str
    feed_forward: str
    residual: str = "add"


@dataclass(kw_only=True, repr=False)
class DeepSeekFields(DraftFields, SharingFields):
    """The fields of `DeepSeekConfig`; those of V4.1 stand in sharing.py, those of draft stages in drafts.py.

    Trunk
        vocab_size, hidden_size, num_hidden_layers, max_position_embeddings, rms_norm_eps, hidden_act,
        initializer_range, tie_word_embeddings, use_cache: as in every decoder of transformers.
        hidden_dropout: probability of dropping an element of a sub-layer's output before the residual addition, and
            of the embeddings; 0 in all releases.

    Attention
        num_attention_heads, num_key_value_heads: heads of queries, and of keys and values (`None`: as many). MLA has
            one latent instead of key / value heads, so there the second must equal the first.
        head_dim: width of a head in multi-head attention (`None`: hidden_size / num_attention_heads). In MLA it is
            the rotary width, `qk_rope_head_dim`.
        attention_bias: bias on q, k, v, o (MHA) or on q_a, kv_a, o (MLA).
        attention_out_bias: bias on o of MHA, where it differs from attention_bias (R1-Distill-Qwen).
        use_qk_norm: RMSNorm over each query and key head of MHA (R1-0528-Qwen3).
        attention_dropout: dropout probability of the attention weights.
        attention_direction: "causal" as in all releases; "prefix", where a prompt also sees itself ahead and what
            follows it is causal (prefix language model, arXiv 1910.10683, section 3.2.1); or "bidirectional", where
            everything sees everything and there is no cache.
        kv_lora_rank: width of the cached latent. A number selects multi-head latent attention (DeepSeek-V2, arXiv
            2405.04434, section 2.1), `None` selects multi-head / grouped-query attention.
        q_lora_rank: width of the query latent; `None` projects queries directly (V2-Lite).
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per head widths of MLA.
        index_topk: how many keys a query attends to. A number selects sparse attention (DeepSeek-V3.2, arXiv
            2512.02556, section 2.1) in place of multi-head latent attention, whose fields it needs, `q_lora_rank` too.
        index_n_heads, index_head_dim: heads of the indexer that chooses them, and the width of each.
        rope_parameters: transformers' rotary dictionary (`rope_type`, `rope_theta`, `factor`, ...). The published
            `rope_scaling` and `rope_theta` are understood.
        rope_interleave: rotary pairs are (0, 1), (2, 3), ... instead of (i, i + width / 2).

    Compressed attention (DeepSeek-V4, section 2.3; needs q_lora_rank, head_dim and qk_rope_head_dim)
        compress_ratios: selects it; how many tokens an entry of each layer stands for. 0 is a sliding window alone, 4
            adds overlapping entries of which the indexer chooses index_topk, any other number entries that are all
            seen. What goes beyond num_hidden_layers is of prediction layers.
        sliding_window: how many tokens, itself among them, a query sees uncompressed.
        compress_rope_theta: rotary base of layers that compress, to which the scaling of rope_parameters applies;
            layers with a window alone have rope_theta and no scaling.
        o_groups, o_lora_rank: the output projection takes heads in so many groups to so many numbers each, and then
            all of these to the hidden width.

    Feed-forward
        intermediate_size, mlp_bias: the dense SwiGLU.
        n_routed_experts: `None` makes every layer dense; else mixture of experts (DeepSeekMoE, arXiv 2401.06066).
        n_shared_experts, num_experts_per_tok, moe_intermediate_size: shared experts, experts per token, expert width.
        first_k_dense_replace, moe_layer_freq: layer i has experts if i >= first_k_dense_replace and
            i % moe_layer_freq == 0.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus" (V4) of the router logits.
        topk_method: "greedy", "group_limited_greedy" (V2: groups by their best expert) or "noaux_tc" (V3: correction
            bias, groups by the sum of their two best).
        n_group, topk_group: number of expert groups, and how many of them a token may use.
        norm_topk_prob, routed_scaling_factor: normalise the chosen scores; factor on them. With softmax scoring the
            factor applies only where the scores are not normalised (the rule of V2's released code).
        num_hash_layers: so many first layers choose experts by the token's id, out of a table (V4).
        swiglu_limit: SwiGLU takes gates from above, and the other half on both sides, to this limit (V4); `None`: not.
        fused_experts: routed experts are held as one tensor per projection; `False`: as linear layers, which can be
            quantized one by one. Files have the same names.
        expert_dtype: how the published experts are quantized, "fp4" or "fp8".
        output_router_logits: return the router logits of every MoE layer.

    Residual
        hc_mult: how many residual streams there are, mixed anew at each sub-layer (manifold-constrained
            hyper-connections, arXiv 2512.24880; V4). `None`: one, to which sub-layers are added.
        hc_sinkhorn_iters, hc_eps: rounds of normalising rows and columns of the mixing matrix, and what is added to
            their sums.

    Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2)
        num_nextn_predict_layers: modules after the last layer, each of which predicts one more token ahead.
        mtp_loss_weight: lambda of eq. 25; the language model then learns from them too. 0 leaves them alone.
        mtp_after_norm: they read the state after the norm that precedes the head, as inference engines have it; else
            the state before it. The paper leaves it open. With residual streams they read these, whatever it says.
    Question answering (DeepSeekForQuestionAnswering)
        type_vocab_size: kinds of tokens, told by `token_type_ids`, each with a vector that is added to its tokens'
            embeddings, as BERT does (arXiv 1810.04805, section 3). 0: there are none.
    Recommendation (DeepSeekForRecommendation; the items are the vocabulary, the padding is pad_token_id)
        item_loss: "softmax" over all items, "sampled_softmax" (with log-q correction) or "gbce" (arXiv 2308.07192);
            `None` takes the first up to 50,000 items, the second beyond.
        num_item_negatives: items drawn per batch for the sampled losses.
        gbce_calibration: t of gBCE, from 0 (plain binary cross entropy) to 1.
        tie_item_embeddings: score items by the embeddings that they are read by.
        num_items: rows of a catalogue of items that are described by text, of which the vocabulary are the tokens; the
            padding is row 0, and 1 is an empty catalogue, to be filled by `add_items`. `None`: the items are the
            vocabulary. How a text becomes a vector says `pooling`.
        item_text_length: tokens of an item's text, at most.
        item_text_encoder: "trunk", or "bag_of_words", the mean of the tokens' embeddings: for texts without an order,
            such as categories, and so cheap that all items are encoded at each step.
        item_id_embeddings: add to each text's vector one that is learned for the item.
        num_item_neighbors: add to the scores what training histories say by counting, keeping so many entries of an
            item (item_counts.py). 0: nothing is counted. item_neighbor_weight is the weight of the likeness to the
            last item_neighbor_window items, item_transition_weight that of what came right after the last one.
        user_features, context_features: columns of a user, and of an interaction, each with its known values. Values
            are numbered from 1 through all columns in the order of their names, the user's first; 0 is none or
            unknown. `None`: there are no such tokens.
    Embedding (DeepSeekForEmbedding)
        pooling: how tokens' states become one vector: "mean", "last_token", or "latent" (NV-Embed, arXiv 2405.17428),
            which has `num_pooling_latents` learned vectors and `num_pooling_heads` heads.
        matryoshka_sizes: the sizes that embeddings may be cut to, all of which are trained (arXiv 2205.13147); `None`
            trains the whole ones alone.
        contrastive_temperature: divides the products of queries and passages in the loss.
        query_prefix, passage_prefix: what stands before each text of that kind.
    Images (DeepSeekForImageClassification, whose `pooling` is as for embeddings, and DeepSeekForObjectDetection)
        image_stem: how pixels become tokens: "patch", a linear map of squares (arXiv 2010.11929); "conv", convolutions
            and max pooling; or "conv_lstm", the same and an LSTM over the tokens in both directions. `None`: no image.
        num_channels: channels of an image, 1 for grey, 3 for colour.
        patch_size: side of a square of "patch", in pixels.
        conv_channels, conv_pooling: channels of each convolution, and the side of the pooling behind it (1: none).
        box_prediction: "grid", a box for each token of the image, of which overlapping ones are suppressed; or "set",
            a box for each of `num_detection_tokens` learned ones behind them (arXiv 2106.00666), trained by bipartite
            matching.
        box_stride: pixels from one box of the grid to the next, of those that the convolutions come by: finer than the
            trunk's tokens, whose states are added to the convolutions' features there (FPN, arXiv 1612.03144). `None`:
            a box for each token.
        nms_threshold: overlap from which on the grid's worse box of two is suppressed; 1: none is.

    Layers
        layer_specs: `None` to derive them, or one (attention, feed_forward) pair of words per layer; a third word, of
            the residual, is derived where it is absent.
        source_model_type: the model_type of the published config.json from which this one was translated.
        source_quantization_config: how the published weights are quantized. They are dequantized while loading.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    # trunk
    vocab_size: int = 102400
    hidden_size: int = 4096
    num_hidden_layers: int = 30
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    hidden_dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    use_qk_norm: bool = False
    attention_dropout: float = 0.0
    attention_direction: str = "causal"
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    rope_parameters: dict | None = None
    rope_interleave: bool | None = None
    # compressed attention
    compress_ratios: list[int] | None = None
    sliding_window: int | None = None
    compress_rope_theta: float | None = None
    o_groups: int | None = None
    o_lora_rank: int | None = None

    # feed-forward
    intermediate_size: int = 11008
    mlp_bias: bool = False
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    num_hash_layers: int = 0
    swiglu_limit: float | None = None
    fused_experts: bool = True
    expert_dtype: str | None = None
    output_router_logits: bool = False

    # residual
    hc_mult: int | None = None
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    # multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float = 0.0
    mtp_after_norm: bool = True
    # question answering
    type_vocab_size: int = 0
    # recommendation
    item_loss: str | None = None
    num_item_negatives: int = 512
    gbce_calibration: float = 0.75
    tie_item_embeddings: bool = True
    num_items: int | None = None
    item_text_length: int = 32
    item_text_encoder: str = "trunk"
    item_id_embeddings: bool = False
    num_item_neighbors: int = 0
    item_neighbor_window: int = 10
    item_neighbor_weight: float = 0.0
    item_transition_weight: float = 0.0
    user_features: dict[str, list[str]] | None = None
    context_features: dict[str, list[str]] | None = None
    # embedding
    pooling: str = "mean"
    num_pooling_latents: int = 512
    num_pooling_heads: int = 8
    matryoshka_sizes: list[int] | None = None
    contrastive_temperature: float = 0.05
    query_prefix: str = ""
    passage_prefix: str = ""
    # images
    image_stem: str | None = None
    num_channels: int = 3
    patch_size: int = 4
    conv_channels: list[int] = field(default_factory=lambda: [32, 64])
    conv_pooling: list[int] = field(default_factory=lambda: [1, 2])
    box_prediction: str = "grid"
    num_detection_tokens: int = 100
    box_stride: int | None = None
    nms_threshold: float = 0.6

    # layers
    layer_specs: list | None = None
    source_model_type: str | None = None
    source_quantization_config: dict | None = None
    # Tells our own file from DeepSeekMoE-16B's, which bears the same model_type.
    deepseek_format: int = 1

    def derive(self) -> None:
        """Fill the fields that follow from others.

        Raises:
            ValueError: for `layer_specs` that can't be.
        """
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads if self.compress_ratios is None else 1
        if self.kv_lora_rank is not None:
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.rope_interleave is None:
            self.rope_interleave = self.kv_lora_rank is not None or self.compress_ratios is not None
        if self.n_routed_experts is not None:
            self.n_group = self.n_group or 1
            self.topk_group = self.topk_group or 1
        if self.layer_specs is not None:
            self.layer_specs = [list(spec) for spec in self.layer_specs]
        derive_drafts(self)
        if self.attention_direction == "bidirectional":
            self.use_cache = False
        validate_layers(self)

    # Derived ---------------------------------------------------------------------------------------------------------

    # Who fits a config to fewer layers (PEFT, say) assigns to these too: what agrees is taken, all else refused.

    @property
    def specs(self) -> list[LayerSpec]:
        """One `LayerSpec` per layer: those given, or those that the fields imply."""
        if self.layer_specs is not None:
            return [self._whole_spec(spec) for spec in self.layer_specs[: self.num_hidden_layers]]
        layers = range(self.num_hidden_layers)
        return [self._whole_spec((self.attention_word(i), self._feed_forward_word(i))) for i in layers]

    @specs.setter
    def specs(self, value: list) -> None:
        self._take_derived("specs", [self._whole_spec(spec) for spec in value], "layer_specs")

    @property
    def residual_word(self) -> str:
        """What all layers hand on; a model of images may have none."""
        return self.specs[0].residual if self.specs else "add"

    @property
    def prediction_spec(self) -> LayerSpec:
        """What prediction layers are: as the last layer, or in V4 a window alone and experts by their scores."""
        if self.compress_ratios is None:
            return self.specs[-1]
        return self._whole_spec(("swa" if self.dspark_block_size is None else "dspark", "moe"))

    @property
    def prediction_word(self) -> str:
        """How prediction layers begin and end: "dspark" and "dspark_shifted", drafts of many tokens; else by the
        residual."""
        residual = self.prediction_spec.residual
        return residual if self.dspark_block_size is None else DRAFTING.get(residual, residual)

    def without_predictions(self) -> None:
        """Say that there are no prediction layers."""
        self.num_nextn_predict_layers, self.dspark_block_size = 0, None

    @property
    def predictions_read_norm(self) -> bool:
        """Whether prediction layers read states behind the norm of the head."""
        return self.mtp_after_norm and self.hc_mult is None

    def spec_at(self, layer_idx: int) -> LayerSpec:
        """The words of a layer, prediction layers among them."""
        return self.specs[layer_idx] if layer_idx < self.num_hidden_layers else self.prediction_spec

    @property
    def mask_word(self) -> str:
        """What attention has for a mask: "causal", pairs of tokens; "rows", which tokens belong together."""
        return "causal" if self.compress_ratios is None else "rows"

    @property
    def normalizes_query_heads(self) -> bool:
        """Whether compressed attention divides each head of a query by its root mean square: V4, not V4.1."""
        return self.kv_source_layer_ids is None

    @property
    def norms_in_float32(self) -> bool:
        """Whether norms multiply by their weights in float32 too."""
        return self.compress_ratios is not None

    def _whole_spec(self, words: Iterable[str]) -> LayerSpec:
        """The words of a layer; the residual is derived unless it is among them."""
        attention, feed_forward, *residual = words
        streams = "mhc" if self.kv_source_layer_ids is None else "mhc_shifted"
        return LayerSpec(attention, feed_forward, *(residual or ["add" if self.hc_mult is None else streams]))

    def _take_derived(self, name: str, value: Any, fields_behind: str) -> None:
        derived = getattr(self, name)
        require(
            value == derived, f"{name}={value} contradicts {derived}, which follows from {fields_behind}; set these"
        )

    def _feed_forward_word(self, layer_idx: int) -> str:
        has_experts = (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )
        experts = "hash_moe" if layer_idx < self.num_hash_layers else "moe"
        return experts if has_experts else "dense"

    def attention_word(self, layer_idx: int) -> str:
        """The attention that the fields imply for a layer."""
        if self.compress_ratios is not None and self.kv_source_layer_ids is not None:
            return self.sharing_word(layer_idx, self.compress_ratios[layer_idx])
        if self.compress_ratios is not None:
            return attention_of_ratio(self.compress_ratios[layer_idx])
        latent = "mla" if self.index_topk is None else "dsa"
        return "mha" if self.kv_lora_rank is None else latent

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each decoder layer, as transformers' caches look it up."""
        return [CACHE_LAYER_TYPES[spec.attention] for spec in self.specs]

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        self._take_derived(
            "layer_types", list(value), "num_hidden_layers, kv_lora_rank, index_topk, compress_ratios and layer_specs"
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head of MLA: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @qk_head_dim.setter
    def qk_head_dim(self, value: int) -> None:
        self._take_derived("qk_head_dim", value, "qk_nope_head_dim and qk_rope_head_dim")

    # Widths: outputs of the projections of multi-head and latent attention, and of the shared experts' inner layer

    @property
    def mha_query_width(self) -> int:
        return self.num_attention_heads * int(self.head_dim or 0)

    @property
    def mha_key_width(self) -> int:
        return int(self.num_key_value_heads or 0) * int(self.head_dim or 0)

    @property
    def mha_out_bias(self) -> bool:
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def mla_query_width(self) -> int:
        return self.num_attention_heads * self.qk_head_dim

    @property
    def mla_latent_width(self) -> int:
        """What one token leaves behind for the others: the latent and the rotary key."""
        return int(self.kv_lora_rank or 0) + self.qk_rope_head_dim

    @property
    def mla_up_width(self) -> int:
        return self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def mla_value_width(self) -> int:
        return self.num_attention_heads * self.v_head_dim

    @property
    def o_group_width(self) -> int:
        """What one group of heads brings to the output projection of compressed attention."""
        return self.mha_query_width // int(self.o_groups or 1)

    @property
    def o_latent_width(self) -> int:
        """What all groups together make of it."""
        return int(self.o_groups or 0) * int(self.o_lora_rank or 0)

    @property
    def index_query_width(self) -> int:
        return int(self.index_n_heads or 0) * int(self.index_head_dim or 0)

    @property
    def shared_expert_width(self) -> int:
        return int(self.moe_intermediate_size or 0) * int(self.n_shared_experts or 0)

    def weight_shapes(self, head: str) -> Shapes | None:
        """Official names and shapes of the weights of a model with this head; see weight_names.py."""
        return weights_of(self, head)

    # Names ---------------------------------------------------------------------------------------------------------

    @classmethod
    def field_names(cls) -> list[str]:
        """Names that `DeepSeekConfig(...)` understands, aliases included."""
        return [one.name for one in fields(cls)] + [*cls.attribute_map, "rope_scaling", "rope_theta"]

    def refuse_misspelled(self, names: Iterable[str]) -> None:
        """Refuse a near miss of a field; other unknown names are kept as attributes by transformers.

        Raises:
            ValueError: naming both.
        """
        known = self.field_names()
        for key in names:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.88)
            if key not in known and not hasattr(type(self), key) and nearest:
                raise ValueError(f"DeepSeekConfig: unknown field {key!r}; did you mean {nearest[0]!r}?")


FIELD_NAMES = tuple(one.name for one in fields(DeepSeekFields))
