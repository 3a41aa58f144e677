"""What drawn images are measured by, beside real ones: nearest training images, spread, and whether they can be read.

Letters: N drawn images, M real ones, P numbers of an image's pixels.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

READ_CLASSES, READ_LEAST, READ_MOST = 100, 10, 20_000  # that an SVM learns: classes, images of each, images
SPREAD_OF = 500  # images of a class
EQUAL = 1e-3  # the distance of equal images, at most: rounding


class Images(NamedTuple):
    """Some images, and what each is one of.

    Attributes:
        pixels: [N, P], so that squared differences are sums over pixels, and means over channels.
        classes: N texts.
    """

    pixels: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, images: np.ndarray, classes: list[str], pixel_max: float) -> "Images":
        """[N, H, W, 3] of bytes, whose white is to be `pixel_max`."""
        return cls(images.reshape(len(images), -1).astype(np.float32) * (pixel_max / 255 / 3**0.5), classes)


def nearest(drawn: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each of [N, P] to the nearest of [M, P], and which that is."""
    apart, places = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(real).kneighbors(drawn)
    return apart[:, 0], places[:, 0]


def psnr(images: np.ndarray, others: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB, by the mean squared error over all pixels of bytes; None if they are equal."""
    error = np.square(images.astype(np.float32) - others).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else None


def spread(images: Images, most: int = SPREAD_OF) -> float | None:
    """The mean distance of two images of a class, mean over the classes; None if none has two."""
    found = []
    for name in sorted(set(images.classes)):
        own = images.pixels[[place for place, other in enumerate(images.classes) if other == name][:most]]
        if len(own) > 1:
            found.append(pdist(own).mean())
    return float(np.mean(found)) if found else None


def reader(images: Images) -> SVC | None:
    """A support vector machine that tells the classes of real images; None where they are too many or too small."""
    counts = Counter(images.classes)
    if not 1 < len(counts) <= READ_CLASSES or min(counts.values()) < READ_LEAST:
        return None
    # Twice scikit-learn's own width: by folds of optdigits' training images the better one.
    gamma = 2 / (images.pixels.shape[1] * max(float(images.pixels.var()), EQUAL))
    return SVC(C=3, gamma=gamma).fit(images.pixels[:READ_MOST], images.classes[:READ_MOST])


def measured(drawn: Images, train: Images, test: Images) -> tuple[dict[str, Any], np.ndarray]:
    """Numbers of drawn images by name, beside those of real ones, and the nearest training image of each."""
    apart, places = nearest(drawn.pixels, train.pixels)
    wanted = set(drawn.classes)
    asked = [place for place, name in enumerate(train.classes) if name in wanted]
    numbers = {
        "copies": int((apart < EQUAL).sum()),
        "nearest_distance": float(apart.mean()),
        "real_nearest_distance": float(nearest(test.pixels, train.pixels)[0].mean()),
        "spread": spread(drawn),
        "real_spread": spread(Images(train.pixels[asked], [train.classes[place] for place in asked])),
    }
    svm = reader(train)
    if svm is not None:
        numbers |= {"read": float(svm.score(*drawn)), "real_read": float(svm.score(*test))}
    return {name: value for name, value in numbers.items() if value is not None}, places
