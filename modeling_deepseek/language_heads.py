"""Heads for text: the language model, and scores per text, per token and per answer.

They stand in one file, which travels with each of them, so that any of these heads can be put on a saved one's
checkpoint where this package isn't installed.

Letters: B batch, S tokens of this call, T tokens including cached ones, D hidden width, V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import __version__
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .ahead import IS_ASSISTED, PredictsAhead
from .attention_mla import keeps_weights
from .cache import refuse_cache_implementation, takes_cache
from .configuration_deepseek import DeepSeekConfig
from .layers import project
from .losses import IGNORED, cross_entropy, head_cross_entropy, needs_no_logits, num_targets
from .modeling_deepseek import PREDICTIONS, DeepSeekModel
from .mtp import shift_left
from .outputs import DeepSeekCausalLMOutput, DeepSeekSequenceOutput
from .pooling import last_token, which_are_tokens
from .pretrained import DeepSeekPreTrainedModel
from .transformers_names import CACHE_WORD, create_masks_for_generate, in_library_words

logger = logging.get_logger(__name__)


def prompt_blocks(labels: torch.Tensor) -> torch.Tensor:
    """[B, S] labels -> block_sequence_ids: each stretch without labels (-100) is one block, labelled tokens are -1."""
    is_prompt = labels == -100
    begins = is_prompt & ~nn.functional.pad(is_prompt[:, :-1], (1, 0), value=False)
    return torch.where(is_prompt, begins.cumsum(1) - 1, -1)


def labelled_positions(
    hidden_states: torch.Tensor, labels: torch.Tensor | None, word: str = "labelled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, D], [B, S] -> [1, N, D] hidden states from which a label is predicted, and these labels [1, N].

    Raises:
        ValueError: without labels, or for another word of `logits_to_keep` than "labelled" and "loss".
    """
    if word not in ("labelled", "loss"):
        raise ValueError(f'logits_to_keep={word!r}: give a number, positions, "labelled" or "loss"')
    if labels is None:
        raise ValueError(f'logits_to_keep="{word}" needs labels')
    targets = labels[:, 1:].to(hidden_states.device)
    is_target = targets != -100
    return hidden_states[:, :-1][is_target].unsqueeze(0), targets[is_target].unsqueeze(0)


def inside(positions: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """[B], [B, S] -> [B], positions outside of the row made a label that is left out."""
    positions = positions.to(scores.device).view(-1)
    return positions.masked_fill((positions < 0) | (positions >= scores.shape[1]), IGNORED)


def tells_prompt(prepare_inputs: Callable) -> None:
    """Raise TypeError if `generate` no longer says `is_first_iteration`, which alone tells a prompt from what follows:
    its tokens would silently be read causally."""
    if "is_first_iteration" not in inspect.signature(prepare_inputs).parameters:
        raise TypeError(
            f"transformers {__version__} does not tell prefix attention where the prompt ends; install the newest "
            "deepseek-hf"
        )


class DeepSeekForCausalLM(PredictsAhead, DeepSeekPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model: next-token logits over the vocabulary.

    With `config.num_nextn_predict_layers` it has the prediction layers too, behind the others in `model.layers`. They
    take part in the loss if `config.mtp_loss_weight` is set, and draft tokens by `generate(..., use_mtp=True)`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    generate = keeps_weights(in_library_words(GenerationMixin.generate))

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.model = DeepSeekModel(config)
        first, word = config.num_hidden_layers, config.prediction_word
        ahead = range(config.num_nextn_predict_layers if word in PREDICTIONS else 0)
        self.model.layers.extend(PREDICTIONS[word](config, first + d) for d in ahead)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        logits_to_keep: int | torch.Tensor | str = 0,
        output_draft_states: bool = False,
        **kwargs,
    ) -> DeepSeekCausalLMOutput:
        """Arguments as in `DeepSeekModel.forward`, and

        labels: [B, S], -100 where there is nothing to learn; shifted here. With `attention_direction` "prefix" the
            stretches without labels see themselves in both directions, as a prompt does in `generate`.
        logits_to_keep: only the last so many positions (0: all), a tensor of positions, or "labelled": only where a
            label is predicted, which saves the head's work on the prompts; the logits are then [1, N, V]. Or "loss":
            none, `logits` is then None, and where the head is a plain Linear they take no memory in training.
        num_items_in_batch (in kwargs): divide the summed loss by this instead of the number of labels.

        With labels and `config.mtp_loss_weight`, `mtp_loss` is the mean over the prediction layers' losses. In
        training `loss` includes it with that weight (eq. 25); in evaluation `loss` is the next token's alone.
        """
        if self.config.attention_direction == "prefix" and labels is not None:
            kwargs.setdefault("block_sequence_ids", prompt_blocks(labels))
        if self.training and labels is None:
            self._tell_what_needs_labels(kwargs)
        learns_ahead = labels is not None and self.config.mtp_loss_weight > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_draft_states=output_draft_states or learns_ahead,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        mtp_loss = None
        if learns_ahead:
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
            mtp_loss = self.loss_ahead(outputs, labels, attention_mask=attention_mask, **inputs, **kwargs)
            loss = loss + self.config.mtp_loss_weight * mtp_loss if self.training else loss
        return DeepSeekCausalLMOutput(  # type: ignore[call-arg]  # the word of 5.24
            loss=loss,
            mtp_loss=mtp_loss,
            draft_states=outputs.draft_states if output_draft_states else None,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _logits_and_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor | str,
        **kwargs,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the head makes of [B, S, D]; arguments as in `forward`."""
        is_loss_alone = isinstance(logits_to_keep, str) and logits_to_keep == "loss"
        is_own_loss = labels is not None and not hasattr(self, "_loss_function")
        if is_loss_alone and is_own_loss and needs_no_logits(self.lm_head, hidden_states):
            given = kwargs.get("shift_labels")
            targets = shift_left(labels, 1, IGNORED) if given is None else given
            return None, head_cross_entropy(self.lm_head, hidden_states, targets, kwargs.get("num_items_in_batch"))
        if isinstance(logits_to_keep, str):
            hidden_states, kwargs["shift_labels"] = labelled_positions(hidden_states, labels, logits_to_keep)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        logits, loss = project(self.lm_head, hidden_states), None
        if labels is not None:
            targets = labels[..., 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
            kwargs["num_items_in_batch"] = num_targets(targets.to(logits.device), kwargs.get("num_items_in_batch"))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return None if is_loss_alone else logits, loss

    def _tell_what_needs_labels(self, given: dict[str, Any]) -> None:
        """Who computes a loss of its own, as Trainer does to smooth labels, may keep them from the model."""
        smoothing = (
            "Trainer keeps labels from the model for label_smoothing_factor; set it to 0, or train by deepseek-hf"
        )
        if self.config.attention_direction == "prefix" and "block_sequence_ids" not in given:
            logger.warning_once(
                f"without labels or block_sequence_ids, prefix attention reads prompts causally ({smoothing})"
            )
        if self.config.mtp_loss_weight:
            logger.warning_once(
                f"without labels the prediction layers learn nothing, for all of mtp_loss_weight ({smoothing})"
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
        if kwargs.pop(IS_ASSISTED, False) and is_first_iteration and inputs_embeds is None:
            # assisted generation hands over the whole prompt, whatever of it the cache has read
            kwargs["next_sequence_length"] = input_ids.shape[1] - int(kwargs[CACHE_WORD].get_seq_length())
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
        is_token = which_are_tokens(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(last_token(hidden_states, is_token))
        loss = None
        if labels is not None:
            count = num_targets(labels.to(logits.device)) if not labels.is_floating_point() else None
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=count
            )
        return DeepSeekSequenceOutput(  # type: ignore[call-arg]  # the word of 5.24
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


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
            kwargs["num_items_in_batch"] = num_targets(labels.to(logits.device), kwargs.get("num_items_in_batch"))
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
            if token_type_ids is None:
                device = self.token_type_embeddings.weight.device
                token_type_ids = torch.zeros((1, 1), dtype=torch.long, device=device)
            kwargs["added_embeds"] = self.token_type_embeddings(token_type_ids)
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
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            count = kwargs.get("num_items_in_batch")
            losses = [cross_entropy(scores, inside(places, scores), count) for scores, places in pairs]
            loss = torch.stack(losses).mean()
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def enter_class_names() -> None:
    """Enter the heads in the tables of transformers that go by class name: Trainer shifts the labels that it smooths
    for those of the first, servers look a model's type up there."""
    for table, head in (
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, DeepSeekForCausalLM),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, DeepSeekForSequenceClassification),
        (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, DeepSeekForTokenClassification),
        (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, DeepSeekForQuestionAnswering),
    ):
        table[DeepSeekConfig.model_type] = head.__name__


enter_class_names()  # here, not in register.py: it is to hold where this package isn't installed, too
