"""Which way a score is better, and what a run does when its numbers cease to be any."""

import json
import math

import numpy as np
import pytest
import torch

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.classification.task import Classification
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.data.files import json_line, write_json
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.trainer_arguments import TrainingArguments
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import TINY, flags

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


def strict(path):
    """A JSON file as other programs read it."""

    def refuse(word):
        raise AssertionError(f"{path} says {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    ("score", "is_more"),
    [("loss", False), ("eval_loss", False), ("mse", False), ("mae", False), ("perplexity", False), ("bleu", True),
     ("exact_match", True), ("hr@10", True), ("eval_macro_f1", True)],
)  # fmt: skip
def test_what_is_better_follows_from_the_name(score, is_more, tmp_path):
    ours = {"output_dir": str(tmp_path), "eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments = TrainingArguments(**ours, load_best_model_at_end=True, metric_for_best_model=score)
    assert arguments.greater_is_better == is_more
    plateau = TrainingArguments(**ours, lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model=score)
    assert plateau.lr_scheduler_kwargs == {"mode": "max" if is_more else "min"}


def test_a_contradiction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--greater_is_better true: of mae less is better"):
        TrainingArguments(output_dir=str(tmp_path), metric_for_best_model="mae", greater_is_better=True)
    with pytest.raises(ValueError, match="--greater_is_better false: of accuracy more is better"):
        TrainingArguments(output_dir=str(tmp_path), metric_for_best_model="accuracy", greater_is_better=False)


def test_falling_errors_go_on_and_the_least_is_kept(tmp_path):
    rows = [{"text": "one " * n, "label": n + 0.5} for n in range(1, 7)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TINY | EVALUATED | {
        "train_file": path, "validation_file": path, "output_dir": tmp_path / "out", "max_steps": 5,
        "metric_for_best_model": "mse", "early_stopping_patience": 1, "save_total_limit": 1,
        "target_lang": None, "max_target_length": None, "learning_rate": 0.003,
        "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    run_stages(Classification, parse_command("classification", Classification.arguments_class, flags(settings)))
    state = strict(tmp_path / "out/trainer_state.json")
    errors = [entry["eval_mse"] for entry in state["log_history"] if "eval_mse" in entry]
    assert len(errors) == 5 and errors[-1] < errors[0]  # it didn't stop when they fell
    assert state["best_metric"] == min(errors)


def spoil(monkeypatch, at, gradient_only=False):
    """Let the forward pass number `at` in training give a loss, or a gradient, that is no number."""
    forward, calls = DeepSeekForCausalLM.forward, []

    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if len(calls) == at:
                by_gradient = output.loss + (self.lm_head.weight.sum() * 0).sqrt()  # 0, of infinite slope
                output.loss = by_gradient if gradient_only else output.loss * math.nan
        return output

    monkeypatch.setattr(DeepSeekForCausalLM, "forward", spoiled)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_run_stops_where_its_loss_is_no_number(gradient_only, data, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, at=5, gradient_only=gradient_only)  # steps of 2, 1 and 2 passes
    settings = TINY | {"output_dir": tmp_path / "out", "max_steps": 6, "save_steps": 1, "do_train": True, **data}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    assert guarded(["translation", *flags(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 3: the loss or its gradient is not a finite number" in error
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model = DeepSeekForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_without_a_checkpoint_it_says_so(data, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, at=1)
    settings = TINY | {"output_dir": tmp_path / "out", "max_steps": 2, "do_train": True, **data}
    assert guarded(["translation", *flags(settings)]) == 2
    assert "step 1: the loss" in (error := capsys.readouterr().err) and "there is no checkpoint yet" in error


def test_scores_that_are_no_numbers_are_null_and_never_the_best(finetune, data, tmp_path, monkeypatch):
    forward, calls = DeepSeekForCausalLM.forward, []

    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if not self.training and kwargs.get("use_cache") is not True and len(calls) < 1:
            calls.append(1)
            output.logits = output.logits * math.nan
        return output

    monkeypatch.setattr(DeepSeekForCausalLM, "forward", spoiled)
    settings = EVALUATED | {"max_steps": 2, "load_best_model_at_end": True, "predict_with_generate": False, **data}
    finetune(output_dir=tmp_path / "out", do_train=True, do_eval=True, **settings)
    history = strict(tmp_path / "out/trainer_state.json")
    losses = [entry["eval_loss"] for entry in history["log_history"] if "eval_loss" in entry]
    assert len(losses) == 1 and history["best_metric"] == losses[0] and history["best_global_step"] == 2
    calls.clear()
    finetune(output_dir=tmp_path / "again", preset=None, vocab_size=None, model_name_or_path=tmp_path / "out",
             do_eval=True, predict_with_generate=False, **data)  # fmt: skip
    assert strict(tmp_path / "again/eval_results.json")["eval_loss"] is None
    assert strict(tmp_path / "again/all_results.json")["eval_loss"] is None


def test_json_has_null_for_what_is_no_number(tmp_path):
    content = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": "NaN", "e": np.float64("nan")}}
    write_json(tmp_path / "x.json", content)
    expected = {"a": [1.5, None, [None]], "b": {"c": None, "d": "NaN", "e": None}}
    assert strict(tmp_path / "x.json") == json.loads(json_line(content)) == expected
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": torch.ones(1)})
    assert strict(tmp_path / "x.json") == expected
