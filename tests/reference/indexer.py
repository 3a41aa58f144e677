"""The indexer of sparse attention, query by query, head by head, key by key.

DeepSeek-V3.2 (arXiv 2512.02556, eq. 1).
"""

import torch

from tests.reference.layers import linear
from tests.reference.rope import frequencies_of, rotate

KEY_NORM_EPS = 1e-6


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """[S, W]: minus its mean, over its standard deviation, times weight, plus bias."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def hadamard(width: int) -> torch.Tensor:
    """[W, W], orthogonal, of entries +-W^-0.5 (Sylvester's construction); W is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * width**-0.5


def index_scores(
    x: torch.Tensor,
    query_latent: torch.Tensor,
    weights: dict[str, torch.Tensor],
    config: dict,
    prefix: str = "",
    rotated: bool = False,
) -> torch.Tensor:
    """Score of every query with every key, later ones too: [S, D], [S, query latent width] -> [S, S].

    Args:
        rotated: turn queries and keys by a Hadamard matrix, as DeepSeek's inference code does before it rounds to FP8.
    """
    heads, width, rope = config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
    frequencies, factor = frequencies_of(config["rope_parameters"], rope, config["max_position_embeddings"], len(x))

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        first = rotate(vector[:rope], position, frequencies, interleaved=False, factor=factor)
        vector = torch.cat((first, vector[rope:]))
        return hadamard(width) @ vector if rotated else vector

    queries = linear(query_latent, weights, f"{prefix}wq_b")
    keys = linear(x, weights, f"{prefix}wk")
    keys = layer_norm(keys, weights[f"{prefix}k_norm.weight"], weights[f"{prefix}k_norm.bias"], KEY_NORM_EPS)
    keys = torch.stack([turned(key, s) for s, key in enumerate(keys)])
    of_heads = linear(x, weights, f"{prefix}weights_proj") * heads**-0.5 * width**-0.5
    rows = []
    for t in range(len(x)):
        row = torch.zeros(len(x), dtype=x.dtype)
        for h in range(heads):
            query = turned(queries[t, h * width : (h + 1) * width], t)
            row = row + of_heads[t, h] * torch.stack([(query * key).sum().clamp(min=0) for key in keys])
        rows.append(row)
    return torch.stack(rows)


def chosen_keys(scores: list[float], count: int) -> list[int]:
    """Positions of the `count` highest scores, of equal ones the later; in order of position."""
    ranked = sorted(range(len(scores)), key=lambda s: (scores[s], s), reverse=True)
    return sorted(ranked[:count])
