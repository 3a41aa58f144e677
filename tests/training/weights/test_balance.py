"""The router biases that are moved towards an equal load: by hand, over micro-batches and processes, resumed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.training.weights.balance import BalanceExperts
from modeling_deepseek import DeepSeekForCausalLM
from tests.modeling.conftest import tiny, token_ids
from tests.modeling.test_dspark import model_of
from tests.small_runs import TINY, flags, write_jsonl

STEP = SimpleNamespace(world_size=1)
BIAS = "e_score_correction_bias"


def biases(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith(BIAS)]


def test_busy_experts_go_down_by_hand():
    model = tiny("tiny_v3").train()
    before, ids = biases(model), token_ids(2, 9)
    balance = BalanceExperts(model, 0.01)
    padded = torch.cat([ids, torch.full((2, 3), model.config.pad_token_id)], dim=1)
    with torch.no_grad():
        logits = model(padded, output_router_logits=True).router_logits
        model.eval()(padded)  # isn't counted
    balance.on_step_end(STEP, None, None)
    loads = []
    for found, old, logit in zip(biases(model), before, logits, strict=True):
        scores = logit.sigmoid().view(2, 12, 8)[:, :9].flatten(0, 1) + old
        groups = scores.view(-1, 4, 2).sum(-1).topk(2).indices  # of two experts each, ranked by both
        allowed = torch.zeros_like(scores, dtype=torch.bool).view(-1, 4, 2)
        allowed[torch.arange(18)[:, None], groups] = True
        chosen = scores.masked_fill(~allowed.view(-1, 8), -9).topk(3).indices
        counts = torch.bincount(chosen.flatten(), minlength=8).float()
        assert counts.sum() == 54
        torch.testing.assert_close(found, old + 0.01 * torch.sign(54 / 8 - counts))
        loads.append(counts.max().item() / (54 / 8) - 1)
    assert balance.max_violation.item() == pytest.approx(sum(loads) / len(loads))


def test_images_move_a_bias_of_their_own():
    model = tiny("tiny_v4.1").train()
    balance, image = BalanceExperts(model, 0.01), model.config.image_token_id
    router = model.model.layers[0].mlp.gate
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    ids = torch.cat([token_ids(2, 7) % 90 + 3, torch.full((2, 3), image), torch.full((2, 2), 2)], dim=1)
    chosen = []
    router.register_forward_hook(lambda module, args, outputs: chosen.append(outputs[2]))
    model(ids)
    balance.on_step_end(STEP, None, None)
    for name, tokens in ((BIAS, slice(0, 7)), (f"{BIAS}_vl", slice(7, 10))):
        counts = torch.bincount(chosen[0].view(2, 12, 3)[:, tokens].flatten(), minlength=8).float()
        moved = before[name] + 0.01 * torch.sign(counts.mean() - counts)
        torch.testing.assert_close(router.get_buffer(name), moved)
    texts = {name: buffer.clone() for name, buffer in router.named_buffers()}
    model(inputs_embeds=torch.randn(2, 5, 32))  # no ids: all of it is text
    balance.on_step_end(STEP, None, None)
    assert torch.equal(router.get_buffer(f"{BIAS}_vl"), texts[f"{BIAS}_vl"])
    assert not torch.equal(router.get_buffer(BIAS), texts[BIAS])


def test_draft_stages_have_experts_of_their_own_number_and_tokens_of_their_own():
    """Two blocks of three drafts in each row of six: as many as the row's tokens, of which some are padding."""
    model, pad = model_of("V4.1", pad_token_id=2).train(), 2
    balance, stage = BalanceExperts(model, 0.01), model.model.draft_stages[1].mlp.gate
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    ids = token_ids(2, 6) % 50 + 3
    ids[:, 4:], chosen = pad, []
    ids[0, 1] = model.config.image_token_id
    stage.register_forward_hook(lambda module, args, outputs: chosen.append(outputs[2]))
    model(ids, labels=ids, use_cache=False)
    assert chosen[0].shape == (2 * 2 * 3, 3)
    balance.on_step_end(STEP, None, None)
    counts = torch.bincount(chosen[0].flatten(), minlength=6).float()
    torch.testing.assert_close(stage.get_buffer(BIAS), before[BIAS] + 0.01 * torch.sign(counts.mean() - counts))
    assert torch.equal(stage.get_buffer(f"{BIAS}_vl"), before[f"{BIAS}_vl"])


def test_micro_batches_count_as_one_step():
    found = []
    for sizes in ((4,), (1, 3)):
        model = tiny("tiny_v3").train()
        balance = BalanceExperts(model, 0.1)
        for part in token_ids(4, 9).split(sizes):
            model(part)
        balance.on_step_end(STEP, None, None)
        balance.on_step_end(STEP, None, None)  # a step without tokens moves nothing
        found.append(biases(model))
    assert all(map(torch.equal, *found))


def run(folder, data, **settings):
    argv = flags(TINY | data | {"output_dir": folder, "router_bias_update": 0.01, "do_train": True} | settings)
    assert guarded(["translation", *argv]) == 0
    return {name: w for name, w in load_file(folder / "model.safetensors").items() if name.endswith(BIAS)}


def test_a_run_moves_and_keeps_them(data, tmp_path):
    whole = run(tmp_path / "whole", data, max_steps=4, save_steps=2)
    assert len(whole) == 2
    for bias in whole.values():  # multiples of the update, of float32
        assert bias.dtype == torch.float32 and bias.any() and bias.abs().max() <= 0.04001
    resumed = run(
        tmp_path / "again", data, max_steps=4, save_steps=2, resume_from_checkpoint=tmp_path / "whole/checkpoint-2"
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    history = json.loads((tmp_path / "whole/trainer_state.json").read_text())["log_history"]
    assert history[0]["expert_max_violation"] > 0
    model = DeepSeekForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(*pair) for pair in zip(biases(model), whole.values(), strict=True))
    assert "router bias update 0.01" in (tmp_path / "whole/README.md").read_text()


def test_two_processes_move_them_as_one(tmp_path):
    """Each step is all four rows, and the learning rate leaves the weights about as they are."""
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [("one", "eins"), ("two birds", "zwei"), ("three", "drei"), ("4", "vier")]
    )
    data = {"train_file": rows}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 9, "save_strategy": "no",
                "learning_rate": 1e-9, "train_sampling_strategy": "random"}  # fmt: skip
    alone = run(tmp_path / "one", data, **settings | {"gradient_accumulation_steps": 2})
    argv = flags(TINY | data | settings | {
        "output_dir": tmp_path / "two", "router_bias_update": 0.01, "do_train": True, "ddp_backend": "gloo"
    })  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "finetune_deepseek", "finetune", "translation", *argv],
        capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    both = load_file(tmp_path / "two/model.safetensors")
    for name, bias in alone.items():
        assert bias.any() and torch.equal(both[name], bias)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "tiny_v2"}, "no router of this model has a bias that chooses"),
        ({"use_peft": True}, "--router_bias_update can't be used with --use_peft"),
        ({"router_bias_update": -1}, "--router_bias_update -1: it must be 0 or more"),
    ],
)
def test_what_has_no_biases_is_refused(settings, says, data, tmp_path, capsys):
    argv = flags(TINY | data | {"output_dir": tmp_path / "out", "router_bias_update": 0.01} | settings)
    assert guarded(["translation", *argv]) == 2
    assert says in capsys.readouterr().err
