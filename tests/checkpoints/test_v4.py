"""Exports of V4: quantized and not, compared with the model's own logits."""

import pytest
import torch
from safetensors.torch import load_file

from configuration_deepseek import DeepSeekConfig
from finetune_deepseek.checkpoints.checkpoint import official_weights
from finetune_deepseek.checkpoints.export import export_bundle
from finetune_deepseek.checkpoints.opening import open_model
from finetune_deepseek.checkpoints.spot_logits import TOKENS, spot_logits
from modeling_deepseek import DeepSeekForCausalLM
from tests.checkpoints.conftest import header
from tests.configuration.test_compressed import V4
from tests.reference.compare import assert_close

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8}
FIELDS = {**V4, "moe_intermediate_size": 32, "num_nextn_predict_layers": 1, "expert_dtype": "fp4", "swiglu_limit": 0.5}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    rope = {"rope_parameters": dict(YARN), "max_position_embeddings": 128}
    model = DeepSeekForCausalLM(DeepSeekConfig(**FIELDS, **rope, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_spot_logits_are_those_of_the_model(folder):
    model, path = folder
    checkpoint = open_model(path)
    ours = spot_logits(checkpoint.skeleton(), checkpoint.tensors)
    ids = [i for i in (7919 * i % 61 for i in range(1, 5 * TOKENS)) if i not in (0, 1)][:TOKENS]
    with torch.no_grad():
        assert_close(ours, model(torch.tensor([ids]), use_cache=False).logits[0])


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")
def test_types_that_an_export_writes(folder, tmp_path):
    model, path = folder
    export_bundle(path, tmp_path / "fp8", dtype="fp8")
    kinds = {name: kind for name, (kind, _) in header(tmp_path / "fp8").items()}
    prefix = "model.layers.1."
    for kind, names in {
        "I8": ["mlp.experts.0.up_proj.weight"],
        "F8_E8M0": ["mlp.experts.0.up_proj.weight_scale_inv", "self_attn.wo_a.weight_scale_inv"],
        "F8_E4M3": ["self_attn.wq_a.weight", "self_attn.indexer.wq_b.weight", "mlp.shared_experts.up_proj.weight"],
        "BF16": ["self_attn.compressor.wkv.weight", "self_attn.indexer.weights_proj.weight", "mlp.gate.weight"],
        "F32": ["attn_hc.scale", "self_attn.attn_sink", "self_attn.compressor.ape"],
        "I64": ["mlp.gate.tid2eid"],
    }.items():
        assert {kinds[prefix + name] for name in names} == {kind}
    assert kinds["model.layers.4.e_proj.weight"] == kinds["model.layers.4.h_proj.weight"] == "F8_E4M3"
    assert set(kinds) == set(official_weights(model)) | {name for name in kinds if name.endswith("_scale_inv")}
    exact = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert exact.config.source_quantization_config["scale_fmt"] == "ue8m0"
    for name, value in exact.named_parameters():
        before = model.get_parameter(name)
        # half a step of e2m1 and of e4m3, of the value or, where it is subnormal, of a scale that was rounded up
        share, least = (1 / 4, 1 / 12) if ".experts." in name else (1 / 16, 2 / 448 / 1024)
        bound = torch.maximum(before.abs() * share, before.abs().max() * least)
        assert ((value - before).abs() <= bound * (1 + 1e-5)).all(), name
    loaded, info = DeepSeekForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        assert loaded(torch.arange(3, 25).view(2, 11)).logits.isfinite().all()
    export_bundle(tmp_path / "fp8", tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name].view(torch.uint8), again[name].view(torch.uint8)) for name in first)
