#!/usr/bin/env bash
# transformers 5.24.0: speculation by prompt lookup on a static cache ends in an IndexError.
#
# Expected: the same tokens as without speculation, which the dynamic cache gives, or a refusal (5.23.0 refuses).
# Seen: for some prompts "index_copy_(): index 19 is out of bounds for dimension 2 with size 19": the cache has room for
# the tokens that are asked for, and not for the candidates that are checked beyond the last of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${PIP_ARGS:-} transformers==5.24.0 torch==2.13.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=2,
)
seen = []
for seed in range(6):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.disable_compile = True
    prompt = torch.randint(3, 97, (1, 6)).repeat(1, 2)
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(prompt, **settings)
    assert torch.equal(plain, model.generate(prompt, cache_implementation="static", **settings))
    assert torch.equal(plain, model.generate(prompt, prompt_lookup_num_tokens=2, **settings))
    try:
        found = model.generate(prompt, prompt_lookup_num_tokens=2, cache_implementation="static", **settings)
        seen.append("the same" if torch.equal(found, plain) else "other tokens")
    except Exception as error:
        seen.append(f"{type(error).__name__}: {error}")
print(f"transformers {transformers.__version__}: expected the same tokens for six prompts; seen", *seen, sep="\n  ")
sys.exit(not any(text.startswith("IndexError: index_copy_()") for text in seen))
PYTHON
