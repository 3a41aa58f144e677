"""Adapters merged from disk give the adapter's own outputs, in little memory; rewritten per expert they do too."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune_deepseek.checkpoints.export import export_adapter, export_bundle, export_native
from finetune_deepseek.training.arguments import LoraArguments
from finetune_deepseek.training.weights.lora import apply_lora
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForSequenceClassification
from modeling_deepseek.moe import DeepSeekExperts
from tests.checkpoints.conftest import VOCAB_SIZE, header, logits_of, weights_of
from tests.reference.compare import assert_close


@torch.no_grad()
def shake(model: PeftModel) -> PeftModel:
    """Random adapter weights: as they begin, B is zero and merging changes nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.normal_(0, 0.1)
        elif "magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
        elif "modules_to_save" in name:
            parameter.normal_(0, 0.5)
    return model.eval()


@pytest.fixture
def adapted(saved, tmp_path):
    """A tiny model on disk and a LoRA adapter for it; gives the adapted model, base folder and adapter folder."""

    def make(name: str = "tiny_v3", head=DeepSeekForCausalLM, config: LoraConfig | None = None, **flags):
        _, base = saved(name, head)
        model = head.from_pretrained(base)
        if config is None:
            wrapped = apply_lora(model, LoraArguments(use_peft=True, lora_r=3, lora_alpha=5, **flags))
        else:
            wrapped = get_peft_model(model, config)
        shake(wrapped).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return wrapped, base, tmp_path / "adapter"

    return make


GROUPS = ["attention", "dense", "shared", "experts", "router", "embeddings", "head"]


@pytest.mark.parametrize("group", [*GROUPS, "all"])
def test_merged_logits_are_the_adapter_s(adapted, tmp_path, group):
    model, base, adapter = adapted(lora_target=[group])
    export_native(base, tmp_path / "out", adapter=adapter)
    merged = DeepSeekForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(logits_of(merged), logits_of(model), "logits")
    assert (logits_of(merged) - logits_of(DeepSeekForCausalLM.from_pretrained(base))).abs().max() > 0.01
    changed = {
        name for name, value in weights_of(base).items() if not torch.equal(value, weights_of(tmp_path / "out")[name])
    }
    assert header(tmp_path / "out") == header(base) and changed


def test_adapters_on_groups_of_heads_are_merged(adapted, tmp_path):
    model, base, adapter = adapted("tiny_v4", lora_target=["output", "attention", "indexer"])
    export_bundle(base, tmp_path / "out", adapter=adapter)
    merged = DeepSeekForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(logits_of(merged), logits_of(model), "logits")
    assert (logits_of(merged) - logits_of(DeepSeekForCausalLM.from_pretrained(base))).abs().max() > 0.01


@pytest.mark.parametrize("group", ["indexer", "all"])
def test_adapters_on_the_indexer_are_merged(adapted, tmp_path, group):
    model, base, adapter = adapted("tiny_v32", lora_target=[group])
    export_native(base, tmp_path / "out", adapter=adapter)
    merged, before = weights_of(tmp_path / "out"), weights_of(base)
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert {name for name in changed if ".indexer." in name} == {
        f"model.layers.{layer}.self_attn.indexer.{part}.weight"
        for layer in range(3)
        for part in ("wq_b", "wk", "weights_proj")
    }
    assert_close(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model), "logits")


@pytest.mark.parametrize("flags", [{"use_rslora": True}, {"use_dora": True}], ids=lambda flags: next(iter(flags)))
@pytest.mark.parametrize("name", ["tiny_v3", "tiny_llm"])
def test_variants_are_merged_as_peft_does(adapted, tmp_path, name, flags):
    model, base, adapter = adapted(name, lora_target=["attention", "dense"], **flags)
    export_native(base, tmp_path / "out", adapter=adapter)
    merged, by_peft = weights_of(tmp_path / "out"), model.merge_and_unload().state_dict()
    name = "model.layers.1.self_attn.o_proj.weight"
    assert_close(merged[name], by_peft[name], name)
    assert_close(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model), "logits")


def test_ranks_by_pattern(adapted, tmp_path):
    patterns = {"rank_pattern": {"experts.gate_up_proj": 2, "o_proj": 5}, "alpha_pattern": {"experts.down_proj": 9}}
    targets = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model, base, adapter = adapted(config=LoraConfig(task_type="CAUSAL_LM", r=3, **targets, **patterns))
    export_native(base, tmp_path / "out", adapter=adapter)
    assert_close(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model), "logits")
    export_adapter(adapter, tmp_path / "2d")
    expert = "base_model.model.model.layers.1.mlp.experts.4."
    assert header(tmp_path / "2d")[f"{expert}up_proj.lora_A.weight"][1] == (2, 32)
    assert_close(logits_of(with_expert_modules(base, tmp_path / "2d")), logits_of(model), "logits")


def test_an_fp8_base_is_merged_in_full_precision(saved, tmp_path):
    _, folder = saved("tiny_v3")
    export_native(folder, tmp_path / "fp8", dtype="fp8")
    model = DeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    wrapped = shake(apply_lora(model, LoraArguments(use_peft=True, lora_r=3)))
    wrapped.save_pretrained(tmp_path / "adapter")
    export_native(tmp_path / "fp8", tmp_path / "fp32", adapter=tmp_path / "adapter", dtype="fp32")
    assert_close(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "fp32")), logits_of(wrapped), "logits")
    export_native(tmp_path / "fp8", tmp_path / "as-stored", adapter=tmp_path / "adapter")
    kinds = {kind for name, (kind, _) in header(tmp_path / "as-stored").items() if "e_score" not in name}
    assert kinds == {"BF16"}, "rounding to FP8 again would lose what the adapter learned"


def test_a_trained_head_comes_along(adapted, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_b_proj", "o_proj"], r=3, modules_to_save=["score"])
    model, base, adapter = adapted(head=DeepSeekForSequenceClassification, config=config)
    export_native(base, tmp_path / "out", adapter=adapter)
    merged = DeepSeekForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(logits_of(merged), logits_of(model), "logits")


def test_a_head_on_a_language_model(saved, tmp_path):
    """The adapter of a classification task on a causal language model brings the head that its base lacks."""
    _, base = saved("tiny_v3")
    torch.manual_seed(2)
    model = DeepSeekForSequenceClassification.from_pretrained(base, num_labels=4)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["o_proj"], r=3, modules_to_save=["score"])
    wrapped = shake(get_peft_model(model, config))
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.get_base_model().config.save_pretrained(tmp_path / "adapter")
    export_bundle(base, tmp_path / "out", adapter=tmp_path / "adapter")
    merged = DeepSeekForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.num_labels == 4 and "lm_head.weight" not in header(tmp_path / "out")
    assert_close(logits_of(merged), logits_of(wrapped), "logits")


class OneByOne(nn.Module):
    """Experts as modules with official names, as servers hold them."""

    def __init__(self, fused: DeepSeekExperts):
        super().__init__()
        width, hidden = fused.down_proj.shape[2], fused.down_proj.shape[1]
        for expert in range(fused.num_experts):
            module = nn.Module()
            for place, name in enumerate(("gate_proj", "up_proj")):
                linear = nn.Linear(hidden, width, bias=False)
                linear.weight.data = fused.gate_up_proj.data[expert, place * width : (place + 1) * width]
                module.add_module(name, linear)
            module.add_module("down_proj", nn.Linear(width, hidden, bias=False))
            module.down_proj.weight.data = fused.down_proj.data[expert]
            self.add_module(str(expert), module)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for name, expert in self.named_children():
            weight = (top_k_weights * (top_k_index == int(name))).sum(-1, keepdim=True)
            inner = nn.functional.silu(expert.gate_proj(hidden_states)) * expert.up_proj(hidden_states)
            output = output + weight * expert.down_proj(inner)
        return output


def with_expert_modules(base, adapter) -> PeftModel:
    """The base with its experts as modules, and a per-expert adapter on it."""
    model = DeepSeekForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = OneByOne(layer.mlp.experts)
    model.config.model_type = "one_by_one"  # for models with fused experts PEFT fuses adapters, too
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("groups", [["experts"], ["attention", "dense", "shared", "experts"]], ids="+".join)
def test_per_expert_adapters_compute_the_same(adapted, tmp_path, groups):
    model, base, adapter = adapted(lora_target=groups)
    export_adapter(adapter, tmp_path / "out")
    names = header(tmp_path / "out")
    expert = "base_model.model.model.layers.2.mlp.experts.7.down_proj."
    assert names[f"{expert}lora_A.weight"][1] == (3, 20) and names[f"{expert}lora_B.weight"][1] == (32, 3)
    assert all(len(shape) == 2 for _, shape in names.values())
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"] is None
    assert_close(logits_of(with_expert_modules(base, tmp_path / "out")), logits_of(model), "logits")


# Memory -------------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "moe_intermediate_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
WIDE |= {"n_routed_experts": 16, "vocab_size": 4000}
MEASURE = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
from finetune_deepseek.checkpoints.export import export_native
small, base, adapter, out = sys.argv[1:]
export_native(small, out + "-warm", adapter=None)  # imports and buffers of the first time

def now():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

peak, before, going = now(), now(), True

def watch():
    global peak
    while going:
        peak = max(peak, now())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
export_native(base, out, adapter=adapter, max_shard_size="8MB")
going = False
thread.join()
print(json.dumps(peak - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_merging_holds_at_most_three_shards(saved, tmp_path):
    small = saved("tiny_v3")[1]
    small.rename(tmp_path / "small")
    model, base = saved("tiny_v3", **WIDE)
    model.save_pretrained(base, max_shard_size="8MB")
    wrapped = apply_lora(model, LoraArguments(use_peft=True, lora_r=1, lora_target=["attention", "experts"]))
    shake(wrapped).save_pretrained(tmp_path / "adapter")
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", base, tmp_path / "adapter", tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert total > 20 * largest * 0.8, "the model is large against a shard"
    assert json.loads(child.stdout.splitlines()[-1]) <= 3 * largest
    assert_close(logits_of(DeepSeekForCausalLM.from_pretrained(tmp_path / "out")), logits_of(wrapped.eval()), "logits")


@pytest.mark.parametrize("tied", [False, True])
def test_single_trained_tokens_are_merged(saved, tmp_path, tied):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=3,
                        trainable_token_indices={"embed_tokens": [3, 10, 17]})  # fmt: skip
    _, base = saved("tiny_v3", tie_word_embeddings=tied)
    model, adapter = shake(get_peft_model(DeepSeekForCausalLM.from_pretrained(base), config)), tmp_path / "adapter"
    assert model.config.tie_word_embeddings == tied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(adapter)
    export_native(base, tmp_path / "out", adapter=adapter)
    before, merged = (DeepSeekForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert_close(logits_of(merged), logits_of(model), "logits")
    changed = (merged.model.embed_tokens.weight != before.model.embed_tokens.weight).any(1).nonzero()[:, 0]
    assert changed.tolist() == [3, 10, 17]


@pytest.mark.parametrize("is_trained", [True, False])
def test_resized_embeddings_are_merged(saved, tmp_path, is_trained):
    """Whether they were trained or only saved, as PEFT does by itself."""
    _, base = saved("tiny_v3")
    torch.manual_seed(3)
    model = DeepSeekForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCAB_SIZE + 7)
    whole = ["embed_tokens", "lm_head"]
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj"], r=3, modules_to_save=whole if is_trained else None
    )
    wrapped = shake(get_peft_model(model, config))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    export_native(base, tmp_path / "out", adapter=tmp_path / "adapter")
    merged = DeepSeekForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == VOCAB_SIZE + 7
    assert_close(logits_of(merged), logits_of(wrapped), "logits")


def test_resized_embeddings_without_their_head_are_refused(saved, tmp_path):
    _, base = saved("tiny_v3")
    model = DeepSeekForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCAB_SIZE + 7)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=3, modules_to_save=["embed_tokens"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="embeddings have 337 tokens, the base 330, and the adapter brings no head"):
        export_native(base, tmp_path / "out", adapter=tmp_path / "adapter")
