"""What is exported as native is the release's form, and stock transformers computes the same with it."""

import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from configuration_deepseek.official import ARCHITECTURES
from finetune_deepseek.checkpoints.export import NATIVE_HEADS, export_bundle, export_native
from modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
)
from tests.checkpoints.conftest import ask_stranger, header, logits_of, save_tiny, weights_of
from tests.parity.cases import CASES
from tests.parity.pairs import pair_of
from tests.reference.compare import assert_close

NO_RELEASE = {"v3_half_rope": "other rotary pairs", "v2_bias": "mlp_bias"}  # no config.json can say these
ROWS = ["llm_gqa", "llm_bias", "llm_tied", "llm_odd", "llm_linear", "llm_llama3", "llm_yarn", "llm_dynamic"]
ROWS += ["distill_qwen2", "distill_qwen3", "v2_lite", "v2_groups", "v2_yarn_0.707", "v2_five_experts", "v2_tied"]
ROWS += ["v3", "v3_direct_query", "v3_unnormalised", "v3_dense", "v3_yarn_1.0", "v3_bias", "v3_tied"]
ROWS += [name for name in ("v32", "v32_two_keys", "v32_yarn_1.0") if name in CASES]
AHEAD = {"v3_ahead": ("tiny_v3_mtp", {}), "v32_ahead": ("tiny_v32", {"num_nextn_predict_layers": 1})}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}}
HEADS = {"sequences": DeepSeekForSequenceClassification, "tokens": DeepSeekForTokenClassification}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Rows of the parity tests, two heads and a bundle, saved by us and exported; what a stranger makes of them.

    Gives models, folders and answers by name.
    """
    root = tmp_path_factory.mktemp("exported")
    models, folders = {name: pair_of(name).ours for name in ROWS}, {}
    for name, model in models.items():
        model.save_pretrained(root / name)
    for name, head in HEADS.items():
        models[name], _ = save_tiny(root / name, "tiny_v3", head, **LABELS)
    for name in models:
        folders[name] = root / f"{name}-native"
        export_native(root / name, folders[name])
    for name, (preset, fields) in AHEAD.items():
        models[name], _ = save_tiny(root / name, preset, **fields)
        folders[name] = root / f"{name}-native"
        export_native(root / name, folders[name])
    models["bundle"], _ = save_tiny(root / "bundle", "tiny_v3_mtp")
    folders["bundle"] = root / "bundle-exported"
    export_bundle(root / "bundle", folders["bundle"], max_shard_size="60KB")
    return models, folders, ask_stranger(folders, root)


@pytest.mark.parametrize("name", ROWS)
def test_stock_transformers_loads_it_and_computes_the_same(exported, name):
    models, _, answers = exported
    class_name, info, logits = answers[name]
    assert class_name == type(pair_of(name).native).__name__ and not info
    assert_close(logits_of(models[name]), logits, "logits")


@pytest.mark.parametrize("name", ROWS)
def test_names_types_and_shapes_are_the_release_s(exported, name):
    _, folders, _ = exported
    official = header(pair_of(name).folder)
    assert header(folders[name]) == official
    written, wanted = weights_of(folders[name]), weights_of(pair_of(name).folder)
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("name", "reason"), NO_RELEASE.items())
def test_what_no_config_json_can_say_is_refused(tmp_path, name, reason):
    pair_of(name).ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=reason):
        export_native(tmp_path / "ours", tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("name", ["llm", "v2_lite", "v3"])
def test_a_release_exported_is_itself(name, tmp_path):
    source = pair_of(name).folder
    export_native(source, tmp_path / "out")
    assert header(tmp_path / "out") == header(source)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == CASES[name][0]


def test_shards_are_indexed_and_no_larger_than_asked(saved, tmp_path):
    model, folder = saved("tiny_v3")
    export_native(folder, tmp_path / "out", max_shard_size="60KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == header(tmp_path / "out").keys()
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 70_000
    assert torch.equal(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model))


def test_moe_16b_has_the_release_s_names(saved, tmp_path):
    """transformers has no class for it, so what its remote code asks for is spelled out here."""
    model, folder = saved("tiny_moe")
    export_native(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek", ["DeepseekForCausalLM"])
    assert "deepseek_format" not in config and "auto_map" not in config
    layers = [f"model.layers.{layer}." for layer in range(3)]
    names = {"model.embed_tokens", "model.norm", "lm_head"}
    names |= {f"{x}{y}" for x in layers for y in ("input_layernorm", "post_attention_layernorm")}
    names |= {f"{x}self_attn.{y}_proj" for x in layers for y in "qkvo"}
    names |= {f"{layers[0]}mlp.{y}_proj" for y in ("gate", "up", "down")} | {f"{x}mlp.gate" for x in layers[1:]}
    groups = ["shared_experts", *(f"experts.{e}" for e in range(8))]
    names |= {f"{x}mlp.{g}.{y}_proj" for x in layers[1:] for g in groups for y in ("gate", "up", "down")}
    assert header(tmp_path / "out").keys() == {f"{name}.weight" for name in names}
    assert torch.equal(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model))


def test_prediction_layers_are_stored_as_released(saved, tmp_path):
    model, folder = saved("tiny_v3_mtp")
    assert not any("shared_head.head" in name for name in header(folder))
    export_native(folder, tmp_path / "out")
    written = weights_of(tmp_path / "out")
    extra = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "mlp.gate")
    assert all(f"model.layers.{layer}.{part}.weight" in written for layer in (3, 4) for part in extra)
    assert torch.equal(written["model.layers.4.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(written["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 2
    _, info = DeepSeekForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("name", AHEAD)
def test_stock_transformers_passes_over_prediction_layers(exported, name):
    models, folders, answers = exported
    class_name, info, logits = answers[name]
    assert class_name == {"v3_ahead": "DeepseekV3ForCausalLM", "v32_ahead": "DeepseekV32ForCausalLM"}[name]
    ahead = {key for key in header(folders[name]) if key.startswith(("model.layers.3.", "model.layers.4."))}
    assert info.keys() <= {"unexpected_keys"}  # it passes over layer 61 in silence, and here it is another
    assert all(key.startswith(("model.layers.3.", "model.layers.4.")) for key in info.get("unexpected_keys", ()))
    assert_close(logits_of(models[name]), logits, "logits")
    extra = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "mlp.gate")
    extra += ("self_attn.indexer.wq_b", "self_attn.indexer.wk", "self_attn.indexer.weights_proj") * ("v32" in name)
    assert {f"model.layers.3.{part}.weight" for part in extra} <= ahead


def test_types(saved, tmp_path):
    model, folder = saved("tiny_v3")
    export_native(folder, tmp_path / "bf16", dtype="bf16")
    kinds = header(tmp_path / "bf16")
    assert {kind for name, (kind, _) in kinds.items() if "e_score" not in name} == {"BF16"}
    assert {kind for name, (kind, _) in kinds.items() if "e_score" in name} == {"F32"}
    export_native(tmp_path / "bf16", tmp_path / "as-stored")  # where the float32 weights lie first in the file
    assert header(tmp_path / "as-stored") == kinds
    for name in ("bf16", "as-stored"):
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export_native(tmp_path / "bf16", tmp_path / "fp32", dtype="fp32")
    rounded, source = weights_of(tmp_path / "fp32"), weights_of(folder)
    for key, value in source.items():
        assert torch.equal(rounded[key], value if "e_score" in key else value.bfloat16().float()), key


INDEXER = {"wq_b.weight": "F8_E4M3", "wq_b.weight_scale_inv": "F32", "wk.weight": "F8_E4M3"}
INDEXER |= {"wk.weight_scale_inv": "F32", "weights_proj.weight": "BF16", "k_norm.weight": "BF16"}
FP8_SIZES = {"hidden_size": 160, "intermediate_size": 136, "moe_intermediate_size": 24, "num_hidden_layers": 2}


def test_fp8_is_within_one_rounding_and_stays_as_it_is(saved, tmp_path):
    model, folder = saved("tiny_v3", **FP8_SIZES)
    export_native(folder, tmp_path / "fp8", dtype="fp8")
    kinds, source = header(tmp_path / "fp8"), weights_of(folder)
    quantized = {name for name, (kind, _) in kinds.items() if kind == "F8_E4M3"}
    assert quantized == {name for name in source if "_proj" in name and "layernorm" not in name}, (
        "projections and nothing else"
    )
    assert all(kinds[f"{name}_scale_inv"][1] == tuple(-(-s // 128) for s in kinds[name][1]) for name in quantized)
    assert {kinds[name][0] for name in source if name not in quantized and "e_score" not in name} == {"BF16"}
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]

    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"  # [160, 136]: partial blocks in both directions
    error = (loaded[name] - source[name]).abs()
    assert (error <= source[name].abs() / 16 + source[name].abs().max() / 448 * 2**-9).all() and error.max() > 0

    export_native(tmp_path / "fp8", tmp_path / "again")  # no second rounding
    first, again = weights_of(tmp_path / "fp8"), weights_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key].view(torch.uint8), again[key].view(torch.uint8)) for key in first)
    export_native(tmp_path / "fp8", tmp_path / "back", dtype="bf16")
    assert weights_of(tmp_path / "back").keys() == source.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")
def test_fp4_experts_are_written_as_they_came_and_anew(saved, tmp_path):
    model, folder = saved("tiny_v3", moe_intermediate_size=32, num_hidden_layers=2, expert_dtype="fp4")
    export_bundle(folder, tmp_path / "fp4", dtype="fp8")
    kinds, source = header(tmp_path / "fp4"), weights_of(folder)
    routed = {name for name in source if ".experts." in name}
    assert {kinds[name] for name in routed} == {("I8", (32, 16))} and len(routed) == 24
    assert {kinds[f"{name}_scale_inv"] for name in routed} == {("F8_E8M0", (32, 1))}
    assert kinds["model.layers.1.mlp.shared_experts.up_proj.weight"][0] == "F8_E4M3"
    assert kinds["model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv"][0] == "F8_E8M0"
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp4", dtype=torch.float32)
    for key, value in loaded.state_dict().items():
        if key.endswith(("gate_up_proj", "down_proj")) and ".experts." in key:
            error = (value - model.state_dict()[key]).abs()
            assert (error <= torch.maximum(model.state_dict()[key].abs() / 4, value.abs().amax(-1, True) / 8)).all()

    export_bundle(tmp_path / "fp4", tmp_path / "as it is")  # no second rounding
    loaded.save_pretrained(tmp_path / "plain")
    export_bundle(tmp_path / "plain", tmp_path / "anew", dtype="fp8")
    first = weights_of(tmp_path / "fp4")
    assert_equal_bytes(first, weights_of(tmp_path / "as it is"), first)
    anew = DeepSeekForCausalLM.from_pretrained(tmp_path / "anew", dtype=torch.float32).state_dict()
    assert all(torch.equal(anew[key], value) for key, value in loaded.state_dict().items() if ".experts." in key)


def assert_equal_bytes(one, other, names):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in names)


def test_fp8_of_v32_has_the_indexer_s_projections_but_not_its_weights(saved, tmp_path):
    _, folder = saved("tiny_v32", num_nextn_predict_layers=1)
    export_native(folder, tmp_path / "fp8", dtype="fp8")
    kinds = header(tmp_path / "fp8")
    for layer in range(4):
        indexer = {part: kinds[f"model.layers.{layer}.self_attn.indexer.{part}"][0] for part in INDEXER}
        assert indexer == INDEXER
    assert kinds["model.layers.3.eh_proj.weight"][0] == "BF16"
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not any(info.values()) and len(loaded.model.layers) == 4


def test_tokenizer_is_stock_and_gives_the_same_ids(saved, tmp_path):
    _, folder = saved("tiny_v3")
    export_native(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config
    text = "A cat 一只猫 1234\n"
    ours, stock = (AutoTokenizer.from_pretrained(where) for where in (folder, tmp_path / "out"))
    assert "DeepSeek" not in type(stock).__name__ and stock(text).input_ids == ours(text).input_ids
    assert stock.chat_template == ours.chat_template


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_transformers_has(exported, name):
    models, folders, answers = exported
    class_name, info, logits = answers[name]
    assert class_name == type(models[name]).__name__.replace("DeepSeek", "DeepseekV3") and not info
    assert_close(logits_of(models[name]), logits, "logits")
    assert json.loads((folders[name] / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_heads_that_transformers_lacks(saved, tmp_path):
    _, folder = saved("tiny_v3", DeepSeekForQuestionAnswering)
    with pytest.raises(ValueError, match="transformers has no DeepseekV3ForQuestionAnswering; use --to bundle"):
        export_native(folder, tmp_path / "out")


def test_the_table_of_heads_is_transformers_own():
    for model_type, name in ARCHITECTURES.items():
        suffixes = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
        there = {suffix for suffix in suffixes if hasattr(transformers, name + suffix)}
        assert there == set(NATIVE_HEADS.get(model_type, ())), model_type


def test_bundle_opens_with_its_own_code(exported):
    models, folders, answers = exported
    class_name, info, logits = answers["bundle"]
    assert class_name == "DeepSeekForCausalLM" and not info
    assert_close(logits, logits_of(models["bundle"]), "logits")
    assert header(folders["bundle"]) == header(folders["bundle"].with_name("bundle"))
