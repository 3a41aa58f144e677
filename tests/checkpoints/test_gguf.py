"""GGUF files: what is in them, and that llama.cpp computes the same with them."""

import copy
import json
import os
import sys

import jinja2
import numpy as np
import pytest
import torch

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.export import export_native
from finetune_deepseek.checkpoints.gguf import export_gguf, plain_template
from modeling_deepseek import DeepSeekForCausalLM
from tests.checkpoints import llama
from tests.checkpoints.conftest import IDS, VOCAB_SIZE, logits_of, tokenizer_of
from tests.parity.cases import LLAMA3, rope, yarn
from tests.reference.compare import assert_close
from tokenization_deepseek import CHAT_TEMPLATES
from tokenization_deepseek.tokenization_deepseek import BOS, EOS

gguf = pytest.importorskip("gguf", reason="pip install deepseek-hf[gguf]")


def read(path) -> tuple[dict, dict]:
    """Metadata, and tensors as numpy arrays in torch's order of axes."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def test_latent_attention_is_split_for_absorption(saved, tmp_path):
    model, folder = saved("tiny_v3")
    export_gguf(folder, tmp_path / "model.gguf")
    fields, tensors = read(tmp_path / "model.gguf")
    kv_b = model.model.layers[1].self_attn.kv_b_proj.weight.detach().numpy().reshape(4, 12 + 10, 16)
    assert np.array_equal(tensors["blk.1.attn_k_b.weight"], kv_b[:, :12].transpose(0, 2, 1))
    assert np.array_equal(tensors["blk.1.attn_v_b.weight"], kv_b[:, 12:])
    assert "blk.1.attn_kv_b.weight" not in tensors
    experts = model.model.layers[2].mlp.experts
    assert np.array_equal(tensors["blk.2.ffn_up_exps.weight"], experts.gate_up_proj.detach().numpy()[:, 20:])
    assert np.array_equal(tensors["blk.2.exp_probs_b.bias"], model.model.layers[2].mlp.gate.e_score_correction_bias)
    expected = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 3,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 16 + 8,
        "deepseek2.attention.key_length_mla": 12 + 8,
        "deepseek2.attention.value_length_mla": 10,
        "deepseek2.attention.q_lora_rank": 24,
        "deepseek2.rope.dimension_count": 8,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_weights_scale": 2.5,
        "deepseek2.expert_group_count": 4,
        "deepseek2.expert_group_used_count": 2,
    }
    assert {key: fields[key] for key in expected} == expected


def test_heads_are_reordered_for_rotary_pairs_side_by_side(saved, tmp_path):
    model, folder = saved("tiny_llm")
    export_gguf(folder, tmp_path / "model.gguf")
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 2
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().numpy()  # 2 heads of width 8
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(tensors["blk.0.attn_k.weight"], weight[order + [8 + row for row in order]])
    assert np.array_equal(tensors["blk.0.attn_v.weight"], model.model.layers[0].self_attn.v_proj.weight.detach())


def test_types(saved, tmp_path):
    _, folder = saved("tiny_v3")
    export_gguf(folder, tmp_path / "model.gguf", dtype="bf16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    small = {name for name in kinds if "norm" in name or "ffn_gate_inp" in name or "exp_probs_b" in name}
    assert {kinds[name] for name in small} == {"F32"} and {kinds[name] for name in kinds.keys() - small} == {"BF16"}
    export_native(folder, tmp_path / "bf16", dtype="bf16")
    export_gguf(tmp_path / "bf16", tmp_path / "as-stored.gguf")
    for name in ("model", "as-stored"):
        assert read(tmp_path / f"{name}.gguf")[0]["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_fp8_becomes_bfloat16(saved, tmp_path):
    _, folder = saved("tiny_v3")
    export_native(folder, tmp_path / "fp8", dtype="fp8")
    export_gguf(tmp_path / "fp8", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    query = tensors["blk.0.attn_q_a.weight"]
    wanted = loaded.model.layers[0].self_attn.q_a_proj.weight.detach()
    assert query.tensor_type.name == "BF16"
    assert torch.equal(torch.tensor(query.data.view(np.int16)).view(torch.bfloat16), wanted)


def test_tokenizer(saved, tmp_path):
    _, folder = saved("tiny_v3")
    export_gguf(folder, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    tokenizer = tokenizer_of("v3")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB_SIZE
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert (types[0], types[len(tokenizer) - 1], types[-1]) == (3, 1, 5)  # control, normal, unused
    assert types[tokens.index("<｜User｜>")] == 4  # user-defined: kept in text
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "deepseek-v3"
    assert fields["tokenizer.ggml.bos_token_id"] == 0 and fields["tokenizer.ggml.add_bos_token"]
    assert len(fields["tokenizer.ggml.merges"]) == len(
        json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    )


@pytest.mark.parametrize(("generation", "word"), [("llm", "deepseek-llm"), ("coder", "deepseek-coder")])
def test_pre_tokenizers_by_generation(saved, tmp_path, generation, word):
    _, folder = saved("tiny_llm")
    tokenizer_of(generation).save_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.pre"] == word


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_templates_are_plain_jinja(name):
    template = plain_template(CHAT_TEMPLATES[name])
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    text = jinja2.Environment().from_string(template).render(messages=chat, bos_token=BOS, eos_token=EOS)
    tokenizer = copy.copy(tokenizer_of("v3"))
    assert text == tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATES[name], tokenize=False)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("tiny_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("tiny_moe", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("tiny_v3", {"n_shared_experts": None}, "experts without shared ones"),
        ("tiny_v3", {"attention_bias": True}, "attention_bias"),
        ("tiny_v3", yarn(mscale=0.5, mscale_all_dim=1.0), "yarn with mscale"),
        ("tiny_v3", rope("linear", factor=4.0), "rope_type 'linear'"),
        ("tiny_llm", rope("dynamic", factor=4.0), "rope_type 'dynamic'"),
        ("tiny_llm", {"attention_direction": "prefix"}, "attention_direction 'prefix'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(saved, tmp_path, name, fields, said):
    _, folder = saved(name, **fields)
    with pytest.raises(ValueError, match=f"llama.cpp has no .*{said}"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_groups_of_v2_are_warned_of(saved, tmp_path):
    _, folder = saved("tiny_v2")
    with pytest.warns(UserWarning, match="ranks groups of experts by their two best"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_what_it_needs(saved, tmp_path):
    _, folder = saved("tiny_v3")
    with pytest.raises(ValueError, match="ends in .gguf"):
        export_gguf(folder, tmp_path / "model")
    with pytest.raises(ValueError, match="no FP8 in blocks"):
        export_gguf(folder, tmp_path / "model.gguf", dtype="fp8")
    with pytest.raises(ValueError, match="one file"):
        export_gguf(folder, tmp_path / "model.gguf", max_shard_size="1GB")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        export_gguf(folder, tmp_path / "model.gguf")
    _, small = saved("tiny_v3", vocab_size=200)
    with pytest.raises(ValueError, match="vocab_size is 200"):
        export_gguf(small, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("_saving*"))


YARN = yarn(mscale=0.707, mscale_all_dim=0.707)
ROWS = {
    "llm": ("tiny_llm", {}),
    "llm, biases": ("tiny_llm", {"attention_bias": True, "mlp_bias": True}),
    "llm, wide heads, tied": ("tiny_llm", {"head_dim": 12, "tie_word_embeddings": True}),
    "llm, linear": ("tiny_llm", rope("linear", factor=4.0)),
    "llm, yarn": ("tiny_llm", yarn()),
    "llm, llama3": ("tiny_llm", LLAMA3),
    "MoE-16B": ("tiny_moe", {}),
    "V2-Lite": ("tiny_v2_lite", {}),
    "V2-Lite, yarn": ("tiny_v2_lite", YARN),
    "V2 without groups, scaled": ("tiny_v2", {"topk_method": "greedy"}),
    "V2, normalised": ("tiny_v2", {"topk_method": "greedy", "norm_topk_prob": True}),
    "V3": ("tiny_v3", {}),
    "V3, yarn": ("tiny_v3", yarn(mscale=1.0, mscale_all_dim=1.0)),
    "V3, all groups": ("tiny_v3", {"n_group": 1, "topk_group": 1}),
    "V3, not normalised": ("tiny_v3", {"norm_topk_prob": False}),
    "V3, prediction layers": ("tiny_v3_mtp", {}),
    "V3, dense": ("tiny_v3", {"first_k_dense_replace": 3}),
}

# More index heads than the tiny preset's 6: with few, ReLU leaves many scores at 0, and ties are broken differently.
INDEXER = {"index_n_heads": 32, "index_head_dim": 64}  # llama.cpp rotates index keys by a Hadamard matrix of 64
ROWS |= {f"V3.2, top {count}": ("tiny_v32", {**INDEXER, "index_topk": count}) for count in (4, 64)}
ROWS["V3.2, prediction layer"] = ("tiny_v32", {**INDEXER, "index_topk": 4, "num_nextn_predict_layers": 1})


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_computes_the_same(saved, tmp_path, row, llama_cpp):
    name, fields = ROWS[row]
    model, folder = saved(name, **{"bos_token_id": 0, "eos_token_id": 1, **fields})
    export_gguf(folder, tmp_path / "model.gguf")
    ids = (IDS % VOCAB_SIZE)[0].tolist()
    # caches in float32; its default of float16 alone costs about 1e-3
    f32 = llama_cpp.GGML_TYPE_F32
    path = str(tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, type_k=f32, type_v=f32, n_threads=1)
    theirs.eval(ids)
    assert_close(torch.tensor(theirs.scores[: len(ids)].copy()), logits_of(model)[0], row, 1e-3)
    text = "A cat 一只猫, don't 1234\n\n  Straße <｜User｜>"
    wanted = tokenizer_of("v3" if "v3" in name else "llm")(text).input_ids
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == wanted


def test_llama_cpp_is_built_from_its_sdist(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it weren't installed
    commands, made = [], []
    monkeypatch.setattr(llama.venv, "create", lambda folder, with_pip: made.append((folder, with_pip)))
    monkeypatch.setattr(llama, "check_tools", lambda: None)
    monkeypatch.setattr(llama, "run", commands.append)
    monkeypatch.setattr(llama, "import_from", lambda folder: folder)
    assert llama.llama_cpp(tmp_path) == tmp_path and made == [(tmp_path, True)]
    assert commands[0][:4] == [str(tmp_path / "bin/python"), "-m", "pip", "install"]
    assert commands[0][4:6] == ["--no-binary", "llama-cpp-python"]
    assert commands[0][-1] == "llama-cpp-python==0.3.36"


def test_why_llama_cpp_cannot_be_built(monkeypatch, tmp_path):
    command = [*llama.install_command(sys.executable), "--dry-run", "--target", str(tmp_path / "target")]
    nowhere = ["--no-index", "--find-links", str(tmp_path)]
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(llama.CannotBuild, match="0.3.36 can't be had: .*No matching distribution found"):
        llama.run([*command, *nowhere])
    with pytest.raises(RuntimeError, match=r"failed:\n[\s\S]*no such option: --no-such"):
        llama.run([*command, "--no-such"])
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(llama.CannotBuild, match="there is no no-such-compiler"):
        llama.check_tools()


def test_presets_of_the_releases_are_accepted():
    from finetune_deepseek.checkpoints.gguf import architecture_of

    older, compressed = ("llm_7b", "moe_16b", "v2_lite", "v2", "v2.5", "v3"), ("v4_flash", "v4_flash_0731", "v4_pro")
    words = {name: architecture_of(preset(name)) for name in older + compressed}
    assert list(words.values()) == ["llama", "deepseek", *["deepseek2"] * 4, *["deepseek4"] * 3]
