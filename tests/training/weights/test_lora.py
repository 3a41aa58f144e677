"""LoRA groups: what they attach to, what is refused, and that adapters reload, merge and switch off exactly."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

import modeling_deepseek  # noqa: F401
from configuration_deepseek.presets import preset
from finetune_deepseek.training.arguments import LoraArguments
from finetune_deepseek.training.weights.lora import (
    GROUPS,
    OTHER,
    apply_lora,
    attached_layers,
    census,
    census_table,
    choose_groups,
)
from modeling_deepseek import DeepSeekForImageTextToText
from tests.modeling.test_dspark import DRAFTS
from tests.modeling.test_image_text import seen
from tests.modeling.test_vision_tower import VISION
from tests.reference.shared_model import ENGRAM

EYES = ("vision", "aligner")
# Adapted weights per group. tiny_v3 has 3 layers, the first dense: 5 projections with q_lora_rank, 2 expert tensors.
ATTACHED = {
    "tiny_llm": {"attention": 12, "dense": 9, "embeddings": 1, "head": 1},
    "tiny_moe": {"attention": 12, "dense": 3, "shared": 6, "experts": 4, "router": 2, "embeddings": 1, "head": 1},
    "tiny_v2_lite": {"attention": 12, "dense": 3, "shared": 6, "experts": 4, "router": 2, "embeddings": 1, "head": 1},
    "tiny_v3": {"attention": 15, "dense": 3, "shared": 6, "experts": 4, "router": 2, "embeddings": 1, "head": 1},
    "tiny_v3.2": {
        **{"attention": 15, "dense": 3, "shared": 6, "experts": 4, "router": 2, "indexer": 9},
        **{"embeddings": 1, "head": 1},
    },
}
# 4 projections of each layer, and of two layers 2 of the compressor; the indexer's own of one layer.
ATTACHED["tiny_v4"] = {
    **{"attention": 3 * 4 + 2 * 2, "output": 3, "shared": 9, "experts": 6, "router": 3, "indexer": 4},
    **{"embeddings": 1, "head": 1},
}
# Its two prediction layers have 5 projections, eh_proj, 3 of the shared expert, 2 expert tensors and a router each.
ATTACHED["tiny_v3_mtp"] = ATTACHED["tiny_v3"] | {"mtp": 24}


def make_model(name="tiny_v3", **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(preset(name, **overrides)).eval()


def lora(**settings):
    return LoraArguments(use_peft=True, **({"lora_r": 4} | settings))


def randomize(model):
    """Give every adapter weight a value, as training would; LoRA's B begins at zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 25).view(2, 10)).logits


def counts(model):
    return {word: len(layers) for word, layers in attached_layers(model).items() if layers}


@pytest.mark.parametrize("name", ATTACHED)
def test_all_means_every_group_that_the_model_has(name):
    model = apply_lora(make_model(name), lora(lora_target=["all"]))
    assert counts(model) == ATTACHED[name]


@pytest.mark.parametrize("group", [word for word in GROUPS if word not in ("stem", "engram", *EYES)])  # in no preset
def test_a_group_attaches_to_its_weights_only(group):
    name = {"indexer": "tiny_v3.2", "output": "tiny_v4"}.get(group, "tiny_v3_mtp")
    model = apply_lora(make_model(name), lora(lora_target=[group]))
    assert counts(model) == {group: ATTACHED[name][group]}


@pytest.mark.parametrize(
    ("ahead", "count"),
    [
        # of each layer: 4 projections, the grouped one, 3 of the shared expert, 2 expert tensors, a router
        ({"num_nextn_predict_layers": 1}, 11 + 2),
        ({**DRAFTS, "dspark_target_layer_ids": [0, 2], "num_nextn_predict_layers": 2}, 2 * 11 + 1 + 3),
    ],
    ids=["prediction layer", "draft stages"],
)
def test_what_predicts_ahead_on_v4_is_a_group_by_itself(ahead, count):
    model = apply_lora(make_model("tiny_v4", **{**ahead, "mtp_loss_weight": 0.0}), lora(lora_target=["all"]))
    assert counts(model) == ATTACHED["tiny_v4"] | {"mtp": count}
    alone = apply_lora(make_model("tiny_v4", **{**ahead, "mtp_loss_weight": 0.3}), lora(lora_target=["mtp"]))
    assert counts(alone) == {"mtp": count}
    ids = torch.arange(3, 67).view(4, 16)
    randomize(alone).train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for n, p in alone.named_parameters() if ".lora_" in n)


def test_each_group_of_heads_has_a_delta_of_its_own():
    """W_g + s B_g A: what a group of heads gives changes by its own rows of B alone."""
    model = randomize(apply_lora(make_model("tiny_v4"), lora(lora_target=["output"])))
    wrapped = model.base_model.model.model.layers[0].self_attn.wo_a
    plain, x = wrapped.get_base_layer(), torch.randn(1, 3, 2, 32)
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight.view(2, 12, 4)
    with torch.no_grad():
        for group in range(2):
            delta = wrapped.scaling["default"] * b[group] @ a
            expected = x[:, :, group] @ (plain.weight.view(2, 12, 32)[group] + delta).T
            torch.testing.assert_close(wrapped(x).view(1, 3, 2, 12)[:, :, group], expected)


def test_groups_of_shared_entries_and_n_grams():
    """5 layers of 4 projections, 3 of compressors; 3 indexers of 2 and 2 keys; 2 tables and what reads them."""
    model = apply_lora(make_model("tiny_v4.1", **ENGRAM), lora(lora_target=["attention", "indexer", "engram"]))
    assert counts(model) == {"attention": 4 * 5 + 3, "indexer": 3 * 2 + 2, "engram": 4}


def test_eyes_are_adapted_saved_and_merged(tmp_path):
    """Two blocks of four projections and the patches' own, and the aligner's two."""
    torch.manual_seed(0)
    base = DeepSeekForImageTextToText(preset("tiny_v4.1", vision_config=VISION, initializer_range=0.2)).eval()
    base.save_pretrained(tmp_path / "base")
    model = randomize(apply_lora(base, lora(lora_target=[*EYES])))
    assert counts(model) == {"vision": 9, "aligner": 2}
    row = seen(5, (2, 3), 7)
    adapted = model(**row, labels=row["input_ids"], use_cache=False)
    adapted.loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if ".lora_" in name)
    model.save_pretrained(tmp_path / "adapter")
    for again in (
        PeftModel.from_pretrained(DeepSeekForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
        model.merge_and_unload(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(again(**row, use_cache=False).logits, adapted.logits.detach())


def test_default_is_attention_and_feed_forward():
    assert set(counts(apply_lora(make_model(), lora()))) == {"attention", "dense", "shared", "experts"}
    assert set(counts(apply_lora(make_model("tiny_llm"), lora()))) == {"attention", "dense"}


@pytest.mark.parametrize("group", [*(word for word in GROUPS if word not in ("engram", "mtp", "stem", *EYES)), "all"])
def test_adapter_reloads_merges_and_switches_off(group, tmp_path):
    name = {"indexer": "tiny_v3.2", "output": "tiny_v4"}.get(group, "tiny_v3")
    base = logits(make_model(name))
    model = randomize(apply_lora(make_model(name), lora(lora_target=[group])))
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)

    make_model(name).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    for reloaded in (
        PeftModel.from_pretrained(make_model(name), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        difference = (logits(reloaded.eval()) - adapted).abs()
        assert difference.max() <= 1e-6, f"max {difference.max()}, mean {difference.mean()}"

    merged = model.merge_and_unload()
    difference = (logits(merged) - adapted).abs()
    assert difference.max() <= 1e-5 * adapted.abs().max(), f"max {difference.max()}, mean {difference.mean()}"


def test_gradients_reach_every_adapter_and_nothing_else():
    model = randomize(apply_lora(make_model(), lora(lora_target=["all"]))).train()
    ids = torch.arange(3, 67).view(4, 16)  # enough tokens for every expert
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.any(), name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "tiny_llm",
            {"lora_target": ["experts"]},
            "--lora_target experts: the model has no such weights; it has atten",
        ),
        ("tiny_v3", {"lora_target": ["atention"]}, r"no such group \(did you mean 'attention'\?\)"),
        ("tiny_v3", {"lora_dropout": 0.1}, "--lora_dropout can't be used with experts: .* no input to drop"),
        ("tiny_v3", {"lora_dropout": 0.1, "lora_target": ["all"]}, "can't be used with experts and router"),
        ("tiny_v3", {"use_dora": True, "lora_target": ["router"]}, "--use_dora can't be used with router"),
        ("tiny_v3", {"lora_bias": True, "lora_target": ["experts"]}, "--lora_bias can't be used with experts"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        apply_lora(make_model(name), lora(**settings))
    assert "\n" not in str(error.value)


def test_dropout_and_dora_work_on_linear_layers():
    model = apply_lora(make_model(), lora(lora_target=["attention,dense"], lora_dropout=0.1, use_dora=True))
    assert counts(model) == {"attention": 15, "dense": 3}


def test_tied_embeddings_are_left_out_or_refused():
    tied = {"tie_word_embeddings": True}
    assert {"embeddings", "head"}.isdisjoint(counts(apply_lora(make_model(**tied), lora(lora_target=["all"]))))
    for group in ("embeddings", "head"):
        with pytest.raises(ValueError, match="ties its head to its embeddings"):
            apply_lora(make_model(**tied), lora(lora_target=[group]))


def test_pefts_own_targets_for_a_native_model():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = apply_lora(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), lora(lora_target=["peft"]))
    targets = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert targets == {"q_proj", "v_proj"}
    ours = apply_lora(make_model(), lora(lora_target=["peft"]))  # by the targets that importing us enters
    assert any(isinstance(module, LoraLayer) for module in ours.modules())
    with pytest.raises(ValueError, match="peft leaves the choice to PEFT; use it alone"):
        apply_lora(make_model(), lora(lora_target=["peft", "dense"]))


def test_rewritten_targets_of_native_models_are_an_error():
    # PEFT turns gate_proj, up_proj, down_proj into the routed experts for this model type; dense would get nothing.
    config = DeepseekV3Config(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    )
    with pytest.raises(ValueError, match="PEFT attached .* rewrites targets for model_type 'deepseek_v3'"):
        apply_lora(DeepseekV3ForCausalLM(config), lora(lora_target=["dense"]))


def test_choosing_from_no_targets():
    assert choose_groups(None, {word: [] for word in GROUPS}, tied=False) == []


def test_draft_stages_are_counted_by_experts_of_their_own():
    stages = {**DRAFTS, "dspark_target_layer_ids": [1, 4], "dspark_n_routed_experts": 4}
    stages |= {"dspark_num_experts_per_tok": 1, "mtp_loss_weight": 0.0}
    model = make_model("tiny_v4.1", **stages)
    layers = [model.get_submodule(f"model.layers.{i}.mlp.experts") for i in (5, 6, 7)]
    experts, found = sum(p.numel() for layer in layers for p in layer.parameters()), census(model)["mtp"]
    assert found.total - found.active == experts * 3 / 4


def test_census_counts_every_parameter_once():
    model = make_model()
    groups = census(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(group.total for group in groups.values()) == total
    # Of 8 experts a token uses 3; of everything else, all.
    idle = groups["experts"].total * 5 // 8
    assert groups["experts"].total == 2 * 8 * 3 * 32 * 20
    assert sum(group.active for group in groups.values()) == total - idle
    assert groups[OTHER].total > 0

    adapted = apply_lora(model, lora(lora_target=["all"]))
    after = census(adapted)
    assert {word: group.total for word, group in after.items()} == {w: group.total for w, group in groups.items()}
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sum(group.trainable for group in after.values()) == trainable
    assert after["experts"].trainable == 2 * 8 * 4 * ((32 + 40) + (20 + 32))  # rank 4 for each expert
    assert f"{total:,}" in census_table(after).splitlines()[-1]
