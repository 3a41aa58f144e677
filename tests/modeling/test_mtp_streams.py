"""V4's prediction layers: against position-by-position formulas, in training, and through files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.weight_names import with_release_names
from finetune_deepseek.checkpoints.checkpoint import official_weights
from finetune_deepseek.checkpoints.opening import open_model
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekModel
from modeling_deepseek.modeling_deepseek import DeepSeekStreamMTPLayer
from tests.configuration.test_compressed import V4
from tests.modeling.conftest import outputs, token_ids
from tests.modeling.test_moe import official_weights as with_single_experts
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.mtp import loss_ahead
from tests.reference.stream_prediction import logits_ahead
from tests.reference.v4_names import v4_names

LAYER = "model.layers.4."


def model_of(**fields) -> DeepSeekForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.3, "swiglu_limit": 1.0, "initializer_range": 0.2}
    model = DeepSeekForCausalLM(DeepSeekConfig(**{**V4, **sizes, **fields}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("_hc.base", "hc_head.base", "e_score_correction_bias", "attn_sink")):
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def layer_weights(model) -> tuple[dict, dict]:
    """The prediction layer's weights with experts one by one, and the pairs that gradients are taken of."""
    layer = model.model.layers[4]
    assert isinstance(layer, DeepSeekStreamMTPLayer)
    single, _ = with_single_experts(layer.mlp)
    twins = {name: twin(p) for name, p in layer.named_parameters() if not name.startswith("mlp.")}
    leaves = {name: (layer.get_parameter(name), twins[name]) for name in twins}
    return {**twins, **{f"mlp.{name}": weight for name, weight in single.items()}}, leaves


def test_predicted_logits_and_gradients():
    model, ids = model_of(), token_ids(1, 11, seed=3) % 61
    with torch.no_grad():
        trunk = model.model(ids, output_draft_states=True, use_cache=False)
    assert trunk.draft_states.shape == (1, 11, 4, 32)
    streams = trunk.draft_states.clone().requires_grad_()
    (predicted,) = model.model.predict_ahead(streams, ids)
    weights, leaves = layer_weights(model)
    copy, head = twin(streams), twin(model.lm_head.weight)
    embeds = model.model.embed_tokens(ids)[0].detach().double()
    expected = logits_ahead(copy[0], embeds, head, weights, model.config.to_dict())
    leaves = {**leaves, "streams": (streams, copy), "head": (model.lm_head.weight, head)}
    assert_same_gradients(model.lm_head(predicted[0, :-1]), expected, leaves)
    labels = ids.clone()
    labels[0, 4] = -100
    with torch.no_grad():
        assert_close(model(ids, labels=labels).mtp_loss, loss_ahead([expected], labels[0].tolist()).detach())


def test_every_weight_of_a_prediction_layer_learns():
    model, ids = model_of().train(), token_ids(3, 13) % 61
    result = model(ids, labels=ids, use_cache=False)
    result.loss.backward()
    assert result.loss > result.mtp_loss * 0.3
    without = [n for n, p in model.named_parameters() if n.startswith(LAYER) and (p.grad is None or not p.grad.any())]
    assert not without


def test_padding_and_packing_leave_the_predictions_as_they_are():
    model, ids = model_of(), token_ids(1, 9, seed=5) % 61
    with torch.no_grad():
        alone = model(ids, labels=ids, use_cache=False).mtp_loss
        padded, mask = torch.cat((ids[:, :4] * 0 + 7, ids), 1), torch.tensor([[0] * 4 + [1] * 9])
        labels = padded.masked_fill(mask == 0, -100)
        assert_close(model(padded, attention_mask=mask, labels=labels, use_cache=False).mtp_loss, alone)
        positions = torch.arange(9).repeat(2)[None]
        packed = torch.cat((ids, ids), 1)
        assert_close(model(packed, position_ids=positions, labels=packed, use_cache=False).mtp_loss, alone)


def test_names_in_files_are_those_of_the_config_and_of_releases(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert (
        shapes == model.config.weight_shapes("ForCausalLM") == {k: v.shape for k, v in official_weights(model).items()}
    )
    released = with_release_names(stored, model.config)
    names = v4_names(V4["compress_ratios"][:4], 2, 8, predictions=1, scales=False)
    # a ratio of 8 stands for one of 128
    assert set(released) == set(names)
    save_file(released, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    trunk, info = DeepSeekModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"} and len(trunk.layers) == 4


@pytest.mark.parametrize("part", ["e_proj.weight", "hc_head.fn"])
def test_an_incomplete_prediction_layer_is_refused(part, tmp_path):
    model_of().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop(f"{LAYER}{part}")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"not in the checkpoint, the first is {LAYER}{part}"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)


def test_draft_stages_where_the_config_has_none_are_told_and_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model, ids = model_of(mtp_loss_weight=0.0), token_ids(1, 7) % 61
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{LAYER}main_proj.weight"] = stored.pop(f"{LAYER}e_proj.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert (
        "its prediction layers are not read: they are other ones than config.json says (dspark_bl"
        in caplog.messages[0]
    )
    assert "has no weights of prediction layers; the model is loaded without them" in caplog.messages[1]
    assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.model.layers) == 4
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    with pytest.raises(ValueError, match="there are no weights of prediction layers .* to train with mtp_loss_weight"):
        DeepSeekForCausalLM.from_pretrained(tmp_path, mtp_loss_weight=0.3)
    assert open_model(tmp_path).config.num_nextn_predict_layers == 0
