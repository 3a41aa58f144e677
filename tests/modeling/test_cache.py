"""Cache layers: buffers that grow by doubling, every operation that generation asks for, gradients, static layers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.cache import (
    GrowingLayer,
    IndexedLatentLayer,
    LatentLayer,
    StaticIndexedLatentLayer,
    StaticKeyValueLayer,
    StaticLatentLayer,
)
from tests.reference.compare import assert_close

# layer class, heads, width of keys, width of values
KINDS = {"kv": (GrowingLayer, 3, 5, 7), "latent": (LatentLayer, 1, 6, 0), "indexed": (IndexedLatentLayer, 1, 6, 3)}


class Feed:
    """Random rows for a layer of one kind, and the same rows for transformers' plain DynamicLayer."""

    def __init__(self, kind: str, batch: int = 2):
        self.layer_class, self.heads, self.key_width, self.value_width = KINDS[kind]
        self.ours, self.plain, self.batch = self.layer_class(), DynamicLayer(), batch
        self.generator = torch.Generator().manual_seed(1)

    def rows(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.batch, self.heads, length)
        keys = torch.randn(*shape, self.key_width, generator=self.generator)
        return keys, torch.randn(*shape, self.value_width, generator=self.generator)

    def append(self, length: int) -> None:
        """Append to both layers and compare all that they hold."""
        rows = self.rows(length)
        for ours, plain in zip(self.ours.update(*rows), self.plain.update(*rows), strict=True):
            assert torch.equal(ours, plain)
        self.compare()

    def both(self, name: str, *arguments) -> None:
        """Call a method of both layers and compare what they hold afterwards."""
        getattr(self.ours, name)(*arguments)
        getattr(self.plain, name)(*arguments)
        self.compare()

    def compare(self) -> None:
        assert self.ours.get_mask_sizes(1) == self.plain.get_mask_sizes(1)
        if self.value_width:  # transformers takes a layer with keys of no width for empty, ours never has them
            assert self.ours.get_seq_length() == self.plain.get_seq_length()
        if self.ours.is_initialized and self.ours.get_seq_length():
            assert torch.equal(self.ours.keys, self.plain.keys)
            assert torch.equal(self.ours.values, self.plain.values)


@pytest.fixture(params=KINDS)
def feed(request) -> Feed:
    return Feed(request.param)


@torch.no_grad()
def test_buffer_moves_only_when_it_doubles(feed: Feed):
    feed.append(7)
    places = []
    for _ in range(63):
        feed.append(1)
        places.append(feed.ours.keys.data_ptr())
    moves = [i for i in range(1, 63) if places[i] != places[i - 1]]
    # capacities 7, 14, 28, 56, 112: the first append after the prompt moves, then those that exceed a capacity
    assert moves == [14 - 7, 28 - 7, 56 - 7]


class WrittenElements(TorchDispatchMode):
    """Counts the elements that operations write: outputs that are no views, and in-place copies."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            is_view = output.untyped_storage().data_ptr() in inputs
            writes = func._schema.is_mutable or (not is_view and "empty" not in func._schema.name)
            self.count += output.numel() if writes else 0
        return output


@torch.no_grad()
def test_a_step_writes_the_new_rows_only(feed: Feed):
    width = feed.heads * (feed.key_width + feed.value_width) * feed.batch
    feed.append(7)
    with WrittenElements() as growing:
        feed.ours.update(*feed.rows(1))
    with WrittenElements() as steady:
        rows = feed.rows(3)
        steady.count = 0
        feed.ours.update(*rows)
    assert steady.count == 3 * width
    assert growing.count >= 8 * width  # the counter sees a copy where there is one


@torch.no_grad()
def test_a_long_decode_writes_each_row_a_bounded_number_of_times(feed: Feed):
    row = feed.heads * (feed.key_width + feed.value_width) * feed.batch
    pieces = [feed.rows(1) for _ in range(200)]
    with WrittenElements() as written:
        for piece in pieces:
            feed.ours.update(*piece)
    assert written.count <= 3 * 200 * row


@pytest.mark.parametrize(
    "operation",
    [
        ("reorder_cache", torch.tensor([1, 1])),
        ("crop", -3),
        ("crop", 0),
        ("batch_select_indices", torch.tensor([1])),
        ("batch_select_indices", slice(0, 1)),  # a view into the same buffer
        ("batch_repeat_interleave", 3),
        ("reset",),
    ],
    ids=lambda operation: operation[0],
)
@torch.no_grad()
def test_operation_then_append(feed: Feed, operation: tuple):
    feed.append(7)
    feed.append(1)  # a buffer with room
    feed.both(*operation)
    if feed.ours.is_initialized and feed.ours.keys is not None:
        feed.batch = feed.ours.keys.shape[0]
    for length in (1, 3, 13):
        feed.append(length)


@torch.no_grad()
def test_random_operations(feed: Feed):
    generator = torch.Generator().manual_seed(2)
    feed.append(3)
    for _ in range(120):
        kind = int(torch.randint(0, 6, (), generator=generator))
        if kind < 3:
            feed.append(kind + 1)
        elif kind == 3:
            feed.both("reorder_cache", torch.randint(0, feed.batch, (feed.batch,), generator=generator))
        elif kind == 4 and feed.ours.get_seq_length() > 3:
            feed.both("crop", -2)
        elif kind == 5 and feed.batch < 6:
            feed.both("batch_repeat_interleave", 2)
            feed.batch *= 2
        elif kind == 5:
            feed.both("batch_select_indices", torch.tensor([0, 3]))
            feed.batch = 2


@torch.no_grad()
def test_a_copy_is_independent(feed: Feed):
    feed.append(7)
    feed.append(1)
    other = copy.deepcopy(feed.ours)
    kept = other.keys.clone()
    feed.append(1)
    assert torch.equal(other.keys, kept)
    keys, values = feed.rows(1)
    other.update(keys, values)
    assert torch.equal(other.keys, torch.cat((kept, keys), dim=2))
    feed.compare()


@torch.no_grad()
def test_offload_and_prefetch(feed: Feed):
    feed.append(7)
    feed.append(1)
    feed.both("offload")
    feed.both("prefetch")
    feed.append(1)


def test_filled_in_inference_mode_and_continued_outside(feed: Feed):
    with torch.inference_mode():
        feed.ours.update(*feed.rows(7))
        feed.ours.update(*feed.rows(1))  # a buffer with room, made of inference tensors
        kept = feed.ours.keys.clone()
    keys, values = feed.rows(2)
    with torch.no_grad():
        feed.ours.update(keys, values)
    assert torch.equal(feed.ours.keys, torch.cat((kept, keys), dim=2))


@pytest.mark.parametrize("needing", ["query", "key", "value"])
def test_gradients_through_a_growing_cache(needing: str):
    """Only one of the three may need a gradient: with LoRA on q_proj alone, keys and values do not."""
    layer, total = GrowingLayer(), 0.0
    torch.manual_seed(1)
    steps = [[torch.randn(2, 3, length, 5) for _ in range(3)] for length in (7, 1, 1, 3)]
    parameter = torch.ones(5, requires_grad=True)
    position = ["query", "key", "value"].index(needing)
    plain, expected = ([], []), 0.0
    for step in steps:
        query, key, value = (x * parameter if i == position else x for i, x in enumerate(step))
        keys, values = layer.update(key, value)
        total = total + ((query @ keys.mT).softmax(-1) @ values).pow(2).sum()
        plain[0].append(key)
        plain[1].append(value)
        keys, values = (torch.cat(rows, dim=2) for rows in plain)
        expected = expected + ((query @ keys.mT).softmax(-1) @ values).pow(2).sum()
    gradient, expected_gradient = (torch.autograd.grad(x, parameter, retain_graph=True)[0] for x in (total, expected))
    assert_close(gradient, expected_gradient, f"gradient of {needing}")


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v2", "tiny_v3", "tiny_v32"])
def test_gradients_through_the_models_cache(name: str):
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset(name, initializer_range=0.2)).eval()
    ids = torch.randint(3, 97, (2, 13))
    learning = [(key, parameter) for key, parameter in model.named_parameters() if ".indexer." not in key]
    names, parameters = zip(*learning, strict=True)
    expected = torch.autograd.grad(model(ids).logits.pow(2).mean(), parameters)
    cache, logits = DynamicCache(config=model.config), []
    for piece in ids.split([7, 1, 1, 4], dim=1):
        logits.append(model(piece, cache=cache).logits)
    gradients = torch.autograd.grad(torch.cat(logits, dim=1).pow(2).mean(), parameters)
    for key, ours, reference in zip(names, gradients, expected, strict=True):
        assert_close(ours, reference, f"gradient of {key}")


@pytest.mark.parametrize(
    ("name", "dynamic", "static"),
    [
        ("tiny_llm", GrowingLayer, StaticKeyValueLayer),
        ("tiny_v3", LatentLayer, StaticLatentLayer),
        ("tiny_v32", IndexedLatentLayer, StaticIndexedLatentLayer),
    ],
)
def test_transformers_caches_are_made_of_our_layers(name: str, dynamic: type, static: type):
    config = preset(name)
    assert [type(layer) for layer in DynamicCache(config=config).layers] == [dynamic] * 3
    assert [type(layer) for layer in StaticCache(config=config, max_cache_len=8).layers] == [static] * 3


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v2_lite", "tiny_v3", "tiny_v32"])
@torch.no_grad()
def test_latents_are_what_is_cached(name: str):
    config = preset(name)
    cache = DeepSeekForCausalLM(config).eval()(torch.randint(3, 97, (2, 7)), use_cache=True).cache
    numbers_per_token = sum(layer.keys.shape[1] * layer.keys.shape[-1] for layer in cache.layers)
    numbers_per_token += sum(layer.values.shape[1] * layer.values.shape[-1] for layer in cache.layers)
    latents = (config.kv_lora_rank or 0) + config.qk_rope_head_dim + (config.index_head_dim or 0)
    expected = 2 * 2 * 8 if name == "tiny_llm" else latents
    assert numbers_per_token == 3 * expected


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["tiny_llm", "tiny_moe", "tiny_v2", "tiny_v3", "tiny_v32"])
@torch.no_grad()
def test_static_cache(name: str, implementation: str):
    torch.manual_seed(1)
    config = preset(name, initializer_range=0.2)
    model = DeepSeekForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 97, (2, 13))
    cache = StaticCache(config=config, max_cache_len=16)
    for _ in range(2):  # the second time after a reset
        logits = [model(piece, cache=cache).logits for piece in ids.split([7, 1, 1, 3, 1], dim=1)]
        assert_close(torch.cat(logits, dim=1), model(ids).logits, "logits with a static cache")
        cache.reset()


@torch.no_grad()
def test_reset_forgets_the_kept_up_projection():
    layer = LatentLayer()
    layer.update(torch.randn(1, 1, 3, 6), torch.randn(1, 1, 3, 0))
    layer.up_projection = (), torch.ones(2, 2)
    layer.reset()
    assert layer.up_projection is None
    assert layer.get_seq_length() == 0
