"""Hand-written backward passes against autograd's of the plain formulas, and where they step aside."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, attention_core, fused, layers, losses, moe, products, rope
from modeling_deepseek.fused import (
    CausalAttention,
    LatentAttention,
    Linear,
    LinearCrossEntropy,
    RMSNorm,
    RotatedTail,
    SortedExperts,
    SwiGLU,
)
from modeling_deepseek.moe import sorted_pairs
from tests.reference.compare import assert_close, relative_error

EXPERT = torch.tensor([[3, 0], [0, 5], [3, 5], [1, 3], [0, 3]])  # expert 2 has no pair, 5 is elsewhere, 4 is too


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second one of a wider tensor."""
    return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x, cos, sin, interleaved):
    width = 2 * cos.shape[-1]
    head, tail = x[..., :-width], x[..., -width:]
    first, second = (tail[..., ::2], tail[..., 1::2]) if interleaved else tail.tensor_split(2, -1)
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    return torch.cat((head, first * cos - second * sin, first * sin + second * cos), -1).transpose(1, 2)


def attention(query, key, value):
    length = query.shape[2]
    unseen = torch.ones(length, length).triu(1).bool()
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(unseen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def limited(gate, up, limit):
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def fused_latent_attention(interleaved: bool):
    return lambda query, rows, norm, up: LatentAttention.apply(
        query, rows, norm, up, *angles(query.dtype), (2, 4, interleaved), 1e-6, 0.3
    ).unflatten(-1, (2, -1))


def latent_attention(interleaved: bool):
    """Two heads of 4 channels without position, 6 rotated ones and 3 of values, from latents of 7."""

    def run(query, rows, norm, up):
        turn = lambda x: rotated(x, *angles(x.dtype), interleaved)  # noqa: E731
        keys, values = (rms_norm(rows[..., :7], norm) @ up.T).unflatten(-1, (2, 7)).split((4, 3), dim=-1)
        keys = torch.cat((keys, rows[..., 7:].unsqueeze(2).expand(-1, -1, 2, -1)), dim=-1)
        return attention(turn(query.unflatten(-1, (2, 10))), turn(keys), values.transpose(1, 2))

    return run


def experts(x, weights, gate_up, down, chosen=EXPERT, limit=None):
    rows = []
    for token, own, indices in zip(x, weights, chosen, strict=True):
        row = torch.zeros_like(token)
        for weight, e in zip(own, indices, strict=True):
            if e < len(gate_up):
                gate, up = limited(*(gate_up[e] @ token).chunk(2), limit)
                row = row + (weight * (down[e] @ (F.silu(gate) * up))).to(row.dtype)
        rows.append(row)
    return torch.stack(rows)


def feed_forward(x, gate, up, down, limit=None):
    inner, outer = limited(x @ gate.T, x @ up.T, limit)
    return (F.silu(inner) * outer) @ down.T


def fused_experts(x, weights, gate_up, down, chosen=EXPERT, limit=None):
    return SortedExperts.apply(x, weights, gate_up, down, *sorted_pairs(chosen, len(gate_up)), limit)


def angles(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(5.0)[None, :, None] * torch.tensor([1.0, 0.3, 0.1])
    return places.cos().to(dtype), places.sin().to(dtype)


LABELS = torch.tensor([3, -100, 0, 6, -100, 2, 1])
HEADS = [(2, 3, 7, 5), (2, 3, 7, 5), (2, 3, 7, 4)]


def rotary(interleaved: bool):
    return (
        lambda x: RotatedTail.apply(x, *angles(x.dtype), interleaved),
        lambda x: rotated(x, *angles(), interleaved),
    )


CASES = {
    "norm": (lambda x, w: RMSNorm.apply(x, w, 1e-6), rms_norm, [(3, 5, 7), (7,)]),
    "rotary": (*rotary(True), [(2, 5, 3, 10)]),
    "whole heads": (*rotary(False), [(2, 5, 3, 6)]),
    "attention": (lambda q, k, v: CausalAttention.apply(q, k, v, 0.3), attention, HEADS),
    "latents": (fused_latent_attention(True), latent_attention(True), [(2, 5, 20), (2, 5, 13), (7,), (14, 7)]),
    "latents, halves": (
        fused_latent_attention(False),
        latent_attention(False),
        [(2, 5, 20), (2, 5, 13), (7,), (14, 7)],
    ),
    "product": (Linear.apply, lambda x, w: x @ w.T, [(3, 5, 7), (4, 7)]),
    "feed-forward": (SwiGLU.apply, feed_forward, [(3, 5, 7), (6, 7), (6, 7), (7, 6)]),
    "experts": (fused_experts, experts, [(5, 6), (5, 2), (4, 8, 6), (4, 6, 4)]),
    "clamped feed-forward": (
        lambda *given: SwiGLU.apply(*given, 0.5),
        partial(feed_forward, limit=0.5),
        [(3, 5, 7), (6, 7), (6, 7), (7, 6)],
    ),
    "clamped experts": (
        partial(fused_experts, limit=0.5),
        partial(experts, limit=0.5),
        [(5, 6), (5, 2), (4, 8, 6), (4, 6, 4)],
    ),
    "loss": (
        lambda x, w: LinearCrossEntropy.apply(x, w, LABELS),
        lambda x, w: F.cross_entropy(x @ w.T, LABELS, reduction="sum"),
        [(7, 4), (9, 4)],
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one shorter, even of few tokens."""
    monkeypatch.setattr(fused, "BLOCK", 3)
    monkeypatch.setattr(fused, "ROWS", 2)
    monkeypatch.setattr(fused, "SCORES", 1)


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Each way in which products are computed, however small they are."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "has_onednn", lambda: request.param == "oneDNN")
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [lambda x: x, strided], ids=["whole", "strided"])
def test_gradients_by_differences(case, layout):
    torch.manual_seed(0)
    function, plain, shapes = CASES[case]
    given = [leaf(*shape) for shape in shapes]
    assert_close(function(*map(layout, given)), plain(*given), tolerance=1e-12)
    assert torch.autograd.gradcheck(lambda *leaves: function(*map(layout, leaves)), given)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_autograd(case, dtype, library):
    torch.manual_seed(1)
    function, plain, shapes = CASES[case]
    if case in ("attention", "latents", "latents, halves") and dtype != torch.float32:
        pytest.skip("half precision goes by torch's kernels")
    given = [leaf(*shape, dtype=dtype) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in given]
    results = []
    for run, leaves in ((plain, exact), (function, given), (plain, [x.detach().requires_grad_() for x in given])):
        output = run(*leaves)
        results.append([output, *torch.autograd.grad(output.double().pow(2).sum(), leaves)])
    for truth, ours, theirs in zip(*results, strict=True):
        if dtype == torch.float32:
            assert_close(ours, truth)
        else:
            assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + torch.finfo(dtype).eps


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_attention_of_whole_blocks(length, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 64)
    given = [leaf(1, 2, length, width, dtype=torch.float32) for width in (6, 6, 4)]
    exact = [x.detach().double().requires_grad_() for x in given]
    ours, truth = CausalAttention.apply(*given, 0.3), attention(*exact)
    assert_close(ours, truth)
    for a, b in zip(
        torch.autograd.grad(ours[..., 0].sum(), given), torch.autograd.grad(truth[..., 0].sum(), exact), strict=True
    ):
        assert (a - b).abs().max() <= 1e-5 * (b.abs().max() + 1)  # one token alone has queries without gradient


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_refused(case):
    function, _, shapes = CASES[case]
    x, *others = (leaf(*shape) for shape in shapes)
    (gradient,) = torch.autograd.grad(function(x, *others).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_frozen_experts_cost_no_products(frozen, monkeypatch):
    """What LoRA leaves as it is, or a router that isn't trained."""
    given = [leaf(*shape) for shape in CASES["experts"][2]]
    expected = torch.autograd.grad(experts(*given).sum(), given)
    asked = []
    outer = fused.plain_outer_product
    monkeypatch.setattr(fused, "plain_outer_product", lambda *a, **more: asked.append(a) or outer(*a, **more))
    given[frozen].requires_grad_(False)
    fused_experts(*given).sum().backward()
    assert given[frozen].grad is None and len(asked) == 4 * (2 - (frozen >= 2))  # of four experts
    for i, x in enumerate(given):
        if i != frozen:
            assert_close(x.grad, expected[i])


@pytest.mark.parametrize("enough", [False, True])
def test_onednn_meets_experts_rows_of_few_numbers_only(enough, monkeypatch):
    """It keeps compiled code for each number; also where one expert has rows enough, but not the mean one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    shapes = (9, 6), (9, 1), (4, 8, 6), (4, 6, 4)
    x, weights, gate_up, down = (leaf(*shape, dtype=torch.float32) for shape in shapes)
    met, onednn = [], products.onednn_product
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    monkeypatch.setattr(products, "ROWS", 8)
    monkeypatch.setattr(products, "LEAST", 2 * 8 * 6 if enough else 3 * 8 * 6)
    monkeypatch.setattr(products, "onednn_product", lambda *given: met.append(given) or onednn(*given))
    chosen = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3])[:, None]
    assert_close(fused_experts(x, weights, gate_up, down, chosen), experts(x, weights, gate_up, down, chosen))
    fused_experts(x, weights, gate_up, down, chosen).sum().backward()
    assert bool(met) == enough
    assert all(8 in (rows.shape[0], rows.shape[1]) for rows, _ in met)


def test_no_tokens_and_none_at_home(library):
    x, weights, gate_up, down = (leaf(*shape, dtype=torch.float32) for shape in ((2, 6), (2, 2), (4, 8, 6), (4, 6, 4)))
    for tokens, chosen in ((0, EXPERT[:0]), (2, torch.full((2, 2), 4))):
        y = fused_experts(x[:tokens], weights[:tokens], gate_up, down, chosen)
        (y.sum() + x.sum()).backward()
        assert y.shape == (tokens, 6) and not y.any() and not gate_up.grad.any() and not down.grad.any()


def test_no_labels():
    x, weight = leaf(3, 4), leaf(9, 4)
    loss = LinearCrossEntropy.apply(x, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_loss_of_no_chance_is_finite():
    """A label that softmax rounds to probability 0."""
    x, weight = torch.tensor([[200.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([1]))
    loss.backward()
    assert loss == 400 and x.grad == 2


def test_loss_backward_twice():
    x, weight = leaf(7, 4), leaf(9, 4)
    loss = LinearCrossEntropy.apply(x, weight, LABELS)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    (3 * loss).backward()
    assert_close(x.grad, 4 * once)


# -- the model --

IDS = torch.arange(26).view(2, 13) * 7 % 50


def trained(name: str = "tiny_v3", **fields) -> DeepSeekForCausalLM:
    torch.manual_seed(0)
    return DeepSeekForCausalLM(preset(name, moe_intermediate_size=16, **fields)).train()


def step(model: torch.nn.Module, **given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    output = model(input_ids=IDS, **{"labels": IDS, "use_cache": False, **given})
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, expected, tolerance: float = 1e-5) -> None:
    assert_close(ours[0], expected[0], "loss", tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if gradient.abs().max() > 1e-7:
            assert_close(ours[1][name], gradient, name, tolerance)


@pytest.fixture
def plainly(monkeypatch):
    """Runs a step without what is tested here."""

    def run(model, **given):
        with monkeypatch.context() as patch:
            for module in (layers, rope, attention_core, moe, losses):
                for name in ("is_trained", "is_trained_as_it_is", "is_plain"):
                    patch.setattr(module, name, lambda *given: False, raising=False)
            return step(model, **given)

    return run


def counted(monkeypatch) -> list[str]:
    """Names of the functions that ran."""
    ran: list[str] = []
    for function in (
        RMSNorm,
        RotatedTail,
        CausalAttention,
        LatentAttention,
        SortedExperts,
        Linear,
        SwiGLU,
        LinearCrossEntropy,
    ):
        original = function.forward
        monkeypatch.setattr(
            function, "forward", staticmethod(lambda *a, f=original, n=function.__name__: ran.append(n) or f(*a))
        )
    return ran


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_moe", "tiny_v2", "tiny_v3", "tiny_v32"])
@pytest.mark.parametrize("padding", [False, True])
def test_step(name, padding, library, plainly, monkeypatch):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)} if padding else {}
    model = trained(name) if name != "tiny_llm" else DeepSeekForCausalLM(preset(name)).train()
    expected, ran = plainly(model, **given), counted(monkeypatch)
    assert_same_step(step(model, **given), expected)
    attends = {"tiny_v2": "LatentAttention", "tiny_v3": "LatentAttention"}.get(name, "CausalAttention")
    assert {"RMSNorm", "SwiGLU"} <= set(ran) and ("Linear" in ran) == (library == "oneDNN")
    assert (attends in ran) != (padding or name == "tiny_v32")
    assert ("RotatedTail" in ran) == (attends not in ran or attends == "CausalAttention")
    assert ("SortedExperts" in ran) == (name != "tiny_llm")


def test_step_of_clamped_experts(library, plainly, monkeypatch):
    model = trained("tiny_v4", swiglu_limit=0.5, initializer_range=0.2)
    expected, ran = plainly(model), counted(monkeypatch)
    assert_same_step(step(model), expected, tolerance=1e-4)  # a scale's gradient is one sum, which cancels
    assert {"SwiGLU", "SortedExperts"} <= set(ran) and ("Linear" in ran) == (library == "oneDNN")


@pytest.mark.parametrize("name", ["tiny_v2", "tiny_v3"])
def test_loss_without_logits(name, plainly, monkeypatch):
    ahead = {"num_nextn_predict_layers": 2, "mtp_loss_weight": 0.3} if name == "tiny_v3" else {}
    model, labels = trained(name, **ahead), IDS.masked_fill(IDS % 3 == 0, -100)
    for more in ({}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}):
        expected = plainly(model, labels=labels, **more)
        assert_same_step(step(model, labels=labels, logits_to_keep="loss", **more), expected)
    ran = counted(monkeypatch)
    output = model(IDS, labels=labels, logits_to_keep="loss")
    assert output.logits is None and ran.count("LinearCrossEntropy") == 1 + 2 * (name == "tiny_v3")
    assert model(IDS, labels=torch.full_like(IDS, -100), logits_to_keep="loss").loss == 0
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert_close(model(IDS, labels=labels, shift_labels=shifted, logits_to_keep="loss").loss, output.loss)


def test_loss_of_bfloat16_adds_up_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 16).bfloat16().requires_grad_(), torch.randn(500, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 500, (400,))
    truth = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    ours = LinearCrossEntropy.apply(hidden, weight, labels)
    assert ours.dtype == torch.float32 and relative_error(ours, truth) < 1e-3
    (expected,), (got,) = (torch.autograd.grad(loss, weight) for loss in (truth, ours))
    assert got.dtype == torch.bfloat16 and relative_error(got, expected) < 0.02


@pytest.mark.parametrize("change", ["hook", "loss function", "no gradients"])
def test_loss_without_logits_where_the_head_is_not_plain(change, monkeypatch):
    model, seen = trained(), []
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    expected = model(IDS, labels=labels).loss
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    if change == "loss function":
        plain = model.loss_function
        model.loss_function = lambda *args, **kwargs: seen.append(0) or plain(*args, **kwargs)
    ran = counted(monkeypatch)
    with torch.set_grad_enabled(change != "no gradients"):
        output = model(IDS, labels=labels, logits_to_keep="loss")
    assert_close(output.loss, expected)
    assert output.logits is None and "LinearCrossEntropy" not in ran and bool(seen) == (change != "no gradients")
    if change == "hook":
        labelled = int((labels[:, 1:] != -100).sum())
        assert seen == [(1, labelled, model.config.vocab_size)]  # not those of the prompts


@pytest.mark.parametrize("word", ["loss", "labelled"])
def test_words_that_need_labels(word):
    with pytest.raises(ValueError, match=f'"{word}" needs labels'):
        trained()(IDS, logits_to_keep=word)
    with pytest.raises(ValueError, match="'lost': give a number"):
        trained()(IDS, labels=IDS, logits_to_keep="lost")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, library):
    """A layer's forward that is first run without gradients rounds as the one that is run again with them."""
    model = trained()
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss, gradients = step(model)
    assert loss == expected[0] and gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


@pytest.mark.parametrize("kinds", [torch.nn.Linear, layers.DeepSeekRMSNorm], ids=["projections", "norms"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
def test_hooks_on_parts_are_called(kind, kinds, library, plainly):
    model, seen = trained(), set()
    expected = plainly(model)
    listened = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name in listened:
        getattr(model.get_submodule(name), f"register_{kind}_hook")(lambda *given, name=name: seen.add(name))
    assert_same_step(step(model), expected)
    assert seen == listened


def test_products_of_processors(monkeypatch):
    """oneDNN is taken for large float32 products on AMD's processors with AVX-512 alone."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    described = {"AuthenticAMD": True, "GenuineIntel": False}
    for vendor, expected in described.items():
        monkeypatch.setattr(products.Path, "exists", lambda path: True)
        monkeypatch.setattr(products.Path, "read_text", lambda path, vendor=vendor: f"vendor_id : {vendor}")
        assert products.is_amd_with_avx512.__wrapped__() == expected
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    rows, weight = torch.ones(1024, 64), torch.ones(64, 64)
    assert products.goes_by_onednn(rows, weight)
    assert not products.goes_by_onednn(rows[:1023], weight)
    assert not products.goes_by_onednn(rows.bfloat16(), weight.bfloat16())
    assert not products.goes_by_onednn(rows.to("meta"), weight.to("meta"))


def test_lora_on_experts(plainly, monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj"], target_modules=["q_b_proj", "kv_b_proj"])
    model = peft.get_peft_model(trained(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, ran = plainly(model), counted(monkeypatch)
    assert_same_step(step(model), expected)
    assert "SortedExperts" in ran and all("lora" in name for name in expected[1])


def test_autocast_is_as_before(plainly, monkeypatch):
    model = trained()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly(model)
        ran = counted(monkeypatch)
        ours = step(model)
        half = step(model, logits_to_keep="loss")
    assert {"CausalAttention", "LatentAttention", "SortedExperts"}.isdisjoint(ran) and "LinearCrossEntropy" in ran
    exact = step(model)
    for got in (ours, half):
        assert relative_error(got[0], exact[0]) <= 2 * relative_error(expected[0], exact[0]) + 1e-3
        for name in ("lm_head.weight", "model.layers.1.mlp.experts.down_proj"):
            error, before = (relative_error(run[1][name], exact[1][name]) for run in (got, expected))
            assert error <= 2 * before + 1e-2, name


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="experts read numbers that torch.func has not before torch 2.11"
)
def test_functional_transforms_go_the_plain_way():
    model = trained()
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (IDS,), {"labels": IDS, "use_cache": False}).loss

    gradients = torch.func.grad(loss)(weights)
    assert_close(gradients["lm_head.weight"], step(model)[1]["lm_head.weight"])


def test_dropout_of_attention_and_long_sequences_take_other_kernels(monkeypatch):
    ran = counted(monkeypatch)
    step(trained(attention_dropout=0.5))
    monkeypatch.setattr(attention_core, "LONGEST", 12)
    step(trained())
    assert {"CausalAttention", "LatentAttention"}.isdisjoint(ran) and "SortedExperts" in ran
