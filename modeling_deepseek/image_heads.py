"""Heads for images: a stem makes tokens of pixels, the trunk reads them, a head decides.

Letters: B images, C channels, H x W pixels, S tokens, D hidden width, N labels.
"""

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_deepseek import DeepSeekConfig
from .image_stem import STEMS, ImageTokens
from .losses import num_targets
from .modeling_deepseek import DeepSeekModel
from .outputs import DeepSeekModelOutput
from .pooling import POOLING_FUNCTIONS, LatentAttentionPooling
from .pretrained import DeepSeekPreTrainedModel


class DeepSeekImageModel(DeepSeekPreTrainedModel):
    """What the heads for images share: stem and trunk, whose embeddings of words are never read here."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        if config.image_stem is None:
            raise ValueError(
                f"{type(self).__name__} needs image_stem ({', '.join(STEMS)}), and the config has none; set it, and "
                'attention_direction="bidirectional"'
            )
        self.stem = STEMS[config.image_stem](config)
        self.model = DeepSeekModel(config)

    def read(
        self, pixel_values: torch.Tensor | None, pixel_mask: torch.Tensor | None, **kwargs
    ) -> tuple[ImageTokens, DeepSeekModelOutput]:
        """[B, C, H, W], [B, H, W] -> the stem's tokens, and what the trunk makes of them.

        Raises:
            ValueError: for what are no such images, or too large ones.
        """
        shape = None if pixel_values is None else tuple(pixel_values.shape)
        if pixel_values is None or len(pixel_values.shape) != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be [images, {self.config.num_channels} channels (config.num_channels), height, "
                f"width]; they are {shape}"
            )
        if pixel_mask is not None and pixel_mask.shape != (shape[0], *shape[2:]):
            raise ValueError(f"pixel_mask {tuple(pixel_mask.shape)} must have the images' number, height and width")
        tokens = self.stem(pixel_values.to(self.dtype), pixel_mask)
        length, limit = tokens.states.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"images of {shape[2]} x {shape[3]} pixels make {length} tokens, the model takes {limit} "
                "(max_position_embeddings); make them smaller, or patch_size or conv_pooling larger"
            )
        mask = None if tokens.is_token is None else tokens.is_token.long()
        outputs = self.model(
            inputs_embeds=tokens.states,
            attention_mask=mask,
            grid_positions=tokens.positions,
            use_cache=False,
            **kwargs,
        )
        return tokens, outputs


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
