"""The DeepSeek model: decoder layers, trunk, and every head.

Read it in this order: `DeepSeekDecoderLayer` (what a block is), `DeepSeekModel` (what the trunk is), the heads. The
mechanisms that a block is made of are one file each: attention_mha.py, attention_mla.py, moe.py, routers.py, rope.py,
cache.py. Which of them a layer has is said by the config (`config.specs`), so no forward asks for a generation.

Letters: B batch, S tokens of this call, T tokens including cached ones, D hidden width, V vocabulary.
"""

import os
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mha import DeepSeekMultiHeadAttention
from .attention_mla import DeepSeekMultiHeadLatentAttention
from .cache import GrowingLayer, LatentLayer, StaticKeyValueLayer, StaticLatentLayer, refuse_cache_implementation
from .checkpoint_files import CheckpointError, naming_the_broken_file, writing_beside
from .checkpoint_keys import register_conversions
from .configuration_deepseek import DeepSeekConfig
from .layers import DeepSeekMLP, DeepSeekRMSNorm
from .moe import DeepSeekExperts, DeepSeekMoE
from .rope import DeepSeekRotaryEmbedding
from .routers import DeepSeekTopKRouter

ATTENTIONS = {"mha": DeepSeekMultiHeadAttention, "mla": DeepSeekMultiHeadLatentAttention}
FEED_FORWARDS = {"dense": DeepSeekMLP, "moe": DeepSeekMoE}

register_conversions()


class DeepSeekDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward, each added to the residual stream."""

    def __init__(self, config: DeepSeekConfig, layer_idx: int):
        super().__init__()
        spec = config.specs[layer_idx]
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


class DeepSeekPreTrainedModel(PreTrainedModel):
    """What all our models share towards transformers: loading, initialising, recording, switching implementations."""

    config_class = DeepSeekConfig
    config: DeepSeekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepSeekDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": DeepSeekDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in ATTENTIONS.values()],
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
        with naming_the_broken_file(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """As transformers', but a save that fails leaves the folder as it was."""
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
        if loading_info.conversion_errors:
            key = min(loading_info.conversion_errors)
            raise CheckpointError(
                f"{source}: the checkpoint's parts of weight {key} do not fit together (first of "
                f"{len(loading_info.conversion_errors)}); some are missing or misshapen, copy or download it again"
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
            raise CheckpointError(
                f"{source}: {len(missing)} weights of the model are not in the checkpoint, the first is {missing[0]}; "
                "the checkpoint is incomplete, or config.json describes another model"
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

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Run the trunk.

        Args:
            input_ids: [B, S]; or inputs_embeds: [B, S, D]. Exactly one.
            attention_mask: [B, T] with 0 at padding on either side, or a ready [B or 1, 1 or H, S, T] mask.
            position_ids: [B or 1, S]; counted from the cache if absent. Positions that restart in a row mark packed
                documents, which then do not see each other.
            past_key_values: a cache of transformers; with `use_cache` one is made if absent.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, and what attention
                implementations take.

        Returns:
            `last_hidden_state` [B, S, D] after the final norm, the cache, and what was asked to be recorded.

        Raises:
            ValueError: if not exactly one of input_ids and inputs_embeds is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = self.causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers[: self.config.num_hidden_layers]:  # early-exit assistance lowers the number
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> Any:
        """The mask of this call, in the form that the attention implementation asks for; built once for all layers."""
        if position_ids is not None and inputs_embeds.shape[1] > 1:
            # transformers looks for packed documents only without a mask and a cache: let those that say nothing
            # count as absent, and tell padding by positions, else documents leak into each other.
            if past_key_values is not None and not past_key_values.is_compileable:
                past_key_values = past_key_values if past_key_values.get_seq_length() else None
            if attention_mask is not None and attention_mask.ndim == 2 and past_key_values is None:
                visible = attention_mask.bool()
                positions = torch.where(visible, position_ids, -2)  # each pad becomes a document of its own
                restarts = visible[:, 1:] & (positions[:, 1:] <= positions.cummax(-1).values[:, :-1])
                if visible.all() or restarts.any():
                    attention_mask, position_ids = None, positions
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


class DeepSeekForCausalLM(DeepSeekPreTrainedModel, GenerationMixin):
    """The language model: next-token logits over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Arguments as in `DeepSeekModel.forward`, and

        labels: [B, S], -100 where there is nothing to learn; shifted here.
        logits_to_keep: only the last so many positions (0: all), or a tensor of positions.
        num_items_in_batch (in kwargs): divide the summed loss by this instead of the number of labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        refuse_cache_implementation(generation_config.cache_implementation)
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
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
            past_key_values=past_key_values,
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
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
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
            past_key_values=past_key_values,
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
    """Extractive answers: for each token, how well the answer starts and ends there."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Arguments as in `DeepSeekModel.forward`, and start_positions, end_positions: [B], the answer's first and
        last token; positions outside of the sequence are left out of the loss.

        Returns:
            `start_logits` and `end_logits`, [B, S].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
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


__all__ = [
    "DeepSeekForCausalLM",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
    "DeepSeekModel",
    "DeepSeekPreTrainedModel",
    "GrowingLayer",
    "LatentLayer",
    "StaticKeyValueLayer",
    "StaticLatentLayer",
]
