"""The DeepSeek model: decoder layers and trunk.

Read it in this order: `DeepSeekDecoderLayer` (what a block is), `DeepSeekModel` (what the trunk is), the heads in
language_heads.py, embedding_head.py and recommendation_head.py. The mechanisms that a block is made of are one file
each: attention_mha.py, attention_mla.py, attention_dsa.py, attention_compressed.py, moe.py, routers.py, residual.py,
rope.py, cache.py, engram.py. Which of them a layer has is said by the config (`config.specs`), so no forward asks for
one.

Letters: B batch, S tokens of this call, T tokens including cached ones, D hidden width, V vocabulary.
"""

import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_compressed import (
    DeepSeekCompressedSparseAttention,
    DeepSeekHeavilyCompressedAttention,
    DeepSeekWindowAttention,
)
from .attention_dsa import DeepSeekSparseAttention
from .attention_mha import DeepSeekMultiHeadAttention
from .attention_mla import DeepSeekMultiHeadLatentAttention
from .attention_shared import DeepSeekReindexingAttention, DeepSeekReusingAttention, DeepSeekSourceAttention, Shared
from .cache import takes_cache
from .cache_compressed import layer_of
from .configuration_deepseek import HEADS_BY_OWN_AUTO_CLASS, DeepSeekConfig
from .dspark import DeepSeekDraftAttention, DraftBlocks, DraftStage, ShiftedDraftStage, Taps, blocks_behind
from .engram import DeepSeekEngram, first_ids
from .indexer import DeepSeekIndexer
from .layers import DeepSeekMLP, embedded, norm_of
from .masks import after_cached, with_documents
from .moe import DeepSeekHashMoE, DeepSeekMoE
from .mtp import MultiTokenPrediction, StreamPrediction, shift_left
from .outputs import DeepSeekModelOutput
from .pretrained import DeepSeekPreTrainedModel
from .residual import RESIDUALS, STREAMS
from .rope import DeepSeekRotaryEmbedding, without_entries
from .routers import DeepSeekTopKRouter
from .row_tokens import RowTokens, row_tokens
from .transformers_names import GradientCheckpointingLayer, create_causal_mask

ATTENTIONS = {
    "mha": DeepSeekMultiHeadAttention,
    "mla": DeepSeekMultiHeadLatentAttention,
    "dsa": DeepSeekSparseAttention,
    "swa": DeepSeekWindowAttention,
    "hca": DeepSeekHeavilyCompressedAttention,
    "csa": DeepSeekCompressedSparseAttention,
    "csa2_full": DeepSeekSourceAttention,
    "csa2_reindex": DeepSeekReindexingAttention,
    "csa2_reuse": DeepSeekReusingAttention,
    "dspark": DeepSeekDraftAttention,
}
FEED_FORWARDS = {"dense": DeepSeekMLP, "moe": DeepSeekMoE, "hash_moe": DeepSeekHashMoE}


class DeepSeekDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward, each joined to the residual stream as residual.py says."""

    def __init__(self, config: DeepSeekConfig, layer_idx: int):
        super().__init__()
        spec = config.spec_at(layer_idx)
        self.self_attn = ATTENTIONS[spec.attention](config, layer_idx)
        self.mlp = FEED_FORWARDS[spec.feed_forward](config.experts_at(layer_idx))
        self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)
        self.attn_hc = RESIDUALS[spec.residual](config)
        self.ffn_hc = RESIDUALS[spec.residual](config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D], or N streams of these; input_ids are for hash layers, kwargs for the attention."""
        hidden_states = self.attn_hc(hidden_states, self.attend, **kwargs)
        return self.ffn_hc(hidden_states, self.transform, input_ids=input_ids)

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D], the attention's part of the block."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return self.dropout(attended)

    def transform(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[B, S, D] -> [B, S, D], the feed-forward's part of the block."""
        return self.dropout(self.mlp(self.post_attention_layernorm(hidden_states), input_ids=input_ids))


class DeepSeekSharingLayer(DeepSeekDecoderLayer):
    """The block of V4.1: hands on the weights to read the streams by, and what layers share, beside the streams.

    All of it is tensors, one by one, so that a block can be run anew for its gradients. Where the config says so, the
    memory of n-grams is written into the streams first (engram.py).
    """

    def __init__(self, config: DeepSeekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.engram = DeepSeekEngram(config, layer_idx) if config.engram_rows(layer_idx) else None

    def __call__(self, hidden_states: tuple[torch.Tensor | None, ...], **kwargs) -> tuple[torch.Tensor | None, ...]:
        """What `ShiftedStreams.enter` or the layer before gave -> the same for the next one."""
        return super().__call__(*hidden_states, **kwargs)

    def forward(  # type: ignore[override]  # the state is several tensors
        self,
        streams: torch.Tensor,
        pre: torch.Tensor,
        *published: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        engram_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | None, ...]:
        """[B, S, N, D], [B, S, N] and the fields of `Published`, all or none -> the same."""
        shared = Shared(*published)
        if self.engram is not None:
            tokens, cache = kwargs["attention_mask"], kwargs.get("cache")
            streams = self.engram(streams, input_ids, engram_ids, tokens, cache)
        state: Any = (streams, pre)
        return (*super().forward(state, input_ids, shared=shared, **kwargs), *shared.published)


LAYERS = {"add": DeepSeekDecoderLayer, "mhc": DeepSeekDecoderLayer, "mhc_shifted": DeepSeekSharingLayer}


class DeepSeekMTPLayer(MultiTokenPrediction, DeepSeekDecoderLayer):  # type: ignore[misc]  # forward takes one more
    """A decoder layer that predicts one token further ahead; mtp.py says how."""


class DeepSeekStreamMTPLayer(StreamPrediction, DeepSeekMTPLayer):  # type: ignore[misc]
    """The same with residual streams."""


class DeepSeekDraftStage(DraftStage, DeepSeekDecoderLayer):  # type: ignore[misc]
    """A decoder layer that drafts several tokens; dspark.py says how."""


class DeepSeekShiftedDraftStage(ShiftedDraftStage, DeepSeekDraftStage):  # type: ignore[misc]
    """The same for V4.1."""


PREDICTIONS = {
    **{"add": DeepSeekMTPLayer, "mhc": DeepSeekStreamMTPLayer},
    **{"dspark": DeepSeekDraftStage, "dspark_shifted": DeepSeekShiftedDraftStage},
}


class DeepSeekModel(DeepSeekPreTrainedModel):
    """Embedding, decoder layers, final norm. The trunk that every head stands on."""

    _can_record_outputs = {
        "hidden_states": DeepSeekDecoderLayer,
        # each attention once: sparse attention is a subclass of the latent one, compressed ones of the window
        "attentions": [OutputRecorder(ATTENTIONS[word], index=1) for word in ("mha", "mla", "swa")],
        "index_scores": OutputRecorder(DeepSeekIndexer, index=0),
        "router_logits": OutputRecorder(DeepSeekTopKRouter, index=0),
    }

    def __init__(self, config: DeepSeekConfig):
        if config.attention_direction == "bidirectional":
            config.use_cache = False  # a config that was made otherwise and set to this has it still
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layer_class = LAYERS[config.residual_word]
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm_of(config)
        self.hc_head = STREAMS[config.residual_word](config)
        self.rotary_emb = DeepSeekRotaryEmbedding(without_entries(config))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.register_buffer("engram_ids", first_ids(config))
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
        output_draft_states: bool = False,
        grid_positions: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        added_embeds: torch.Tensor | None = None,
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
            output_draft_states: return what prediction layers read of each token, too, as `draft_states`.
            grid_positions: [B or 1, S, 2]; rows and columns of an image's tokens, which are rotated by these.
            image_embeds: [N, D]; what stands in row by row for the embeddings of the N tokens `config.image_token_id`.
            added_embeds: [B or 1, S or 1, D]; added to the tokens' embeddings.
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
            inputs_embeds = embedded(self.embed_tokens, input_ids)
        if added_embeds is not None:
            inputs_embeds = inputs_embeds + added_embeds.to(inputs_embeds.device)
        if image_embeds is not None:
            is_image: Any = input_ids == self.config.image_token_id
            inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(inputs_embeds))
        if self.config.attention_direction == "bidirectional":
            if use_cache or cache is not None:
                raise ValueError("bidirectional attention has no cache: every token may change with what follows it")
            if block_sequence_ids is None:
                block_sequence_ids = torch.zeros(
                    inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device
                )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask = self.mask_of(inputs_embeds, attention_mask, position_ids, cache, block_sequence_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        position_embeddings = self.rotary_emb(
            inputs_embeds, position_ids if grid_positions is None else grid_positions
        )

        hidden_states = self.hc_head.enter(self.dropout(inputs_embeds))
        kwargs |= {} if self.engram_ids is None else {"engram_ids": self.engram_ids}
        kind, taps = type(hidden_states), Taps(self.config.draft_taps if output_draft_states else [])
        # early-exit assistance lowers the number
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            taps.look(layer_idx, hidden_states)
            hidden_states = layer(
                hidden_states,
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                cache=cache,
                **kwargs,
            )
        taps.look(self.config.num_hidden_layers, hidden_states)
        if not isinstance(hidden_states, kind):
            raise ValueError(
                f"the last layer gave a {type(hidden_states).__name__} and no {kind.__name__}: layers are wrapped up "
                'to prediction layers, which stand behind; leave them out (target_modules=["model.layers.0", ...])'
            )
        last_hidden_state, draft_states = self.norm(self.hc_head(hidden_states)), None
        if output_draft_states:
            draft_states = last_hidden_state if self.config.predictions_read_norm else hidden_states
            draft_states = draft_states if self.config.dspark_block_size is None else taps.all()
        return DeepSeekModelOutput(  # type: ignore[call-arg]  # the word of 5.24
            last_hidden_state=last_hidden_state,
            cache=cache,
            draft_states=draft_states,
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
            hidden_states: [B, S, D], the trunk's state after or before its final norm, as
                `config.predictions_read_norm`; or its streams [B, S, N, D].
            block_sequence_ids: not used here: in both directions a position would see the token that it predicts,
                which is an input of the next one.
            others: as in `forward`, with which the states were made.

        Returns:
            One [B, S, D] per prediction layer, to be given to the head: position i of the d-th predicts token
            i + d + 1. Its last d positions have no token ahead and mean nothing.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask = self.mask_of(inputs_embeds, attention_mask, position_ids, None)
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
            predicted.append(layer.predicted(state))
            hidden_states = predicted[-1] if self.config.predictions_read_norm else state
        return predicted

    @property
    def draft_stages(self) -> list[DeepSeekDraftStage]:
        """The layers that draft, if there are any."""
        return [layer for layer in self.layers if isinstance(layer, DeepSeekDraftStage)]

    def draft_context(self, draft_states: torch.Tensor) -> torch.Tensor:
        """What `forward` gave as `draft_states`, [B, S, k D] -> [B, S, D], which blocks see.

        Drafts learn from the trunk, and the trunk nothing from them: no gradient goes back.
        """
        first = self.draft_stages[0]
        return first.main_norm(first.main_proj(draft_states.detach()))

    def draft(
        self,
        context: torch.Tensor,
        first_embeds: torch.Tensor,
        anchors: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the draft stages over blocks.

        Args:
            context: [B, S, D], as `draft_context` gives it.
            first_embeds: [B, A, D], embeddings of the tokens that blocks begin with.
            anchors: [B, A], the columns that blocks follow; attention_mask, position_ids: of these columns, as in
                `forward`.

        Returns:
            [B, A, b, D] before the norm of the head; entry j is of the token j + 2 behind the anchor.
        """
        config, stages = self.config, self.draft_stages
        tokens = row_tokens(attention_mask, position_ids, context.shape[:2], context.device, None)
        if position_ids is None:
            position_ids = torch.arange(context.shape[1], device=context.device).unsqueeze(0)
        size = config.dspark_block_size
        blocks: DraftBlocks = blocks_behind(anchors, tokens, position_ids, config.sliding_window, size)
        rotation = self.rotary_emb(context, position_ids), self.rotary_emb(context, blocks.positions)
        noise = self.embed_tokens(torch.full_like(blocks.positions[:, 1:], config.dspark_noise_token_id))
        embeds = torch.cat((first_embeds.flatten(0, 1).unsqueeze(1), noise.to(first_embeds.dtype)), dim=1)
        streams = stages[-1].hc_head.enter(embeds.detach())
        for stage in stages:
            streams = stage(streams, context, blocks=blocks, rotation=rotation)
        return stages[-1].hc_head(streams).unflatten(0, anchors.shape)

    def mask_of(self, *args, **kwargs) -> Any:
        """What this model's attention takes as a mask, of the arguments of `causal_mask`."""
        return MASKS[self.config.mask_word](self, *args, **kwargs)

    def rows_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        block_sequence_ids: torch.Tensor | None = None,
    ) -> RowTokens:
        """Which tokens of this call belong together, for attention that compresses them."""
        if block_sequence_ids is not None:
            raise ValueError("block_sequence_ids: compressed attention has no blocks; entries are of what came before")
        counted = None if cache is None else layer_of(cache, 0)
        return row_tokens(attention_mask, position_ids, inputs_embeds.shape[:2], inputs_embeds.device, counted)

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
            block_sequence_ids = after_cached(block_sequence_ids, cache)
        documents: dict[str, Any] = {}
        if position_ids is not None and inputs_embeds.shape[1] > 1:
            # transformers looks for packed documents only without a mask and a cache: let those that say nothing
            # count as absent.
            if cache is not None and not cache.is_compileable:
                cache = cache if cache.get_seq_length() else None
            if attention_mask is not None and attention_mask.ndim == 2 and cache is None:
                attention_mask, position_ids, documents = with_documents(
                    attention_mask, position_ids, str(self.config._attn_implementation)
                )
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
            block_sequence_ids=block_sequence_ids,
            **documents,
        )


MASKS = {"causal": DeepSeekModel.causal_mask, "rows": DeepSeekModel.rows_mask}
