"""Engram: n-grams of tokens looked up in a table (arXiv 2601.07372; DeepSeek-V4.1's report and released code).

Before its block a layer reads, for each token, the rows that the n-grams ending there hash to, and writes what they
hold into the residual streams, as much as it fits what is there:

    hash      ids of the tokens behind, newest first:  a_0, a_1, .. a_(n-1)        x: exclusive or
              h_n  = (a_0 m_0) x (a_1 m_1) x .. (a_(n-1) m_(n-1))                  n = 2 .. engram_max_ngram_size
              row  = h_n mod prime(layer, n, head) + where that head's rows begin
    memory    k_0 .. k_(N-1), v = W_kv [ all rows of the token ]                   N streams
    gate      g_i = sigmoid( signed_sqrt( rms(X_i) . (rms(k_i) q_i k'_i) / sqrt(D) ) )
    output    X_i + g_i v                                                          weights q, k' per stream and channel

Ids are those of `token_ids`, where tokens that differ in case, accents or spaces alone are one. N-grams end at
padding, at the begin of a document and at images, and the padding token's id stands for what is beyond; images
themselves have none. Multipliers come from numpy's generator, seeded by the layer; primes are the first from
engram_vocab_size on that no other layer, n or head has.

Letters: B batch, S tokens, K kept before them, N streams, C hashes of a token, D hidden width.
"""

from typing import Any

import numpy
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import cached_file

from .cache_compressed import WindowLayer, layer_of
from .layers import Float32Buffers, unit_rms
from .row_tokens import RowTokens
from .weight_names import CheckpointError

SEED = 10007
A_SPACE = "\ue000"  # stands for a token of spaces alone, which would lose all its text
NO_TOKEN = -1
LEAST = 1e-6  # of a product before its root: there the gradient would be infinite
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # enough for all numbers of 64 bits


def is_prime(number: int) -> bool:
    """Miller-Rabin with fixed witnesses, which are never wrong below 2^64."""
    if number < 2 or any(number % prime == 0 for prime in WITNESSES):
        return number in WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        pow(witness, odd, number) == 1 or any(pow(witness, odd << i, number) == number - 1 for i in range(twos))
        for witness in WITNESSES
    )


def primes_of(config, layer_idx: int) -> list[int]:
    """How many rows each hash of a layer has, n by n and head by head: primes that follow each other."""
    before = sorted(config.engram_layer_ids).index(layer_idx)
    found: list[int] = []
    number = config.engram_vocab_size
    while len(found) < (before + 1) * config.engram_columns:
        found += [number] if is_prime(number) else []
        number += 1
    return found[before * config.engram_columns :]


def multipliers_of(config, layer_idx: int) -> list[int]:
    """Odd factors of the ids, newest first, so small that no product needs more than 63 bits."""
    bound = max(1, (2**63 - 1) // config.engram_compressed_vocab_size // 2)
    drawn = numpy.random.default_rng(SEED * layer_idx).integers(
        low=0, high=bound, size=config.engram_max_ngram_size, dtype=numpy.int64
    )
    return (2 * drawn + 1).tolist()


def first_ids(config) -> torch.Tensor | None:
    """[V] ids of tokens here, before a tokenizer or a checkpoint tells them: themselves where none are joined, else
    `NO_TOKEN`. `None` for a model without tables."""
    if not any(config.engram_rows(layer) for layer in range(config.num_hidden_layers)):
        return None
    if config.engram_compressed_vocab_size == config.vocab_size:
        return torch.arange(config.vocab_size)
    return torch.full((config.vocab_size,), NO_TOKEN)


class EngramHash(Float32Buffers):
    """Ids of tokens to rows of one layer's table."""

    multipliers: torch.Tensor
    primes: torch.Tensor
    begins: torch.Tensor

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.ngram, self.heads = config.engram_max_ngram_size, config.engram_n_heads
        primes, rows = primes_of(config, layer_idx), config.engram_rows(layer_idx)
        if rows < sum(primes):
            raise ValueError(
                f"engram_num_embeddings has {rows} rows for layer {layer_idx}, but its {len(primes)} hashes from "
                f"engram_vocab_size={config.engram_vocab_size} on need {sum(primes)}; raise it"
            )
        begins = [sum(primes[:column]) for column in range(len(primes))]
        self.numbers = {"multipliers": multipliers_of(config, layer_idx), "primes": primes, "begins": begins}
        for name, values in self.numbers.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, S, n] ids, newest first -> [B, S, C] rows."""
        products = ids * self.multipliers
        mixed, hashes = products[..., 0], []
        for size in range(1, self.ngram):
            mixed = mixed ^ products[..., size]
            primes = self.primes[(size - 1) * self.heads : size * self.heads]
            hashes.append(mixed.unsqueeze(-1) % primes)
        return torch.cat(hashes, dim=-1) + self.begins


def histories(ids: torch.Tensor, tokens: RowTokens, size: int, layer: WindowLayer) -> torch.Tensor:
    """[B, S] ids, `NO_TOKEN` at images -> [B, S, size]: those of each token and of the ones behind it, newest first;
    `NO_TOKEN` from where the n-gram ends on."""
    rows = layer.roll("engram", ids.unsqueeze(-1), size - 1, tokens).squeeze(-1)  # [B, K + S], right-aligned
    ranks, starts = tokens.ranks.expand(len(ids), -1), tokens.starts.expand(len(ids), -1)
    totals = tokens.totals_after()
    after = tokens.seen + tokens.length if totals is None else totals.unsqueeze(-1)
    places = rows.shape[1] - after + ranks  # of each token in rows
    found, goes_on = [], ranks >= 0
    for back in range(size):
        goes_on = goes_on & (ranks - back >= starts) & (places >= back)
        there = rows.gather(1, (places - back).clamp(0, rows.shape[1] - 1))
        goes_on = goes_on & (there != NO_TOKEN)
        found.append(torch.where(goes_on, there, NO_TOKEN))
    return torch.stack(found, dim=-1)


class DeepSeekEngram(nn.Module):
    """The memory of one layer. Parameter names are the checkpoints'."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx, self.streams, self.width = layer_idx, config.hc_mult, config.hidden_size
        self.eps, self.size, self.pad = config.rms_norm_eps, config.engram_max_ngram_size, config.engram_pad_token_id
        self.image = config.image_token_id
        self.hash = EngramHash(config, layer_idx)
        self.embed = nn.Embedding(config.engram_rows(layer_idx), config.engram_head_dim)
        self.wkv = nn.Linear(config.engram_width, (self.streams + 1) * self.width, bias=False)
        self.q_weight = nn.Parameter(torch.ones(self.streams, self.width))
        self.k_weight = nn.Parameter(torch.ones(self.streams, self.width))

    def forward(
        self,
        streams: torch.Tensor,
        input_ids: torch.Tensor | None,
        token_ids: torch.Tensor,
        tokens: RowTokens,
        cache: Cache | None,
    ) -> torch.Tensor:
        """[B, S, N, D] -> [B, S, N, D].

        Args:
            input_ids: [B, S].
            token_ids: [V] the id of each token here.

        Raises:
            ValueError: without input_ids; on a CPU for tokens that `token_ids` doesn't have.
        """
        if input_ids is None:
            raise ValueError("Engram looks up the tokens' ids: give input_ids, not inputs_embeds")
        refuse_unknown(input_ids, token_ids)
        is_image = input_ids == (NO_TOKEN if self.image is None else self.image)
        ids = token_ids[input_ids].masked_fill(is_image, NO_TOKEN)
        layer = WindowLayer() if cache is None else layer_of(cache, self.layer_idx)
        ids = histories(ids, tokens, self.size, layer)
        rows = self.hash(torch.where(ids == NO_TOKEN, token_ids[self.pad], ids))
        memory = self.wkv(self.embed(rows).flatten(-2))  # [B, S, (N + 1) D]
        gates = self.gates(streams, memory[..., : -self.width]).masked_fill(ids[..., :1] == NO_TOKEN, 0.0)
        value = memory[..., None, -self.width :].float()
        return (streams.float() + gates.unsqueeze(-1) * value).to(streams.dtype)

    def gates(self, streams: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B, S, N, D] and [B, S, N D] -> float32 [B, S, N]."""
        keys = unit_rms(keys.float().unflatten(-1, (self.streams, self.width)), self.eps)
        weighted = keys * (self.q_weight.float() * self.k_weight.float())
        product = (unit_rms(streams.float(), self.eps) * weighted).sum(-1) * self.width**-0.5
        return torch.sigmoid(torch.copysign(product.abs().clamp_min(LEAST).sqrt(), product))


def refuse_unknown(input_ids: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Raise ValueError for tokens without an id; on a CPU alone, elsewhere the look would wait."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    least, largest = (int(x) for x in torch.aminmax(input_ids)) if input_ids.numel() else (0, 0)
    if least < 0 or largest >= len(token_ids):
        wrong = least if least < 0 else largest
        raise ValueError(f"token id {wrong} has no place in token_ids, which has {len(token_ids)}; add it")
    if (token_ids[input_ids] < 0).any():
        raise ValueError(
            "Engram has no ids of its own for tokens: they come from the tokenizer, by load_engram_ids(tokenizer)"
        )


# Ids from a tokenizer ------------------------------------------------------------------------------------------------


def ids_of(backend: Any, vocab_size: int) -> tuple[list[int], int]:
    """Tokens of a tokenizer -> ids in the order of the first token of each, and how many ids there are.

    Tokens are one where their texts agree after NFKC, NFD, and without accents, case and outer spaces; pieces of a
    character, which are no text, stay what they are.
    """
    from tokenizers import Regex, normalizers  # here, for only models with tables need them

    normalizer = normalizers.Sequence(
        [
            *(normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()),
            *(normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex(r"^ $"), A_SPACE)),
            *(normalizers.Strip(), normalizers.Replace(A_SPACE, " ")),
        ]
    )
    numbers: dict[str, int] = {}
    ids = []
    for token in range(min(vocab_size, backend.get_vocab_size(with_added_tokens=True))):
        text = backend.decode([token], skip_special_tokens=False)
        is_piece = "\ufffd" in text
        key = backend.id_to_token(token) if is_piece else normalizer.normalize_str(text) or text
        ids.append(numbers.setdefault(key, len(numbers)))
    return ids, len(numbers)


def engram_ids(tokenizer: Any, config: Any) -> torch.Tensor:
    """[V] ids of a tokenizer's tokens; `NO_TOKEN` for those that it hasn't.

    Args:
        tokenizer: of transformers, or of tokenizers.

    Raises:
        CheckpointError: if they are another number than the tables were made for, as every hash hangs on it.
    """
    ids, count = ids_of(getattr(tokenizer, "backend_tokenizer", tokenizer), config.vocab_size)
    if count != config.engram_compressed_vocab_size:
        raise CheckpointError(
            f"the tokenizer gives {count} ids of n-grams, but engram_compressed_vocab_size="
            f"{config.engram_compressed_vocab_size}; take the tokenizer of the checkpoint"
        )
    return torch.tensor(ids + [NO_TOKEN] * (config.vocab_size - len(ids)))


def with_engram_ids(weights: dict[str, Any], model: nn.Module, load_config: Any) -> dict[str, Any]:
    """The entries of a checkpoint, and ids of the tokenizer beside it where the model needs some and it has none.

    Raises:
        CheckpointError: if there is no tokenizer.json; as `engram_ids`.
    """
    config: Any = model.config
    embedding = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
    key = f"{(embedding or '').removesuffix('embed_tokens.weight')}engram_ids"
    if first_ids(config) is None or key in weights or embedding is None:
        return weights
    asked = getattr(load_config, "download_kwargs", None) or {}
    return {**weights, key: ids_beside(load_config.pretrained_model_name_or_path, config, **asked)}


def ids_beside(source: str, config: Any, **place: Any) -> torch.Tensor:
    """The ids that a model of this config needs, by the tokenizer in a folder or repository.

    Raises:
        CheckpointError: as `with_engram_ids`.
    """
    from tokenizers import Tokenizer

    first = first_ids(config)
    if first is not None and (first >= 0).all():
        return first
    known = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
    place = {name: place[name] for name in known if place.get(name) is not None}
    file = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **place)
    if file is None:
        raise CheckpointError(
            "its Engram looks n-grams up by ids that come from the tokenizer, and there is no tokenizer.json beside "
            "the weights; copy it there"
        )
    return engram_ids(Tokenizer.from_file(file), config)
