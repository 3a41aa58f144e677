"""FP8 blocks: exact values, partial blocks, one rounding there and back, and checkpoints in the releases' form."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configuration_deepseek.official import to_official
from configuration_deepseek.weight_names import QUANTIZED
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekModel, register
from modeling_deepseek.quantization import dequantize_blocks, quantize_blocks
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.reference.quantization import dequantize, e4m3

SHAPES = [((128, 128), [128, 128]), ((57, 13), [16, 4]), ((20, 12), [128, 128]), ((12, 30), [3, 10]), ((9, 4), [4, 3])]
FORMATS = [None, "ue8m0"]
E8M0 = getattr(torch, "float8_e8m0fnu", None)  # not in torch 2.6
needs_e8m0 = pytest.mark.skipif(E8M0 is None, reason="torch has no float8_e8m0fnu")


def random(*shape, seed=0):
    """Numbers of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    return values.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0)


def test_the_reference_reads_bytes_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor([e4m3(code) for code in range(256)])
    assert torch.equal(codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9), values.nan_to_num(1e9))


@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, pytest.param(E8M0, marks=needs_e8m0)], ids=["float32", "ue8m0"])
def test_dequantized_is_each_product_rounded_once(shape, block, kind):
    weight = random(*shape).clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond it, older torch has no number
    grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    scale = random(*grid, seed=1).abs().clamp(min=1e-3)
    scale = torch.exp2(scale.log2().round()).to(kind) if kind != torch.float32 else scale
    assert torch.equal(dequantize_blocks(weight, scale, block), dequantize(weight, scale.float(), block).float())


def test_a_576_row_projection_has_half_a_block_at_the_end():
    weight, scale = torch.ones(576, 130).to(torch.float8_e4m3fn), torch.arange(10.0).view(5, 2)
    values = dequantize_blocks(weight, scale, [128, 128])
    assert values.shape == (576, 130)
    assert values[:128, :128].unique() == 0 and values[:128, 128:].unique() == 1
    assert values[512:, :128].unique() == 8 and values[512:, 128:].unique() == 9


@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_there_and_back_is_one_rounding(shape, block, scale_fmt):
    weight = random(*shape)
    quantized, scale = quantize_blocks(weight, block, scale_fmt)
    assert quantized.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    back = dequantize_blocks(quantized, scale, block)
    unit = dequantize_blocks(torch.ones(shape).to(torch.float8_e4m3fn), scale, block)
    # half a step of e4m3: 2^-4 of the value, or 2^-10 of the scale where the value is subnormal; 1e-6 for float32
    assert ((back - weight).abs() <= torch.maximum(weight.abs() * 2**-4, unit * 2**-10) * (1 + 1e-5)).all()
    again, scale_again = quantize_blocks(back, block, scale_fmt)
    assert torch.equal(dequantize_blocks(again, scale_again, block), back) or scale_fmt is None
    torch.testing.assert_close(dequantize_blocks(again, scale_again, block), back, rtol=1e-6, atol=0)
    if scale_fmt == "ue8m0":
        assert (torch.frexp(scale).mantissa == 0.5).all()
        assert quantized.float().abs().max() <= 448


def test_zeros_stay_zeros():
    quantized, scale = quantize_blocks(torch.zeros(5, 7), [4, 4], "ue8m0")
    assert not quantized.float().any() and (scale == 1).all()


# Checkpoints --------------------------------------------------------------------------------------------------------

BLOCK = [16, 12]  # of which no size of the tiny model is a multiple throughout


def fp8_folder(model, folder, scale_fmt=None, scale_type=torch.float32):
    """A checkpoint as V3's: official config, FP8 projections and their scales in shards; returns what it means."""
    model.save_pretrained(folder, max_shard_size="40KB")
    means = {}
    for file in folder.glob("model-*.safetensors"):
        stored = {}
        for key, tensor in load_file(file).items():
            means[key] = tensor
            if QUANTIZED.fullmatch(key):
                quantized, scale = quantize_blocks(tensor, BLOCK, scale_fmt)
                means[key] = dequantize_blocks(quantized, scale, BLOCK)
                stored |= {key: quantized, f"{key}_scale_inv": scale.to(scale_type)}
            else:
                stored[key] = tensor
        save_file(stored, file, {"format": "pt"})
    config = to_official(model.config.to_dict())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
    config["quantization_config"] = quantization | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    (folder / "config.json").write_text(json.dumps(config))
    return means


def test_what_the_releases_quantize():
    names = (
        "self_attn.kv_a_proj_with_mqa self_attn.o_proj self_attn.indexer.wk mlp.up_proj mlp.experts.7.down_proj "
        "mlp.shared_experts.gate_proj"
    )
    plain = "self_attn.q_a_layernorm self_attn.indexer.weights_proj mlp.gate eh_proj shared_head.head input_layernorm"
    assert all(QUANTIZED.fullmatch(f"model.layers.61.{name}.weight") for name in names.split())
    assert not any(QUANTIZED.fullmatch(f"model.layers.61.{name}.weight") for name in plain.split())


@pytest.mark.parametrize(
    ("name", "scale_fmt", "scale_type"),
    [
        ("tiny_v3", None, torch.float32),
        ("tiny_v3_mtp", "ue8m0", torch.float32),
        pytest.param("tiny_v3", "ue8m0", E8M0, marks=needs_e8m0),
        ("tiny_v2", None, torch.float32),
        ("tiny_v32", "ue8m0", torch.float32),
    ],
)
def test_an_fp8_checkpoint_is_dequantized_while_it_is_read(name, scale_fmt, scale_type, tmp_path):
    model = tiny(name, **({"num_nextn_predict_layers": 1} if name == "tiny_v32" else {}))
    means = fp8_folder(model, tmp_path, scale_fmt, scale_type)
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.source_quantization_config["weight_block_size"] == BLOCK
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert written.keys() == means.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in means.items())
    assert sum(not torch.equal(tensor, means[key]) for key, tensor in load_all(model, tmp_path / "was").items()) > 20
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(outputs(again, token_ids(2, 7)), outputs(loaded, token_ids(2, 7)))


def load_all(model, folder):
    """The model's tensors under official names."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_bfloat16_is_the_rounded_product(tmp_path):
    means = fp8_folder(tiny("tiny_v3"), tmp_path)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    key = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(loaded.get_parameter(key), means[key].to(torch.bfloat16))
    trunk = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(trunk.get_parameter(key.removeprefix("model.")), means[key].to(torch.bfloat16))


def test_native_registration_reads_fp8(tmp_path):
    fp8_folder(tiny("tiny_v3"), tmp_path)
    register(native=True)
    try:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DeepSeekForCausalLM
    finally:
        register(native=False)


KEY = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def spoil(folder, change):
    """Change the tensors of the shard that holds KEY."""
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        if KEY in tensors:
            change(tensors)
            save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: tensors.update({f"{KEY}_scale_inv": torch.ones(1, 3)}),
            rf"scale {KEY}_scale_inv has shape \(1, 3\), but a weight of shape \(24, 32\) in blocks of 16 x 12 has",
        ),
        (lambda tensors: tensors.pop(f"{KEY}_scale_inv"), rf"weight {KEY} is quantized but its scale .* is missing"),
        (
            lambda tensors: tensors.update({KEY: torch.ones(24, 32)}),
            rf"scale {KEY}_scale_inv has no quantized weight beside it",
        ),
    ],
)
def test_a_bad_scale_is_one_line_that_names_the_key(change, says, tmp_path):
    fp8_folder(tiny("tiny_v3"), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=f"^{tmp_path}: {says}") as refused:
        DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_offload_to_disk_would_read_the_bytes_as_they_are_and_is_refused(tmp_path):
    fp8_folder(tiny("tiny_v3"), tmp_path)
    with pytest.raises(
        ValueError, match="quantized weights cannot be loaded under DeepSpeed ZeRO-3 or with offload to disk"
    ):
        DeepSeekForCausalLM.from_pretrained(
            tmp_path, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
        )


def test_a_config_without_the_block_is_one_line(tmp_path):
    fp8_folder(tiny("tiny_v3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized in blocks, but config.json has no quantization_config"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)


def test_scales_in_a_type_that_torch_lacks_are_one_line(tmp_path):
    """A process in which torch is as 2.6 is; the file's header has the type, whatever torch has."""
    fp8_folder(tiny("tiny_v3"), tmp_path, "ue8m0", torch.uint8)
    for file in tmp_path.glob("model-*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = data[8:end].replace(b'"U8"', b'"F8_E8M0"')
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    run = subprocess.run([sys.executable, "-c", OLDER, str(tmp_path)], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if "F8_E8M0" in line]
    assert len(lines) == 3, run.stdout + run.stderr
    for line in lines:
        assert re.search(r"_scale_inv is of type F8_E8M0, which torch \S+ lacks; install 2.7 or later$", line)
        assert str(tmp_path) in line


OLDER = """
import sys
import peft, torch, transformers.trainer
vars(torch).pop("float8_e8m0fnu", None)
from finetune_deepseek.checkpoints.export import export_native
from finetune_deepseek.checkpoints.inspection import inspect_checkpoint
from modeling_deepseek import DeepSeekForCausalLM
for read in (DeepSeekForCausalLM.from_pretrained, lambda path: export_native(path, path + "/out"), inspect_checkpoint):
    try:
        read(sys.argv[1])
    except ValueError as error:
        print(error)
"""
