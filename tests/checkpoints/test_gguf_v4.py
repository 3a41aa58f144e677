"""GGUF files of V4: what is in them, and that llama.cpp computes the same with them."""

import numpy as np
import pytest
import torch

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.export import export_native
from finetune_deepseek.checkpoints.gguf import architecture_of, export_gguf
from modeling_deepseek import DeepSeekForCausalLM
from tests.checkpoints.conftest import VOCAB_SIZE, save_tiny, tokenizer_of
from tests.checkpoints.test_gguf import read
from tests.reference.compare import assert_close

gguf = pytest.importorskip("gguf", reason="pip install deepseek-hf[gguf]")
# Many index heads: with few, ReLU leaves many scores at 0, and ties are broken differently. 4 streams, ratios of 4 and
# 128, index keys of a multiple of 64 are what llama.cpp has.
SIZES = {
    **{"hidden_size": 64, "head_dim": 32, "qk_rope_head_dim": 16, "hc_mult": 4, "index_n_heads": 32},
    **{"index_head_dim": 64, "index_topk": 8, "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]},
    **{"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 1024, "moe_intermediate_size": 32},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
FP4 = {"expert_dtype": "fp4"}
IDS = [7919 * i % 300 + 3 for i in range(300)]  # two entries of 128


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A release's form: FP4 experts, FP8 elsewhere, hash layers, a prediction layer."""
    folder = tmp_path_factory.mktemp("quantized")
    fields = {**SIZES, **FP4, "num_hash_layers": 1, "num_nextn_predict_layers": 1, "vocab_size": VOCAB_SIZE}
    save_tiny(folder / "source", "tiny_v4", **fields)
    export_native(folder / "source", folder / "fp8", dtype="fp8")
    export_gguf(folder / "fp8", folder / "model.gguf")
    return DeepSeekForCausalLM.from_pretrained(folder / "fp8", dtype=torch.float32).eval(), folder


has_powers_of_two = pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")


@has_powers_of_two
def test_fp4_experts_become_mxfp4_exactly(quantized):
    model, folder = quantized
    fields, tensors = read(folder / "model.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    experts = {name for name in kinds if name.endswith("_exps.weight")}
    assert len(experts) == 3 * 4 and {kinds[name] for name in experts} == {"MXFP4"}
    for layer in range(4):
        fused = model.model.layers[layer].mlp.experts
        gate, up = fused.gate_up_proj.detach().chunk(2, dim=1)
        for part, value in (("gate", gate), ("up", up), ("down", fused.down_proj.detach())):
            read_back = gguf.dequantize(
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"], gguf.GGMLQuantizationType.MXFP4
            )
            assert np.array_equal(read_back, value.numpy())
    for name, ours in (("attn_q_a", "self_attn.wq_a"), ("ffn_up_shexp", "mlp.shared_experts.up_proj")):
        bits = tensors[f"blk.1.{name}.weight"].view(np.uint16).astype(np.uint32) << 16
        wanted = model.model.layers[1].get_submodule(ours).weight.detach().numpy()
        assert kinds[f"blk.1.{name}.weight"] == "BF16" and np.array_equal(bits.view(np.float32), wanted)


@has_powers_of_two
def test_fields_and_tables_of_v4(quantized):
    model, folder = quantized
    fields, tensors = read(folder / "model.gguf")
    expected = {
        "general.architecture": "deepseek4",
        "deepseek4.block_count": 4,
        "deepseek4.attention.head_count_kv": 1,
        "deepseek4.attention.key_length": 32,
        "deepseek4.attention.sliding_window": 5,
        "deepseek4.attention.compress_ratios": [0, 4, 128, 4],
        "deepseek4.attention.compress_rope_freq_base": 160000.0,
        "deepseek4.attention.output_group_count": 2,
        "deepseek4.rope.dimension_count": 16,
        "deepseek4.hyper_connection.count": 4,
        "deepseek4.hash_layer_count": 1,
        "deepseek4.expert_gating_func": 4,
        "deepseek4.swiglu_clamp_exp": [10.0] * 4,
    }
    assert {key: fields[key] for key in expected} == expected
    table = tensors["blk.0.ffn_gate_tid2eid.weight"]
    assert table.dtype == np.int32 and np.array_equal(table, model.model.layers[0].mlp.gate.tid2eid)
    assert "blk.0.exp_probs_b.bias" not in tensors and not [name for name in tensors if name.startswith("blk.4.")]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"compress_ratios": [0, 4, 8]}, r"compress_ratios \[8\]: it knows 0, 4 and 128"),
        ({"compress_ratios": [0, 128, 128]}, "compress_ratios without 4"),
        ({"compress_ratios": [0, 4, 128]}, "hc_mult 3: it knows 4"),
        ({"compress_ratios": [0, 4, 128], "hc_mult": 4}, "index_head_dim 14, no multiple of 64"),
    ],
)
def test_what_llama_cpp_has_not_of_v4_is_refused(fields, said):
    with pytest.raises(ValueError, match=f"llama.cpp has no {said}"):
        architecture_of(preset("tiny_v4", **fields))


def test_v4_1_is_refused():
    with pytest.raises(ValueError, match="not for deepseek_v41; llama.cpp .* has no V4.1; export --to native") as said:
        architecture_of(preset("v4.1_flash"))
    assert "converter" not in str(said.value)


ROWS = {
    "plain": {},
    "yarn": {"rope_parameters": YARN},
    "hash layer, prediction layer": {"num_hash_layers": 1, "num_nextn_predict_layers": 1},
    "clamped, not normalised": {"swiglu_limit": 0.5, "norm_topk_prob": False},
    "no clamp, tied": {"swiglu_limit": None, "tie_word_embeddings": True},
}


def logits_of_llama_cpp(llama_cpp, path) -> torch.Tensor:
    f32 = llama_cpp.GGML_TYPE_F32
    # one batch: its own batches of 512 are longer
    with_logits = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1}
    theirs = llama_cpp.Llama(str(path), type_k=f32, type_v=f32, **with_logits)
    theirs.eval(IDS[:200])
    theirs.eval(IDS[200:201])  # in pieces, as in decoding
    theirs.eval(IDS[201:])
    scores = torch.tensor(theirs.scores[: len(IDS)].copy())
    text = "A cat 一只猫, don't 1234\n\n  Straße <｜User｜>"
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer_of("v3")(text).input_ids
    theirs.close()
    return scores


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_computes_the_same(saved, tmp_path, row, llama_cpp):
    fields = {**SIZES, **ROWS[row]}
    model, folder = saved("tiny_v4", **{name: dict(v) if isinstance(v, dict) else v for name, v in fields.items()})
    export_gguf(folder, tmp_path / "model.gguf")
    assert_close(logits_of_llama_cpp(llama_cpp, tmp_path / "model.gguf"), logits_of(model), row, 1e-3)


@pytest.mark.slow
@has_powers_of_two
def test_llama_cpp_computes_with_mxfp4(quantized, llama_cpp):
    """It rounds activations to 8 bits where experts have 4, to bfloat16 elsewhere. Pairs left as they were
    give 1.2."""
    model, folder = quantized
    theirs, ours = logits_of_llama_cpp(llama_cpp, folder / "model.gguf"), logits_of(model)
    assert ((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).median() < 0.1
