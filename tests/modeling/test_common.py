"""What every tiny preset does under every head: padding, packing, caching, gradients, saving, recording, compiling."""

import copy
import pickle

import pytest
import torch

from modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForRecommendation,
    DeepSeekForSequenceClassification,
    DeepSeekModel,
)
from modeling_deepseek.routers import DeepSeekTopKRouter
from tests.modeling.conftest import HEADS, TINY, labels_for, outputs, tiny, token_ids
from tests.reference.compare import assert_close

# These say one thing per row, where the others say one per token.
SEQUENCE_HEADS = (DeepSeekForSequenceClassification, DeepSeekForRecommendation, DeepSeekForEmbedding)
every_token_head = pytest.mark.parametrize(
    "head", [h for h in HEADS if h not in SEQUENCE_HEADS], ids=lambda h: h.__name__, indirect=True
)


def padded(ids, pads, side):
    """Tokens [B, S] with so many pad tokens added on one side, and their mask."""
    pad = torch.full((ids.shape[0], pads), 2)
    parts = [pad, ids] if side == "left" else [ids, pad]
    tokens = torch.cat(parts, dim=1)
    return tokens, (tokens != 2).long()


def loss_of(model, ids, **kwargs):
    """The head's loss; for the trunk, which has none, a fixed projection of its output."""
    if isinstance(model, DeepSeekModel):
        hidden = model(ids, **kwargs).last_hidden_state
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).mean()
    return model(ids, **labels_for(model, ids), **kwargs).loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    ids = token_ids(2, 7)
    tokens, mask = padded(ids, 4, side)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for positions in (position_ids, None) if side == "right" else (position_ids,):
        got = outputs(model, tokens, attention_mask=mask, position_ids=positions)
        if not isinstance(model, SEQUENCE_HEADS):
            got = got[:, 4:] if side == "left" else got[:, :7]
        assert_close(got, outputs(model, ids))


def test_left_padding_without_position_ids_only_shifts_positions(model):
    """Rotary attention sees distances, so a shift of all positions changes nothing either."""
    tokens, mask = padded(token_ids(2, 7), 4, "left")
    got = outputs(model, tokens, attention_mask=mask)
    assert_close(
        got if isinstance(model, SEQUENCE_HEADS) else got[:, 4:], outputs(model, token_ids(2, 7)), tolerance=5e-5
    )


@every_token_head
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", [None, "ones", "padded"])
def test_packed_documents_do_not_see_each_other(model, use_cache, mask):
    lengths = (5, 3, 7)
    ids = token_ids(2, sum(lengths))
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    attention_mask = None if mask is None else torch.ones_like(ids)
    if mask == "padded":
        ids, attention_mask = padded(ids, 2, "right")
        position_ids = torch.cat((position_ids, torch.arange(2).expand(2, -1)), dim=1)
    got = outputs(model, ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache)
    separate = torch.cat([outputs(model, part) for part in ids[:, : sum(lengths)].split(lengths, dim=1)], dim=1)
    assert_close(got[:, : sum(lengths)], separate)


@every_token_head
def test_packing_works_in_training_mode_with_gradients(model):
    ids = token_ids(1, 8)
    position_ids = torch.cat((torch.arange(5), torch.arange(3)))[None]
    trunk = model.base_model.train()
    try:
        got = trunk(ids, position_ids=position_ids).last_hidden_state
        alone = trunk(ids[:, 5:]).last_hidden_state
    finally:
        trunk.eval()
    assert_close(got[:, 5:], alone)


@every_token_head
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 1, 3), (8, 1)], ids=str)
def test_cached_steps_equal_one_call(model, chunks):
    ids, trunk = token_ids(2, 9), model.base_model
    with torch.no_grad():
        whole = trunk(ids, use_cache=False)
        assert whole.cache is None
        cache, parts = None, []
        for part in ids.split(chunks, dim=1):
            step = trunk(part, cache=cache, use_cache=True)
            cache = step.cache
            parts.append(step.last_hidden_state)
    assert cache.get_seq_length() == 9
    assert_close(torch.cat(parts, dim=1), whole.last_hidden_state)


def test_gradients_reach_every_weight(name, head):
    # Enough tokens that every expert is chosen by some; prediction layers learn only if asked to.
    model, ids = tiny(name, head).train(), token_ids(4, 31)
    model.config.mtp_loss_weight = 0.3 if model.config.num_nextn_predict_layers else 0.0
    loss_of(model, ids).backward()
    # A shift of an answer's scores at all places is lost in their softmax: that gradient is 0 but for rounding.
    may_be_0 = {"qa_outputs.bias"}
    untouched = [
        key for key, p in model.named_parameters() if p.grad is None or not (p.grad.abs().sum() > 0 or key in may_be_0)
    ]
    # The indexer chooses keys, and a choice has no gradient: it learns from its scores (test_sparse_attention.py).
    assert untouched == [key for key, _ in model.named_parameters() if ".indexer." in key]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, head, use_reentrant):
    model, ids = tiny(name, head).train(), token_ids(2, 9)
    loss_of(model, ids).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.base_model.layers)
    if use_reentrant:
        model.enable_input_require_grads()
    loss_of(model, ids).backward()
    for key, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, msg=lambda m, k=key: f"{k}: {m}")


def test_embeddings_may_be_given_instead_of_tokens(model):
    ids = token_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert_close(outputs(model, inputs_embeds=embeds), outputs(model, ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_a_ready_made_mask_is_taken_as_it_is(model):
    ids = token_ids(2, 7)
    tokens, mask = padded(ids, 3, "right")
    visible = torch.tril(torch.ones(10, 10, dtype=torch.bool)) & mask.bool()[:, None, None, :]
    if model.config.compress_ratios is not None:  # it can't say what an entry is made of
        with pytest.raises(ValueError, match="attention_mask has 4 dimensions, but compressed attention counts"):
            outputs(model, tokens, attention_mask=visible)
        return
    expected = outputs(model, tokens, attention_mask=mask)
    if isinstance(model, SEQUENCE_HEADS):
        assert_close(outputs(model, tokens, attention_mask=visible), expected)
    else:
        assert_close(outputs(model, tokens, attention_mask=visible)[:, :7], expected[:, :7])


def test_recorded_outputs_have_their_shapes(model):
    ids, config = token_ids(2, 7), model.config
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        result = eager(ids, output_hidden_states=True, output_attentions=True)
        routed = model.base_model(ids, output_router_logits=True).router_logits
        plain = model(ids)
    streams = () if config.hc_mult is None else (config.hc_mult,)
    shapes = [(2, 7, *streams, 32)] * config.num_hidden_layers + [(2, 7, 32)]
    assert [tuple(h.shape) for h in result.hidden_states] == shapes
    ratios = config.compress_ratios or [0] * config.num_hidden_layers
    keys = [7 + (7 // ratio if ratio else 0) for ratio in ratios]  # and entries
    assert [tuple(a.shape) for a in result.attentions] == [(2, 4, 7, count) for count in keys]
    for weights in result.attentions:
        total = weights.sum(-1)
        torch.testing.assert_close(total, torch.ones(2, 4, 7)) if config.compress_ratios is None else None
        assert (total <= 1 + 1e-5).all() and not weights[..., :7].triu(1).any()  # a sink takes what is missing
    moe_layers = sum(spec.feed_forward == "moe" for spec in config.specs)
    assert [tuple(r.shape) for r in routed or ()] == [(14, 8)] * moe_layers
    assert plain.hidden_states is None and plain.attentions is None


@every_token_head
def test_attentions_of_absorbed_decode_equal_those_of_one_call(model):
    eager, ids = copy.deepcopy(model.base_model), token_ids(2, 7)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        whole = eager(ids, output_attentions=True).attentions
        cache = eager(ids[:, :6], use_cache=True).cache
        step = eager(ids[:, 6:], cache=cache, output_attentions=True).attentions
    for all_rows, last_row in zip(whole, step, strict=True):
        kept = last_row.shape[-1]  # a window lets go of its first keys
        assert_close(last_row, all_rows[:, :, -1:, -kept:])
        assert not all_rows[:, :, -1:, :-kept].any()


def test_config_switches_recording_on(name):
    model = tiny(name, output_hidden_states=True, output_router_logits=True)
    with torch.no_grad():
        result = model(token_ids(1, 5))
    assert len(result.hidden_states) == model.config.num_hidden_layers + 1
    assert len(result.router_logits or ()) == sum(spec.feed_forward == "moe" for spec in model.config.specs)


def test_tuples_for_those_who_ask(model):
    ids = token_ids(2, 5)
    with torch.no_grad():
        as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    first = as_tuple[0] if not isinstance(model, HEADS[-1]) else torch.stack(as_tuple[:2], dim=-1)
    first = first[:, 3:] if isinstance(model, DeepSeekForRecommendation) else first  # as `outputs` gives it
    torch.testing.assert_close(first, outputs(model, ids))


def test_copies_and_pickles_compute_the_same(name, head):
    model, ids = tiny(name, head), token_ids(2, 7)
    pickled = pickle.dumps(model)  # before the first forward, for transformers' recording hooks can't be pickled
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(outputs(twin, ids), outputs(model, ids))


def test_bfloat16_is_close_and_keeps_float32_where_it_must(model):
    ids = token_ids(2, 7)
    half = copy.deepcopy(model).to(torch.bfloat16)
    biases = {key: b for key, b in half.named_buffers() if key.endswith("e_score_correction_bias")}
    routers = sum(isinstance(module, DeepSeekTopKRouter) for module in model.modules())
    assert len(biases) == (routers if model.config.topk_method == "noaux_tc" else 0)
    for key, bias in biases.items():
        assert bias.dtype == torch.float32
        assert torch.equal(bias, model.get_buffer(key))
    assert torch.equal(half.base_model.rotary_emb.inv_freq, model.base_model.rotary_emb.inv_freq)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    got, expected = outputs(half, ids), outputs(model, ids)
    # A recommender's scores are float32 in any type: rounded ones would tie.
    assert got.dtype == (torch.float32 if isinstance(half, DeepSeekForRecommendation) else torch.bfloat16)
    # Rounded activations may change a token's experts, so only the bulk is compared.
    assert (got.float() - expected).abs().median() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_casting_back_and_forth_leaves_the_correction_bias(cast):
    model = tiny("tiny_v3")
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    getattr(model, cast)()
    assert torch.equal(gate.e_score_correction_bias, before) and gate.weight.dtype != torch.float64
    model.to("meta").to_empty(device="cpu")
    assert gate.e_score_correction_bias.dtype == torch.float32


def test_loss_divided_by_the_number_of_items(name):
    model, ids = tiny(name), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        mean = model(ids, labels=labels).loss
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(mean * (labels[:, 1:] != -100).sum(), summed)
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=5).loss, summed / 5)
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss, summed / 5)


def test_logits_to_keep(causal):
    ids = token_ids(2, 7)
    every = outputs(causal, ids)
    assert_close(outputs(causal, ids, logits_to_keep=2), every[:, -2:])
    assert_close(outputs(causal, ids, logits_to_keep=torch.tensor([1, 4])), every[:, [1, 4]])


def test_resizing_embeddings_keeps_old_tokens(model):
    model, ids = copy.deepcopy(model), token_ids(2, 7)
    before = outputs(model, ids)
    model.resize_token_embeddings(103, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 103
    after = outputs(model, ids)
    if isinstance(model, DeepSeekForCausalLM):
        assert model.lm_head.weight.shape == (103, 32) and after.shape[-1] == 103
    assert_close(after[..., : before.shape[-1]], before)
    outputs(model, torch.full((1, 3), 102))
    model.resize_token_embeddings(97)
    assert_close(outputs(model, ids), before)


def test_tied_embeddings_stay_tied(name, tmp_path):
    model = tiny(name, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs(loaded, token_ids(2, 7)), outputs(model, token_ids(2, 7)))
    apart = tiny(name)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_dropout_acts_in_training_only(name):
    model, ids = tiny(name, hidden_dropout=0.3, attention_dropout=0.3), token_ids(2, 9)
    assert torch.equal(outputs(model, ids), outputs(model, ids))
    assert_close(outputs(model, ids), outputs(tiny(name), ids))
    model.train()
    assert not torch.equal(outputs(model, ids), outputs(model, ids))


def test_fresh_weights_follow_the_initializer(name):
    from configuration_deepseek import preset

    model = DeepSeekForCausalLM(preset(name, initializer_range=0.02))
    for key, weight in model.named_parameters():
        if key.endswith(("bias", "attn_sink", ".ape", "_hc.base", "hc_head.base")):
            assert (weight == 0).all(), key
        elif "norm" in key or key.endswith(("_hc.scale", "hc_head.scale")):
            assert (weight == 1).all(), key
        else:
            assert 0.014 < weight.std() < 0.026, key
    for key, buffer in model.named_buffers():
        if "bias" in key:
            assert (buffer == 0).all(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_compiles_without_a_graph_break(name):
    model, ids = tiny(name, moe_intermediate_size=16) if name != "tiny_llm" else tiny(name), token_ids(2, 8)
    model.set_experts_implementation("grouped_mm")
    expected = outputs(model, ids, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, expected)
