"""Palette: every pixel by the number of its colour, row by row.

Colours are those that occur in training images, exactly, where they are few enough, else the centres of k-means over
all pixels; the darkest is the first. Letters: N images, H x W pixels, K colours.
"""

import numpy as np
from sklearn.cluster import KMeans

CLUSTERED = 100_000  # different colours, at most, that k-means looks at
LIGHTNESS = np.array([0.299, 0.587, 0.114])


class Palette:
    """See the module.

    Args:
        size: H and W.
        colours: [K, 3] bytes.
    """

    kind = "palette"

    def __init__(self, size: tuple[int, int], colours: np.ndarray) -> None:
        self.size = self.grid = size
        self.colours = np.asarray(colours, dtype=np.uint8)
        self.number = len(self.colours)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, 3] of bytes -> [N, H * W], the number of the nearest colour."""
        found, places, _ = colours_of(images)
        return nearest(found, self.colours)[places].reshape(len(images), -1)

    def decode(self, numbers: np.ndarray) -> np.ndarray:
        """[N, H * W] -> [N, H, W, 3] of bytes."""
        return self.colours[np.asarray(numbers)].reshape(-1, *self.size, 3)


def trained_palette(images: np.ndarray, number: int, seed: int) -> Palette:
    """At most so many colours for images [N, H, W, 3] of bytes."""
    colours, _, counts = colours_of(images)
    if len(colours) > number:
        shown = np.argsort(-counts, kind="stable")[:CLUSTERED]  # the most frequent
        means = KMeans(number, n_init=1, random_state=seed).fit(colours[shown], sample_weight=counts[shown])
        colours = np.unique(means.cluster_centers_.round().astype(np.uint8), axis=0)
    return Palette(images.shape[1:3], colours[np.argsort(colours @ LIGHTNESS, kind="stable")])


def colours_of(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different colours [M, 3] of images, the number of each pixel's [N * H * W], and how many have each [M]."""
    red, green, blue = (images[..., channel].reshape(-1).astype(np.int32) for channel in range(3))
    codes, places, counts = np.unique(red << 16 | green << 8 | blue, return_inverse=True, return_counts=True)
    return np.stack((codes >> 16, codes >> 8 & 255, codes & 255), axis=1), places.reshape(-1), counts


def nearest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """[M] numbers of the palette's colours [K, 3] with the least squared difference; the first of equal ones."""
    apart = np.square(colours[:, None].astype(np.int32) - palette[None].astype(np.int32)).sum(-1)
    return apart.argmin(1)
