"""Folders that an earlier commit saved: the package opens them, and `export --to bundle` renews their code.

Their own frozen code does not read the cache of transformers 5.24 on, and only a rewrite can mend that.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HEADS = {
    "DeepSeekForCausalLM": {},
    "DeepSeekForSequenceClassification": {},
    "DeepSeekForQuestionAnswering": {"type_vocab_size": 2},
    "DeepSeekForEmbedding": {"attention_direction": "bidirectional"},
    "DeepSeekForRecommendation": {},
}


def outputs(model):
    """All tensors that the model gives for two rows, concatenated."""
    import torch

    with torch.no_grad():
        result = model.eval()(input_ids=torch.arange(3, 25).reshape(2, 11), use_cache=False)
    return torch.cat([value.flatten() for value in result.to_tuple() if torch.is_tensor(value)]).tolist()


def save_by(code, folder):
    """Save each class by the packages in the folder `code`; what they compute."""
    import sys

    sys.path.insert(0, code)
    import torch

    import modeling_deepseek
    from configuration_deepseek import preset

    assert Path(modeling_deepseek.__file__).is_relative_to(code)
    results = {}
    for head, fields in HEADS.items():
        torch.manual_seed(0)
        model = getattr(modeling_deepseek, head)(preset("tiny_v3", initializer_range=0.2, **fields))
        model.save_pretrained(f"{folder}/{head}")
        results[head] = outputs(model)
    return results


def open_old(folder):
    """Open each folder by the package; also what a language model generates; the command writes it anew."""
    import sys

    import torch

    import modeling_deepseek
    from finetune_deepseek.__main__ import main

    results = {head: outputs(getattr(modeling_deepseek, head).from_pretrained(f"{folder}/{head}")) for head in HEADS}
    model = modeling_deepseek.DeepSeekForCausalLM.from_pretrained(f"{folder}/DeepSeekForCausalLM")
    generated = model.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False).tolist()
    sys.argv = ["deepseek-hf", "export", f"{folder}/DeepSeekForCausalLM", f"{folder}/again", "--to", "bundle"]
    main()
    return {"outputs": results, "generated": generated}


def generate_as_a_stranger(folder):
    """What the rewritten folder generates without the package."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/again", trust_remote_code=True)
    return model.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False).tolist()


def test_folders_of_earlier_code_open_and_are_renewed(earlier_code, run_client, run_stranger, tmp_path):
    expected = run_client(save_by, str(earlier_code), str(tmp_path))
    ours = run_client(open_old, str(tmp_path))
    for head in HEADS:
        assert ours["outputs"][head] == pytest.approx(expected[head], abs=1e-6), head
    assert "transformers_names.py" not in {path.name for path in (tmp_path / "DeepSeekForCausalLM").iterdir()}
    assert "transformers_names.py" in {path.name for path in (tmp_path / "again").iterdir()}
    assert run_stranger(generate_as_a_stranger, str(tmp_path)) == ours["generated"]
