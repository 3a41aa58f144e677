"""What no loss reaches is frozen when training begins, so that several processes don't wait for its gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from configuration_deepseek.presets import PRESETS, preset
from finetune_deepseek.training.weights.freezing import freeze_unreached, unreached_groups
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import TINY, flags

TINY_PRESETS = [name for name in PRESETS if name.startswith("tiny_")]
AHEAD = {"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.0}
MODELS = [(name, {}) for name in TINY_PRESETS] + [("tiny_v32", AHEAD), ("tiny_v3", AHEAD | {"mtp_loss_weight": 0.1})]


def made(name, fields, is_lora):
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(preset(name, vocab_size=64, **fields)).train()
    if is_lora:
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        return get_peft_model(model, config)
    return model


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize(("name", "fields"), MODELS)
def test_what_is_frozen_is_what_gets_no_gradient(name, fields, is_lora):
    model = made(name, fields, is_lora)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(3, 64, (4, 31))
    model(input_ids=ids, labels=ids).loss.backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    freeze_unreached(model)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == reached
    assert bool(trainable - reached) == bool(unreached_groups(model))


def test_nothing_left_to_train_is_an_error():
    model = get_peft_model(made("tiny_v32", {}, False), LoraConfig(target_modules=["wq_b", "wk"], r=2))
    with pytest.raises(ValueError, match="No loss reaches indexer, and nothing else would be trained"):
        freeze_unreached(model)


def test_the_census_says_so(finetune, data, tmp_path, capsys):
    finetune(output_dir=tmp_path, max_steps=1, do_train=True, **data | {"preset": "tiny_v32"})
    lines = capsys.readouterr().out.splitlines()
    assert {"trained weights: all, without indexer", "frozen: indexer, which no loss reaches"} <= set(lines)
    row = next(line.split() for line in lines if line.startswith("indexer"))
    assert int(row[1].replace(",", "")) > 0 and row[3] == "0"


RUNS = """
import json, sys
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.translation.task import Translation
for argv in json.loads(sys.argv[1]):
    run_stages(Translation, parse_command("translation", Translation.arguments_class, argv))
    print("DONE", argv[-1], flush=True)
"""


@pytest.mark.slow
def test_two_processes_with_and_without_checkpointing_train_every_preset(data, tmp_path):
    runs = []
    for name, fields in MODELS:
        some = name == "tiny_v32" and not fields  # without checkpointing, and with LoRA
        for checkpointing, is_lora in ((True, False), *(((False, False), (True, True)) if some else ())):
            overrides = ",".join(f"{key}={value}" for key, value in fields.items()) or None
            settings = TINY | data | {
                "preset": name, "config_overrides": overrides, "gradient_checkpointing": checkpointing,
                "do_train": True, "max_steps": 2, "save_strategy": "no", "ddp_backend": "gloo", "report_to": "none",
                "use_peft": is_lora, "lora_target": ["all"] if is_lora else None, "data_checks": "off",
            }  # fmt: skip
            runs.append([*flags(settings), f"--output_dir={tmp_path / str(len(runs))}"])
    (tmp_path / "runs.py").write_text(RUNS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "runs.py"), json.dumps(runs)],
        capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("DONE") == 2 * len(runs)
