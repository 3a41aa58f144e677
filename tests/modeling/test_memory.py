"""How much memory loading takes, in a process of its own: at most 1.25 times the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import to_official
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.quantization import quantize_blocks

LIMIT = 1.25
# 400 million parameters in V3's shape
SHAPE_400M = {
    **{"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12},
    **{"num_attention_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    **{"qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 32, "moe_intermediate_size": 256},
    **{"num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}
CHILD = """
import os, sys
import torch
from modeling_deepseek import DeepSeekForCausalLM

def resident(word):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(word))

torch.ones(8, 8) @ torch.ones(8, 8)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
model = DeepSeekForCausalLM.from_pretrained(sys.argv[1])
peak = resident("VmHWM") - before
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(peak / size, size, sep=",")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("form", ["float32", "fp8 to bfloat16"])
def test_loading_400m_takes_at_most_1_25_times_the_model(form, tmp_path):
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(DeepSeekConfig(**SHAPE_400M))
    model.save_pretrained(tmp_path, max_shard_size="400MB")
    fields = to_official(model.config.to_dict()) | {"torch_dtype": "float32"}
    del model
    if form != "float32":
        for file in tmp_path.glob("model-*.safetensors"):
            stored = load_file(file)
            for key in [key for key in stored if "_proj" in key]:
                stored[key], stored[f"{key}_scale_inv"] = quantize_blocks(stored[key], [128, 128])
            save_file(stored, file, {"format": "pt"})
        fields |= {"torch_dtype": "bfloat16"}
        fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    ratio, size = child.stdout.split(",")
    assert int(float(size)) > 700e6
    assert "Loading weights: 100%" in child.stderr, "progress is shown"
    print(f"{form}: peak {float(ratio):.3f} of the model")
    assert float(ratio) <= LIMIT
