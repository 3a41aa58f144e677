"""The DeepSeek model: decoder layers, trunk, and every head.

Read it in this order: `DeepSeekDecoderLayer` (what a block is), `DeepSeekModel` (what the trunk is), the heads. The
mechanisms that a block is made of are one file each: attention_mha.py, attention_mla.py, attention_dsa.py, moe.py,
routers.py, rope.py, cache.py. Which of them a layer has is said by the config (`config.specs`), so no forward asks for
a generation.

Letters: B batch, S tokens of this call, T tokens including cached ones, D hidden width, V vocabulary.
"""

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import __version__
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_dsa import DeepSeekSparseAttention
from .attention_mha import DeepSeekMultiHeadAttention
from .attention_mla import DeepSeekMultiHeadLatentAttention
from .cache import (
    GrowingLayer,
    LatentLayer,
    StaticKeyValueLayer,
    StaticLatentLayer,
    refuse_cache_implementation,
    takes_cache,
)
from .checkpoint_files import CheckpointError, in_turn, naming_the_broken_file, open_slices, unlisted, writing_beside
from .checkpoint_keys import LAYER, differing_copies, register_conversions, shared_mtp_keys, take_mtp_keys
from .configuration_deepseek import HEADS_BY_OWN_AUTO_CLASS, DeepSeekConfig
from .contrastive import matryoshka_loss, truncated
from .indexer import DeepSeekIndexer
from .item_counts import NO_ITEM, DeepSeekItemCounts
from .item_losses import FULL_SOFTMAX_ITEMS, draw_negatives, item_loss
from .item_ranking import allowed_items, item_scores, pad_histories, top_k
from .item_texts import ITEM_PADDING, NO_TOKEN, DeepSeekItemTexts, PickedItems
from .layers import DeepSeekMLP, DeepSeekRMSNorm
from .losses import cross_entropy, labels_ahead
from .moe import DeepSeekExperts, DeepSeekMoE
from .mtp import MultiTokenPrediction, shift_left
from .pooling import POOLING_FUNCTIONS, LatentAttentionPooling
from .quantization import DequantizedSlice, dequantized
from .rope import DeepSeekRotaryEmbedding
from .routers import DeepSeekTopKRouter
from .side_features import DeepSeekSideFeatures
from .tested_versions import tell_if_untested
from .transformers_names import (
    GradientCheckpointingLayer,
    answers_to_both,
    create_causal_mask,
    create_masks_for_generate,
    in_library_words,
)

ATTENTIONS = {
    "mha": DeepSeekMultiHeadAttention,
    "mla": DeepSeekMultiHeadLatentAttention,
    "dsa": DeepSeekSparseAttention,
}
FEED_FORWARDS = {"dense": DeepSeekMLP, "moe": DeepSeekMoE}

logger = logging.get_logger(__name__)
register_conversions()


@answers_to_both
@dataclass
class DeepSeekModelOutput(MoeModelOutputWithPast):
    """transformers' output of a trunk, and `state_before_norm` [B, S, D] if it was asked for."""

    state_before_norm: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output of a language model, and `mtp_loss`: mean loss of the prediction layers, not weighted."""

    mtp_loss: torch.Tensor | None = None


@answers_to_both
@dataclass
class DeepSeekSequenceOutput(SequenceClassifierOutputWithPast):
    """transformers' output of a model that gives one vector of scores per sequence."""


@dataclass
class DeepSeekEmbeddingOutput(ModelOutput):
    """`embeddings` [B, D] of length 1, `passage_embeddings` [P, D] if passages were given, and `loss` with labels."""

    loss: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    passage_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DeepSeekDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward, each added to the residual stream."""

    def __init__(self, config: DeepSeekConfig, layer_idx: int):
        super().__init__()
        spec = config.specs[min(layer_idx, config.num_hidden_layers - 1)]  # prediction layers are as the last one
        self.self_attn = ATTENTIONS[spec.attention](config, layer_idx)
        self.mlp = FEED_FORWARDS[spec.feed_forward](config)
        self.input_layernorm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; kwargs are the attention's."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(transformed)


class DeepSeekMTPLayer(MultiTokenPrediction, DeepSeekDecoderLayer):  # type: ignore[misc]  # forward takes one more
    """A decoder layer that predicts one token further ahead; mtp.py says how."""


class DeepSeekPreTrainedModel(PreTrainedModel):
    """What all our models share towards transformers: loading, initialising, recording, switching implementations."""

    config_class = DeepSeekConfig
    config: DeepSeekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepSeekDecoderLayer", "DeepSeekMTPLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "gate.weight"]
    _can_record_outputs = {
        "hidden_states": DeepSeekDecoderLayer,
        # each attention once: sparse attention is a subclass of the latent one
        "attentions": [OutputRecorder(ATTENTIONS[word], index=1) for word in ("mha", "mla")],
        "index_scores": OutputRecorder(DeepSeekIndexer, index=0),
        "router_logits": OutputRecorder(DeepSeekTopKRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepSeekTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(bias := getattr(module, "e_score_correction_bias", None), torch.Tensor):
                init.zeros_(bias)
        elif isinstance(module, DeepSeekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepSeekItemTexts):
            init.constant_(module.tokens, NO_TOKEN)
            if hasattr(module, "identities"):
                init.zeros_(module.identities.weight)
        elif isinstance(module, DeepSeekItemCounts):
            for table, value in ((module.neighbors, NO_ITEM), (module.followers, NO_ITEM)):
                init.constant_(table, value)
            for table in (module.similarities, module.transitions):
                init.zeros_(table)

    # transformers finds out by reading this file's text whether implementations may be chosen; ours are in siblings.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation asked for; without a wish grouped_mm, or eager for widths that grouped_mm refuses."""
        config = self.config
        # It wants rows of whole 16 bytes: 8 numbers in bfloat16, to which a model may be cast at any time.
        odd = config.n_routed_experts and (config.hidden_size % 8 or (config.moe_intermediate_size or 0) % 8)
        if requested_experts is None and odd:
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', but a damaged file is named."""
        tell_if_untested()
        with naming_the_broken_file(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As transformers', but weights are read one by one, quantized ones dequantized as they are read."""
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            try:
                state_dict = model.official_slices(open_slices(checkpoint_files), load_config)
            except CheckpointError as error:
                raise CheckpointError(f"{load_config.pretrained_model_name_or_path}: {error}") from None
            if is_deepspeed_zero3_enabled():  # reads the files itself, on one process for all
                state_dict = None
        with in_turn():
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )

    def official_slices(self, weights: dict[str, Any], load_config) -> dict[str, Any]:
        """What of a checkpoint's entries, still in their files, is to be loaded into this model."""
        weights = dequantized(weights, self.config)
        reads_elsewhere = is_deepspeed_zero3_enabled() or "disk" in (load_config.device_map or {}).values()
        if reads_elsewhere and any(isinstance(entry, DequantizedSlice) for entry in weights.values()):
            raise CheckpointError(
                "FP8 weights cannot be loaded under DeepSpeed ZeRO-3 or with offload to disk; load the model without, "
                "and save it dequantized first"
            )
        rest, ahead = take_mtp_keys(weights, self.config)
        return {**rest, **self.slices_ahead(ahead, rest, load_config.pretrained_model_name_or_path)}

    def slices_ahead(self, ahead: dict[str, Any], rest: dict[str, Any], source: str) -> dict[str, Any]:
        """What of the prediction layers' entries is to be loaded: nothing, only the language model has such layers."""
        return {}

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """As transformers', but a save that fails leaves the folder as it was."""
        tell_if_untested()
        if kwargs.get("distributed_checkpoint"):  # all processes write to one folder, and need its true name
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        with writing_beside(save_directory) as beside:
            weights = None if state_dict is None else dict(state_dict)  # transformers empties what it is given
            super().save_pretrained(beside, is_main_process, weights, **kwargs)
        if push_to_hub:  # apart, so that a failed upload doesn't undo the save
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            with tempfile.TemporaryDirectory() as upload:
                super().save_pretrained(upload, is_main_process, state_dict, push_to_hub, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As transformers', but a trunk weight that the checkpoint lacks or misshapes is an error, not a warning."""
        source = load_config.pretrained_model_name_or_path
        shards = unlisted(source)
        reason = f"the index does not list {shards[0]}" if shards else "the checkpoint is incomplete"
        if loading_info.conversion_errors:
            key = min(loading_info.conversion_errors)
            raise CheckpointError(
                f"{source}: the checkpoint's parts of weight {key} do not fit together (first of "
                f"{len(loading_info.conversion_errors)}); {reason}, or some are misshapen: copy or download it again"
            )
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            key, found, wanted = sorted(loading_info.mismatched_keys)[0]
            raise CheckpointError(
                f"{source}: weight {key} has shape {tuple(found)} but the config asks for {tuple(wanted)} (first of "
                f"{len(loading_info.mismatched_keys)}); mend config.json, or pass ignore_mismatched_sizes=True"
            )
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        missing = sorted(key for key in loading_info.missing_keys if key.startswith(prefix))
        if missing and source is not None:
            others = sorted(loading_info.unexpected_keys)
            found = f" (it has {others[0]})" if others else ""
            raise CheckpointError(
                f"{source}: {len(missing)} weights of the model are not in the checkpoint, the first is {missing[0]}"
                f"{found}; {reason}, or config.json describes another model"
            )
        layers = [(LAYER.match(key), key) for key in sorted(loading_info.unexpected_keys)]
        foreign = [key for layer, key in layers if layer and int(layer[1]) < model.config.num_hidden_layers]
        if foreign and source is not None:
            raise CheckpointError(
                f"{source}: the model has no place for {len(foreign)} weights of the checkpoint, the first is "
                f"{foreign[0]}; config.json describes another model"
            )
        return loading_info


class DeepSeekModel(DeepSeekPreTrainedModel):
    """Embedding, decoder layers, final norm. The trunk that every head stands on."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepSeekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepSeekRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the other classes', but says so where the folder holds a head that no Auto class of transformers names.

        There `AutoModel` looks at the model_type alone, and gives the trunk of what was saved as a recommender or an
        embedding model.
        """
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        trunk = model[0] if isinstance(model, tuple) else model
        for saved in trunk.config.architectures or []:
            if saved in HEADS_BY_OWN_AUTO_CLASS.values():
                warnings.warn(
                    f"{pretrained_model_name_or_path} holds a {saved}, and this is its trunk without the head; "
                    f"use {saved}.from_pretrained.",
                    stacklevel=2,
                )
        return model

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        output_state_before_norm: bool = False,
        **kwargs,
    ) -> DeepSeekModelOutput:
        """Run the trunk.

        Args:
            input_ids: [B, S]; or inputs_embeds: [B, S, D]. Exactly one.
            attention_mask: [B, T] with 0 at padding on either side, or a ready [B or 1, 1 or H, S, T] mask.
            position_ids: [B or 1, S]; counted from the cache if absent. Positions that restart in a row mark packed
                documents, which then do not see each other.
            cache: a cache of transformers; with `use_cache` one is made if absent.
            block_sequence_ids: [B, S]; tokens of equal number see each other in both directions, -1 is causal. Absent
                it is -1, or 0 with `attention_direction` "bidirectional".
            output_state_before_norm: return the state that the final norm gets, too.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_index_scores` (of the
                sparse layers, [B, S, T] each and differentiable in their indexers), and what attention
                implementations take.

        Returns:
            `last_hidden_state` [B, S, D] after the final norm, the cache, and what was asked to be recorded.

        Raises:
            ValueError: if not exactly one of input_ids and inputs_embeds is given; for a cache where attention is
                bidirectional; for blocks with an attention implementation that has no mask for them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.attention_direction == "bidirectional":
            if use_cache or cache is not None:
                raise ValueError("bidirectional attention has no cache: every token may change with what follows it")
            if block_sequence_ids is None:
                block_sequence_ids = torch.zeros(
                    inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device
                )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask = self.causal_mask(inputs_embeds, attention_mask, position_ids, cache, block_sequence_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers[: self.config.num_hidden_layers]:  # early-exit assistance lowers the number
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                cache=cache,
                **kwargs,
            )
        return DeepSeekModelOutput(
            last_hidden_state=self.norm(hidden_states),
            cache=cache,
            state_before_norm=hidden_states if output_state_before_norm else None,
        )

    def predict_ahead(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> list[torch.Tensor]:
        """Run the prediction layers over whole sequences.

        Args:
            hidden_states: [B, S, D], the trunk's state after or before its final norm, as `config.mtp_after_norm`.
            block_sequence_ids: not used here: in both directions a position would see the token that it predicts,
                which is an input of the next one.
            others: as in `forward`, with which the states were made.

        Returns:
            One [B, S, D] per prediction layer, to be given to the head: position i of the d-th predicts token
            i + d + 1. Its last d positions have no token ahead and mean nothing.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask = self.causal_mask(inputs_embeds, attention_mask, position_ids, None)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        predicted: list[torch.Tensor] = []
        for layer in (layer for layer in self.layers if isinstance(layer, DeepSeekMTPLayer)):
            state = layer(
                hidden_states,
                shift_left(inputs_embeds, len(predicted) + 1),
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            predicted.append(layer.shared_head(state))
            hidden_states = predicted[-1] if self.config.mtp_after_norm else state
        return predicted

    def causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        block_sequence_ids: torch.Tensor | None = None,
    ) -> Any:
        """The mask of this call, in the form that the attention implementation asks for; built once for all layers."""
        if block_sequence_ids is not None:
            if "flash" in str(self.config._attn_implementation):
                raise ValueError(
                    f"{self.config._attn_implementation} has no mask for attention in both directions; "
                    "set attn_implementation to sdpa, eager or flex_attention"
                )
            seen = cache.get_seq_length() if cache is not None else 0
            block_sequence_ids = nn.functional.pad(block_sequence_ids, (int(seen), 0), value=-1)
        if position_ids is not None and inputs_embeds.shape[1] > 1:
            # transformers looks for packed documents only without a mask and a cache: let those that say nothing
            # count as absent, and tell padding by positions, else documents leak into each other.
            if cache is not None and not cache.is_compileable:
                cache = cache if cache.get_seq_length() else None
            if attention_mask is not None and attention_mask.ndim == 2 and cache is None:
                visible = attention_mask.bool()
                positions = torch.where(visible, position_ids, -2)  # each pad becomes a document of its own
                restarts = visible[:, 1:] & (positions[:, 1:] <= positions.cummax(-1).values[:, :-1])
                if visible.all() or restarts.any():
                    attention_mask, position_ids = None, positions
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
            block_sequence_ids=block_sequence_ids,
        )


def prompt_blocks(labels: torch.Tensor) -> torch.Tensor:
    """[B, S] labels -> block_sequence_ids: each stretch without labels (-100) is one block, labelled tokens are -1."""
    is_prompt = labels == -100
    begins = is_prompt & ~nn.functional.pad(is_prompt[:, :-1], (1, 0), value=False)
    return torch.where(is_prompt, begins.cumsum(1) - 1, -1)


def labelled_positions(hidden_states: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, D], [B, S] -> [1, N, D] hidden states from which a label is predicted, and these labels [1, N].

    Raises:
        ValueError: without labels.
    """
    if labels is None:
        raise ValueError('logits_to_keep="labelled" needs labels')
    targets = labels[:, 1:].to(hidden_states.device)
    is_target = targets != -100
    return hidden_states[:, :-1][is_target].unsqueeze(0), targets[is_target].unsqueeze(0)


def tells_prompt(prepare_inputs: Callable) -> None:
    """Raise TypeError if `generate` no longer says `is_first_iteration`, which alone tells a prompt from what follows:
    its tokens would silently be read causally."""
    if "is_first_iteration" not in inspect.signature(prepare_inputs).parameters:
        raise TypeError(
            f"transformers {__version__} does not tell prefix attention where the prompt ends; install the newest "
            "deepseek-hf"
        )


class DeepSeekForCausalLM(DeepSeekPreTrainedModel, GenerationMixin):
    """The language model: next-token logits over the vocabulary.

    With `config.num_nextn_predict_layers` it has the prediction layers too, behind the others in `model.layers`. They
    take part only in the loss, and only if `config.mtp_loss_weight` is set.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    generate = in_library_words(GenerationMixin.generate)

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        first = config.num_hidden_layers
        self.model.layers.extend(DeepSeekMTPLayer(config, first + d) for d in range(config.num_nextn_predict_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def slices_ahead(self, ahead: dict[str, Any], rest: dict[str, Any], source: str) -> dict[str, Any]:
        """The prediction layers' entries without their copies of embedding and head. If there are none at all, as
        where transformers wrote the checkpoint, the model goes without such layers."""
        config = self.config
        if config.num_nextn_predict_layers and not ahead:
            if config.mtp_loss_weight:
                raise CheckpointError(
                    f"there are no weights of prediction layers (model.layers.{config.num_hidden_layers}.*) to train "
                    f"with mtp_loss_weight={config.mtp_loss_weight}; set it to 0"
                )
            logger.warning(f"{source} has no weights of prediction layers; the model is loaded without them")
            del self.model.layers[config.num_hidden_layers :]
            config.num_nextn_predict_layers = 0
        for key in differing_copies({**rest, **ahead}, config):
            logger.warning(f"{source}: {key} differs from the weight that it is a copy of, which is used in its place")
        shared = shared_mtp_keys(config)
        return {key: entry for key, entry in ahead.items() if key not in shared}

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | str = 0,
        **kwargs,
    ) -> DeepSeekCausalLMOutput:
        """Arguments as in `DeepSeekModel.forward`, and

        labels: [B, S], -100 where there is nothing to learn; shifted here. With `attention_direction` "prefix" the
            stretches without labels see themselves in both directions, as a prompt does in `generate`.
        logits_to_keep: only the last so many positions (0: all), a tensor of positions, or "labelled": only where a
            label is predicted, which saves the head's work on the prompts; the logits are then [1, N, V].
        num_items_in_batch (in kwargs): divide the summed loss by this instead of the number of labels.

        With labels and `config.mtp_loss_weight`, `mtp_loss` is the mean over the prediction layers' losses. In
        training `loss` includes it with that weight (eq. 25); in evaluation `loss` is the next token's alone.
        """
        if self.config.attention_direction == "prefix" and labels is not None:
            kwargs.setdefault("block_sequence_ids", prompt_blocks(labels))
        learns_ahead = labels is not None and self.config.mtp_loss_weight > 0
        if learns_ahead and not self.config.mtp_after_norm:
            kwargs["output_state_before_norm"] = True
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, shift_labels = outputs.last_hidden_state, None
        if isinstance(logits_to_keep, str):
            hidden_states, shift_labels = labelled_positions(hidden_states, labels)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **({} if shift_labels is None else {"shift_labels": shift_labels}),
                **kwargs,
            )
        mtp_loss = None
        if learns_ahead:
            state = outputs.last_hidden_state if self.config.mtp_after_norm else outputs.state_before_norm
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
            mtp_loss = self.mtp_loss(state, labels, attention_mask=attention_mask, **inputs, **kwargs)
            loss = loss + self.config.mtp_loss_weight * mtp_loss if self.training else loss
        return DeepSeekCausalLMOutput(
            loss=loss,
            mtp_loss=mtp_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration=False, use_cache=True, **kwargs
    ):
        """As transformers', and with `attention_direction` "prefix" the first call's tokens are one block."""
        if self.config.attention_direction == "prefix":
            if not use_cache:
                raise ValueError("prefix attention generates with a cache, which tells the prompt from what follows")
            kwargs.pop("block_sequence_ids", None)
            if is_first_iteration:
                prompt = input_ids if inputs_embeds is None else inputs_embeds
                kwargs["block_sequence_ids"] = torch.zeros(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        return super().prepare_inputs_for_generation(
            input_ids,
            *args,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )

    def create_masks_for_generate(self, config, inputs_embeds, *, is_first_iteration=False, **kwargs):
        """The mask for a static cache, which transformers builds before the forward, with the prompt as a block."""
        if config.attention_direction == "prefix" and is_first_iteration:
            kwargs["block_sequence_ids"] = torch.zeros(
                inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device
            )
        return create_masks_for_generate(config=config, inputs_embeds=inputs_embeds, **kwargs)

    def mtp_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Mean over the prediction layers of their cross entropies (eq. 24 and 25, without lambda).

        Args:
            hidden_states: [B, S, D], as `DeepSeekModel.predict_ahead` takes them; so are the other inputs.
            labels: [B, S], not shifted.
        """
        ahead = self.model.predict_ahead(
            hidden_states, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        losses = [
            cross_entropy(
                self.lm_head(states), labels_ahead(labels, depth, attention_mask, position_ids), num_items_in_batch
            )
            for depth, states in enumerate(ahead, start=1)
        ]
        return torch.stack(losses).mean()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        is_split = generation_config.prefill_chunk_size or is_assisted
        if self.config.attention_direction == "prefix":
            if is_split:
                raise ValueError("prefix attention reads the prompt alone and as a whole: no assistant, no chunks")
            tells_prompt(super().prepare_inputs_for_generation)
        refuse_cache_implementation(generation_config.cache_implementation)
        # A static cache has no row for the last token, which nobody reads; but a wrong guess of it is verified.
        rows = max_cache_length + is_assisted
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, rows
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, for its paged cache cannot hold latents. `generate_batch` and `generate` get here too."""
        refuse_cache_implementation("paged")


class DeepSeekForSequenceClassification(DeepSeekPreTrainedModel):
    """One score vector per sequence, read off at its last token: classification, regression, reranking."""

    # The loss is a mean over the batch, so Trainer has to divide it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepSeekModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> DeepSeekSequenceOutput:
        """Arguments as in `DeepSeekModel.forward`, and labels: [B] classes or targets, or [B, num_labels].

        Returns:
            `logits` [B, num_labels].

        Raises:
            ValueError: for a batch in which nothing tells where a sequence ends.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(hidden_states[rows, self.last_token(hidden_states, input_ids, attention_mask)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return DeepSeekSequenceOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def last_token(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | int:
        """[B] positions of the last token that is no padding, by token id, else by the mask, else the last one."""
        if input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        elif attention_mask is not None and attention_mask.ndim == 2:
            is_token = attention_mask[:, -hidden_states.shape[1] :].bool()
        elif hidden_states.shape[0] == 1 or input_ids is None:
            return -1
        else:
            raise ValueError("batches of more than one row need config.pad_token_id or an attention_mask")
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return (positions * is_token.to(positions.device)).argmax(-1)


class DeepSeekForTokenClassification(DeepSeekPreTrainedModel):
    """One score vector per token."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepSeekModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Arguments as in `DeepSeekModel.forward`, and labels: [B, S], -100 to leave a token out.

        Returns:
            `logits` [B, S, num_labels].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DeepSeekForQuestionAnswering(DeepSeekPreTrainedModel):
    """Extractive answers: for each token, how well the answer starts and ends there.

    With `config.type_vocab_size` it is told what kind each token is of, such as which ones the question has too.
    """

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Arguments as in `DeepSeekModel.forward`, and

        start_positions, end_positions: [B], the answer's first and last token; positions outside of the sequence are
            left out of the loss.
        token_type_ids: [B, S] kinds of tokens, below `config.type_vocab_size`; absent, all are 0.

        Returns:
            `start_logits` and `end_logits`, [B, S].

        Raises:
            ValueError: for kinds of tokens if the model knows none.
        """
        if hasattr(self, "token_type_embeddings"):
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.model.embed_tokens(input_ids), None
            if token_type_ids is None:
                token_type_ids = torch.zeros((1, 1), dtype=torch.long, device=inputs_embeds.device)
            inputs_embeds = inputs_embeds + self.token_type_embeddings(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError("this model knows no kinds of tokens; set config.type_vocab_size or leave token_type_ids")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def item_numbers(config: Any) -> tuple[int, int]:
    """How many items there are, the padding included, and its number."""
    if getattr(config, "num_items", None) is not None:
        return config.num_items, ITEM_PADDING
    return config.vocab_size, config.pad_token_id


def loss_name(config: Any) -> str:
    """The loss that is asked for, or the whole softmax as far as it is cheap."""
    if config.item_loss is not None:
        return config.item_loss
    # For the trunk each item of the softmax is a text to be read.
    is_read = getattr(config, "num_items", None) is not None and config.item_text_encoder == "trunk"
    limit = config.num_item_negatives + 1 if is_read else FULL_SOFTMAX_ITEMS
    return "softmax" if item_numbers(config)[0] <= limit else "sampled_softmax"


def feature_reader(model: Any, *features: Any) -> DeepSeekSideFeatures | None:
    """What reads a model's user and context features, None where it has none.

    Raises:
        ValueError: if there is none, but features are given.
    """
    reader = getattr(model, "side_features", None)
    if reader is None and any(part is not None for part in features):
        raise ValueError(
            "this model reads no user or context features; make one with config.user_features or "
            "config.context_features, or leave them out"
        )
    return reader


class DeepSeekForRecommendation(DeepSeekPreTrainedModel):
    """A history of items in, a score for every item to come next out.

    The vocabulary is the catalogue: `config.vocab_size` rows, of which `config.pad_token_id` (0 if it isn't set) is
    no item but padding. A score is the product of the last hidden state with the item's embedding (Kang and McAuley,
    arXiv 1808.09781, equation 6), or with `item_head` where `config.tie_item_embeddings` is false.

    With `config.num_items` the vocabulary are words instead, and items are texts of them, number 0 being the padding:
    an item's embedding is made of its text by the same trunk (item_texts.py), so that items which `add_items` brings
    are ranked without a click. An empty history is then one padding, which the mask lets through.

    With `config.user_features` or `config.context_features` what is known of the user stands before the history, and
    the context of each interaction before its item (side_features.py).

    With `config.num_item_neighbors` what is counted of items is added to the scores, not to the loss (item_counts.py).
    """

    def __init__(self, config: DeepSeekConfig):
        if config.pad_token_id is None:
            config.pad_token_id = 0
        super().__init__(config)
        self.model = DeepSeekModel(config)
        if config.num_items is not None:
            self.item_texts = DeepSeekItemTexts(config)
        if config.user_features or config.context_features:
            self.side_features = DeepSeekSideFeatures(config)
        if config.num_item_neighbors:
            self.item_counts = DeepSeekItemCounts(*item_numbers(config), config)
        if not config.tie_item_embeddings:
            self.item_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def item_embeddings(self) -> torch.Tensor:
        """[V, D], by which items are scored."""
        if self.config.num_items is not None:
            return self.item_texts.table(self.model)
        if not self.config.tie_item_embeddings:
            return self.item_head.weight
        table = self.model.embed_tokens
        if type(table) is nn.Embedding:
            return table.weight
        return table(torch.arange(self.config.vocab_size, device=table.weight.device))  # an adapter has its say

    def read_items(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the trunk reads in place of item numbers: [B, S] -> [B, S, D]."""
        if self.config.num_items is not None:
            return nn.functional.embedding(input_ids, self.item_embeddings())
        return self.model.embed_tokens(input_ids)

    def add_items(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append items to a catalogue of texts (`config.num_items`), given as tokens. Not amid a training: the
        optimizer would go on with the former rows.

        Returns:
            Their numbers [N].

        Raises:
            ValueError: if the items of this model aren't texts, or a text is empty or too long.
        """
        if self.config.num_items is None:
            raise ValueError("the items of this model are ids without text; make it with config.num_items")
        numbers = self.item_texts.append(texts)
        self.config.num_items += len(numbers)
        if hasattr(self, "item_counts"):
            self.item_counts.append(len(numbers))
        return numbers

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "item_head", None)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.item_head = new_embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        candidates: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        **kwargs,
    ) -> DeepSeekSequenceOutput:
        """Arguments as in `DeepSeekModel.forward`, the input_ids [B, S] being item numbers, oldest first, and

        labels: [B, S], usually the input_ids, -100 where there is nothing to learn; shifted here, so that every item
            is learned from those before it. The loss is `config.item_loss`.
        num_items_in_batch: divide the summed loss by this instead of the number of labels.
        candidates: [B, C] item numbers, filled up with the padding: score these alone. The labels [B] then say which
            of its candidates each row went on with, and the loss is the cross entropy among them.
        user_features: [B, F] numbers of values, 0 where there is none or it is unknown; absent, all are 0.
        context_features: [B, S, C], the same for the interaction that follows each item, the last being the one asked
            for. What is recorded of the layers counts these tokens too, and a cache can't be gone on with.
        inputs_embeds: in place of the input_ids; then nothing that is counted of the items is added to the scores.

        Returns:
            `logits` [B, V] or [B, C]: the scores of all items after the last one of each row, the lowest number for
            the padding. None while training without candidates: a large catalogue's scores would cost more than its
            sampled loss.

        Raises:
            ValueError: for a batch in which nothing tells where a sequence ends; for features of a model without such,
                or of another shape; with features for a cache that isn't empty, or position_ids; with counted items
                for a cache that isn't empty.
        """
        side = feature_reader(self, user_features, context_features)
        history = input_ids
        if hasattr(self, "item_counts") and cache is not None and cache.get_seq_length():
            raise ValueError("a model with counted items can't go on from a cache; give whole histories")
        _, padding = item_numbers(self.config)
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ne(input_ids, padding).long()
            if cache is not None and cache.get_seq_length():
                attention_mask = None  # it would have to cover the cached items too
        picked = None
        if self.config.num_items is not None and input_ids is not None:
            picked = self.pick_items(input_ids, candidates, is_learning=self.training and labels is not None)
            inputs_embeds, input_ids = picked.read(input_ids), None  # the mask says what is padding
        mask = attention_mask
        if side is not None:
            if position_ids is not None or (cache is not None and cache.get_seq_length()):
                raise ValueError(
                    "a model with user or context features counts positions itself and can't go on from a cache; give "
                    "whole histories, without position_ids"
                )
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.read_items(input_ids), None
            inputs_embeds, mask, position_ids = side(inputs_embeds, attention_mask, user_features, context_features)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if side is not None:
            hidden_states = side.predicting(hidden_states)
        loss = logits = None
        if labels is not None and candidates is None:
            loss = self.next_item_loss(hidden_states, labels, num_items_in_batch, picked)
        if labels is None or candidates is not None or not self.training:
            rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            last = hidden_states[rows, self.last_token(hidden_states, input_ids, attention_mask)]
            picked = picked or PickedItems(self.item_embeddings(), None)
            if candidates is not None:
                logits = torch.einsum("bd,bcd->bc", last, picked.read(candidates))
                if hasattr(self, "item_counts") and history is not None:
                    logits = logits + self.item_counts(history).gather(1, candidates)
                logits = logits.masked_fill(candidates == padding, torch.finfo(logits.dtype).min)
            else:
                logits = item_scores(last, picked.vectors)
                lowest = torch.finfo(logits.dtype).min
                if hasattr(self, "item_counts") and history is not None:
                    logits += self.item_counts(history)
                logits.index_fill_(1, torch.tensor([padding], device=last.device), lowest)  # in place: it is large
        if labels is not None and candidates is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return DeepSeekSequenceOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    last_token: Any = DeepSeekForSequenceClassification.last_token

    def pick_items(self, input_ids: torch.Tensor, candidates: torch.Tensor | None, is_learning: bool) -> PickedItems:
        """The vectors that a batch of histories [B, S] of items of text needs: all as they are kept, or to learn from
        with gradients those of its own items and of the negatives."""
        if not is_learning:
            return PickedItems(self.item_embeddings(), None)
        config = self.config
        if candidates is not None:
            return self.item_texts.pick(
                self.model, torch.cat((input_ids.flatten(), candidates.flatten())), input_ids[:0, 0]
            )
        if loss_name(config) == "softmax":
            negatives = torch.arange(1, config.num_items, device=input_ids.device)
        else:
            negatives = draw_negatives(config.num_item_negatives, config.num_items - 1, ITEM_PADDING, input_ids.device)
        return self.item_texts.pick(self.model, input_ids, negatives)

    def next_item_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        picked: PickedItems | None = None,
    ) -> torch.Tensor:
        """Mean loss of the item after each position: hidden states [B, S, D], labels [B, S] (not shifted); of all
        items, or among those picked."""
        config = self.config
        num_items, padding = item_numbers(config)
        targets = labels[:, 1:].to(hidden_states.device)
        known = targets != -100
        picked = picked or PickedItems(self.item_embeddings(), None)
        total = item_loss(
            loss_name(config),
            hidden_states[:, :-1][known],
            picked.place(targets[known]),
            picked.vectors,
            padding,
            config.num_item_negatives,
            config.gbce_calibration,
            picked.negatives,
            num_items - 1,
        )
        return total / (known.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def last_states(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Histories [B, S], padded on the right -> [B, D], whose products with the item_embeddings are the scores,
        without what is counted."""
        first = input_ids[:, :1]  # one candidate in place of the whole catalogue
        outputs = self(input_ids=input_ids, candidates=first, output_hidden_states=True, use_cache=False, **kwargs)
        mask = torch.ne(input_ids, item_numbers(self.config)[1]).long()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        states = outputs.hidden_states[-1]
        if hasattr(self, "side_features"):
            states = self.side_features.predicting(states)
        return states[rows, self.last_token(states, None, mask)]

    @torch.no_grad()
    def recommend(
        self,
        history: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor,
        k: int = 10,
        exclude_seen: bool = True,
        filter: torch.Tensor | Sequence[int] | None = None,
        user_features: Any = None,
        context_features: Any = None,
        search: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best next items, by exact search over the whole catalogue unless another search is given.

        Args:
            history: item numbers of one user, oldest first, or of several; or [B, S] padded on the right. The last
                `config.max_position_embeddings` of them are read.
            exclude_seen: leave out all items of the history.
            filter: the only items to choose from: their numbers, or booleans [V] or [B, V].
            user_features: numbers [F] for one user, [B, F] for several; see `forward`.
            context_features: of the request, [C] or [B, C]; or of what followed each item of the history and, at the
                last, of the request: [S, C] for one user, for several a list of such or [B, S, C].
            search: takes the `last_states` [B, D], the item_embeddings [V, D], k, the padding and the items to leave
                out (as `top_k` does), and returns what `top_k` does. With a filter the search is exact nevertheless.

        Returns:
            Items and scores, best first: [K] for one user, [B, K] for several; K = min(k, number of items). Where
            fewer are left, the rest is padding with a score of minus infinity.

        Raises:
            ValueError: for an empty history, a number that is no item or no value of its column, features of a model
                without such, another search for a model with counted items, or if nothing is left to choose from.
        """
        if search is not None and hasattr(self, "item_counts"):
            raise ValueError("a model with counted items is searched exactly; leave out the search")
        side = feature_reader(self, user_features, context_features)
        num_items, padding = item_numbers(self.config)
        rows: Any
        if torch.is_tensor(history):
            rows = [[item for item in row if item != padding] for row in torch.atleast_2d(history).tolist()]
            is_one = history.ndim == 1
        else:
            is_one = not len(history) or not hasattr(history[0], "__len__")
            rows = [history] if is_one else history
        seen = pad_histories(rows, num_items, padding).to(self.device)
        recent = [row[-self.config.max_position_embeddings :] for row in rows]
        input_ids = pad_histories(recent, num_items, padding).to(self.device)
        features: dict[str, torch.Tensor] = {}
        if side is not None:
            given = [[part] if is_one and part is not None else part for part in (user_features, context_features)]
            features = side.of_requests([*map(len, rows)], self.config.max_position_embeddings, *given)
        allowed = None if filter is None else allowed_items(filter, num_items, padding)
        was_training = self.training
        excluded = seen if exclude_seen else None
        try:
            if search is not None and allowed is None:
                states = self.eval().last_states(input_ids, **features)
                items, best = search(states, self.item_embeddings(), k, padding, excluded)
            else:
                scores = self.eval()(input_ids=input_ids, use_cache=False, **features).logits
                items, best = top_k(scores, k, padding, excluded, allowed, overwrite=True)
        finally:
            self.train(was_training)
        return (items[0], best[0]) if is_one else (items, best)


class DeepSeekForEmbedding(DeepSeekPreTrainedModel):
    """A text in, a vector of length 1 out; texts that belong together get vectors that point the same way.

    How the tokens' states become one vector says `config.pooling`. Where every token should see the whole text, set
    `config.attention_direction` to "bidirectional". Queries and passages are told apart by `config.query_prefix` and
    `config.passage_prefix`, which whoever makes the tokens writes before the texts.
    """

    # The loss is a mean over the queries, so Trainer has to divide it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        if config.pooling == "latent":
            self.pooling = LatentAttentionPooling(
                config.hidden_size, config.num_pooling_latents, config.num_pooling_heads, config.rms_norm_eps
            )
        self.post_init()

    def pool(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S, D] states of the trunk -> [B, D] of length 1. What is padding says a mask [B, S]; a ready mask of
        another shape says nothing, and then the token ids do. Without any mask all are tokens."""
        is_token = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None and getattr(attention_mask, "ndim", 0) == 2:
            is_token = attention_mask.bool()
        elif attention_mask is not None and input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        pool = self.pooling if self.config.pooling == "latent" else POOLING_FUNCTIONS[self.config.pooling]
        return truncated(pool(hidden_states, is_token.to(hidden_states.device)), None)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        passage_input_ids: torch.Tensor | None = None,
        passage_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> DeepSeekEmbeddingOutput:
        """Arguments as in `DeepSeekModel.forward`, without a cache, and for training

        passage_input_ids: [P, T] tokens of the passages, those of the input_ids being the queries.
        passage_attention_mask: [P, T].
        labels: [B], which passage is each query's. Passages that are nobody's are hard negatives. With several
            processes, each query is compared with the passages of its own process.

        Raises:
            ValueError: for a cache, and for labels without passages.
        """
        if kwargs.pop("use_cache", None) or kwargs.get("cache") is not None:
            raise ValueError("an embedding is made of a whole text at once; leave use_cache and cache out")
        if labels is not None and passage_input_ids is None:
            raise ValueError("labels say which passage is a query's, but there are no passage_input_ids")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        embeddings = self.pool(outputs.last_hidden_state, input_ids, attention_mask)
        passages = loss = None
        if passage_input_ids is not None:
            states = self.model(passage_input_ids, passage_attention_mask, use_cache=False).last_hidden_state
            passages = self.pool(states, passage_input_ids, passage_attention_mask)
        if labels is not None:
            config = self.config
            loss = matryoshka_loss(
                embeddings,
                passages,
                labels.to(embeddings.device),
                config.contrastive_temperature,
                config.matryoshka_sizes,
            )
        return DeepSeekEmbeddingOutput(
            loss=loss,
            embeddings=embeddings,
            passage_embeddings=passages,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "DeepSeekCausalLMOutput",
    "DeepSeekEmbeddingOutput",
    "DeepSeekForCausalLM",
    "DeepSeekForEmbedding",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForRecommendation",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
    "DeepSeekMTPLayer",
    "DeepSeekModel",
    "DeepSeekModelOutput",
    "DeepSeekPreTrainedModel",
    "GrowingLayer",
    "LatentLayer",
    "StaticKeyValueLayer",
    "StaticLatentLayer",
]
