"""FP4 experts: exact values, the nearest on the way back, and a checkpoint that mixes FP4 and FP8 as V4's does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_deepseek.weight_names import QUANTIZED, ROUTED
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.quantization import (
    dequantize_blocks,
    pack_fp4,
    quantize_blocks,
    quantize_fp4,
    unpack_fp4,
)
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.reference.quantization import E2M1, dequantize_fp4, nearest_e2m1

E8M0 = getattr(torch, "float8_e8m0fnu", None)  # not in torch 2.6
pytestmark = pytest.mark.skipif(E8M0 is None, reason="torch has no float8_e8m0fnu")


def test_every_byte_is_two_numbers():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(8, 32)
    exponents = torch.tensor([[127, 1], [0, 254], [100, 130], [127, 127]] * 2, dtype=torch.uint8)
    ours = dequantize_blocks(packed, exponents.view(E8M0), [1, 32])
    assert torch.equal(ours, dequantize_fp4(packed, exponents).float())
    assert torch.equal(
        unpack_fp4(torch.tensor([[0x21, -0x7F]], dtype=torch.int8)), torch.tensor([[0.5, 1.0, 0.5, -0.0]])
    )


def test_packed_is_the_nearest():
    values = torch.cat((torch.linspace(-6, 6, 97), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(1)))
    expected = torch.tensor([nearest_e2m1(value) for value in values.tolist()])
    assert torch.equal(unpack_fp4(pack_fp4(values[None]))[0], expected)
    assert torch.equal(unpack_fp4(pack_fp4(torch.tensor([E2M1])))[0], torch.tensor(E2M1))


def test_there_and_back_is_one_rounding_and_fp4_stays_itself():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 96, generator=generator) * torch.exp(3 * torch.randn(7, 96, generator=generator))
    weight[2] = 0
    packed, scale = quantize_fp4(weight)
    assert packed.shape == (7, 48) and packed.dtype == torch.int8 and scale.shape == (7, 3)
    assert (torch.frexp(scale).mantissa == 0.5).all() and torch.equal(scale.to(E8M0).float(), scale)
    back = dequantize_blocks(packed, scale, [1, 32])
    step = scale.repeat_interleave(32, 1)
    # half a step of e2m1: a quarter of the value, or of the scale where the value is subnormal
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 4, step / 4)).all()
    assert (back.abs() <= 6 * step).all()
    assert torch.equal(dequantize_blocks(*quantize_fp4(back), [1, 32]), back)
    codes = torch.randint(0, 256, (64, 32), generator=generator, dtype=torch.uint8).view(torch.int8)
    released = dequantize_blocks(codes, torch.full((64, 2), 0.25), [1, 32])
    assert torch.equal(dequantize_blocks(*quantize_fp4(released), [1, 32]), released)


def fp4_folder(folder, expert_dtype="fp4", scale_type=E8M0):
    """A checkpoint of V3's kind whose routed experts are FP4, the rest FP8; returns what it means."""
    tiny("tiny_v3", moe_intermediate_size=32).save_pretrained(folder)
    stored, means = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not QUANTIZED.fullmatch(key):
            stored[key] = means[key] = tensor
            continue
        is_fp4 = expert_dtype == "fp4" and ROUTED.fullmatch(key)
        block = [1, 32] if is_fp4 else [16, 12]
        quantized, scale = quantize_fp4(tensor) if is_fp4 else quantize_blocks(tensor, block, "ue8m0")
        means[key] = dequantize_blocks(quantized, scale, block)
        stored |= {key: quantized, f"{key}_scale_inv": scale.to(scale_type)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["source_quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 12], "scale_fmt": "ue8m0"}
    (folder / "config.json").write_text(json.dumps({**config, "expert_dtype": expert_dtype}))
    return stored, means


@pytest.mark.parametrize(("expert_dtype", "scale_type"), [("fp4", E8M0), ("fp8", torch.float32)])
def test_a_checkpoint_is_dequantized_while_it_is_read(expert_dtype, scale_type, tmp_path):
    _, means = fp4_folder(tmp_path, expert_dtype, scale_type)
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded.save_pretrained(tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert written.keys() == means.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in means.items())
    half = DeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype != torch.bfloat16}
    assert all(name.endswith("gate.weight") for name in kept)
    assert outputs(half, token_ids(1, 5)).isfinite().all()


def test_scales_that_do_not_fit_are_refused(tmp_path):
    stored, _ = fp4_folder(tmp_path)
    key = "model.layers.1.mlp.experts.0.up_proj.weight"
    for changed, message in (
        (
            {f"{key}_scale_inv": stored[f"{key}_scale_inv"][:, :0]},
            r"has shape \(32, 0\), but a weight of shape \(32, 32\)",
        ),
        ({f"{key}_scale_inv": None}, f"weight {key} is quantized but its scale {key}_scale_inv is missing"),
        ({key: None}, f"scale {key}_scale_inv has no quantized weight beside it"),
    ):
        weights = {name: tensor for name, tensor in (stored | changed).items() if tensor is not None}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            DeepSeekForCausalLM.from_pretrained(tmp_path)
