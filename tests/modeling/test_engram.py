"""N-grams looked up: rows by hand, what ends an n-gram, caches, ids of tokenizers, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.opening import open_model
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.cache_compressed import WindowLayer
from modeling_deepseek.engram import EngramHash, engram_ids, histories, ids_of, is_prime, primes_of
from modeling_deepseek.row_tokens import row_tokens
from tests.modeling.conftest import token_ids
from tests.modeling.test_shared_model import model_of
from tests.reference.compare import assert_close
from tests.reference.shared_model import ENGRAM, rows_of

IMAGE = 96


@pytest.fixture(scope="module")
def model():
    return model_of(**ENGRAM)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_primes_are_those_of_division():
    assert [n for n in range(-3, 200) if is_prime(n)] == [n for n in range(2, 200) if all(n % d for d in range(2, n))]
    assert not is_prime(3215031751)  # fools the witnesses 2, 3, 5 and 7 together
    assert not is_prime(41 * 43) and is_prime(2**61 - 1)


def test_tables_of_the_release_have_as_many_rows_as_their_primes():
    config = preset("v4.1_flash")
    primes = [primes_of(config, layer) for layer in (1, 14)]
    assert [sum(p) for p in primes] == config.engram_num_embeddings and primes[0][0] == 16000057
    assert len({*primes[0], *primes[1]}) == 48 == 2 * config.engram_columns


@pytest.mark.parametrize("layer", ENGRAM["engram_layer_ids"])
def test_rows_are_those_of_whole_numbers(layer):
    config, ids = preset("tiny_v4.1", **ENGRAM), token_ids(1, 13)
    tokens = row_tokens(None, None, (1, 13), ids.device, None)
    found = histories(ids, tokens, config.engram_max_ngram_size, WindowLayer())
    ours = EngramHash(config, layer)(torch.where(found < 0, config.engram_pad_token_id, found))
    assert ours[0].tolist() == rows_of(ids[0].tolist(), config.to_dict(), layer)
    assert ours.max() < config.engram_rows(layer)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(model, side):
    ids = token_ids(2, 9)
    parts = {"left": (0, 9), "right": (9, 0), "between": (4, 5)}[side]
    first, second = ids.split(parts, dim=1)
    tokens = torch.cat((first, torch.full((2, 3), 2), second), dim=1)
    mask = torch.ones_like(tokens)
    mask[:, first.shape[1] : first.shape[1] + 3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, tokens, attention_mask=mask, position_ids=positions)
    assert_close(got[mask.bool()].view(2, 9, -1), logits(model, ids))


def test_rows_of_a_batch_may_be_padded_differently_and_decoded(model):
    ids = token_ids(1, 11)
    tokens = torch.cat((torch.full((1, 4), 2), ids[:, :7]), dim=1).repeat(2, 1)
    mask = (torch.arange(11) >= 4).long().repeat(2, 1)
    tokens[1, 2:4], mask[1, 2:4] = ids[0, 7:9], 1  # the second row has two tokens more before
    second = torch.cat((ids[:, 7:9], ids[:, :7]), dim=1)
    cache, steps = DynamicCache(), [tokens, *ids[:, 7:].repeat(2, 1).split(1, dim=1)]
    got = []
    for step in steps:
        mask = mask if step is tokens else torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        got.append(logits(model, step, attention_mask=mask, position_ids=positions, cache=cache)[:, -1])
    got = torch.stack(got, dim=1)
    assert_close(got[:1], logits(model, ids)[:, 6:])
    assert_close(got[1:], logits(model, torch.cat((second, ids[:, 7:]), dim=1))[:, 8:])


@pytest.mark.parametrize("chunks", [(1,) * 10, (3, 1, 4, 2)], ids=str)
def test_cached_steps_equal_one_call_though_rows_change_places(model, chunks):
    ids, cache, order = token_ids(3, 10), DynamicCache(), torch.tensor([2, 0, 1])
    expected, got, rows = logits(model, ids), [], torch.arange(3)
    for part in ids.split(chunks, dim=1):
        got.append(logits(model, part[rows], cache=cache)[rows.argsort()])
        cache.reorder_cache(order)
        rows = rows[order]
    assert_close(torch.cat(got, dim=1), expected)


def test_a_cache_that_took_tokens_back_goes_on_as_if_they_never_came(model):
    ids, cache = token_ids(2, 12), DynamicCache()
    logits(model, ids[:, :9], cache=cache)
    cache.crop(6)
    assert_close(logits(model, ids[:, 6:], cache=cache), logits(model, ids)[:, 6:])


def test_documents_packed_in_a_row_have_n_grams_of_their_own(model):
    ids = token_ids(1, 12)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 6)])[None]
    separate = torch.cat([logits(model, part) for part in ids.split((5, 1, 6), dim=1)], dim=1)
    assert_close(logits(model, ids, position_ids=positions), separate)


def test_later_tokens_change_nothing_before_them(model):
    ids = token_ids(1, 12)
    other = ids.clone()
    other[0, 8:] = IMAGE
    assert_close(logits(model, other)[:, :8], logits(model, ids)[:, :8])


def test_images_end_n_grams_and_have_none(model):
    """What an image's places hold is no id: n-grams behind one don't look beyond it."""
    config = model.config
    ids = torch.tensor([[5, 6, 7, IMAGE, IMAGE, 8, 9]])
    tokens = row_tokens(None, None, ids.shape, ids.device, None)
    found = histories(ids.masked_fill(ids == IMAGE, -1), tokens, config.engram_max_ngram_size, WindowLayer())
    assert found[0].tolist() == [
        *([5, -1, -1, -1], [6, 5, -1, -1], [7, 6, 5, -1], [-1] * 4, [-1] * 4, [8, -1, -1, -1], [9, 8, -1, -1]),
    ]
    memory = model.model.layers[0].engram
    streams = torch.randn(1, 7, config.hc_mult, config.hidden_size)
    written = memory(streams, ids, model.model.engram_ids, tokens, None)
    is_same = (written == streams).all(-1).all(-1)[0]
    assert is_same.tolist() == [False, False, False, True, True, False, False]


def test_experts_of_images_are_chosen_with_their_own_bias(model):
    gate = model.model.layers[1].mlp.gate
    hidden, ids = torch.randn(4, 32), torch.tensor([[5, IMAGE, 6, IMAGE]])
    logit, weights, chosen = gate(hidden, ids)
    scores = torch.nn.functional.softplus(logit).sqrt()
    biases = {5: gate.e_score_correction_bias, 6: gate.e_score_correction_bias, IMAGE: gate.e_score_correction_bias_vl}
    for row, token in enumerate(ids[0].tolist()):
        assert set(chosen[row].tolist()) == set((scores[row] + biases[token]).topk(3).indices.tolist())
    expected = scores.gather(1, chosen)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) * 1.5)


# Ids of a tokenizer -------------------------------------------------------------------------------------------------


def tokenizer_of(*texts: str) -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(texts)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=texts[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def test_tokens_that_look_alike_have_one_id():
    """In bytes as letters: G with dot is a space, and the two after it each half of a letter."""
    pieces = ["<s>", "Cafe", "cafĂŠ", "Ġcafe", "CAFE", "Ġ", "ĠĠ", "ĉ", "Ă", "Ŋ", "ĩ", "tea", "ďżŃ"]
    pieces[2] = "caf" + "Ã©"  # the letter e with an accent, in bytes as letters
    ids, count = ids_of(tokenizer_of(*pieces), len(pieces))
    assert ids[1] == ids[2] == ids[3] == ids[4]
    assert ids[5] == ids[6] == ids[7] and ids[5] != ids[1]  # spaces and tabs
    assert count == len(set(ids)) and ids[11] not in ids[:11]


@pytest.fixture
def saved(tmp_path):
    """A model whose tables join tokens, beside a tokenizer that does."""
    pieces = [f"t{i}" for i in range(95)] + ["T7", "Ġt7"]
    tokenizer = tokenizer_of(*pieces)
    config = preset("tiny_v4.1", **{**ENGRAM, "engram_compressed_vocab_size": 95})
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.uniform_(0.9, 1.1)
    return model, tokenizer, tmp_path


def test_a_new_model_needs_the_ids_of_a_tokenizer(saved):
    model, tokenizer, _ = saved
    with pytest.raises(ValueError, match="Engram has no ids of its own for tokens: they come from the tokenizer"):
        logits(model, token_ids(1, 5))
    model.load_engram_ids(tokenizer)
    assert model.model.engram_ids[[95, 96]].tolist() == [7, 7]
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = model.model.embed_tokens.weight[7]
    assert torch.equal(logits(model, torch.tensor([[5, 95, 9]])), logits(model, torch.tensor([[5, 7, 9]])))


def test_ids_are_saved_with_the_model_and_made_beside_a_release(saved):
    model, tokenizer, folder = saved
    model.load_engram_ids(tokenizer)
    model.save_pretrained(folder / "own")
    own = DeepSeekForCausalLM.from_pretrained(folder / "own")
    ids = token_ids(2, 7)
    assert torch.equal(logits(own, ids), logits(model, ids))
    weights = {name: value for name, value in model.state_dict().items() if name != "model.engram_ids"}
    model.save_pretrained(folder / "released", state_dict=weights)
    with pytest.raises(ValueError, match="released: its Engram looks n-grams up by ids that come from the tokenizer"):
        DeepSeekForCausalLM.from_pretrained(folder / "released")
    tokenizer.save(str(folder / "released/tokenizer.json"))
    half = DeepSeekForCausalLM.from_pretrained(folder / "released", dtype=torch.bfloat16)
    biases = [buffer for name, buffer in half.named_buffers() if name.endswith("correction_bias_vl")]
    assert len(biases) == 5 and {bias.dtype for bias in biases} == {torch.float32}
    assert torch.equal(half.model.engram_ids, model.model.engram_ids)
    assert torch.equal(half.model.layers[0].engram.hash.primes, model.model.layers[0].engram.hash.primes)
    tokenizer_of(*(f"t{i}" for i in range(97))).save(str(folder / "released/tokenizer.json"))
    with pytest.raises(ValueError, match="gives 97 ids of n-grams, but engram_compressed_vocab_size=95"):
        DeepSeekForCausalLM.from_pretrained(folder / "released")


def test_what_engram_refuses(model):
    ids = token_ids(1, 5)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="token id 97 has no place in token_ids, which has 97"):
        model.model.layers[0].engram(None, torch.tensor([[97]]), model.model.engram_ids, None, None)
    with pytest.raises(ValueError, match="engram_num_embeddings has 100 rows for layer 0, but its 6 hashes"):
        DeepSeekForCausalLM(preset("tiny_v4.1", **{**ENGRAM, "engram_num_embeddings": [100, 700]}))
    with pytest.raises(ValueError, match="this model has no tables of n-grams"):
        DeepSeekForCausalLM(preset("tiny_v4.1")).load_engram_ids(tokenizer_of("a"))
    with pytest.raises(ValueError, match="gives 1 ids of n-grams"):
        engram_ids(tokenizer_of("a"), model.config)


def test_a_table_that_is_missing_or_has_other_rows_is_refused_in_one_line(model, tmp_path):
    model.save_pretrained(tmp_path)
    key, stored = "model.layers.3.engram.embed.weight", load_file(tmp_path / "model.safetensors")
    table = stored.pop(key)
    for weights in (stored, stored | {key: table[:-1].clone()}):
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        for opened in (DeepSeekForCausalLM.from_pretrained, open_model):
            with pytest.raises(ValueError) as refused:
                opened(tmp_path)
            assert key in str(refused.value) and "\n" not in str(refused.value)
