"""The formulas of the cache's size against caches as they are, and what `inspect` says of V4."""

import pytest
import torch
from transformers import DynamicCache

from configuration_deepseek import DeepSeekConfig, preset
from finetune_deepseek.checkpoints.cache_size import by_attention, cache_bytes
from finetune_deepseek.checkpoints.gguf import architecture_of
from finetune_deepseek.checkpoints.inspection import inspect_checkpoint, spans
from finetune_deepseek.commands.inspect import in_words
from modeling_deepseek import DeepSeekForCausalLM
from tests.configuration.test_compressed import V4


def test_formulas_give_what_a_cache_holds():
    config = DeepSeekConfig(**V4)
    model = DeepSeekForCausalLM(config).bfloat16().eval()
    cache, tokens = DynamicCache(config=config), 64  # a multiple of both ratios
    ids = torch.arange(tokens).view(1, -1) % 61
    with torch.no_grad():
        for part in ids.split([50, 13, 1], dim=1):
            model(part, cache=cache, use_cache=True)
    kept = 0
    for layer in cache.layers:
        kept += sum(rows.nbytes for rows in layer.rolls.values())
        kept += sum(entries.data[:, : tokens // layer.ratio].nbytes for entries in layer.entries.values())
    assert kept == cache_bytes(config, tokens)


@pytest.mark.parametrize(
    "pieces", [[1024] + [1] * 40, [700, 324] + [1] * 8, [48] * 12], ids=["decode", "two", "pieces"]
)
@torch.no_grad()
def test_memory_is_hardly_more(pieces):
    """Of whole tensors, those that slices are of among them."""
    config = DeepSeekConfig(**V4 | {"num_hidden_layers": 3})
    model, cache = DeepSeekForCausalLM(config).bfloat16().eval(), DynamicCache(config=config)
    for part in (torch.arange(sum(pieces)).view(1, -1) % 61).split(pieces, dim=1):
        model(part, cache=cache, use_cache=True, logits_to_keep=1)
    tensors = [rows for layer in cache.layers for rows in layer.rolls.values()]
    tensors += [entries.data for layer in cache.layers for entries in layer.entries.values()]
    storages = {rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes() for rows in tensors}
    assert sum(storages.values()) <= 1.1 * cache_bytes(config, sum(pieces))


def test_of_v4_flash_by_hand():
    """Per token: 21 layers of (512 + 128) / 4 numbers, 20 of 512 / 128, in two bytes."""
    sizes = {"num_hidden_layers": 43, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "head_dim": 512}
    config = DeepSeekConfig(**{**V4, **sizes, "index_head_dim": 128, "sliding_window": 128, "qk_rope_head_dim": 64})
    assert by_attention(config) == {"swa": 0, "csa": 21 * 640 / 4 * 2, "hca": 20 * 4 * 2}
    window = 43 * (127 + 8) * 512 * 2
    pending = 21 * (7 + 8) * 4 * 640 * 4 + 20 * (127 + 8) * 2 * 512 * 4
    assert cache_bytes(config, 1_048_576) == 1_048_576 * 6880 + window + pending


def test_of_v3_by_hand():
    assert by_attention(preset("v3")) == {"mla": 61 * 576 * 2}
    assert cache_bytes(preset("v3"), 1000) == 1000 * 61 * 576 * 2


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0], "0"),
        ([0, 1, 2, 5], "0-2, 5"),
        ([3, 5, 7, 9], "3-9 by 2"),
        ([0, 1, 2, 4, 6, 8], "0-2, 4-8 by 2"),
        ([1, 9, 17], "1-17 by 8"),
        ([1, 5, 6, 7], "1, 5-7"),
    ],
)
def test_spans(numbers, words):
    assert spans(numbers) == words


def test_inspect_tells_of_v4(tmp_path):
    torch.manual_seed(0)
    ratios = [0, 4, 8, 4, 8, 4, 0]
    fields = {**V4, "num_hidden_layers": 6, "compress_ratios": ratios, "num_hash_layers": 1}
    model = DeepSeekForCausalLM(DeepSeekConfig(**fields, num_nextn_predict_layers=1))
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.weights == "match the config" and found.generation == "DeepSeek-V4"
    assert list(found.layers) == ["0", "1-5 by 2", "2, 4"]
    assert found.layers["1-5 by 2"] == (
        "csa (4 heads, one key of width 16, window 6, query latent 24, entries of 4 tokens, 6 index heads choose 3), "
        "moe (3 of 8 experts, 1 of 1 groups, 1 shared, width 20, sqrtsoftplus noaux_tc), 4 residual streams"
    )
    assert "hash_moe" in found.layers["0"] and "by the token's id" in found.layers["0"]
    learned = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert found.total == learned + biases
    assert found.cache_per_token == 3 * (16 + 14) / 4 * 2 + 2 * 16 / 8 * 2
    text = in_words(found)
    assert "53 bytes per token in bfloat16 (swa 0, csa 45, hca 8); " in text
    assert " at 131,072 tokens, " in text and "at 1,048,576 tokens" in text
    assert "where there are entries 160000" in text


def test_gguf_of_v4s_parts_in_other_generations_is_refused():
    for fields in ({"hc_mult": 2}, {"swiglu_limit": 7.0}, {"num_hash_layers": 1}):
        with pytest.raises(ValueError, match=f"llama.cpp has no {next(iter(fields))}"):
            architecture_of(preset("tiny_v3", **fields))
