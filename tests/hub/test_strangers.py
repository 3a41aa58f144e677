"""Every class, saved to a folder, opens by every fitting Auto class: with our packages, and in a process without them.

One process saves, one stranger loads with trust_remote_code, one process of ours loads; all outputs are compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HEADS = {
    "DeepSeekModel": "AutoModel",
    "DeepSeekForCausalLM": "AutoModelForCausalLM",
    "DeepSeekForSequenceClassification": "AutoModelForSequenceClassification",
    "DeepSeekForTokenClassification": "AutoModelForTokenClassification",
    "DeepSeekForQuestionAnswering": "AutoModelForQuestionAnswering",
}
EYES = {"DeepSeekForImageTextToText": "AutoModelForImageTextToText"}
N_GRAMS = {
    **{"engram_layer_ids": [0, 3], "engram_num_embeddings": [260, 700], "engram_max_ngram_size": 4},
    **{"engram_vocab_size": 20, "engram_n_heads": 2, "engram_head_dim": 6, "engram_compressed_vocab_size": 97},
    "engram_pad_token_id": 2,
}


def outputs(model):
    """All tensors that the model gives for two fixed rows, the second padded, concatenated to one."""
    import torch

    ids = torch.arange(3, 25).reshape(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        result = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    return torch.cat([value.flatten() for value in result.to_tuple() if torch.is_tensor(value)])


def seen(model, processor, folder):
    """What the model says of a picture between two letters."""
    import torch
    from PIL import Image

    picture = Image.frombytes("RGB", (9, 5), bytes(range(135)))
    picture.save(f"{folder}/picture.png")
    with torch.no_grad():
        inputs = processor(images=picture, text="a<｜deepseek_image｜>b", return_tensors="pt")
        return model.eval()(**inputs, use_cache=False).logits


def save_eyes(folder):
    """Save a model of images and text with its processor; what it says of a picture."""
    import torch

    from configuration_deepseek import preset
    from modeling_deepseek import DeepSeekForImageTextToText
    from tokenization_deepseek import DeepSeekProcessor, train_tokenizer

    tokenizer = train_tokenizer(["ab"] * 3, 290, chat_template="v4.1")
    image = tokenizer.convert_tokens_to_ids("<｜deepseek_image｜>")
    tower = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 4}
    pixels = {"patch_size": 2, "downsample_ratio": 3, "max_image_tokens": 20, "min_pixels": 4}
    vision = tower | pixels | {"rope_theta": 10000}
    torch.manual_seed(0)
    config = preset("tiny_v4.1", vocab_size=290, image_token_id=image, vision_config=vision, initializer_range=0.2)
    model, processor = DeepSeekForImageTextToText(config), DeepSeekProcessor(tokenizer, image, **pixels)
    model.save_pretrained(f"{folder}/eyes")
    processor.save_pretrained(f"{folder}/eyes")
    return seen(model, processor, folder)


def save_all(folder):
    """Save each class for each tiny preset, an adapter, and what they compute."""
    import torch
    from peft import LoraConfig, get_peft_model

    import modeling_deepseek
    from configuration_deepseek import PRESETS, preset

    presets = [name for name in PRESETS if name.startswith("tiny_")]
    made = {f"{name}/{head}": preset(name) for name in presets for head in HEADS}
    made["hash_layers/DeepSeekForCausalLM"] = preset("tiny_v4", num_hash_layers=2)
    made["n_grams/DeepSeekForCausalLM"] = preset("tiny_v4.1", **N_GRAMS)
    expected = {}
    for path, config in made.items():
        torch.manual_seed(0)
        model = getattr(modeling_deepseek, path.partition("/")[2])(config)
        model.save_pretrained(Path(folder, path))
        expected[path] = outputs(model)
        expected[f"{path}'s trunk"] = outputs(model.base_model)

    base = f"{folder}/tiny_v3/DeepSeekForCausalLM"
    model = modeling_deepseek.DeepSeekForCausalLM.from_pretrained(base)
    prompt = torch.arange(3, 9)[None]
    expected["generated"] = model.generate(prompt, max_new_tokens=6, do_sample=False)
    targets = ["q_b_proj", "kv_b_proj", "o_proj"]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, target_parameters=parameters, init_lora_weights=False
    )
    plain = outputs(model)
    adapted = get_peft_model(model, lora)
    expected["adapter"] = outputs(adapted)
    adapted.save_pretrained(f"{folder}/adapter")
    adapted.merge_adapter()
    merged = outputs(adapted)
    adapted.unmerge_adapter()
    unmerged = outputs(adapted)
    with adapted.disable_adapter():
        disabled = outputs(adapted)
    adapted.merge_and_unload().save_pretrained(f"{folder}/merged")
    expected["merged"] = merged
    expected["eyes"] = save_eyes(folder)
    torch.save(expected, f"{folder}/expected.pt")

    def difference(left, right):
        return (left - right).abs().max().item()

    return {
        "models": [*made],
        "adapter changes": difference(plain, expected["adapter"]),
        "merged": difference(merged, expected["adapter"]),
        "unmerged": difference(unmerged, expected["adapter"]),
        "disabled": difference(disabled, plain),
    }


def load_all(folder, trust_remote_code):
    """Load by Auto classes all that `save_all` wrote: differences, classes, and weights that were missing.

    With trust_remote_code it also writes the folder `again`, which both processes load.
    """
    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    if not trust_remote_code:
        import modeling_deepseek  # noqa: F401 - this alone registers everything

    expected = torch.load(f"{folder}/expected.pt")
    facts = {"differences": {}, "classes": {}, "missing": {}}

    def load(path, auto_class):
        auto = getattr(transformers, auto_class)
        model, info = auto.from_pretrained(f"{folder}/{path}", output_loading_info=True, **trust)
        facts["classes"][f"{path} by {auto_class}"] = [type(model).__module__, type(model).__name__]
        facts["missing"][f"{path} by {auto_class}"] = sorted(info["missing_keys"])
        return model

    def compare(name, result):
        facts["differences"][name] = (result - expected[name]).abs().max().item()

    for path in [name for name in expected if name.partition("/")[2] in HEADS]:
        compare(path, outputs(load(path, HEADS[path.partition("/")[2]])))
        compare(f"{path}'s trunk", outputs(load(path, "AutoModel")))
    causal = "tiny_v3/DeepSeekForCausalLM"
    for auto_class in list(HEADS.values())[2:]:
        load(causal, auto_class)  # only the head is new
    config = transformers.AutoConfig.from_pretrained(f"{folder}/{causal}", **trust)
    facts["shifted"] = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if name in HEADS)
    facts["config"] = [type(config).__module__, type(config).__name__, config.kv_lora_rank]

    model = load(causal, "AutoModelForCausalLM")
    prompt = torch.arange(3, 9)[None]
    compare("generated", model.generate(prompt, max_new_tokens=6, do_sample=False))
    if trust_remote_code:
        model.save_pretrained(f"{folder}/again")
    compare("adapter", outputs(PeftModel.from_pretrained(model, f"{folder}/adapter")))
    with_base = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", **trust)
    facts["differences"]["adapter with its base"] = (outputs(with_base) - expected["adapter"]).abs().max().item()
    again = load("again", "AutoModelForCausalLM")
    facts["differences"]["again"] = (outputs(again) - expected[causal]).abs().max().item()
    compare("merged", outputs(load("merged", "AutoModelForCausalLM")))
    processor = transformers.AutoProcessor.from_pretrained(f"{folder}/eyes", **trust)
    compare("eyes", seen(load("eyes", "AutoModelForImageTextToText"), processor, folder))
    load("eyes", "AutoModelForCausalLM")
    reads = transformers.pipeline("image-text-to-text", model=f"{folder}/eyes", processor=processor, **trust)
    part = {"type": "image", "url": f"{folder}/picture.png"}
    facts["read"] = reads(text=[{"role": "user", "content": [part]}], max_new_tokens=3, return_full_text=False)
    return facts


def importable(packages):
    import importlib.util

    def found(name):
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in packages if found(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(run_client, folder):
    return run_client(save_all, str(folder))


@pytest.fixture(scope="module")
def loaded(saved, run_client, run_stranger, folder):
    stranger = run_stranger(load_all, str(folder), True)  # first: it saves a folder for both
    return {"stranger": stranger, "ours": run_client(load_all, str(folder), False)}


def test_a_stranger_has_none_of_our_packages(run_client, run_stranger):
    packages = ["configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "finetune_deepseek"]
    assert run_client(importable, packages) == packages
    assert run_stranger(importable, [*packages, "modeling_deepseek.rope", "json"]) == ["json"]


@pytest.mark.parametrize("process", ["ours", "stranger"])
def test_every_class_gives_equal_outputs_by_every_fitting_auto_class(saved, loaded, process):
    names = saved["models"] + [f"{name}'s trunk" for name in saved["models"]]
    names += ["generated", "adapter", "adapter with its base", "merged", "again", "eyes"]
    assert loaded[process]["differences"] == dict.fromkeys(names, 0.0)


@pytest.mark.parametrize(("process", "home"), [("ours", "modeling_deepseek"), ("stranger", "transformers_modules")])
def test_the_class_is_the_one_asked_for(loaded, process, home):
    heads = {auto_class: head for head, auto_class in (HEADS | EYES).items()}
    for what, (module, name) in loaded[process]["classes"].items():
        assert name == heads[what.rpartition(" ")[2]], what
        assert module.split(".")[0] == home, what
    config_home = "configuration_deepseek" if process == "ours" else home
    module, *rest = loaded[process]["config"]
    assert [module.split(".")[0], *rest] == [config_home, "DeepSeekConfig", 16]


@pytest.mark.parametrize("process", ["ours", "stranger"])
def test_trainer_shifts_the_labels_that_it_smooths(loaded, process):
    assert loaded[process]["shifted"] == ["DeepSeekForCausalLM"]


@pytest.mark.parametrize("process", ["ours", "stranger"])
def test_a_head_on_a_causal_lm_checkpoint_is_all_that_is_new(loaded, process):
    causal = "tiny_v3/DeepSeekForCausalLM by AutoModelFor"
    new = {what.removeprefix(causal): keys for what, keys in loaded[process]["missing"].items() if keys}
    assert new == {
        "SequenceClassification": ["score.weight"],
        "TokenClassification": ["score.bias", "score.weight"],
        "QuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"],
    }


def test_a_pipeline_reads_a_picture_in_either_process(loaded):
    ours, theirs = (loaded[process]["read"][0]["generated_text"] for process in ("ours", "stranger"))
    assert ours == theirs and isinstance(ours, str)


def test_adapters_merge_and_unmerge(saved):
    assert saved["adapter changes"] > 0.01
    assert saved["merged"] < 1e-5
    assert saved["unmerged"] < 1e-5
    assert saved["disabled"] == pytest.approx(0, abs=1e-5)


def test_the_folder_holds_all_that_travels(saved, folder):
    head = folder / "tiny_v3" / "DeepSeekForQuestionAnswering"
    for path, more in ((head, {}), (folder / "eyes", EYES)):
        config = json.loads((path / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", *HEADS.values(), *more.values()}
        for auto_class, reference in config["auto_map"].items():
            module, _, name = reference.partition(".")
            assert f"class {name}(" in (path / f"{module}.py").read_text(), auto_class


LANGUAGE = "ahead draft_loss drafting language_heads losses pooling"
SEEING = f"{LANGUAGE} image_text_head vision_tower processing_deepseek chat_parts"


@pytest.mark.parametrize(
    ("head", "extra"),
    [("tiny_v3/DeepSeekForCausalLM", LANGUAGE), ("tiny_v3/DeepSeekModel", ""), ("eyes", SEEING)],
)
def test_a_folder_holds_no_file_that_its_class_does_not_need(saved, folder, head, extra):
    trunk = """adapters configuration_deepseek fields official modeling_deepseek pretrained outputs attention_core
        attention_compressed attention_dsa attention_mha attention_mla attention_shared cache cache_compressed
        checkpoint_files checkpoint_keys compressor drafts dspark engram fused heads indexer layers masks moe mtp
        products quantization requiring residual rope routers row_tokens sharing tested_versions
        transformers_names validation vision weight_names weight_state whole_folders"""
    needed = {f"{name}.py" for name in f"{trunk} {extra}".split()}
    assert {file.name for file in (folder / head).glob("*.py")} == needed
