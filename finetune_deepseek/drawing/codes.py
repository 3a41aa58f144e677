"""Codes: squares of pixels by the nearest vectors of a learned codebook (VQ-VAE, arXiv 1711.00937).

An encoder of convolutions over the squares gives each a vector, which the nearest of K takes the place of; a decoder
of convolutions over the chosen vectors gives the pixels. The codebook follows the means of what chooses it (appendix
A.1 there) and begins, after a time without it, as the centres of k-means; a vector that nothing chooses begins anew.

Letters: N images, H x W pixels, P side of a square in pixels, h x w squares, D width of the convolutions, C of a
vector, K vectors.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from torch.nn import functional as F

WIDTH, VECTOR, BLOCKS = 96, 16, 2
COMMITMENT = 0.25  # beta of eq. 3 there
FORGETTING = 0.98  # gamma of appendix A.1
WITHOUT_CODEBOOK = 0.2  # share of the steps
BATCH, RATE = 32, 2e-3
LEAST_CHOSEN = 0.05  # of the usual number that chooses a vector in a step; one of fewer begins anew
ENCODED_AT_ONCE = 256


class Block(nn.Module):
    """x + W GELU(3 x 3 convolution of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(F.gelu(self.spread(x)))


class Codes(nn.Module):
    """See the module.

    Args:
        size: H and W; each a multiple of P.
        patch: P.
        number: K.
    """

    kind = "codes"
    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(self, size: tuple[int, int], patch: int, number: int) -> None:
        super().__init__()
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"--patch_pixels {patch}: images of {size[0]} x {size[1]} pixels are no whole number of such squares; "
                "set --image_size."
            )
        self.size, self.patch, self.number = size, patch, number
        self.grid = (size[0] // patch, size[1] // patch)
        pixels = 3 * patch * patch
        blocks = [Block(WIDTH) for _ in range(2 * BLOCKS)]
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, WIDTH, 3, padding=1), *blocks[:BLOCKS], nn.Conv2d(WIDTH, VECTOR, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(VECTOR, WIDTH, 3, padding=1), *blocks[BLOCKS:], nn.Conv2d(WIDTH, pixels, 1)
        )
        self.register_buffer("codebook", torch.randn(number, VECTOR))
        self.register_buffer("counts", torch.ones(number))
        self.register_buffer("sums", self.codebook.clone())

    # -- images [N, H, W, 3] of bytes to numbers [N, h * w] and back --

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        parts = [self.nearest(self.vectors(scaled(part))).flatten(1).numpy() for part in _parts(images)]
        return np.concatenate(parts)

    @torch.no_grad()
    def decode(self, numbers: np.ndarray) -> np.ndarray:
        parts = []
        for part in _parts(numbers):
            chosen = torch.from_numpy(np.asarray(part)).long().view(-1, *self.grid)
            pixels = self.pixels(self.codebook[chosen].permute(0, 3, 1, 2))
            parts.append(((pixels + 0.5) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(parts)

    # -- the parts --

    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""
        return self.encoder(F.pixel_unshuffle(pixels, self.patch))

    def pixels(self, vectors: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [N, 3, H, W]."""
        return F.pixel_shuffle(self.decoder(vectors), self.patch)

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [N, h, w], the number of the nearest vector of the codebook."""
        flat = vectors.permute(0, 2, 3, 1)
        return (self.codebook.square().sum(1) - 2 * flat @ self.codebook.T).argmin(-1)

    # -- training --

    def loss(self, pixels: torch.Tensor, has_codebook: bool) -> torch.Tensor:
        """The mean squared error of pixels [N, 3, H, W] and, with the codebook, of vectors from what they chose."""
        vectors = self.vectors(pixels)
        if not has_codebook:
            return F.mse_loss(self.pixels(vectors), pixels)
        numbers = self.nearest(vectors.detach())
        chosen = self.codebook[numbers].permute(0, 3, 1, 2)
        self.follow(vectors.detach().permute(0, 2, 3, 1).flatten(0, 2), numbers.flatten())
        error = F.mse_loss(self.pixels(vectors + (chosen - vectors).detach()), pixels)
        return error + COMMITMENT * F.mse_loss(vectors, chosen)

    def follow(self, vectors: torch.Tensor, numbers: torch.Tensor) -> None:
        """Move the codebook towards the means of the vectors [M, C] that chose each."""
        chosen = F.one_hot(numbers, self.number).to(vectors.dtype)  # [M, K]
        self.counts.lerp_(chosen.sum(0), 1 - FORGETTING)
        self.sums.lerp_(chosen.T @ vectors, 1 - FORGETTING)
        usual = len(vectors) / self.number
        idle = self.counts < LEAST_CHOSEN * usual
        fresh = vectors[torch.randint(len(vectors), (int(idle.sum()),))]
        self.counts[idle], self.sums[idle] = usual, usual * fresh
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])

    def begin(self, vectors: np.ndarray, seed: int) -> None:
        """Set the codebook to the centres of vectors [M, C]."""
        means = MiniBatchKMeans(self.number, random_state=seed, n_init=1, batch_size=4096).fit(vectors)
        self.codebook.copy_(torch.from_numpy(means.cluster_centers_))
        share = np.bincount(means.labels_, minlength=self.number) / len(vectors)
        self.counts.copy_(torch.from_numpy(share * BATCH * math.prod(self.grid)).clamp(min=1.0))
        self.sums.copy_(self.codebook * self.counts[:, None])


def trained_codes(
    images: np.ndarray, patch: int, number: int, steps: int, seed: int, tell: Callable[[str], Any] = print
) -> Codes:
    """Codes learned from images [N, H, W, 3] of bytes.

    Raises:
        ValueError: if there are fewer squares than vectors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codes = Codes(images.shape[1:3], patch, number)
        if len(images) * math.prod(codes.grid) < number:
            raise ValueError(f"--codes {number}: the training images have fewer squares; lower it.")
        optimizer = torch.optim.AdamW(codes.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.05)
        begin = math.ceil(WITHOUT_CODEBOOK * steps)
        for step, batch in zip(range(steps), _batches(len(images)), strict=False):
            if step == begin:
                some = scaled(images[torch.randperm(len(images))[:1024].numpy()])
                with torch.no_grad():
                    codes.begin(codes.vectors(some).permute(0, 2, 3, 1).flatten(0, 2).numpy(), seed)
            loss = codes.loss(scaled(images[batch]), step >= begin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(steps // 5, 1) == 0:
                tell(f"codes: step {step:,} of {steps:,}, loss {loss.item():.5f}")
    return codes.eval().requires_grad_(False)


def scaled(images: np.ndarray) -> torch.Tensor:
    """[N, H, W, 3] of bytes -> [N, 3, H, W] from -.5 to .5."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[begin : begin + ENCODED_AT_ONCE] for begin in range(0, len(rows), ENCODED_AT_ONCE))


def _batches(count: int) -> Iterator[np.ndarray]:
    """Numbers of images, without end; each comes once before any comes again."""
    while True:
        yield from torch.randperm(count).numpy()[: max(count // BATCH, 1) * BATCH].reshape(-1, min(BATCH, count))
