"""A feature pyramid (FPN, arXiv 1612.03144, section 3): what the trunk makes of its tokens, brought back to the finer
places of the convolutions that they came from.

The trunk's cost grows with its tokens, small objects need fine places: so it may read few, and boxes be given by many.

Letters: B images, D hidden width, S tokens, h x w places of them, S' finer places.
"""

import torch
from torch import nn

from .configuration_deepseek import DeepSeekConfig
from .image_stem import ImageTokens, finer_levels, laid_out


class FeaturePyramid(nn.Module):
    """Adds to the features of each finer level, mapped to the trunk's width, those of the place that they lie in."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        levels = finer_levels(config)
        self.pooling = [config.conv_pooling[level] for level in levels]
        self.lateral = nn.ModuleList(nn.Conv2d(config.conv_channels[level], config.hidden_size, 1) for level in levels)

    def forward(self, states: torch.Tensor, tokens: ImageTokens) -> ImageTokens:
        """[B, S, D], what the trunk made of the tokens -> S' tokens with their states."""
        (height, width), batch = tokens.shape, len(states)
        places = (tokens.positions[..., :1] * width + tokens.positions[..., 1:]).expand_as(states)
        grid = torch.zeros_like(states).scatter(1, places, states).transpose(1, 2).view(batch, -1, height, width)
        levels = zip(self.lateral, self.pooling, tokens.finer, strict=True)
        for lateral, pooling, (features, _) in reversed(list(levels)):
            for axis in (-2, -1):
                grid = grid.repeat_interleave(pooling, axis)
            grid = lateral(features) + grid[..., : features.shape[-2], : features.shape[-1]]
        return laid_out(grid, tokens.finer[0].mask)
