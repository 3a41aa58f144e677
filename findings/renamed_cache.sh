#!/usr/bin/env bash
# transformers 5.24.0: a model of one's own whose forward takes `past_key_values` and **kwargs, as 5.23.0 called it,
# generates as if nothing stood before the last token.
#
# Expected: what it generates without a cache, or an error.
# Seen: other tokens, and a warning of deprecation at most: generate hands the cache over as `cache`, which **kwargs
# takes and the forward never reads, while the input is cut to the last token.
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
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Config(PreTrainedConfig):
    model_type = "summing"
    vocab_size: int = 7
    num_hidden_layers: int = 1


class Summing(PreTrainedModel, GenerationMixin):
    """The next token is the sum of all before it, modulo 7; the cache holds them."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        tokens = input_ids[:, None, :, None].float()
        if past_key_values is not None:
            tokens, _ = past_key_values.update(tokens, tokens, 0)
        total = tokens.sum((1, 2, 3)).long() % 7
        logits = nn.functional.one_hot(total, 7).float()[:, None] + self.weight
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


model = Summing(Config(bos_token_id=None, eos_token_id=None, pad_token_id=0))
prompt, settings = torch.tensor([[1, 2]]), {"max_new_tokens": 4, "do_sample": False}
expected = model.generate(prompt, use_cache=False, **settings).tolist()
seen = model.generate(prompt, **settings).tolist()
assert expected == [[1, 2, 3, 6, 5, 3]]  # 1 + 2, then + 3, + 6, + 5
print(f"transformers {transformers.__version__}: expected {expected}; seen {seen}")
sys.exit(seen != [[1, 2, 3, 3, 3, 3]])
PYTHON
