"""Attention against its formulas; absorbed decode against expansion: same numbers, no expanded keys, no copied cache,
and the same respect for whatever stands in the place of kv_b_proj."""

import contextlib
import types
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.attention_mha import DeepSeekMultiHeadAttention
from modeling_deepseek.attention_mla import DeepSeekMultiHeadLatentAttention, keeps_weights
from modeling_deepseek.layers import is_plain_linear
from modeling_deepseek.rope import DeepSeekRotaryEmbedding
from tests.reference.attention import mha, mla
from tests.reference.compare import assert_close, assert_same_gradients, relative_error, twin

IMPLEMENTATIONS = ["eager", "sdpa"]


def rope(rope_type: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


YARN = rope("yarn", factor=40.0, original_max_position_embeddings=8, mscale=0.707, mscale_all_dim=0.707)
ATTENTIONS = {
    "mha": ("tiny_llm", {"num_key_value_heads": 4}),
    "gqa": ("tiny_llm", {"num_key_value_heads": 2}),
    "mqa": ("tiny_llm", {"num_key_value_heads": 1}),
    "mha, bias": ("tiny_llm", {"attention_bias": True}),
    "mha, odd": ("tiny_llm", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14}),
    "mha, linear": ("tiny_llm", rope("linear", factor=4.0)),
    "mha, yarn": ("tiny_llm", rope("yarn", factor=4.0, original_max_position_embeddings=8)),
    "mla": ("tiny_v3", {}),
    "mla, direct query": ("tiny_v2_lite", {}),
    "mla, bias": ("tiny_v3", {"attention_bias": True}),
    "mla, half rope": ("tiny_v3", {"rope_interleave": False}),
    "mla, yarn": ("tiny_v2", YARN),
    "mla, yarn with two mscales": ("tiny_v2", {"rope_parameters": {**YARN["rope_parameters"], "mscale_all_dim": 1.0}}),
    "mla, odd": (
        "tiny_v3",
        {
            "num_attention_heads": 3,
            "q_lora_rank": 13,
            "kv_lora_rank": 11,
            "qk_nope_head_dim": 7,
            "qk_rope_head_dim": 6,
            "v_head_dim": 5,
        },
    ),
    "mla, wide values": ("tiny_v3", {"v_head_dim": 27}),
}


def causal_mask(length: int) -> torch.Tensor:
    """[1, 1, S, S], to be added to scores."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_against_the_formulas(name: str, implementation: str):
    torch.manual_seed(1)
    base, fields = ATTENTIONS[name]
    config = preset(base, **fields)
    config._attn_implementation = implementation
    attention_class = DeepSeekMultiHeadAttention if config.kv_lora_rank is None else DeepSeekMultiHeadLatentAttention
    attention = attention_class(config, layer_idx=0)
    for key, parameter in attention.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in key), std=0.3)
    weights = {key: twin(parameter) for key, parameter in attention.named_parameters()}
    x = torch.randn(2, 13, config.hidden_size, requires_grad=True)
    copy = twin(x)

    positions = DeepSeekRotaryEmbedding(config)(x, torch.arange(13)[None])
    ours, _ = attention(x, positions, causal_mask(13))
    reference = mha if config.kv_lora_rank is None else mla
    expected = torch.stack([reference(sequence, weights, config.to_dict()) for sequence in copy])
    leaves = {"x": (x, copy), **{key: (attention.get_parameter(key), weights[key]) for key in weights}}
    assert_same_gradients(ours, expected, leaves)


# Absorbed decode -----------------------------------------------------------------------------------------------------

PROMPT = 31


@pytest.fixture(scope="module")
def model() -> DeepSeekForCausalLM:
    """V3 with a latent wide against heads and queries, so that an expanded or copied cache is the largest tensor."""
    return fresh_model()


def fresh_model(**fields) -> DeepSeekForCausalLM:
    torch.manual_seed(1)
    widths = {"kv_lora_rank": 40, "qk_rope_head_dim": 6, "initializer_range": 0.2, "num_hidden_layers": 2}
    return DeepSeekForCausalLM(preset("tiny_v3", **widths, **fields)).eval()


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def counting_absorbed() -> Iterator[mock.Mock]:
    """Counts the calls of absorbed attention, which go on as they are."""
    absorbed = DeepSeekMultiHeadLatentAttention.attend_absorbed
    with mock.patch.object(
        DeepSeekMultiHeadLatentAttention, "attend_absorbed", autospec=True, side_effect=absorbed
    ) as m:
        yield m


def never_absorbing():
    """Every call expands, decoding too."""
    return mock.patch.object(DeepSeekMultiHeadLatentAttention, "absorbing_is_cheaper", return_value=False)


@torch.no_grad()
def decode(model, ids: torch.Tensor, lengths: list[int], **arguments) -> torch.Tensor:
    """Logits of a prompt and pieces after it, with a cache."""
    cache = DynamicCache(config=getattr(model, "config", None))
    pieces = ids.split(lengths, dim=1)
    return torch.cat([model(piece, cache=cache, **arguments).logits for piece in pieces], dim=1)


decode_in_generate = keeps_weights(decode)
DECODES = {"in generate": decode_in_generate, "by hand": decode}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_absorbed_equals_expanded(model, implementation: str, batch: int):
    model.set_attn_implementation(implementation)
    lengths = [PROMPT, 1, 1, 3, 1]
    ids = token_ids(batch, sum(lengths))
    with counting_absorbed() as absorbed:
        ours = decode(model, ids, lengths)
    assert absorbed.call_count == 4 * 2  # every piece but the prompt, in both layers
    with never_absorbing():
        assert_close(ours, decode(model, ids, lengths), "absorbed against expanded")
    with torch.no_grad():
        assert_close(ours, model(ids).logits, "absorbed against no cache")


@torch.no_grad()
def test_absorbed_gives_the_attention_weights(model):
    model.set_attn_implementation("eager")
    ids = token_ids(3, PROMPT + 3)
    cache = model(ids[:, :PROMPT], use_cache=True).cache
    with counting_absorbed() as absorbed:
        ours = model(ids[:, PROMPT:], cache=cache, output_attentions=True).attentions
    assert absorbed.call_count == 2
    whole = model(ids, output_attentions=True).attentions
    for a, b in zip(ours, whole, strict=True):
        assert_close(a, b[:, :, PROMPT:], "attention weights")


class NewTensors(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes in new memory."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(output):
            if is_tensor(x) and x.untyped_storage().data_ptr() not in inputs:
                self.made.append((str(func), tuple(x.shape)))
        return output


def is_tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_decode_neither_expands_nor_copies_the_cache(model, implementation: str, batch: int, queries: int):
    model.set_attn_implementation(implementation)
    config, ids = model.config, token_ids(batch, PROMPT + 1 + queries)
    cache = DynamicCache(config=config)
    model(ids[:, :PROMPT], cache=cache)
    model(ids[:, PROMPT : PROMPT + 1], cache=cache)  # the buffer doubles here, and has room afterwards
    with NewTensors() as decoding:
        model(ids[:, PROMPT + 1 :], cache=cache)

    cached = batch * (PROMPT + 1) * (config.kv_lora_rank + config.qk_rope_head_dim)
    expanded = batch * config.num_attention_heads * (PROMPT + 1) * min(config.qk_nope_head_dim, config.v_head_dim)
    limit = min(cached, expanded)
    assert 97 * batch * queries < limit  # the logits are allowed
    large = [(name, shape) for name, shape in decoding.made if torch.Size(shape).numel() >= limit]
    assert not large, f"decode makes tensors as large as the cache ({limit} elements): {large}"

    with never_absorbing(), NewTensors() as expanding:  # the recorder does see an expansion
        model(ids[:, -1:], cache=cache)
    heads, widths = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
    assert any(torch.Size(shape).numel() >= batch * heads * PROMPT * widths for _, shape in expanding.made)


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "left padding"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_several_queries_see_only_what_is_before_them(model, implementation: str, padded: bool):
    model.set_attn_implementation(implementation)
    ids = token_ids(2, PROMPT + 3)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], cache=cache)
    with counting_absorbed() as absorbed:
        ours = model(ids[:, PROMPT:], attention_mask=mask, cache=cache).logits
    assert absorbed.call_count == 2
    assert_close(ours, model(ids, attention_mask=mask).logits[:, PROMPT:], "logits of the last three")


# What stands in the place of kv_b_proj -------------------------------------------------------------------------------


class RoundedLinear(nn.Linear):
    """A weight-only int8 Linear, its weight multiplied out in forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear(x, (self.weight / scale).round() * scale * 1.5)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def projections(model) -> list[tuple[nn.Module, nn.Linear]]:
    attentions = [layer.self_attn for layer in model.model.layers]
    return [(attention, attention.kv_b_proj) for attention in attentions]


class Shifted(nn.Linear):
    """Adds what no attribute tells of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5


def shifted(model):
    for attention, linear in projections(model):
        attention.kv_b_proj = Shifted(linear.in_features, linear.out_features, bias=False)
        attention.kv_b_proj.weight = linear.weight


def rounded(model):
    for attention, linear in projections(model):
        attention.kv_b_proj = RoundedLinear(linear.in_features, linear.out_features, bias=False)
        attention.kv_b_proj.weight = linear.weight


def wrapped(model):
    for attention, linear in projections(model):
        attention.kv_b_proj = nn.Sequential(linear, nn.Linear(linear.out_features, linear.out_features, bias=False))


def biased(model):
    for _, linear in projections(model):
        linear.bias = nn.Parameter(torch.randn(linear.out_features))


def hooked(model):
    for _, linear in projections(model):
        linear.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(model):
    for _, linear in projections(model):
        linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replaced_forward(model):
    for _, linear in projections(model):
        linear.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), linear)


def parametrised(model):
    for _, linear in projections(model):
        parametrize.register_parametrization(linear, "weight", Doubled())


def weight_normed(model):
    for _, linear in projections(model):
        parametrised_linear = nn.utils.parametrizations.weight_norm(linear)
        parametrised_linear.parametrizations.weight.original0.data.mul_(3)


def offloaded_projection(model):
    from accelerate import cpu_offload

    for _, linear in projections(model):
        cpu_offload(linear, execution_device=torch.device("cpu"))
        assert linear.weight.is_meta


def offloaded_model(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.kv_b_proj.weight.is_meta


def dynamically_quantized(model):
    for attention, linear in projections(model):
        holder = nn.ModuleDict({"linear": linear})
        attention.kv_b_proj = torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, dtype=torch.qint8)["linear"]


# name -> (change, whether decode still absorbs, tolerance)
REPLACEMENTS: dict[str, tuple[Callable, bool, float]] = {
    "rounded": (rounded, True, 1e-5),
    "wrapped": (wrapped, True, 1e-5),
    "biased": (biased, False, 1e-5),
    "shifted": (shifted, False, 1e-5),
    "hooked": (hooked, True, 1e-5),
    "hooked before": (hooked_before, False, 1e-5),
    "replaced forward": (replaced_forward, True, 1e-5),
    "parametrised": (parametrised, True, 1e-5),
    "weight norm": (weight_normed, True, 1e-5),
    "offloaded projection": (offloaded_projection, True, 1e-5),
    "offloaded model": (offloaded_model, True, 1e-5),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("way", "prompt"), [("in generate", PROMPT), ("by hand", PROMPT), ("by hand", 40)])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_decode_honours_what_stands_for_kv_b_proj(name: str, way: str, prompt: int):
    """By hand, where a projection may be changed between calls, rows are absorbed if they are more than the latent is
    wide (40), each time anew."""
    change, absorbs, tolerance = REPLACEMENTS[name]
    model, lengths = fresh_model(), [prompt, 1, 1, 3]
    ids = token_ids(2, sum(lengths))
    with torch.no_grad():
        before = model(ids).logits
    change(model)
    assert not any(is_plain_linear(projection) for _, projection in projections(model))
    with counting_absorbed() as absorbed:
        ours = DECODES[way](model, ids, lengths)
    assert absorbed.call_count == (6 if absorbs and (way == "in generate" or prompt == 40) else 0)
    with torch.no_grad():
        expected = model(ids).logits
    if name not in ("offloaded projection", "offloaded model"):
        assert relative_error(before, expected) > 1e-3, "the change changes nothing"
    assert_close(ours, expected, "decode against prefill", tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_decode_honours_a_dynamically_quantized_projection():
    """It rounds activations by the range of each call, so that no two ways agree to more than its own error."""
    model, lengths = fresh_model(first_k_dense_replace=2), [PROMPT, 1, 1, 3]  # no experts, whose choice may flip
    ids = token_ids(2, sum(lengths))
    dynamically_quantized(model)
    with counting_absorbed() as absorbed:
        ours = decode_in_generate(model, ids, lengths)
    assert absorbed.call_count in (0, 6)
    with torch.no_grad():
        assert_close(ours, model(ids).logits, "decode against prefill", tolerance=0.1)


def lora(use_dora: bool = False, seed: int = 1, **fields):
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["kv_b_proj", "q_b_proj"]
    return LoraConfig(r=3, lora_alpha=9, target_modules=targets, init_lora_weights=False, use_dora=use_dora, **fields)


def with_adapters(*configs):
    """A PEFT model with adapters one and two of these configs; one is active."""
    from peft import get_peft_model

    model = get_peft_model(fresh_model(), configs[0], adapter_name="one")
    for name, config in zip(("two",), configs[1:], strict=False):
        model.add_adapter(name, config)
    return model.eval()


@contextlib.contextmanager
def merged(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@contextlib.contextmanager
def active(model, name):
    model.set_adapter(name)
    yield
    model.set_adapter("one")


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT calls it
    "ignore:`lora_bias=True` was passed",
)

STATES = {
    "LoRA": lambda: (with_adapters(lora()), contextlib.nullcontext),
    "DoRA": lambda: (with_adapters(lora(use_dora=True)), contextlib.nullcontext),
    "LoRA with a bias": lambda: (with_adapters(lora(lora_bias=True)), contextlib.nullcontext),
    "merged": lambda: (with_adapters(lora()), merged),
    "second of two": lambda: (with_adapters(lora(), lora(seed=2)), lambda model: active(model, "two")),
    "disabled": lambda: (with_adapters(lora()), lambda model: model.disable_adapter()),
}


@pytest.mark.parametrize("way", DECODES)
@pytest.mark.parametrize("name", STATES)
def test_decode_honours_adapters(name: str, way: str):
    model, state = STATES[name]()
    lengths = [PROMPT, 1, 1, 3]
    ids = token_ids(2, sum(lengths))
    with torch.no_grad():
        before = fresh_model()(ids).logits
    with state() if state is contextlib.nullcontext else state(model), torch.no_grad():
        ours, expected = DECODES[way](model, ids, lengths), model(ids).logits
    assert_close(ours, expected, "decode against prefill")
    assert (relative_error(before, expected) > 1e-2) == (name != "disabled")


def test_decode_honours_merged_and_unloaded_adapters():
    model, lengths = with_adapters(lora()), [PROMPT, 1, 3]
    ids = token_ids(2, sum(lengths))
    adapted = decode(model, ids, lengths)
    plain = model.merge_and_unload()
    assert all(is_plain_linear(projection) for _, projection in projections(plain))
    assert_close(decode(plain, ids, lengths), adapted, "merged against adapted")


def test_decode_honours_adapters_by_row():
    model, lengths = with_adapters(lora(), lora(seed=2)), [PROMPT, 1, 1, 3]
    ids = token_ids(3, sum(lengths))
    ours = decode(model, ids, lengths, adapter_names=["one", "two", "__base__"])
    with active(model, "one"):
        assert_close(ours[:1], decode(model, ids[:1], lengths), "row of adapter one")
    with active(model, "two"):
        assert_close(ours[1:2], decode(model, ids[1:2], lengths), "row of adapter two")
    with model.disable_adapter():
        assert_close(ours[2:], decode(model, ids[2:], lengths), "row of no adapter")


def test_a_kept_up_projection_is_computed_once_per_generation():
    model, calls = fresh_model(), []
    hooked(model)
    model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(
        lambda m, args, output: calls.append(args[0].shape)
    )
    latent, ids = model.config.kv_lora_rank, token_ids(2, PROMPT)
    cache = DynamicCache(config=model.config)
    seen = model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert calls == [(2, PROMPT, latent), (1, latent), (latent, latent)]
    calls.clear()
    model.generate(seen, cache=cache, max_new_tokens=4, do_sample=False)
    assert calls == [(1, latent), (latent, latent)]


def replace_weight(layer) -> None:
    layer.lora_B["one"].weight.data = layer.lora_B["one"].weight + 1  # the version stays


SWITCHES = {
    "adapter": lambda model: model.set_adapter("two"),
    "merge": lambda model: model.merge_adapter(),
    "disable": lambda model: model.disable_adapter().__enter__(),
    "scaling": lambda model: [layer.scaling.update(one=3.0) for _, layer in projections(model.base_model.model)],
    "weights": lambda model: [layer.lora_B["one"].weight.add_(1) for _, layer in projections(model.base_model.model)],
    "other weights": lambda model: [replace_weight(layer) for _, layer in projections(model.base_model.model)],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_an_adapter_changed_during_a_decode_is_honoured(name: str):
    ids = token_ids(2, PROMPT + 4)

    @keeps_weights
    @torch.no_grad()
    def run() -> torch.Tensor:
        model, cache, logits = with_adapters(lora(), lora(seed=2)), DynamicCache(config=fresh_model().config), []
        for i, piece in enumerate(ids.split([PROMPT, 2, 2], dim=1)):
            if i == 2:
                SWITCHES[name](model)
            logits.append(model(piece, cache=cache).logits)
        return torch.cat(logits, dim=1)

    ours = run()
    with never_absorbing():
        assert_close(ours, run(), "absorbed against expanded")


@pytest.mark.parametrize("prompt", [PROMPT, 45])
def test_an_adapter_swapped_between_two_calls_on_one_cache_is_honoured(prompt: int):
    """PEFT writes the new adapter into the old one's memory through `.data`, which leaves no trace."""
    ids = token_ids(1, prompt)

    @torch.no_grad()
    def run() -> torch.Tensor:
        model, cache = with_adapters(lora()), DynamicCache(config=fresh_model().config)
        first = model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False)
        for _, layer in projections(model.base_model.model):
            layer.lora_B["one"].weight.data.mul_(-2)
        second = model.generate(first, cache=cache, max_new_tokens=3, do_sample=False)
        for _, layer in projections(model.base_model.model):
            layer.lora_B["one"].weight.data.mul_(-2)
        return model(second[:, -1:], cache=cache).logits

    ours = run()
    with never_absorbing():
        assert_close(ours, run(), "absorbed against expanded")


# The switch ----------------------------------------------------------------------------------------------------------


def attention_of(name: str, **fields) -> DeepSeekMultiHeadLatentAttention:
    """An attention of a preset's widths, with few heads: costs are per head."""
    config = preset(name, num_attention_heads=1, num_key_value_heads=1, hidden_size=8, **fields)
    config._attn_implementation = "sdpa"
    return DeepSeekMultiHeadLatentAttention(config, 0).eval()


@pytest.mark.parametrize(
    ("queries", "seen", "absorbs"),
    [
        (1, 0, False),  # the first token
        (4096, 0, False),  # a prompt
        (1, 1, True),
        (1, 4096, True),  # decoding
        (3, 4096, True),  # drafts to be verified
        (64, 4096, True),
        (512, 4096, False),  # a chunk of a prompt
        (4096, 4096, False),
    ],
)
@torch.no_grad()
def test_costs_decide(queries: int, seen: int, absorbs: bool):
    attention = attention_of("v3")
    assert attention.absorbing_is_cheaper(queries, seen) == absorbs
    if seen:
        keys, latent, rope_width, nope, value = seen + queries, 512, 64, 128, 128
        projecting = latent * (nope + value)
        absorbed = queries * projecting + queries * keys * (latent + rope_width + latent)
        expanded = keys * projecting + queries * keys * (nope + rope_width + value)
        assert absorbs == (absorbed < expanded)


def test_training_and_gradients_expand():
    attention = attention_of("v3")
    assert not attention.absorbing_is_cheaper(1, 4096)  # gradients are on
    with torch.no_grad():
        assert attention.absorbing_is_cheaper(1, 4096)
        assert not attention.train().absorbing_is_cheaper(1, 4096)


@torch.no_grad()
def test_kernels_without_room_for_wide_heads_expand():
    attention = attention_of("v3")
    attention.config._attn_implementation = "flash_attention_2"
    assert not attention.absorbing_is_cheaper(1, 4096)


@torch.no_grad()
def test_static_caches_absorb_single_queries():
    """Their length is a tensor, which is not to be waited for."""
    attention, seen = attention_of("v3"), torch.tensor(4096)
    assert attention.absorbing_is_cheaper(1, seen)
    assert not attention.absorbing_is_cheaper(3, seen)
