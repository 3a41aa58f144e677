"""SASRec (Kang and McAuley, "Self-Attentive Sequential Recommendation", arXiv 1808.09781): what a recommender is to be
compared with, of the same width, depth and heads, trained on the same path (`--sasrec`).

Learned absolute positions, LayerNorm before each of two sub-layers, attention, and a feed-forward of the model's own
width with ReLU; dropout on embeddings and sub-layers; items are scored by their embeddings.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from modeling_deepseek import AutoModelForRecommendation, DeepSeekForRecommendation
from modeling_deepseek.item_catalogue import item_scores
from modeling_deepseek.pooling import last_token, which_are_tokens


class SASRecConfig(PreTrainedConfig):
    """The fields of `DeepSeekConfig` that SASRec has."""

    model_type = "sasrec"

    vocab_size: int = 2
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 50
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    use_cache: bool = False
    item_loss: str | None = None
    num_item_negatives: int = 512
    gbce_calibration: float = 0.75
    tie_item_embeddings: bool = True


class SASRecBlock(nn.Module):
    """Attention and a feed-forward, each with LayerNorm before and a residual around it (section 3.2)."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.attention_dropout = config.num_attention_heads, config.attention_dropout
        self.input_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]. Padding is on the right, where causal attention doesn't reach."""
        heads = self.qkv_proj(self.input_layernorm(hidden_states)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        hidden_states = hidden_states + self.dropout(self.o_proj(attended.transpose(1, 2).flatten(2)))
        wide = self.dropout(F.relu(self.up_proj(self.post_attention_layernorm(hidden_states))))
        return hidden_states + self.dropout(self.down_proj(wide))


class SASRecForRecommendation(PreTrainedModel):
    """Loss, scores and `recommend` as in `DeepSeekForRecommendation`."""

    config_class = SASRecConfig
    config: SASRecConfig

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        # One more than is read: the last item of a training window is a target only, but stands in the row.
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.layers = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def item_embeddings(self) -> torch.Tensor:
        return self.embed_tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutputWithPast:
        """Item numbers [B, S], padded on the right; as `DeepSeekForRecommendation.forward`."""
        hidden_states = self.embed_tokens(input_ids) * self.config.hidden_size**0.5  # as in the released code
        hidden_states = hidden_states + self.embed_positions.weight[: input_ids.shape[1]]
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.norm(hidden_states)
        loss = logits = None
        if labels is not None:
            loss = self.next_item_loss(hidden_states, labels, num_items_in_batch)
        if labels is None or not self.training:
            is_token = which_are_tokens(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
            last = last_token(hidden_states, is_token)
            logits = item_scores(last, self.item_embeddings())
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits)

    next_item_loss: Any = DeepSeekForRecommendation.next_item_loss
    recommend: Any = DeepSeekForRecommendation.recommend


def sasrec_config(config: PreTrainedConfig) -> SASRecConfig:
    """SASRec of the width, depth, heads and dropouts of another model's config."""
    known = config.to_dict()
    skipped = ("model_type", "layer_norm_eps", "use_cache", "initializer_range")
    return SASRecConfig(
        **{name: known[name] for name in SASRecConfig.__annotations__ if name in known and name not in skipped}
    )


def register_sasrec() -> None:
    """Let `AutoModelForRecommendation` open SASRec's folders. A run and `recommend` do; importing does not, since the
    table is the process's."""
    AutoConfig.register(SASRecConfig.model_type, SASRecConfig, exist_ok=True)
    AutoModelForRecommendation.register(SASRecConfig, SASRecForRecommendation, exist_ok=True)
