"""Stems: the pixels of an image to the tokens that the trunk reads.

`patch` maps squares linearly (ViT, arXiv 2010.11929, section 3.1). `conv` convolves and pools. `conv_lstm` then runs
an LSTM over the tokens, row by row, in both directions. Convolutions are normed over each image's own places, so its
tokens depend neither on the others of its batch nor on how far it is padded to their size.

Letters: B images, C channels, H x W pixels, h x w places of the token grid, S = h * w tokens, D hidden width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class ImageTokens(NamedTuple):
    """What a stem gives.

    Attributes:
        states: [B, S, D]; an image's own tokens row by row, and behind them those of its padding.
        is_token: [B, S] booleans, false at padding; None without any.
        positions: [1 or B, S, 2], row and column of each token.
        shape: h and w, with padding.
        finer: what was computed on the way with more places, down to a stride of `box_stride`, the finest first.
    """

    states: torch.Tensor
    is_token: torch.Tensor | None
    positions: torch.Tensor
    shape: tuple[int, int] = (0, 0)
    finer: tuple["Level", ...] = ()


class Level(NamedTuple):
    """Features of one resolution.

    Attributes:
        features: [B, C', h', w'], 0 at padding.
        mask: [B, 1, h', w'] ones and zeros; None without padding.
    """

    features: torch.Tensor
    mask: torch.Tensor | None


def laid_out(features: torch.Tensor, mask: torch.Tensor | None) -> ImageTokens:
    """[B, D, h, w], [B, 1, h, w] ones and zeros: places as tokens, row by row, those of padding last."""
    height, width = features.shape[-2:]
    rows = torch.arange(height, device=features.device).repeat_interleave(width)
    columns = torch.arange(width, device=features.device).repeat(height)
    positions = torch.stack((rows, columns), dim=-1).unsqueeze(0)  # [1, S, 2]
    tokens = ImageTokens(features.flatten(2).transpose(1, 2), None, positions, (height, width))
    return tokens if mask is None else own_tokens_first(tokens._replace(is_token=mask.flatten(1).bool()))


def own_tokens_first(tokens: ImageTokens) -> ImageTokens:
    """The tokens of each image in their order, before those of its padding, which lie between them in a grid."""
    assert tokens.is_token is not None
    batch, length = tokens.is_token.shape
    order = tokens.is_token.int().argsort(dim=1, descending=True, stable=True)[..., None]  # [B, S, 1]
    return tokens._replace(
        states=tokens.states.gather(1, order.expand_as(tokens.states)),
        is_token=tokens.is_token.gather(1, order[..., 0]),
        positions=tokens.positions.expand(batch, length, 2).gather(1, order.expand(batch, length, 2)),
    )


class ImageStem(nn.Module):
    """What the stems share: a grid of features out of pixels, laid out as tokens with their places.

    Attributes:
        stride: pixels from one token to the next, across and down.
    """

    stride: int

    def grid(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> tuple[Level, tuple[Level, ...]]:
        """[B, C, H, W], [B, 1, H, W] ones and zeros -> [B, D, h, w], [B, 1, h, w]; and what is finer."""
        raise NotImplementedError

    def mix(self, tokens: ImageTokens) -> ImageTokens:
        """What is done to the tokens as a sequence: nothing here."""
        return tokens

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> ImageTokens:
        """[B, C, H, W], [B, H, W] with 0 at padding, which is right of an image and below it."""
        mask = None
        if pixel_mask is not None:
            mask = pixel_mask.unsqueeze(1).to(pixel_values.dtype)
            pixel_values = pixel_values * mask
        last, finer = self.grid(pixel_values, mask)
        return self.mix(laid_out(*last)._replace(finer=finer))


class PatchStem(ImageStem):
    """Squares of P x P pixels, each mapped linearly; those over the edge are filled up with zeros."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = self.stride = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)

    def grid(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> tuple[Level, tuple[Level, ...]]:
        size = self.patch_size
        over = (0, -pixels.shape[-1] % size, 0, -pixels.shape[-2] % size)
        features = self.projection(F.pad(pixels, over))
        return Level(features, None if mask is None else F.max_pool2d(F.pad(mask, over), size)), ()


class ImageRMSNorm(nn.Module):
    """Divides an image's features by their root mean square over all channels and its own places, so that strong and
    faint places stay what they are to each other; a weight for each channel."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, C, H, W], [B, 1, H, W] -> [B, C, H, W]; computed in float32."""
        own = features if mask is None else features.masked_fill(mask == 0, 0.0)
        places = features[0, 0].numel() if mask is None else mask.float().sum((1, 2, 3), keepdim=True).clamp(min=1)
        wide = torch.promote_types(own.dtype, torch.float32)
        norm = torch.linalg.vector_norm(own, dim=(1, 2, 3), keepdim=True, dtype=wide)
        scale = torch.rsqrt(norm.square() / (places * features.shape[1]) + self.eps)
        return (features * (scale * self.weight[:, None, None])).to(features.dtype)


class ConvBlock(nn.Module):
    """A 3 x 3 convolution, a norm over the image, GELU, and pooling by the largest value of P x P places."""

    def __init__(self, channels_in: int, channels: int, pooling: int, eps: float):
        super().__init__()
        self.pooling = pooling
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm = ImageRMSNorm(channels, eps)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, C, H, W], [B, 1, H, W] -> [B, C', H, W], not yet pooled; padding is 0, as beyond an image's edges."""
        features = F.gelu(self.norm(self.conv(pixels), mask))
        return features if mask is None else features.masked_fill(mask == 0, 0.0)

    def pooled(self, features: torch.Tensor, mask: torch.Tensor | None) -> Level:
        """The same of fewer places."""
        if self.pooling == 1:
            return Level(features, mask)
        if mask is None:
            return Level(self._pooled(features), None)
        lowest = torch.finfo(features.dtype).min
        pooled, mask = self._pooled(features.masked_fill(mask == 0, lowest)), self._pooled(mask)
        return Level(pooled.masked_fill(mask == 0, 0.0), mask)

    def _pooled(self, features: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(features, self.pooling, ceil_mode=True)


def finer_levels(config) -> list[int]:
    """Which convolutions are the last of a stride that is finer than the tokens', and `box_stride` or more."""
    pooling = config.conv_pooling
    strides = [math.prod(pooling[:number]) for number in range(len(pooling))]
    finest = config.box_stride or math.prod(pooling)
    return [number for number, stride in enumerate(strides) if pooling[number] > 1 and stride >= finest]


class ConvStem(ImageStem):
    """Convolutions with pooling, then a linear map to the trunk's width."""

    def __init__(self, config):
        super().__init__()
        before = [config.num_channels, *config.conv_channels]
        self.stride = math.prod(config.conv_pooling)
        self.levels = finer_levels(config)
        self.blocks = nn.ModuleList(
            ConvBlock(*sizes, config.rms_norm_eps)
            for sizes in zip(before, config.conv_channels, config.conv_pooling, strict=False)
        )
        self.projection = nn.Conv2d(before[-1], config.hidden_size, 1)

    def grid(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> tuple[Level, tuple[Level, ...]]:
        finer = []
        if pixels.device.type == "cpu":  # where pooling is several times as fast in this layout
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        level = Level(pixels, mask)
        for number, block in enumerate(self.blocks):
            features = block(*level)
            if number in self.levels:
                finer.append(Level(features, level.mask))
            level = block.pooled(features, level.mask)
        return level._replace(features=self.projection(level.features)), tuple(finer)


class ConvLSTMStem(ConvStem):
    """The same, and an LSTM over the tokens in both directions, half of the width each."""

    def __init__(self, config):
        super().__init__(config)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size // 2, batch_first=True, bidirectional=True)

    def mix(self, tokens: ImageTokens) -> ImageTokens:
        if tokens.is_token is None:
            return tokens._replace(states=self.lstm(tokens.states)[0])
        lengths = tokens.is_token.sum(1).clamp(min=1).cpu()  # the backward direction begins at each image's own end
        packed = nn.utils.rnn.pack_padded_sequence(tokens.states, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=tokens.states.shape[1]
        )
        return tokens._replace(states=states)


STEMS: dict[str, type[ImageStem]] = {"patch": PatchStem, "conv": ConvStem, "conv_lstm": ConvLSTMStem}
