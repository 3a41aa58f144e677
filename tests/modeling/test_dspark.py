"""Draft stages (DSpark): against formulas position by position, in training, and through files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.presets import PRESETS
from configuration_deepseek.weight_names import with_release_names
from finetune_deepseek.checkpoints.checkpoint import official_weights
from finetune_deepseek.checkpoints.export import export_native
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForSequenceClassification, DeepSeekModel
from modeling_deepseek.draft_loss import targets_of
from modeling_deepseek.modeling_deepseek import DeepSeekDraftStage
from tests.configuration.test_compressed import V4
from tests.modeling.conftest import outputs, token_ids
from tests.modeling.test_moe import official_weights as with_single_experts
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.dspark import loss_of, scores_of, states_behind
from tests.reference.v4_names import v4_names
from tests.reference.v41_names import draft_names, v41_names

DRAFTS = {
    **{"dspark_block_size": 3, "dspark_noise_token_id": 7, "dspark_target_layer_ids": [1, 3], "dspark_markov_rank": 5},
    **{"num_nextn_predict_layers": 3, "mtp_loss_weight": 0.3, "swiglu_limit": 1.0, "initializer_range": 0.2},
}


SHARED = {  # V4.1's, with experts of their own number
    **{**PRESETS["tiny_v4.1"], "vocab_size": 61, "image_token_id": 60, **DRAFTS, "index_n_heads": 20},
    **{"dspark_n_routed_experts": 6, "dspark_num_experts_per_tok": 3},
}
BASES = {"V4": {**V4, "num_hash_layers": 1, **DRAFTS}, "V4.1": SHARED}


def model_of(base: str = "V4", **fields) -> DeepSeekForCausalLM:
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(DeepSeekConfig(**{**BASES[base], **fields}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("_hc.base", "hc_head.base", "e_score_correction_bias", "bias_vl", "attn_sink")):
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def stage_weights(model) -> tuple[list[dict], dict]:
    """Each stage's weights with experts one by one, and the pairs that gradients are taken of."""
    stages, leaves = [], {}
    for i, stage in enumerate(model.model.draft_stages):
        single, _ = with_single_experts(stage.mlp)
        twins = {name: twin(p) for name, p in stage.named_parameters() if not name.startswith("mlp.")}
        leaves |= {f"{i}.{name}": (stage.get_parameter(name), twins[name]) for name in twins}
        stages.append({**twins, **{f"mlp.{name}": weight for name, weight in single.items()}})
    return stages, leaves


@pytest.fixture(scope="module", params=BASES)
def drafted(request):
    """A model, ids of one row, and its trunk's output."""
    small = {"hidden_size": 16, "hc_mult": 2, "hc_sinkhorn_iters": 2, "num_nextn_predict_layers": 2, "vocab_size": 23}
    ids = token_ids(1, 11, seed=3) % 23
    small |= {"image_token_id": ids[0, 2].item()} if request.param == "V4.1" else {}  # stages take it as any other
    model = model_of(request.param, **small, n_routed_experts=4)
    with torch.no_grad():
        return model, ids, model.model(ids, output_draft_states=True, use_cache=False)


def test_states_scores_and_gradients_behind_each_token(drafted):
    model, ids, trunk = drafted
    assert trunk.draft_states.shape == (1, 11, 32)
    stages, leaves = stage_weights(model)
    config, embeds = model.config.to_dict(), model.model.embed_tokens.weight
    anchors = torch.tensor([[1, 9]])  # with fewer contexts than the window, with more
    states = model.model.draft(model.model.draft_context(trunk.draft_states), embeds[ids[0, anchors + 1]], anchors)
    last, expected = model.model.draft_stages[-1], []
    previous = torch.tensor([[[5, 8, 2], [22, 0, 11]]])
    bias, markov = last.markov_head(previous)
    scores = model.lm_head(last.shared_head(states)) + bias
    ours = torch.cat((scores, last.confidence_head(states, markov).unsqueeze(-1)), dim=-1)
    for t, tokens in zip(anchors[0].tolist(), previous[0].tolist(), strict=True):
        block = states_behind(t, trunk.draft_states[0].double(), int(ids[0, t + 1]), stages, embeds.double(), config)
        row, odds = scores_of(block, tokens, stages[-1], model.lm_head.weight.detach().double(), config)
        expected.append(torch.cat((row, odds.unsqueeze(-1)), dim=-1))
    assert_same_gradients(ours[0], torch.stack(expected), leaves, tolerance=2e-5)


def test_means_of_streams_are_taken_behind_the_layers_and_in_shared_models_before(drafted):
    model, ids, trunk = drafted
    recorded, layers = [], [model.model.layers[i] for i in (1, 3)]
    hooks = [layer.register_forward_hook(lambda *a: recorded.append(a[-1].mean(2))) for layer in layers]
    if model.config.kv_source_layer_ids is not None:
        [hook.remove() for hook in hooks]
        hooks = [layer.register_forward_pre_hook(lambda *a: recorded.append(a[1][0].mean(2))) for layer in layers]
    outputs(model, ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert torch.equal(trunk.draft_states, torch.cat(recorded, dim=-1))


def test_targets_end_with_the_text_its_labels_and_its_document():
    labels = torch.tensor([[-100, -100, 12, 13, 14, -100, 16, 17]])
    anchors = torch.tensor([[0, 2, 4, 6]])
    plain = targets_of(labels, anchors, 3, attention_mask=None, position_ids=None)
    none = [-100] * 3
    assert plain.tolist() == [[[12, 13, 14], [14, -100, -100], [16, 17, -100], none]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = targets_of(labels, anchors, 3, attention_mask=None, position_ids=positions)
    assert packed.tolist() == [[[12, -100, -100], none, [16, 17, -100], none]]
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    padded = targets_of(labels, anchors, 3, attention_mask=mask, position_ids=None)
    assert padded.tolist() == [[none, none, [16, 17, -100], none]]


def test_the_loss_and_its_gradients(drafted):
    model, ids, trunk = drafted
    labels = ids.clone()
    labels[0, 7] = -100
    stages, leaves = stage_weights(model)
    config, embeds = model.config.to_dict(), model.model.embed_tokens.weight.double()
    head, losses, weights = model.lm_head.weight.detach().double(), [], []
    logits = trunk.last_hidden_state[0].double() @ head.T
    for t in (0, 3, 6, 9):
        count = next((j for j in range(3) if t + 2 + j > 10 or labels[0, t + 2 + j] == -100), 3)
        if not count:
            continue
        block = states_behind(t, trunk.draft_states[0].double(), int(ids[0, t + 1]), stages, embeds, config)
        previous, targets = ids[0, t + 1 : t + 1 + count].tolist(), labels[0, t + 2 : t + 2 + count].tolist()
        scores = scores_of(block[:count], previous, stages[-1], head, config)
        of_block = loss_of(*scores, logits[t + 1 : t + 1 + count], targets)
        losses, weights = losses + of_block[0], weights + of_block[1]
    assert len(losses) == 3 + 2 + 3
    ours = model.draft_loss(trunk, labels, input_ids=ids)
    assert_same_gradients(ours, sum(losses) / sum(weights), leaves, tolerance=2e-5)
    result = model(ids, labels=labels, use_cache=False)
    torch.testing.assert_close(result.mtp_loss, ours)


@pytest.mark.parametrize("base", BASES)
def test_every_weight_of_the_stages_learns_and_no_other_one(base):
    model, ids = model_of(base).train(), token_ids(3, 13) % 61
    result = model(ids, labels=ids, use_cache=False)
    result.loss.backward()
    assert result.loss > result.mtp_loss * 0.3
    first = model.config.num_hidden_layers
    ahead = tuple(f"model.layers.{i}." for i in range(first, first + 3))
    taught = {name: p.grad for name, p in model.named_parameters()}
    # an expert that no token chose has a gradient of its row alone
    assert not [name for name, grad in taught.items() if name.startswith(ahead) and (grad is None or not grad.any())]
    model.zero_grad()
    model.config.mtp_loss_weight = 0.0
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith(ahead):
            assert torch.equal(parameter.grad, taught[name]) if taught[name] is not None else parameter.grad is None


@pytest.mark.parametrize("base", BASES)
def test_padding_and_packing_leave_the_loss_as_it_is(base):
    model, ids = model_of(base), token_ids(1, 9, seed=5) % 61
    with torch.no_grad():
        alone = model(ids, labels=ids, use_cache=False).mtp_loss
        for width in (3, 6):  # of blocks, which begin at columns
            padded, mask = torch.cat((ids[:, :1].repeat(1, width), ids), 1), torch.tensor([[0] * width + [1] * 9])
            labels = padded.masked_fill(mask == 0, -100)
            assert_close(model(padded, attention_mask=mask, labels=labels, use_cache=False).mtp_loss, alone)
            right, mask = torch.cat((ids, ids[:, :1].repeat(1, width)), 1), torch.tensor([[1] * 9 + [0] * width])
            labels = right.masked_fill(mask == 0, -100)
            assert_close(model(right, attention_mask=mask, labels=labels, use_cache=False).mtp_loss, alone)
        positions = torch.arange(9).repeat(2)[None]
        packed = torch.cat((ids, ids), 1)
        assert_close(model(packed, position_ids=positions, labels=packed, use_cache=False).mtp_loss, alone)


def test_micro_batches_add_up_and_a_batch_without_targets_adds_nothing():
    model, ids = model_of(), token_ids(4, 9) % 61
    labels = ids.clone()
    labels[1:, 5:] = -100
    with torch.no_grad():
        parts = [
            model(ids[rows], labels=labels[rows], num_items_in_batch=20, use_cache=False).mtp_loss
            for rows in ([0], [1, 2, 3])
        ]
        means = [model(ids[rows], labels=labels[rows], use_cache=False).mtp_loss for rows in ([0], [1, 2, 3])]
        torch.testing.assert_close(sum(parts), (8 * means[0] + 12 * means[1]) / 20)
        nothing = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=20, use_cache=False)
    assert nothing.mtp_loss == 0
    with pytest.raises(ValueError, match="draft stages learn from token ids: give input_ids, not inputs_embeds"):
        model_of(num_hash_layers=0)(inputs_embeds=torch.zeros(1, 9, 32), labels=ids[:1], use_cache=False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(dtype, base):
    model, ids = model_of(base).train().to(dtype), token_ids(2, 12) % 61
    result = model(ids, labels=ids, use_cache=False)
    result.loss.backward()
    assert result.mtp_loss.isfinite() and model.model.draft_stages[0].main_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_teaches_the_same(reentrant, base):
    ids = token_ids(2, 12) % 61
    gradients = []
    for is_checkpointed in (False, True):
        model = model_of(base).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.draft_stages[0].main_proj.weight.grad)
    assert_close(gradients[1], gradients[0])


# Files --------------------------------------------------------------------------------------------------------------


def release_names(base: str, scales: bool) -> set[str]:
    if base == "V4":
        return set(v4_names(V4["compress_ratios"][:4], 1, 8, drafts=3, scales=scales))
    sizes = {"layers": 5, "experts": 8, "makers": [1, 2], "without_gate": [2], "choosers": [1, 2, 4], "engrams": []}
    sizes |= {"stages": 3, "stage_experts": 6}
    return {*v41_names(sizes, scales), *draft_names(sizes, scales)}


@pytest.mark.parametrize("base", BASES)
def test_names_in_files_are_those_of_the_config_and_of_releases(base, tmp_path):
    model = model_of(base)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert (
        shapes == model.config.weight_shapes("ForCausalLM") == {k: v.shape for k, v in official_weights(model).items()}
    )
    released = with_release_names(stored, model.config)
    assert set(released) == release_names(base, scales=False)
    save_file(released, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    first = model.config.num_hidden_layers
    assert len(loaded.model.draft_stages) == 3 and isinstance(loaded.model.layers[first], DeepSeekDraftStage)
    trunk, info = DeepSeekModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"} and len(trunk.layers) == first


@pytest.mark.parametrize("part", ["4.main_norm.weight", "5.attn_hc.fn", "6.confidence_head.proj.weight"])
def test_incomplete_stages_are_refused(part, tmp_path):
    model_of().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop(f"model.layers.{part}")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"not in the checkpoint, the first is model.layers.{part}"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_exported_as_released_and_opened_again(dtype, base, tmp_path):
    if dtype == "fp8" and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("torch has no float8_e8m0fnu")
    fields = {"expert_dtype": "fp4" if dtype == "fp8" else None, "moe_intermediate_size": 32}
    model = model_of(base, mtp_loss_weight=0.0, **fields)
    model.save_pretrained(tmp_path / "own")
    export_native(tmp_path / "own", tmp_path / "native", dtype=dtype)
    stored = load_file(tmp_path / "native/model.safetensors")
    assert set(stored) == release_names(base, scales=dtype == "fp8")
    assert stored["mtp.0.main_proj.weight"].dtype == (torch.float8_e4m3fn if dtype == "fp8" else torch.float32)
    loaded, info = DeepSeekForCausalLM.from_pretrained(
        tmp_path / "native", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and len(loaded.model.draft_stages) == 3
    ids = token_ids(1, 9) % 61
    loaded.config.mtp_loss_weight = 0.3
    model.config.mtp_loss_weight = 0.3
    with torch.no_grad():
        losses = [net(ids, labels=ids, use_cache=False).mtp_loss for net in (loaded, model)]
    torch.testing.assert_close(*losses, rtol=1e-6 if dtype == "fp32" else 0.2, atol=0)


def test_other_classes_and_transformers_own_saves_go_without(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model, ids = model_of(mtp_loss_weight=0.0), token_ids(1, 7) % 61
    model.save_pretrained(tmp_path)
    scores = DeepSeekForSequenceClassification.from_pretrained(tmp_path)
    assert len(scores.model.layers) == 4
    scores.save_pretrained(tmp_path / "scores")
    assert len(DeepSeekForSequenceClassification.from_pretrained(tmp_path / "scores").model.layers) == 4
    stored = load_file(tmp_path / "model.safetensors")
    ahead = tuple(f"model.layers.{i}." for i in (4, 5, 6))
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(ahead)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert "has no weights of prediction layers; the model is loaded without them" in caplog.text
    assert torch.equal(outputs(loaded, ids), outputs(model, ids)) and len(loaded.model.layers) == 4
    loaded.save_pretrained(tmp_path / "again")
    assert DeepSeekForCausalLM.from_pretrained(tmp_path / "again").config.dspark_block_size is None
