"""Vectors of items: of a trained recommender or embedding model, of a file, or of which items are near each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from ..data.cells import as_ids
from ..data.files import read_list
from ..retrieval.passage_index import Retriever
from ..training.saved import Saved
from .items.catalogue import PADDING
from .recommender import open_recommender

NEIGHBOURHOOD = 3  # items that are this near each other in a history count as neighbours
SVD_SIZE = 32


def read_item_vectors(source: str, ids_file: str | None, titles: dict[str, str]) -> tuple[list[str], np.ndarray]:
    """Item ids and their vectors [N, D].

    Args:
        source: a folder or Hub id of a recommender (its own items) or an embedding model (which reads the titles), or
            a file, .npy or .safetensors, of one matrix.
        ids_file: whose the matrix's rows are: a JSON list, or a line each.
        titles: by item id.

    Raises:
        ValueError: with one line, for what can't be read or doesn't fit together.
    """
    if Path(source).suffix in (".npy", ".safetensors"):
        return _read_matrix(source, ids_file)
    if ids_file:
        raise ValueError(
            f"--item_ids_file belongs to a file of vectors, but --item_vectors is {source}; leave it out."
        )
    saved = Saved.open("item_vectors", source)
    if "embedding" in (saved.task, str(saved.head).lower()):
        return list(titles), Retriever.of(saved).encode(list(titles.values()), is_query=False).float().cpu().numpy()
    recommender = None if saved.task == "generative_recommendation" else open_recommender(saved)
    if recommender is None or not hasattr(recommender.model, "item_embeddings"):
        raise ValueError(f"--item_vectors {source}: this model has no vectors of items; name a recommender.")
    vectors = recommender.model.item_embeddings().detach().float().cpu().numpy()
    if len(vectors) != len(recommender.items):
        raise ValueError(
            f"--item_vectors {source}: {len(vectors):,} vectors for {len(recommender.items):,} items of its catalogue."
        )
    # A catalogue's padding is its first row, whatever its model's tokens for text are padded with.
    return recommender.items[PADDING + 1 :], vectors[PADDING + 1 :]


def _read_matrix(path: str, ids_file: str | None) -> tuple[list[str], np.ndarray]:
    if ids_file is None:
        raise ValueError(
            f"--item_vectors {path}: add --item_ids_file, a JSON list or a text that says whose each row is."
        )
    try:
        if path.endswith(".npy"):
            vectors = np.load(path, allow_pickle=False)
        else:
            matrices = [tensor for tensor in load_file(path).values() if tensor.ndim == 2]
            if len(matrices) != 1:
                raise ValueError(f"it has {len(matrices)} matrices, where one is expected")
            vectors = matrices[0].float().numpy()
        ids = as_ids(read_list(ids_file))
    except (ValueError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"--item_vectors {path} with --item_ids_file {ids_file}: {' '.join(str(error).split())}."
        ) from error
    if None in ids:
        raise ValueError(f"--item_ids_file {ids_file}: number {ids.index(None) + 1} is no id; each vector needs one.")
    items = [item for item in ids if item is not None]
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or len(items) != len(vectors):
        raise ValueError(
            f"--item_vectors {path}: found {vectors.dtype} of shape {vectors.shape}, expected numbers of shape "
            f"[{len(items)}, width] for the {len(items):,} ids of --item_ids_file."
        )
    if len(set(items)) < len(items):
        raise ValueError(f"--item_ids_file {ids_file}: {len(items) - len(set(items)):,} ids are there twice.")
    return items, vectors


def neighbour_vectors(histories: Sequence[Sequence[str]], items: Sequence[str], seed: int) -> np.ndarray:
    """[N, D] by truncated SVD of the positive pointwise mutual information of standing near each other in a history
    (Levy and Goldberg, 2014); zero for items that are in none."""
    numbers = {item: number for number, item in enumerate(items)}
    rows: list[int] = []
    columns: list[int] = []
    for history in histories:
        known = [numbers[item] for item in history]
        for distance in range(1, NEIGHBOURHOOD + 1):
            rows += known[:-distance] + known[distance:]
            columns += known[distance:] + known[:-distance]
    counts = sparse.csr_matrix(
        (np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(len(items),) * 2
    ).tocoo()
    totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    expected = totals[counts.row] * totals[counts.col] / max(len(rows), 1)
    counts.data = np.maximum(np.log(counts.data / expected), 0)
    size = min(SVD_SIZE, len(items) - 1)
    return TruncatedSVD(size, random_state=seed).fit_transform(counts.tocsr()).astype(np.float32)
