"""A run that is killed in its second epoch and resumed ends with the bytes of one that was not."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from finetune_deepseek.classification.task import Classification
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.training import trainer as trainer_module
from finetune_deepseek.training.batches import RowSampler, TokenBatchSampler
from finetune_deepseek.training.callbacks import EpochCallback
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.translation.task import Translation
from tests.small_runs import TINY, flags, write_jsonl

SENTENCES = [(" ".join(["bird"] * n), " ".join(["Vogel"] * n)) for n in (1, 5, 2, 4, 3, 2, 1)]
SMALL = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "save_steps": 1,
    "save_total_limit": 20,
    "do_train": True,
}
OTHER_TASK = {"target_lang": None, "max_target_length": None}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model for adapters to stand on."""
    folder = tmp_path_factory.mktemp("base")
    path = write_jsonl(folder / "rows.jsonl", SENTENCES)
    run(Translation, folder / "model", TINY | {"train_file": path, "do_train": True, "max_steps": 1})
    return folder / "model"


def run(task, folder, settings):
    argv = flags(settings | {"output_dir": folder})
    return run_stages(task, parse_command(task.name, task.arguments_class, argv))


def ends_alike(task, settings, tmp_path, monkeypatch, step, name="model.safetensors"):
    """Killed in the step after `step`, whose checkpoint is the last."""
    run(task, tmp_path / "whole", settings)
    original = trainer_module.FinetuneTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.FinetuneTrainer, "training_step", dying)
    with pytest.raises(Killed):
        run(task, tmp_path / "killed", settings)
    monkeypatch.setattr(trainer_module.FinetuneTrainer, "training_step", original)
    run(task, tmp_path / "killed", settings | {"resume_from_checkpoint": "true"})
    whole, resumed = ((tmp_path / run_name / name).read_bytes() for run_name in ("whole", "killed"))
    return whole == resumed


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, 6),  # of 4, 4, 4 steps
        ({"hidden_dropout": 0.2, "attention_dropout": 0.1}, 5),
        ({"optim": "muon"}, 7),
        ({"gradient_accumulation_steps": 2, "hidden_dropout": 0.1}, 3),  # of 2, 2, 2 steps
        ({"tokens_per_batch": 24, "per_device_train_batch_size": None}, None),
        ({"train_sampling_strategy": "random", "dataloader_num_workers": 1}, 6),
        ({"eval_strategy": "epoch", "hidden_dropout": 0.1, "load_best_model_at_end": False}, 4),  # at an epoch's end
    ],
    ids=["full", "dropout", "muon", "accumulation", "tokens", "random", "evaluated"],
)
def test_a_full_model(settings, step, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", SENTENCES)
    settings = TINY | SMALL | {"train_file": path, "validation_file": path} | settings
    assert ends_alike(Translation, settings, tmp_path, monkeypatch, step or 5)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_an_adapter(optim, base, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", SENTENCES)
    adapter = {
        "preset": None,
        "vocab_size": None,
        "model_name_or_path": base,
        "use_peft": True,
        "lora_target": ["all"],
    }
    settings = TINY | SMALL | adapter | {"train_file": path, "optim": optim, "hidden_dropout": 0.1}
    assert ends_alike(Translation, settings, tmp_path, monkeypatch, 6, "adapter_model.safetensors")


def test_balanced_classes(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{'ab'[n > 4]}\n" for n in range(7)))
    settings = TINY | OTHER_TASK | SMALL | {"train_file": tmp_path / "rows.csv", "balance": "sampler"}
    assert ends_alike(Classification, settings, tmp_path, monkeypatch, 6)


def test_item_dropout(tmp_path, monkeypatch):
    lines = [f"u{user},i{(user + step) % 9},{step}" for user in range(7) for step in range(6)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    settings = TINY | OTHER_TASK | SMALL | {"vocab_size": None, "interactions_file": tmp_path / "events.csv"}
    assert ends_alike(Recommendation, settings | {"item_dropout": 0.5}, tmp_path, monkeypatch, 6)


def test_an_order_is_that_of_its_seed_and_epoch():
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            samplers = RowSampler(40, seed), RowSampler(40, seed, lengths=list(range(40)), group=4)
            for sampler in samplers:
                sampler.set_epoch(epoch)
                assert sorted(sampler) == list(range(40))
            orders |= {tuple(sampler) for sampler in samplers}
    assert len(orders) == 18  # seed 0 in epoch 1 is not seed 1 in epoch 0


@pytest.mark.parametrize(("data_seed", "found"), [(0, 0), (None, 5)])
def test_data_seed_0_is_a_seed(data_seed, found, tmp_path, monkeypatch):
    seeds, original = [], RowSampler.__iter__
    monkeypatch.setattr(RowSampler, "__iter__", lambda self: seeds.append(self.seed) or original(self))
    path = write_jsonl(tmp_path / "rows.jsonl", SENTENCES)
    settings = TINY | SMALL | {"train_file": path, "data_seed": data_seed, "seed": 5, "max_steps": 1}
    run(Translation, tmp_path / "out", settings)
    assert set(seeds) == {found}


def test_tokens_of_two_towers_are_counted():
    """Queries and passages are padded apart, and a row brings its negatives."""
    sizes = [[(1, 3), (3, 10)], [(1, 8), (1, 9)], [(1, 2), (1, 2)], [(1, 2), (1, 2)], [(1, 40), (2, 30)]]
    batches = list(TokenBatchSampler(sizes, 64, 0))
    assert sorted(row for batch in batches for row in batch) == list(range(5))
    for batch in batches:
        parts = list(zip(*(sizes[row] for row in batch), strict=True))
        tokens = sum(sum(count for count, _ in part) * max(length for _, length in part) for part in parts)
        assert tokens <= 64 or len(batch) == 1
    assert [4] in batches and any(len(batch) > 1 for batch in batches)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_epoch_of_two_processes_has_its_own_order(rank):
    """The loader that skips batches is another, and hands the epoch on to no sampler that processes share."""

    def epoch_of(skipped):
        sampler = RowSampler(24, seed=3)
        loader = prepare_data_loader(
            DataLoader(list(range(24)), batch_size=3, sampler=sampler),
            num_processes=2, process_index=rank, put_on_device=False,
        )  # fmt: skip
        if skipped:
            loader = skip_first_batches(loader, skipped)
        EpochCallback(sampler, object()).on_epoch_begin(None, SimpleNamespace(epoch=1.25), None)  # type: ignore[arg-type]
        loader.set_epoch(1)
        return [batch.tolist() for batch in loader]

    whole = epoch_of(0)
    assert len(whole) == 4 and epoch_of(1) == whole[1:]


def test_an_optimizer_of_other_weights_is_named(tmp_path):
    """As checkpoints of earlier versions have it, whose optimizer held the indexer, which is frozen now."""
    path = write_jsonl(tmp_path / "rows.jsonl", SENTENCES)
    settings = TINY | SMALL | {"train_file": path, "max_steps": 1}
    run(Translation, tmp_path / "out", settings)
    resumed = settings | {"max_steps": 2, "resume_from_checkpoint": tmp_path / "out/checkpoint-1"}
    with pytest.raises(ValueError, match="checkpoint-1: its optimizer was of other trained weights .*--freeze"):
        run(Translation, tmp_path / "out", resumed | {"freeze": ["embeddings"]})


KILLED = """
import os, signal, sys
import torch
from finetune_deepseek.commands.finetune import finetune
from finetune_deepseek.training.trainer import FinetuneTrainer

torch.set_num_threads(1)
original = FinetuneTrainer.training_step

def dying(self, *args, **kwargs):
    if self.state.global_step == 6:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return original(self, *args, **kwargs)

FinetuneTrainer.training_step = dying
finetune(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    """By a signal that nothing can answer, in the second epoch of four steps each."""
    path = write_jsonl(tmp_path / "rows.jsonl", SENTENCES)
    settings = TINY | SMALL | {"train_file": path, "hidden_dropout": 0.1}
    run(Translation, tmp_path / "whole", settings)
    argv = ["translation", *flags(settings | {"output_dir": tmp_path / "killed"})]
    child = subprocess.run([sys.executable, "-c", KILLED, *argv], capture_output=True, text=True, timeout=900)
    assert child.returncode == -getattr(signal, "SIGKILL", signal.SIGTERM), child.stderr[-2000:]
    assert not (tmp_path / "killed/model.safetensors").exists()
    run(Translation, tmp_path / "killed", settings | {"resume_from_checkpoint": "true"})
    state = json.loads((tmp_path / "killed/trainer_state.json").read_text())
    assert state["global_step"] == 12 and (tmp_path / "killed/checkpoint-6").is_dir()
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
