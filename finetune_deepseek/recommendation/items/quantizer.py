"""Residual k-means: a vector as a few digits, each naming the nearest centre of what the digits before it leave over.

It makes semantic IDs as in TIGER (Rajput et al., arXiv 2305.05065, section 3.1), which trains an RQ-VAE instead.
Letters: N vectors, D width, L levels, K centres per level.
"""

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

LARGE = 20_000  # from so many vectors on, k-means goes by batches


def residual_codes(
    vectors: np.ndarray, num_levels: int, codebook_size: int, seed: int
) -> tuple[np.ndarray, list[float]]:
    """Codes [N, L] from 0 to K - 1 of vectors [N, D], and the share of the variance that is left over by each level.

    Raises:
        ValueError: for vectors that are no matrix of finite numbers.
    """
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"item vectors must be a matrix of finite numbers, found one of shape {vectors.shape}.")
    residual = vectors.astype(np.float32) - vectors.mean(0, dtype=np.float32)
    variance = float((residual**2).sum()) or 1.0
    codes, left_over = np.zeros((len(vectors), num_levels), dtype=np.int64), []
    kmeans = MiniBatchKMeans if len(vectors) >= LARGE else KMeans
    for level in range(num_levels):
        # More centres than different vectors would be empty ones.
        centres = min(codebook_size, len(np.unique(residual, axis=0)))
        found = kmeans(centres, random_state=seed + level, n_init=1).fit(residual)
        codes[:, level] = found.labels_
        residual = residual - found.cluster_centers_[found.labels_]
        left_over.append(float((residual**2).sum()) / variance)
    return codes, left_over


def distinct_codes(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """Codes that no two vectors share, and how many shared theirs: if any did, all get one more digit, which counts
    those of the same code ([N, L] -> [N, L + 1])."""
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    digit = np.empty(len(codes), dtype=np.int64)
    digit[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    collisions = int(sizes[sizes > 1].sum())
    return (np.column_stack((codes, digit)) if collisions else codes), collisions
