"""Batches by tokens, training by time, the mean of the last checkpoints, and the head on targets only."""

import itertools
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Seq2SeqTrainingArguments, TrainerState

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.training import callbacks
from finetune_deepseek.training.batches import TokenBatchSampler
from finetune_deepseek.training.callbacks import TimeLimitCallback
from finetune_deepseek.training.optimization import follow_the_clock
from finetune_deepseek.training.weights.averaging import expected_checkpoints
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import TINY, flags, write_jsonl

LENGTHS = [random.Random(1).randint(1, 40) for _ in range(500)]


def one_text(lengths):
    return [[(1, length)] for length in lengths]


SENTENCES = [(" ".join(["bird"] * n), " ".join(["Vogel"] * n)) for n in range(1, 13)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_their_tokens_and_every_row_once(world_size):
    epochs = []
    for epoch in range(2):
        samplers = [TokenBatchSampler(one_text(LENGTHS), 200, 7, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        by_rank = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in by_rank} == {len(samplers[0])}
        batches = [batch for batches in by_rank for batch in batches]
        rows = [row for batch in batches for row in batch]
        assert len(rows) == len(set(rows))
        assert len(batches) == samplers[0].count // world_size * world_size
        assert world_size > 1 or sorted(rows) == list(range(500))
        assert all(len(batch) * max(LENGTHS[row] for row in batch) <= 200 for batch in batches)
        padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
        assert padded < 1.03 * sum(LENGTHS[row] for row in rows)
        epochs.append(batches)
    assert epochs[0] != epochs[1] and len(epochs[0]) == len(epochs[1])


def test_a_row_over_the_budget_is_a_batch_of_its_own():
    batches = sorted(TokenBatchSampler(one_text([9, 2, 2, 2]), 4, 0), key=len)
    assert sorted(map(len, batches)) == [1, 1, 2] and [0] in batches
    with pytest.raises(ValueError, match="--tokens_per_batch 100: all rows fit in 1 batches"):
        TokenBatchSampler(one_text([9, 2]), 100, 0, world_size=2)


def test_a_run_by_tokens_resumes_where_it_stopped(finetune, tmp_path, capsys):
    path = str(write_jsonl(tmp_path / "rows.jsonl", SENTENCES))
    settings = {"train_file": path, "do_train": True, "tokens_per_batch": 60, "max_steps": 8, "save_steps": 3}
    results = finetune(output_dir=tmp_path / "whole", save_total_limit=5, **settings)
    assert "up to 60 tokens per step" in capsys.readouterr().out
    assert 0 < results["train_tokens_per_second"] * results["train_runtime"] <= 8 * 60
    finetune(output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3", **settings)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_schedule_runs_by_time():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: min(step / 10, (1000 - step) / 1000))
    clock = SimpleNamespace(share=0.0)
    follow_the_clock(scheduler, clock, num_training_steps=1000, warmup_steps=10)
    rates = {}
    for step in range(1, 15):
        clock.share = max(0.0, (step - 9) / 5)
        scheduler.step()
        rates[step] = scheduler.get_last_lr()[0]
    assert rates[5] == 0.5 and rates[10] == pytest.approx(0.8) and rates[12] == pytest.approx(0.4) and rates[14] == 0
    with pytest.raises(ValueError, match="--train_minutes: this --lr_scheduler_type"):
        follow_the_clock(ReduceLROnPlateau(optimizer), clock, 10, 0)


def test_training_ends_with_the_time(finetune, data, tmp_path, monkeypatch):
    ticks = itertools.count()  # a clock by which each look takes a tenth of a second
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    settings = {"do_train": True, "train_minutes": 0.05, "warmup_steps": 2, "lr_scheduler_type": "linear", **data}
    finetune(output_dir=tmp_path, **settings)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert 10 <= len(rates) <= 31  # of 3 seconds; a step looks once, saving and the like too
    assert max(rates) == pytest.approx(0.01, rel=0.2) and rates[-1] < 0.2 * max(rates)


@pytest.mark.slow
def test_two_processes_end_with_the_first_ones_time(data, tmp_path):
    """They take the same number of steps, whatever their own clocks say; else the slower one would wait forever.

    One of them saves, at every step here, so that a second writer of the same folder would be met.
    """
    settings = TINY | data | {
        "output_dir": tmp_path / "out", "do_train": True, "train_minutes": 0.1, "tokens_per_batch": 16,
        "lr_scheduler_type": "linear", "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 1,
        "average_checkpoints": 2, "overwrite_output_dir": True, "optim": "muon",
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "finetune_deepseek", "finetune", "translation", *flags(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] > 1 and (tmp_path / "out/model.safetensors").is_file()
    assert done.stdout.count("the model is the mean of 2 checkpoints") == 1


def test_a_resumed_clock_goes_on():
    clock = TimeLimitCallback(minutes=1.0)
    clock.elapsed = 30.0
    resumed = TimeLimitCallback.from_state(clock.state())
    assert 0.5 <= resumed.share < 0.6
    control = SimpleNamespace(should_training_stop=False)
    resumed.on_step_end(SimpleNamespace(world_size=1), None, control)  # type: ignore[arg-type]
    assert not control.should_training_stop
    fresh = TimeLimitCallback(minutes=1.0)  # what a run makes that goes on from a checkpoint with that state
    for step, share in ((0, 0.0), (3, 0.5)):
        fresh.on_train_begin(None, TrainerState(global_step=step, stateful_callbacks=[clock]), control)  # type: ignore[arg-type]
        assert share <= fresh.share < share + 0.1
    resumed.elapsed = 60.0
    resumed.on_step_end(SimpleNamespace(world_size=1), None, control)  # type: ignore[arg-type]
    assert control.should_training_stop


def test_the_mean_of_the_last_checkpoints(finetune, data, tmp_path):
    settings = {"do_train": True, "do_predict": True, "max_steps": 6, "save_steps": 1, "average_checkpoints": 3}
    finetune(output_dir=tmp_path, **settings, **data)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (4, 5, 6)]
    parts = [DeepSeekForCausalLM.from_pretrained(path).state_dict() for path in tmp_path.glob("checkpoint-*")]
    found = DeepSeekForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3)
    assert not torch.equal(found["lm_head.weight"], parts[0]["lm_head.weight"])


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"save_strategy": "steps", "save_steps": 3}, 0, 4),  # 3, 6, 9 and the last, 10
        ({"save_strategy": "steps", "save_steps": 5}, 0, 2),
        ({"save_strategy": "steps", "save_steps": 0.5}, 0, 2),  # a share of all steps
        ({"save_strategy": "steps", "save_steps": 500}, 0, 1),
        ({"save_strategy": "steps", "save_steps": 3}, 6, 2),  # resumed
        ({"save_strategy": "epoch"}, 0, 5),
        ({"save_strategy": "epoch"}, 4, 3),
        ({"save_strategy": "no"}, 0, 0),
        ({"save_strategy": "best"}, 0, None),
    ],
)
def test_checkpoints_are_counted_before_they_are_saved(settings, step, expected, tmp_path):
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    state = TrainerState(max_steps=10, num_train_epochs=5, global_step=step)
    state.compute_steps(args, 10)
    assert expected_checkpoints(args, state) == expected


def test_fewer_checkpoints_than_time_allowed_are_averaged_all_the_same(finetune, data, tmp_path):
    settings = {"train_minutes": 1e-6, "save_steps": 1, "average_checkpoints": 3, "do_train": True}
    results = finetune(output_dir=tmp_path, **settings, **data)
    assert results["averaged_checkpoints"] == 1
    found, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "checkpoint-1"))
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_a_training_step_computes_logits_of_targets_only(finetune, data, tmp_path, monkeypatch):
    shapes = []
    forward = torch.nn.Linear.forward

    def spy(self, x):
        if self.out_features >= 260:
            shapes.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    for direction in ("causal", "prefix"):
        shapes.clear()
        overrides = f"attention_direction={direction}"
        settings = {"config_overrides": overrides, "do_train": True, "max_steps": 1, "label_smoothing_factor": 0.1}
        finetune(output_dir=tmp_path / direction, **settings, **data)
        (shape,) = shapes
        assert shape[0] == 1 and shape[1] < 40  # [1, N, D], the targets of three rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_minutes": 1, "max_steps": 4}, "--train_minutes and --max_steps both say when to stop"),
        ({"train_minutes": 0}, "--train_minutes 0: it must be above 0"),
        ({"tokens_per_batch": -5}, "--tokens_per_batch -5: it must be 1 or more"),
        (
            {"average_checkpoints": 2, "load_best_model_at_end": True, "eval_strategy": "steps"},
            "--average_checkpoints takes the last ones, not the best",
        ),
        ({"average_checkpoints": 2, "use_peft": True}, "--average_checkpoints can't be used with --use_peft"),
        (
            {"average_checkpoints": 3, "max_steps": 2, "save_steps": 1},
            "this run will have saved 2; lower --save_steps",
        ),
        ({"generation_length_penalty": 2.0}, "--generation_length_penalty has no effect without beams"),
    ],
    ids=str,
)
def test_bad_values_are_one_line(settings, message, data, tmp_path, capsys):
    argv = flags(TINY | {"output_dir": tmp_path / "out", "do_train": True} | data | settings)
    assert guarded(["translation", *argv]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("deepseek-hf: error: ") and message in error
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_two_towers_of_one_length_make_the_same_batches_in_every_epoch_and_process():
    """Rows of as many tokens with other shares of query and passage fit together or not: none may be lost for that."""
    draw = random.Random(2)
    sizes = [[(1, query), (1, 20 - query)] for query in (draw.randint(1, 19) for _ in range(60))]
    sizes += [[(1, 5), (3, 7)], [(1, 20), (3, 2)], [(1, 1), (1, 25)]]
    kinds = []
    for epoch in range(4):
        samplers = [TokenBatchSampler(sizes, 90, 7, rank, 2) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        by_rank = [list(sampler) for sampler in samplers]
        assert [len(batches) for batches in by_rank] == [samplers[0].count // 2] * 2
        alone = TokenBatchSampler(sizes, 90, 7)
        alone.set_epoch(epoch)
        batches = list(alone)
        assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
        kinds.append(sorted(sorted(tuple(sizes[row]) for row in batch) for batch in batches))
    assert all(found == kinds[0] for found in kinds)
