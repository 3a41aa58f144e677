"""Multi-token prediction: forward and loss against the slow reference, keys, and the model around it."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from configuration_deepseek import preset
from configuration_deepseek.weight_names import shared_mtp_keys
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForTokenClassification, DeepSeekModel
from modeling_deepseek.losses import cross_entropy, labels_ahead
from modeling_deepseek.mtp import shift_left
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.parity.pairs import randomise
from tests.parity.test_reference_model import fused
from tests.reference.compare import assert_close
from tests.reference.mtp import logits_ahead, loss_ahead

SMALL = {"vocab_size": 31, "num_hidden_layers": 2, "initializer_range": 0.2, "mtp_loss_weight": 0.3}
MODELS = {
    "V3": ("tiny_v3_mtp", {"num_nextn_predict_layers": 1}),
    "three deep": ("tiny_v3_mtp", {"num_nextn_predict_layers": 3}),
    "before the norm": ("tiny_v3_mtp", {"mtp_after_norm": False}),
    "tied": ("tiny_v3_mtp", {"tie_word_embeddings": True}),
    "V3.2": ("tiny_v32", {"num_nextn_predict_layers": 2, "index_topk": 3}),
    "on multi-head attention": ("tiny_llm", {"num_nextn_predict_layers": 2}),
}
ATTENTIONS = ["eager", "sdpa"]


@pytest.fixture
def warnings(caplog):
    """What is warned of while loading."""
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield caplog
    logger.removeHandler(caplog.handler)


def model_of(name):
    base, fields = MODELS[name]
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset(base, **{**SMALL, **fields}))
    randomise(model, seed=1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_agree_with_the_reference(name, tmp_path):
    model = model_of(name).train()
    model.save_pretrained(tmp_path)
    weights = {key: w.double().requires_grad_() for key, w in load_file(tmp_path / "model.safetensors").items()}
    fields, ids = model.config.to_dict(), [3, 14, 15, 26, 5, 3]
    labels = [-100, -100, 15, -100, 5, 3]
    expected = logits_ahead(ids, weights, fields, model.config.mtp_after_norm)
    trunk = model.model(torch.tensor([ids]), output_draft_states=True)
    ahead = model.model.predict_ahead(trunk.draft_states, torch.tensor([ids]))
    assert len(ahead) == model.config.num_nextn_predict_layers
    for depth, (ours, reference) in enumerate(zip(ahead, expected, strict=True), start=1):
        assert_close(model.lm_head(ours)[0, :-depth], reference, f"logits at depth {depth}")

    result = model(torch.tensor([ids]), labels=torch.tensor([labels]))
    reference_loss = loss_ahead(expected, labels)
    assert_close(result.mtp_loss, reference_loss, "mtp_loss")
    assert result.mtp_loss > 0.1
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(result.mtp_loss, parameters.values(), allow_unused=True)
    learnt = {key: w for key, w in weights.items() if not key.endswith("e_score_correction_bias")}
    reference = torch.autograd.grad(reference_loss, learnt.values(), allow_unused=True, materialize_grads=True)
    reference = dict(zip(learnt, reference, strict=True))
    for key, ours in zip(parameters, gradients, strict=True):
        if ours is None:  # the final norm, where the state before it is read; the indexers, which only choose
            is_unread = key == "model.norm.weight" and not model.config.mtp_after_norm
            assert is_unread or ".indexer." in key
        else:
            assert_close(ours, fused(key, reference), f"gradient of {key}")


def test_the_loss_has_the_weight_in_training_only():
    model, ids = model_of("three deep").train(), token_ids(2, 9) % 31
    trained = model(ids, labels=ids)
    evaluated = model.eval()(ids, labels=ids)
    model.config.mtp_loss_weight = 0.0
    plain = model.train()(ids, labels=ids)
    assert plain.mtp_loss is None
    torch.testing.assert_close(trained.loss, plain.loss + 0.3 * trained.mtp_loss)
    torch.testing.assert_close(evaluated.loss, plain.loss)  # training has ways of its own, which round otherwise
    torch.testing.assert_close(evaluated.mtp_loss, trained.mtp_loss)
    assert trained.hidden_states is None and len(model(ids, output_hidden_states=True).hidden_states) == 3


def test_recording_leaves_the_prediction_layers_out():
    model, ids = model_of("three deep").train(), token_ids(2, 9) % 31
    recorded = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    model.set_attn_implementation("eager")
    result = model(ids, labels=ids, **recorded)
    assert result.mtp_loss > 0
    assert (len(result.hidden_states), len(result.attentions), len(result.router_logits)) == (3, 2, 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, attention):
    model, ids = model_of("three deep").train(), token_ids(2, 9, seed=3) % 28 + 3
    model.set_attn_implementation(attention)
    expected = model(ids, labels=ids).mtp_loss
    pads = torch.full((2, 4), 2)
    tokens = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    mask = torch.cat([pads * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pads * 0], dim=1)
    labels = tokens.masked_fill(mask == 0, -100)
    assert_close(model(tokens, attention_mask=mask, labels=labels).mtp_loss, expected, "mtp_loss")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_documents_do_not_see_each_other(attention):
    model = model_of("three deep").train()
    model.set_attn_implementation(attention)
    first, second = token_ids(1, 8) % 31, token_ids(1, 6, seed=5) % 31
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(8), torch.arange(6))).unsqueeze(0)
    result = model(packed, labels=packed, position_ids=positions, num_items_in_batch=1).mtp_loss
    apart = sum(model(ids, labels=ids, num_items_in_batch=1).mtp_loss for ids in (first, second))
    assert_close(result, apart, "mtp_loss")
    assert model(first, labels=first).mtp_loss < apart


def test_embeddings_in_place_of_tokens_and_checkpointing_change_nothing():
    model, ids = model_of("three deep").train(), token_ids(2, 9) % 31
    expected = model(ids, labels=ids, use_cache=False).loss  # as checkpointing has it: a cache has a way of its own
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, labels=ids).loss, expected, "loss")
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(ids, labels=ids).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_labels_ahead():
    labels = torch.tensor([[5, 6, 7, 8, 9]])
    assert labels_ahead(labels, 1, None, None).tolist() == [[7, 8, 9, -100, -100]]
    assert labels_ahead(labels, 3, None, None).tolist() == [[9, -100, -100, -100, -100]]
    assert labels_ahead(labels, 9, None, None).tolist() == [[-100] * 5]
    left = torch.tensor([[0, 0, 1, 1, 1]])
    assert labels_ahead(labels, 1, left, None).tolist() == [[-100, -100, 9, -100, -100]]
    documents = torch.tensor([[0, 1, 2, 0, 1]])
    assert labels_ahead(labels, 1, None, documents).tolist() == [[7, -100, -100, -100, -100]]
    assert shift_left(labels, 2, -1).tolist() == [[7, 8, 9, -1, -1]]


def test_cross_entropy_of_nothing_is_zero():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 4), -100))
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    model = model_of("three deep").train()
    assert model(token_ids(1, 2) % 31, labels=token_ids(1, 2) % 31).loss.isfinite()  # shorter than the depth


def test_trainer_learns_ahead_and_evaluates_the_next_token(tmp_path):
    rows = [{"input_ids": token_ids(9, seed=i).tolist(), "labels": token_ids(9, seed=i).tolist()} for i in range(4)]
    model = tiny("tiny_v3_mtp", mtp_loss_weight=0.3)
    before = model.model.layers[4].eh_proj.weight.clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(model.model.layers[4].eh_proj.weight, before)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == (4, 9, 97)
    ids = torch.tensor([row["input_ids"] for row in rows])
    logits = torch.tensor(predicted.predictions)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert predicted.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_accumulate_as_one_batch():
    model, ids = model_of("three deep").train(), token_ids(4, 9) % 31
    whole = model(ids, labels=ids, num_items_in_batch=32).loss
    halves = sum(model(half, labels=half, num_items_in_batch=32).loss for half in ids.chunk(2))
    assert_close(halves, whole, "loss")


# Prompts that are read in both directions ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["three deep", "before the norm", "V3.2", "on multi-head attention"])
def test_no_label_reaches_what_predicts_it(name, attention):
    """With prefix attention the trunk sees prompts whole; prediction layers, whose input is shifted, must not."""
    model = model_of(name).eval()
    model.config.attention_direction = "prefix"
    model.set_attn_implementation(attention)
    labels = token_ids(1, 12, seed=4) % 31
    for prompt in (slice(0, 4), slice(7, 9)):
        labels[:, prompt] = -100

    @torch.no_grad()
    def predicted(ids):
        """What the next token's head and each prediction layer say, as the loss is computed from."""
        seen = []
        handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        model(ids, labels=labels)
        handle.remove()
        return seen

    ids = token_ids(1, 12, seed=7) % 31
    before = predicted(ids)
    assert len(before) == 1 + model.config.num_nextn_predict_layers
    for place in (labels[0] != -100).nonzero().flatten().tolist():
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 11) % 31
        for depth, (one, other) in enumerate(zip(before, predicted(changed), strict=True)):
            until = max(place - depth, 0)  # row i predicts token i + depth + 1
            # experts take their tokens together, so that the last bits depend on the other tokens
            assert_close(other[:until], one[:until], f"before token {place} at depth {depth}", 1e-6)
            sees = slice(until, len(one) - depth)
            assert until >= len(one) - depth or (other[sees] - one[sees]).abs().max() > 1e-3
    earlier = ids.clone()
    earlier[0, 3] = (ids[0, 3] + 11) % 31
    assert not torch.equal(before[0][0], predicted(earlier)[0][0]), "the trunk sees its prompt in both directions"


@pytest.mark.parametrize("direction", ["causal", "prefix"])
@pytest.mark.parametrize("name", ["three deep", "before the norm", "V3.2"])
def test_logits_of_labelled_tokens_alone_give_the_same_loss(name, direction):
    model, ids = model_of(name).train(), token_ids(3, 11, seed=2) % 31
    model.config.attention_direction = direction
    labels = ids.clone()
    labels[0, :5], labels[1, 3:6], labels[2, 8:] = -100, -100, -100
    losses, gradients = [], []
    for kept in (0, "labelled"):
        model.zero_grad()
        result = model(ids, labels=labels, logits_to_keep=kept)
        result.loss.backward()
        losses.append((result.loss.detach(), result.mtp_loss.detach()))
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert result.logits.shape[1] == (labels[:, 1:] != -100).sum() and losses[0][1] > 0
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert_close(gradients[1][key], gradient, key)


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", ["tiny_v3_mtp", "tiny_v32"])
def test_official_names_for_any_layer_count_and_depth(name, layers, depth, tmp_path):
    model = tiny(name, num_hidden_layers=layers, num_nextn_predict_layers=depth)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    for layer in range(layers, layers + depth):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < own
        assert {"input_layernorm.weight", "self_attn.kv_b_proj.weight", "mlp.shared_experts.up_proj.weight"} < own or (
            layers == 1  # whose only layer is dense
        )
        assert not own & {"embed_tokens.weight", "shared_head.head.weight"}
        indexer = {f"self_attn.indexer.{part}" for part in ("wq_b.weight", "wk.weight", "k_norm.bias")}
        assert own & indexer == (indexer if name == "tiny_v32" else set())
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in loaded.state_dict().items())


def add_copies(folder, change=lambda tensor: tensor):
    """Store embedding and head again with each prediction layer, as the releases do."""
    weights = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    for key, shared in shared_mtp_keys(config).items():
        weights[key] = change(weights.get(shared, weights["model.embed_tokens.weight"]).clone())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_embedding_and_head_are_read_but_not_held(tied, tmp_path, warnings):
    model, ids = tiny("tiny_v3_mtp", mtp_loss_weight=0.1, tie_word_embeddings=tied), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    before = set(load_file(tmp_path / "model.safetensors"))
    add_copies(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not warnings.messages
    assert loaded.num_parameters() == model.num_parameters()
    with torch.no_grad():
        assert torch.equal(loaded(ids, labels=ids).mtp_loss, model(ids, labels=ids).mtp_loss)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == before


def test_copies_that_are_none_are_told(tmp_path, warnings):
    tiny("tiny_v3_mtp").save_pretrained(tmp_path)
    add_copies(tmp_path, lambda tensor: tensor + 1)
    DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert len(warnings.messages) == 4
    assert "model.layers.3.embed_tokens.weight differs from the weight that it is a copy of" in warnings.messages[0]


def test_a_checkpoint_without_prediction_layers_opens_without_them(tmp_path, warnings):
    model, ids = tiny("tiny_v3_mtp", num_nextn_predict_layers=0), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=1, output_loading_info=True)
    assert not any(info.values()) and len(loaded.model.layers) == 3
    assert loaded.config.num_nextn_predict_layers == 0
    assert [line.split(" has ")[1] for line in warnings.messages] == [
        "no weights of prediction layers; the model is loaded without them"
    ]
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    with pytest.raises(
        ValueError, match=r"no weights of prediction layers \(model.layers.3.\*\) to train with mtp_lo"
    ):
        DeepSeekForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=1, mtp_loss_weight=0.3)


def test_a_prediction_layer_that_is_incomplete_is_an_error(tmp_path):
    tiny("tiny_v3_mtp").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.4.eh_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of the model are not in .*, the first is model.layers.4.eh_proj"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tiny_v3_mtp", "tiny_v32"])
def test_other_heads_have_no_prediction_layers(name, tmp_path, warnings):
    model = tiny(name, num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path)
    for head in (DeepSeekModel, DeepSeekForTokenClassification):
        loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
        assert info["unexpected_keys"] == {"lm_head.weight"} and len(loaded.base_model.layers) == 3
    ids = token_ids(2, 7)
    assert torch.equal(outputs(DeepSeekModel.from_pretrained(tmp_path), ids), outputs(model.model, ids))


def test_the_trainer_resumes_prediction_layers(tmp_path):
    model = tiny("tiny_v3_mtp", mtp_loss_weight=0.1)
    model.save_pretrained(tmp_path)
    fresh = DeepSeekForCausalLM(preset("tiny_v3_mtp", mtp_loss_weight=0.1)).eval()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(fresh(ids, labels=ids).mtp_loss, model(ids, labels=ids).mtp_loss)
