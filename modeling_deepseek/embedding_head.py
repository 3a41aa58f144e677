"""The head that makes one vector of a text.

Letters: B texts, S tokens, P passages, T tokens of a passage, D width.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .cache import takes_cache
from .configuration_deepseek import DeepSeekConfig
from .contrastive import equal_rows, matryoshka_loss, truncated
from .contrastive import right_passages as right_of
from .modeling_deepseek import DeepSeekModel
from .pooling import POOLING_FUNCTIONS, LatentAttentionPooling, which_are_tokens
from .pretrained import DeepSeekPreTrainedModel


@dataclass
class DeepSeekEmbeddingOutput(ModelOutput):
    """`embeddings` [B, D] of length 1, `passage_embeddings` [P, D] if passages were given, and `loss` with labels."""

    loss: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    passage_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
        """[B, S, D] states of the trunk -> [B, D] of length 1. Without any mask all are tokens."""
        input_ids = None if attention_mask is None else input_ids
        is_token = which_are_tokens(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
        pool = self.pooling if self.config.pooling == "latent" else POOLING_FUNCTIONS[self.config.pooling]
        return truncated(pool(hidden_states, is_token), None)

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
        right_passages: torch.Tensor | None = None,
        **kwargs,
    ) -> DeepSeekEmbeddingOutput:
        """Arguments as in `DeepSeekModel.forward`, without a cache, and for training

        passage_input_ids: [P, T] tokens of the passages, those of the input_ids being the queries.
        passage_attention_mask: [P, T].
        labels: [B], which passage is each query's. Passages that are nobody's are hard negatives. With several
            processes, each query is compared with the passages of its own process.
        right_passages: [B, P] booleans, which passages answer each query, so that those beside its own are no
            negatives of it; absent, those that equal queries of the batch name.

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
            config, labels = self.config, labels.to(embeddings.device)
            if right_passages is None and input_ids is not None:
                right_passages = right_of(equal_rows(input_ids, attention_mask), labels, len(passages))
            loss = matryoshka_loss(
                embeddings, passages, labels, config.contrastive_temperature, config.matryoshka_sizes, right_passages
            )
        return DeepSeekEmbeddingOutput(
            loss=loss,
            embeddings=embeddings,
            passage_embeddings=passages,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
