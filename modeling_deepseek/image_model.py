"""What heads for images stand on: a stem makes tokens of pixels, the trunk reads them.

Letters: B images, C channels, H x W pixels, S tokens.
"""

import torch

from .configuration_deepseek import DeepSeekConfig
from .image_stem import STEMS, ImageTokens
from .modeling_deepseek import DeepSeekModel
from .outputs import DeepSeekModelOutput
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

    def extended(self, tokens: ImageTokens) -> ImageTokens:
        """What the trunk reads of the stem's tokens: those, and what a head may add behind them."""
        return tokens

    def read(
        self, pixel_values: torch.Tensor | None, pixel_mask: torch.Tensor | None, **kwargs
    ) -> tuple[ImageTokens, DeepSeekModelOutput]:
        """[B, C, H, W], [B, H, W] -> the tokens, and what the trunk makes of them.

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
        tokens = self.extended(self.stem(pixel_values.to(self.dtype), pixel_mask))
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
