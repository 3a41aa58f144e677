"""Image classification: one decision about all tokens of an image.

Letters: B images, C channels, H x W pixels, S tokens, D hidden width, N labels.
"""

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_deepseek import DeepSeekConfig
from .image_model import DeepSeekImageModel
from .losses import num_targets
from .pooling import POOLING_FUNCTIONS, LatentAttentionPooling


class DeepSeekForImageClassification(DeepSeekImageModel):
    """One score vector per image, of the mean of its tokens' states or what else `config.pooling` says."""

    # The loss is a mean over the batch, so Trainer has to divide it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.pooling == "latent":
            self.pooling = LatentAttentionPooling(
                config.hidden_size, config.num_pooling_latents, config.num_pooling_heads, config.rms_norm_eps
            )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: [B, C, H, W].
            pixel_mask: [B, H, W], 0 at padding, which is right of an image and below it.
            labels: [B] classes or targets, or [B, N].
            kwargs: `output_hidden_states` and the like.

        Returns:
            `logits` [B, N].

        Raises:
            ValueError: for other channels than the config's, and images of more tokens than the model takes.
        """
        tokens, outputs = self.read(pixel_values, pixel_mask, **kwargs)
        hidden_states, is_token = outputs.last_hidden_state, tokens.is_token
        if is_token is None:
            is_token = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        pool = self.pooling if self.config.pooling == "latent" else POOLING_FUNCTIONS[self.config.pooling]
        logits = self.score(self.dropout(pool(hidden_states, is_token)))
        loss = None
        if labels is not None:
            count = None if labels.is_floating_point() else num_targets(labels.to(logits.device))
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=count
            )
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
