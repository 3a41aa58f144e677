#!/usr/bin/env bash
# transformers 5.24.0, stock DeepseekV3ForCausalLM: a run that Trainer resumes keeps random weights in its experts.
#
# Expected: a fresh model, resumed from a checkpoint without a further step, is the model that was saved, as
# from_pretrained gives it.
# Seen: the fused experts keep their fresh random weights, without an error; all other weights are restored.
# save_pretrained writes one tensor per expert, and Trainer._load_from_checkpoint reads the file without the conversion
# that from_pretrained does. load_best_model_at_end goes the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${PIP_ARGS:-} transformers==5.24.0 torch==2.13.0 accelerate==1.15.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments

config = DeepseekV3Config(
    vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)
rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4


def train(seed, **settings):
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config)
    arguments = TrainingArguments("out", max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train(**settings)
    return model.state_dict()


saved = train(0)
resumed = train(1, resume_from_checkpoint="out/checkpoint-2")
loaded = DeepseekV3ForCausalLM.from_pretrained("out/checkpoint-2").state_dict()
lost = {name for name, weight in resumed.items() if not torch.equal(weight, saved[name])}
assert all(torch.equal(weight, saved[name]) for name, weight in loaded.items()), "from_pretrained differs too"
print(f"transformers {transformers.__version__}: expected no weight that differs; seen {sorted(lost) or 'none'}")
experts = {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
sys.exit(lost != experts)
PYTHON
