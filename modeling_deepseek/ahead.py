"""What a language model does with prediction layers and draft stages: load them, learn from them, draft by them."""

from typing import Any

import torch
from transformers.utils import logging

from .checkpoint_keys import differing_copies
from .draft_loss import draft_loss
from .drafting import DRAFTERS
from .losses import head_cross_entropy, labels_ahead
from .weight_names import CheckpointError, are_other_predictions, shared_mtp_keys

logger = logging.get_logger(__name__)

IS_ASSISTED = "is_assisted"  # among the arguments of a generation: tokens are guessed in it


class PredictsAhead:
    """Part of `DeepSeekForCausalLM`; mtp.py and dspark.py have the layers."""

    config: Any
    model: Any
    lm_head: Any

    def slices_ahead(self, ahead: dict[str, Any], rest: dict[str, Any], source: str) -> dict[str, Any]:
        """The prediction layers' entries without their copies of embedding and head. If there are none at all, as
        where transformers wrote the checkpoint, or others than the config says, the model goes without such layers."""
        config = self.config
        if are_other_predictions(ahead, config):
            logger.warning(
                f"{source}: its prediction layers are not read: they are other ones than config.json says "
                f"(dspark_block_size={config.dspark_block_size})"
            )
            ahead = {}
        if config.num_nextn_predict_layers and not ahead:
            if config.mtp_loss_weight:
                raise CheckpointError(
                    f"there are no weights of prediction layers (model.layers.{config.num_hidden_layers}.*) to train "
                    f"with mtp_loss_weight={config.mtp_loss_weight}; set it to 0"
                )
            logger.warning(f"{source} has no weights of prediction layers; the model is loaded without them")
            del self.model.layers[config.num_hidden_layers :]
            config.without_predictions()
        for key in differing_copies({**rest, **ahead}, config):
            logger.warning(f"{source}: {key} differs from the weight that it is a copy of, which is used in its place")
        shared = shared_mtp_keys(config)
        return {key: entry for key, entry in ahead.items() if key not in shared}

    def loss_ahead(self, *args, **kwargs) -> torch.Tensor:
        """The loss of what is predicted ahead; arguments as in `mtp_loss`."""
        return LOSSES[self.config.prediction_word](self, *args, **kwargs)

    def mtp_loss(
        self,
        outputs: Any,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Mean over the prediction layers of their cross entropies (eq. 24 and 25, without lambda).

        Args:
            outputs: of the trunk, with `draft_states`; other inputs as `DeepSeekModel.predict_ahead` takes them.
            labels: [B, S], not shifted.
        """
        ahead = self.model.predict_ahead(
            outputs.draft_states, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        losses = [
            head_cross_entropy(
                self.lm_head, states, labels_ahead(labels, depth, attention_mask, position_ids), num_items_in_batch
            )
            for depth, states in enumerate(ahead, start=1)
        ]
        return torch.stack(losses).mean()

    def draft_loss(self, outputs: Any, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """As draft_loss.py has it; arguments as in `mtp_loss`."""
        return draft_loss(self.model, self.lm_head, outputs, labels, **kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs) -> Any:
        """transformers' choice of who guesses tokens in assisted generation; with `use_mtp` the model itself."""
        config, made = kwargs["generation_config"], super()._get_candidate_generator  # type: ignore[misc]
        is_own = config.use_mtp and config.assistant_early_exit is None and config.prompt_lookup_num_tokens is None
        drafter = self.drafter(**kwargs) if is_own else made(model_kwargs=model_kwargs, **kwargs)
        model_kwargs[IS_ASSISTED] = True  # once others have copied the arguments
        return drafter

    def drafter(self, generation_config: Any, logits_processor: Any, **kwargs) -> Any:
        """What guesses by prediction layers or draft stages.

        Raises:
            ValueError: if there are none.
        """
        if len(self.model.layers) == self.config.num_hidden_layers:
            raise ValueError("use_mtp: this model has no prediction layers to guess by; leave use_mtp out")
        return DRAFTERS[self.config.prediction_word](self, generation_config, logits_processor)


LOSSES = {
    **{"add": PredictsAhead.mtp_loss, "mhc": PredictsAhead.mtp_loss},
    **{"dspark": PredictsAhead.draft_loss, "dspark_shifted": PredictsAhead.draft_loss},
}
