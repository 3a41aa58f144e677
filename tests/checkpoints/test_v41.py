"""Exports of V4.1 and what `inspect` says of it: names and types of the release, there and back."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.cache_size import by_attention, cache_bytes
from finetune_deepseek.checkpoints.export import export_bundle, export_native
from finetune_deepseek.checkpoints.inspection import inspect_checkpoint
from finetune_deepseek.checkpoints.opening import open_model
from finetune_deepseek.checkpoints.spot_logits import TABLE, spot_logits
from finetune_deepseek.checkpoints.tensors import unread
from finetune_deepseek.language.serving.language_model import opened
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageTextToText, quantization
from tests.checkpoints.conftest import header
from tests.modeling.test_vision_tower import VISION
from tests.reference.compare import assert_close
from tests.reference.shared_model import ENGRAM
from tests.reference.v41_names import v41_names
from tokenization_deepseek import DeepSeekProcessor, train_tokenizer

PIXELS = {"max_image_tokens": 30, "min_pixels": 4}
SIZES = {
    **{"layers": 5, "experts": 8, "makers": [1, 2], "without_gate": [2], "choosers": [1, 2, 4], "engrams": [0, 3]},
}
FIELDS = {**ENGRAM, "moe_intermediate_size": 32, "expert_dtype": "fp4", "vision_config": {"num_hidden_layers": 1}}
IDS = torch.arange(3, 25).view(2, 11)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, saved as ours."""
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(preset("tiny_v4.1", **FIELDS, initializer_range=0.2)).eval()
    folder = tmp_path_factory.mktemp("v41")
    model.save_pretrained(folder / "own")
    return model, folder


def test_names_of_the_release_there_and_back(saved, tmp_path):
    model, folder = saved
    export_native(folder / "own", tmp_path / "official", dtype="fp32")
    assert set(load_file(tmp_path / "official/model.safetensors")) == set(v41_names(SIZES, scales=False))
    file = json.loads((tmp_path / "official/config.json").read_text())
    assert file["model_type"] == "deepseek_v41" and file["text_config"]["engram_layer_ids"] == [0, 3]
    assert file["vision_config"] == {"num_hidden_layers": 1} and "expert_dtype" not in file
    again, info = DeepSeekForCausalLM.from_pretrained(tmp_path / "official", output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(again), logits(model))


def test_spot_logits_are_those_of_the_model(saved):
    model, folder = saved
    checkpoint = open_model(folder / "own")
    ours = spot_logits(checkpoint.skeleton(), checkpoint.tensors)
    tables = {name: replace(tensor, read=unread) for name, tensor in checkpoint.tensors.items() if TABLE in name}
    assert len(tables) == 2
    assert torch.equal(spot_logits(checkpoint.skeleton(), checkpoint.tensors | tables), ours)  # by rows alone
    ids = [i for i in (7919 * i % 97 for i in range(1, 40)) if i not in (0, 1, 2)][:8]
    with torch.no_grad():
        assert_close(ours, model(torch.tensor([ids]), use_cache=False).logits[0])


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")
def test_quantized_as_released_and_the_vision_tower_is_handed_on(saved, tmp_path, monkeypatch):
    model, folder = saved
    read, dequantize_blocks = [], quantization.dequantize_blocks
    monkeypatch.setattr(
        quantization, "dequantize_blocks", lambda w, *args: read.append(tuple(w.shape)) or dequantize_blocks(w, *args)
    )
    export_native(folder / "own", tmp_path / "fp8", dtype="fp8")
    assert (1, 6) in read and not {(260, 6), (700, 6)} & set(read)  # of tables, the rows that were looked up
    kinds = {name: kind for name, (kind, _) in header(tmp_path / "fp8").items()}
    assert set(kinds) == set(v41_names(SIZES))
    for kind, names in {
        "I8": ["layers.1.ffn.experts.0.w1.weight"],
        "F8_E4M3": ["layers.0.engram.embed.weight", "layers.0.engram.wkv.weight", "layers.1.attn.wkv.weight"],
        "F8_E8M0": ["layers.0.engram.embed.scale", "layers.1.attn.indexer.wq_b.scale"],
        "BF16": ["layers.1.attn.indexer.wk.weight", "layers.2.attn.compressor.wkv.weight", "layers.0.engram.q_weight"],
        "F32": ["layers.0.ffn.gate.bias_vl", "layers.0.hc_attn_fn", "layers.0.attn.attn_sink"],
    }.items():
        assert {kinds[name] for name in names} == {kind}, names
    tables = header(tmp_path / "fp8")
    assert list(tables["layers.0.engram.embed.scale"][1]) == [260, 1]  # each row by itself, 32 columns at a time
    file = json.loads((tmp_path / "fp8/config.json").read_text())
    assert file["quantization_config"]["expert_dtype"] == "fp4" and "expert_dtype" not in file
    assert file["quantization_config"]["weight_block_size"] == [32, 32]
    weights = load_file(tmp_path / "fp8/model.safetensors")
    tower = {
        "vision.norm.weight": torch.ones(3),
        "image_start": torch.ones(4),
        "mtp.0.main_proj.weight": torch.ones(2),
    }
    save_file({**weights, **tower}, tmp_path / "fp8/model.safetensors", {"format": "pt"})
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    for name, value in loaded.named_parameters():
        before = model.get_parameter(name)
        # half a step of e2m1 and of e4m3, of the value or, where it is subnormal, of a scale that was rounded up
        share, least = (1 / 4, 1 / 12) if ".experts." in name else (1 / 16, 2 / 448 / 1024)
        bound = torch.maximum(before.abs() * share, before.abs().max() * least)
        assert ((value - before).abs() <= bound * (1 + 1e-5)).all(), name
    export_native(tmp_path / "fp8", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert set(again) == {*weights, "vision.norm.weight", "image_start"}
    assert all(torch.equal(weights[name].view(torch.uint8), again[name].view(torch.uint8)) for name in weights)


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    """A model of images and text with its processor, saved as ours."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["ab"] * 3, 300, chat_template="v4.1")
    image = tokenizer.convert_tokens_to_ids("<｜deepseek_image｜>")
    fields = {"vocab_size": 300, "image_token_id": image, "vision_config": VISION | PIXELS, "initializer_range": 0.2}
    model = DeepSeekForImageTextToText(preset("tiny_v4.1", **fields)).eval()
    folder = tmp_path_factory.mktemp("sees") / "own"
    model.save_pretrained(folder)
    DeepSeekProcessor(tokenizer, image, 2, 3, 30, 4).save_pretrained(folder)
    return model, folder


def said(model, processor):
    picture = Image.frombytes("RGB", (9, 5), bytes(range(135)))
    inputs = processor(images=picture, text="a<｜deepseek_image｜>b", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits


@pytest.mark.parametrize("export", [export_native, export_bundle])
def test_a_model_that_sees_goes_out_and_comes_back(sees, tmp_path, export):
    model, folder = sees
    export(folder, tmp_path / "out", dtype="fp32")
    again, info = DeepSeekForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    processor = DeepSeekProcessor.from_pretrained(tmp_path / "out")
    assert_close(said(again, processor), said(model, DeepSeekProcessor.from_pretrained(folder)))
    if export is export_native:
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["architectures"] == ["DeepseekV41ForCausalLM"] and config["vision_config"] == VISION | PIXELS
        names = set(load_file(tmp_path / "out/model.safetensors"))
        assert names >= {
            "image_start",
            "aligner.w1.bias",
            "vision.blocks.1.attn.wqkv.weight",
            "layers.1.attn.wkv.weight",
        }
        assert not (tmp_path / "out/processor_config.json").exists()
    else:
        assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is DeepSeekProcessor
        assert (tmp_path / "out/processing_deepseek.py").is_file()


def test_what_is_compared_of_a_model_that_sees(sees):
    """With another tower the logits are others."""
    model, folder = sees
    checkpoint = open_model(folder)
    ours = spot_logits(checkpoint.skeleton(), checkpoint.tensors)
    ids = [i for i in (7919 * i % 300 for i in range(1, 40)) if i not in (0, 1, 2, model.config.image_token_id)][:8]
    pixels = torch.arange(24).float().sin().view(2, 12)  # two patches of one token, which takes 4 places
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 1]])}
    with torch.no_grad():
        rows = torch.tensor([[model.config.image_token_id] * 4 + ids])
        assert_close(ours, model(rows, **inputs, use_cache=False).logits[0])
    opened(str(folder), "main")  # as a language model, by the verbs
    found = inspect_checkpoint(str(folder))
    assert found.total == sum(p.numel() for p in model.parameters()) + 5 * 2 * 8  # with the biases of routers


def test_what_inspect_says(saved):
    model, folder = saved
    found = inspect_checkpoint(str(folder / "own"))
    lines = list(found.layers.values())
    assert (
        "csa2_full (4 heads, one key of width 16, window 5, query latent 24, entries of 2 tokens, 6 index heads"
        in str(lines)
    )
    assert "csa2_reuse" in str(lines) and "entries of 1 token of another layer" in str(lines)
    assert (
        "3 residual streams, read by weights of the sub-layer before, n-grams up to 4 tokens in 260 rows" in lines[0]
    )
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    tables = (260 + 700 - 2 * 6) * 6
    assert found.total == parameters + 5 * 2 * 8  # with the biases of routers
    assert found.active == found.total - experts * 5 // 8 - tables


def test_size_of_the_cache():
    """By hand: 3 of 4 layers that make entries have one in 2 tokens, of 512 + 128 numbers in two bytes each."""
    config = preset("v4.1_flash")
    each = {"swa": 0, "csa2_full": (3 * 640 / 2 + 640) * 2, "csa2_reindex": 0, "csa2_reuse": 0}
    assert by_attention(config) == each and sum(each.values()) == 3200
    windows, ids = 40 * (127 + 8) * 512 * 2, 2 * (3 + 8) * 8
    pending = 3 * (1 + 8) * 2 * 512 * 4 + 8 * 512 * 2
    assert cache_bytes(config, 1_048_576) == 1_048_576 * 3200 + windows + ids + pending


def test_formulas_give_what_a_cache_holds(saved):
    config, tokens = saved[0].config, 64
    half = DeepSeekForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        cache = None
        for part in (torch.arange(tokens).view(1, -1) % 90 + 3).split([50, 13, 1], dim=1):
            cache = half(part, cache=cache, use_cache=True).cache
    kept = 0
    for layer in cache.layers:
        kept += sum(rows.nbytes for rows in layer.rolls.values())
        kept += sum(entries.data[:, : tokens // layer.ratio].nbytes for entries in layer.entries.values())
    assert kept == cache_bytes(config, tokens)
