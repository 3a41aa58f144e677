"""Optimizers, schedules, regularization, frozen weights, perplexity and plots: each flag does what it says."""

import json
import math
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from configuration_deepseek import preset
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.training import run as run_module
from finetune_deepseek.training import trainer_arguments
from finetune_deepseek.training.arguments import ModelArguments
from finetune_deepseek.training.callbacks import plot_metrics
from finetune_deepseek.training.loading import with_dropout
from finetune_deepseek.training.optimization import smoothing_term, target_losses, wsd_settings
from finetune_deepseek.training.trainer_arguments import TrainingArguments
from finetune_deepseek.training.weights.freezing import freeze_weights
from finetune_deepseek.training.weights.groups import GROUPS, OTHER, group_of
from finetune_deepseek.translation.task import Translation
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import PAIRS, TINY, flags, write_jsonl

# One step without warm-up and clipping, by the plainest optimizer: the change of a weight is -rate * gradient.
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0}
ABSENT = ("output", "indexer", "engram", "mtp", "vision", "aligner", "stem")
PRESENT = [word for word in GROUPS if word not in ABSENT]  # what the tiny model has
STILL = {**SGD, "learning_rate": 1e-30, "do_train": True}


def log_history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def logged(folder, key):
    return [entry[key] for entry in log_history(folder) if key in entry]


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows_of_ids(tokenizer, pairs=PAIRS):
    """Ids and labels of each row, written here once more: the loss is on the target and its end."""
    rows = []
    for source, target in pairs:
        prompt = tokenizer(f"de: {source}\n")["input_ids"]
        target_ids = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((torch.tensor([prompt + target_ids]), len(prompt)))
    return rows


def target_log_probabilities(folder, pairs=PAIRS):
    """Log-probabilities [N, V] at the positions of all target tokens, row by row, and the target tokens [N]."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    log_probabilities, targets = [], []
    for ids, start in rows_of_ids(tokenizer, pairs):
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        log_probabilities.append(logits.log_softmax(-1))
        targets.append(ids[0, start:])
    return torch.cat(log_probabilities), torch.cat(targets)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that knows the three rows by half, so that its predictions differ, and the three rows."""
    from finetune_deepseek.training.run import run_stages

    folder = tmp_path_factory.mktemp("start")
    path = str(write_jsonl(folder / "rows.jsonl", PAIRS))
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    settings = {"max_steps": 12, "do_train": True, "output_dir": folder / "model"}
    argv = flags(TINY | files | settings)
    run_stages(Translation, parse_command("translation", Translation.arguments_class, argv))
    return folder / "model", files


@pytest.fixture
def continued(start, finetune, tmp_path):
    """Go on from `start` with the given flags; gives the folder of the run and its results."""
    folder, files = start

    def run(name="out", **settings):
        defaults = {"preset": None, "vocab_size": None, "model_name_or_path": folder, "predict_with_generate": False}
        settings = {**defaults, **SGD, **files, **settings}
        if not any(f"do_{work}" in settings for work in ("eval", "predict")):
            settings["do_train"] = True
        return tmp_path / name, finetune(output_dir=tmp_path / name, **settings)

    return run


# -- optimizers and schedules --


def test_adamw_and_sgd_take_their_own_step(start, continued):
    before = weights(start[0])
    name = "lm_head.weight"
    steps = {}
    for optim in ("sgd", "adamw_torch"):
        folder, _ = continued(optim, optim=optim, learning_rate=0.01)
        steps[optim] = (weights(folder)[name] - before[name]).abs()
        assert f"optimizer | {optim}, learning rate 0.01" in ModelCard.load(folder / "README.md").text
    # Adam's first step is the learning rate for any gradient but 0; SGD's has the gradient's size.
    moved = steps["sgd"] > 1e-6
    assert torch.allclose(steps["adamw_torch"][moved], torch.tensor(0.01), rtol=1e-2)
    assert steps["sgd"].max() < 0.01 and steps["sgd"][moved].std() > 0


def cosine(progress):
    return (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler_type": "cosine"}, [0, 0.5, *(cosine(step / 8) for step in range(8))]),
        ({"lr_scheduler_type": "linear"}, [0, 0.5, *(1 - step / 8 for step in range(8))]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
            [0, 0.5, *(0.1 + 0.9 * cosine(step / 8) for step in range(8))],
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": '{"num_decay_steps": 4, "decay_type": "linear"}',
            },
            [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_share": 0.4},
            [0, 0.5, 1, 1, 1, 1, *(cosine(step / 4) for step in range(4))],
        ),
        ({"lr_scheduler_type": "multi_step"}, [0, 0.5, 1, 1, 1, 1, 1, 1, 0.316, 0.316**2]),
        (
            {"lr_scheduler_type": "multi_step", "lr_milestones": [0.4, 7], "lr_factor": 0.5},
            [0, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
        ),
    ],
)
def test_learning_rate_over_the_steps(settings, expected, continued):
    folder, _ = continued(max_steps=10, warmup_steps=2, learning_rate=0.001, **settings)
    found = [rate / 0.001 for rate in logged(folder, "learning_rate")]
    assert found == pytest.approx(expected, abs=1e-6)


def test_of_two_steps_one_lowers_the_rate():
    args = TrainingArguments(output_dir="unread", lr_decay_share=0.2, warmup_steps=1, use_cpu=True)
    assert wsd_settings(args, 2) == {"num_decay_steps": 1} and wsd_settings(args, 10) == {"num_decay_steps": 2}
    args.lr_scheduler_kwargs = {"num_decay_steps": 9}
    assert wsd_settings(args, 10) == {"num_decay_steps": 9}
    with pytest.raises(ValueError, match="^--lr_scheduler_type warmup_stable_decay: 9 steps don't hold 1 of warm-up"):
        wsd_settings(args, 9)


def test_a_resumed_step_schedule_goes_on_where_it_was(continued, tmp_path):
    schedule = {"lr_scheduler_type": "multi_step", "lr_milestones": [2, 3], "max_steps": 4, "warmup_steps": 0}
    whole, _ = continued("whole", save_steps=2, **schedule)
    resumed, _ = continued("resumed", resume_from_checkpoint=whole / "checkpoint-2", **schedule)
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    card = ModelCard.load(whole / "README.md").text
    assert "schedule | multi_step: times 0.316 at each of 2 3, warm-up 0 of all steps" in card


# -- regularization --


def is_norm(name):
    return "norm" in name


def test_weight_decay_shrinks_all_but_norms(start, continued):
    before, plain = weights(start[0]), weights(continued("plain")[0])
    folder, _ = continued("decayed", weight_decay=0.5)
    decayed = weights(folder)
    assert any(map(is_norm, before))
    for name, tensor in before.items():
        decay = 0 if is_norm(name) else 0.1 * 0.5
        difference = decayed[name] - (plain[name] - decay * tensor)
        assert difference.abs().max() < 1e-6, (name, difference.abs().max())
    assert "regularization | weight decay 0.5" in ModelCard.load(folder / "README.md").text


def l1_of(tensors):
    return sum(tensor.abs().sum().item() for name, tensor in tensors.items() if not is_norm(name))


@pytest.mark.parametrize("batch", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}])
def test_l1_pulls_all_but_norms_towards_zero_once_per_step(batch, start, continued):
    before, plain = weights(start[0]), weights(continued("plain", **batch)[0])
    folder, _ = continued("l1", l1=0.01, **batch)
    pulled = weights(folder)
    for name, tensor in before.items():
        if "e_score_correction_bias" in name:
            continue
        pull = 0 if is_norm(name) else 0.1 * 0.01 * tensor.sign()
        difference = pulled[name] - (plain[name] - pull)
        assert difference.abs().max() < 1e-6, (name, difference.abs().max())
    # The log gives the penalty beside the loss, which stays free of it.
    assert logged(folder, "l1_penalty") == pytest.approx([0.01 * l1_of(pulled)], rel=1e-5)
    assert logged(folder, "loss") == pytest.approx(logged(folder.with_name("plain"), "loss"))
    assert not logged(folder.with_name("plain"), "l1_penalty")
    assert "regularization | L1 0.01" in ModelCard.load(folder / "README.md").text


def test_l1_on_lora_takes_the_adapters_alone(continued):
    folder, results = continued(l1=0.01, use_peft=True, lora_target=["attention"], lora_r=2)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert logged(folder, "l1_penalty") == pytest.approx([0.01 * l1_of(adapter)], rel=1e-5)


@pytest.mark.parametrize(
    ("use_peft", "batch"),
    [
        (False, {}),
        (False, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
        (True, {}),
    ],
)
def test_label_smoothing_is_on_the_shifted_labels(use_peft, batch, start, continued):
    log_probabilities, targets = target_log_probabilities(start[0])
    nll = -log_probabilities.gather(1, targets[:, None]).mean()
    expected = 0.9 * nll - 0.1 * log_probabilities.mean()
    settings = STILL | {"label_smoothing_factor": 0.1, "use_peft": use_peft, "eval_strategy": "steps", **batch}
    folder, _ = continued(**settings)
    assert logged(folder, "loss") == pytest.approx([expected.item()], rel=1e-4)
    # An evaluation measures; it isn't smoothed.
    assert logged(folder, "eval_loss") == pytest.approx([nll.item()], rel=1e-4)
    assert expected > 1.05 * nll
    assert "regularization | label smoothing 0.1" in ModelCard.load(folder / "README.md").text


def test_label_smoothing_equals_torchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 13, requires_grad=True), torch.randint(0, 13, (3, 7))
    labels[0, :5], labels[2] = -100, -100
    shifted = logits[:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(*shifted, label_smoothing=0.2)
    sums, counts = target_losses(logits, labels)
    packed = logits[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]
    found = sums.sum() / counts.sum() + 0.2 * smoothing_term(*packed)
    assert counts.tolist() == [2, 6, 0]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    by_number = smoothing_term(*packed, num_targets=16)
    torch.testing.assert_close(by_number, smoothing_term(*packed) / 2)


def test_dropout_is_set_on_built_and_loaded_models(start, continued, finetune, tmp_path):
    rates = {"attention_dropout": 0.2, "hidden_dropout": 0.3}
    still, _ = continued("still", **STILL)
    loaded, _ = continued("loaded", **(STILL | rates))
    fresh, built = tmp_path / "fresh", tmp_path / "built"
    finetune(output_dir=fresh, **(STILL | start[1]))
    finetune(output_dir=built, **(STILL | rates | start[1]))
    for folder in (loaded, built):
        config = json.loads((folder / "config.json").read_text())
        assert (config["attention_dropout"], config["hidden_dropout"]) == (0.2, 0.3)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.model.dropout.p == model.model.layers[0].dropout.p == 0.3
        assert model.model.layers[0].self_attn.attention_dropout == 0.2
        card = ModelCard.load(folder / "README.md").text
        assert "regularization | attention dropout 0.2, hidden dropout 0.3" in card
    # It works in training, and not at evaluation.
    for without, dropping in ((still, loaded), (fresh, built)):
        assert logged(dropping, "loss") != pytest.approx(logged(without, "loss"), rel=1e-4)
    _, with_rates = continued("again", do_eval=True, **rates)
    _, without = continued("plain", do_eval=True)
    assert with_rates["eval_loss"] == without["eval_loss"]
    # 0 switches the config's own off.
    off, _ = continued("off", model_name_or_path=loaded, attention_dropout=0, hidden_dropout=0, **STILL)
    assert logged(off, "loss") == pytest.approx(logged(still, "loss"), rel=1e-5)


def test_dropout_of_an_adapters_base(continued):
    adapter, _ = continued("adapter", use_peft=True, lora_r=2)
    folder, _ = continued("more", model_name_or_path=adapter, hidden_dropout=0.3, **STILL)
    assert logged(folder, "loss") != pytest.approx(logged(adapter, "loss"), rel=1e-3)


# -- frozen weights --


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("group", ["embeddings", "router", "experts"])
def test_a_frozen_group_stays_and_the_others_move(group, start, continued, capsys):
    folder, results = continued(freeze=[group])
    before, after = weights(start[0]), weights(folder)
    moved = changed(before, after)
    # Routed experts are saved one by one, under a name of their own.
    groups = {name: "experts" if ".mlp.experts." in name else group_of(name) for name in before}
    assert {name for name in before if groups[name] == group}.isdisjoint(moved)
    assert {groups[name] for name in moved} == {groups[name] for name in before} - {group}
    out = capsys.readouterr().out
    assert f"trained weights: all, without {group}" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(group)]
    assert rows[0][3] == "0" and int(rows[0][1].replace(",", "")) > 0
    assert results["parameters_trainable"] < results["parameters_total"]
    assert f"trained weights | all, without {group}" in ModelCard.load(folder / "README.md").text


def test_last_layers_with_norm_and_head(start, continued, capsys):
    folder, _ = continued(train_last_n_layers=1, freeze="head,router")
    moved = changed(weights(start[0]), weights(folder))
    last = max(int(name.split(".")[2]) for name in moved if ".layers." in name)
    assert moved and all(name.startswith(f"model.layers.{last}.") or name == "model.norm.weight" for name in moved)
    assert "model.norm.weight" in moved
    assert f"model.layers.{last}.mlp.gate.weight" not in moved
    text = "the last 1 layers, final norm and head, without head router"
    assert f"trained weights: {text}" in capsys.readouterr().out
    assert f"trained weights | {text}" in ModelCard.load(folder / "README.md").text


def tiny_llama(**settings):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, **sizes, **settings))


def frozen_arguments(tmp_path, **settings):
    argv = flags({"output_dir": tmp_path, "preset": "tiny_v3", **settings})
    return parse_command("translation", Translation.arguments_class, argv)[0].training


def test_freezing_a_native_model_and_a_tied_head(tmp_path):
    model = tiny_llama()
    freeze_weights(model, frozen_arguments(tmp_path, train_last_n_layers=0))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"model.norm.weight", "lm_head.weight"}
    for settings in ({"freeze": "head"}, {"freeze": "embeddings"}, {"train_last_n_layers": 3}):
        model = tiny_llama(tie_word_embeddings=True)
        freeze_weights(model, frozen_arguments(tmp_path, **settings))
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="leave no weight to train"):
        model.model.norm.weight.requires_grad_(False)
        freeze_weights(model, frozen_arguments(tmp_path, train_last_n_layers=0))


def test_frozen_weights_with_gradient_checkpointing(start, continued):
    """Checkpoints of layers whose input needs no gradient must still give the layers' weights theirs."""
    plain, _ = continued("plain", freeze="embeddings")
    folder, _ = continued("checkpointed", freeze="embeddings", activation_checkpointing=True)
    expected, found = weights(plain), weights(folder)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


# -- perplexity and plots --


@pytest.mark.parametrize("use_peft", [False, True])
def test_perplexity_is_over_all_target_tokens(use_peft, start, continued, tmp_path):
    pairs = [*PAIRS, ("four", "vier neue Wörter")]
    path = str(write_jsonl(tmp_path / "uneven.jsonl", pairs))
    log_probabilities, targets = target_log_probabilities(start[0], pairs)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    for batch_size in (1, 3, 4):
        settings = STILL | {"use_peft": use_peft, "per_device_eval_batch_size": batch_size}
        settings |= {"do_train": None, "do_eval": True, "do_predict": True, "test_file": path}
        folder, results = continued(f"batch{batch_size}", **settings)
        assert results["test_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert results["test_perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    log_probabilities, targets = target_log_probabilities(start[0])
    expected = F.nll_loss(log_probabilities, targets).exp().item()
    assert results["eval_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert json.loads((folder / "eval_results.json").read_text())["eval_perplexity"] == results["eval_perplexity"]
    assert f"| perplexity | {results['test_perplexity']:.4g} | - |" in ModelCard.load(folder / "README.md").text


def test_perplexity_beside_generation(continued):
    _, without = continued("without", do_eval=True)
    _, results = continued("with", do_eval=True, predict_with_generate=True)
    assert results["eval_perplexity"] == without["eval_perplexity"]
    assert "eval_chrf2" in results and "eval_chrf2" not in without


def test_metric_plot_is_there_when_there_were_evaluations(continued, tmp_path):
    with_evaluations, _ = continued("with", eval_strategy="steps", max_steps=2, eval_steps=1)
    without, _ = continued("without")
    assert (with_evaluations / "metric_plot.png").read_bytes().startswith(b"\x89PNG")
    assert (with_evaluations / "loss_plot.png").is_file() and (without / "loss_plot.png").is_file()
    assert not (without / "metric_plot.png").exists()
    assert len(logged(with_evaluations, "eval_perplexity")) == 2


def test_metric_plot_has_one_curve_per_score(tmp_path, monkeypatch):
    from finetune_deepseek.training import callbacks

    figures = []
    monkeypatch.setattr(callbacks, "save_figure", lambda figure, path: figures.append(figure))
    plot_metrics([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5, "eval_runtime": 1.0}], tmp_path / "none.png")
    assert not figures
    history = [{"step": step, "eval_bleu": 10.0 * step, "eval_exact_match": step / 4} for step in (1, 2)]
    plot_metrics([*history, {"step": 2, "eval_samples_per_second": 3.0}], tmp_path / "two.png")
    curves = {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figures[0].axes}
    assert curves == {"bleu": [[1, 10], [2, 20]], "exact_match": [[1, 0.25], [2, 0.5]]}


# -- the census, and bad values --


def test_the_census_says_it_all_before_the_first_step(start, continued, capsys, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(prepared, built):
        raise Stopped

    monkeypatch.setattr(run_module, "train", stop)
    settings = {"lr_scheduler_type": "multi_step", "lr_milestones": [0.5, 0.75], "warmup_steps": 3, "l1": 1e-4}
    settings |= {"weight_decay": 0.1, "label_smoothing_factor": 0.1, "hidden_dropout": 0.2, "freeze": "embeddings"}
    with pytest.raises(Stopped):
        continued(**settings)
    lines = capsys.readouterr().out.splitlines()
    assert "trained weights: all, without embeddings" in lines
    assert "optimizer: sgd, learning rate 0.1" in lines
    assert "schedule: multi_step: times 0.316 at each of 0.5 0.75, warm-up 3 steps" in lines
    assert "regularization: weight decay 0.1, L1 0.0001, label smoothing 0.1, hidden dropout 0.2" in lines


def test_lora_is_named_among_the_trained_weights(continued, capsys):
    folder, _ = continued(use_peft=True, lora_r=4)
    assert "trained weights: LoRA adapters, r 4, alpha 32" in capsys.readouterr().out
    assert "trained weights | LoRA adapters, r 4, alpha 32" in ModelCard.load(folder / "README.md").text
    with pytest.raises(ValueError, match="--freeze: this is a LoRA adapter"):
        continued("more", model_name_or_path=folder, freeze="head")


BY_SCORE = {"metric_for_best_model": "bleuu", "eval_strategy": "steps", "save_strategy": "steps", "do_train": True}
BY_SCORE |= {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamv_torch"}, "--optim adamv_torch: no such choice (did you mean 'adamw_torch'?)"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type cosin: no such choice (did you mean 'cosine'?)"),
        ({"lr_scheduler_type": "multistep"}, "(did you mean 'multi_step'?)"),
        ({"lr_milestones": [0.5]}, "--lr_milestones has no effect without --lr_scheduler_type multi_step"),
        ({"lr_decay_share": 0.5}, "--lr_decay_share has no effect without --lr_scheduler_type warmup_stable_decay"),
        (
            {"tokens_per_batch": 64, "train_sampling_strategy": "sequential"},
            "--tokens_per_batch 64 has no effect with --train_sampling_strategy sequential",
        ),
        ({"lr_factor": 0.5}, "--lr_factor has no effect without --lr_scheduler_type multi_step"),
        ({"lr_scheduler_type": "multi_step", "lr_milestones": [0, 0.5]}, "--lr_milestones 0 0.5: each must be"),
        ({"lr_scheduler_type": "multi_step", "lr_factor": 1.5}, "--lr_factor 1.5: it must be above 0 and below 1"),
        ({"lr_scheduler_type": "multi_step", "lr_milestones": [0.5, 7]}, "step 7 is never reached"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"steps": 4}'},
            "got an unexpected keyword argument 'steps'",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_share": 0.3, "warmup_steps": 4},
            "4 steps don't hold 4 of warm-up (--warmup_steps) and 1 of decay (--lr_decay_share)",
        ),
        ({"lr_scheduler_kwargs": '{"decay": 3}'}, "unexpected keyword argument 'decay'"),
        ({"lr_scheduler_type": "multi_step", "lr_milestones": ["inf"]}, "--lr_milestones inf: each must be above 0"),
        ({"l1": -1}, "--l1 -1: it must be 0 or more"),
        ({"l1": "nan"}, "--l1 nan: it must be 0 or more"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1: it must be 0 or more"),
        ({"label_smoothing_factor": 1}, "--label_smoothing_factor 1: it must be at least 0 and less than 1"),
        ({"hidden_dropout": 1}, "--hidden_dropout 1: it must be at least 0 and less than 1"),
        ({"attention_dropout": -0.5}, "--attention_dropout -0.5: it must be at least 0 and less than 1"),
        ({"freeze": "embedding"}, "--freeze embedding: no such group (did you mean 'embeddings'?)"),
        ({"freeze": PRESENT, "train_last_n_layers": 99}, "--train_last_n_layers 99: the model has 3 layers"),
        ({"train_last_n_layers": -1}, "--train_last_n_layers -1: it must be 0 or more"),
        (BY_SCORE, "--metric_for_best_model bleuu: evaluation gives no such number (did you mean 'bleu'?); there is "),
        ({"freeze": "head", "use_peft": True}, "--freeze can't be used with --use_peft"),
        ({"train_last_n_layers": 1, "use_peft": True}, "--train_last_n_layers can't be used with --use_peft"),
    ],
)
def test_bad_values_are_one_line(settings, message, data, tmp_path, capsys):
    argv = flags(TINY | {"max_steps": 4, "output_dir": tmp_path / "out"} | data | settings)
    assert guarded(["translation", *argv]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("deepseek-hf: error: ") and message in error


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["none", "trackio"], '--report_to trackio: it is not installed: pip install "deepseek-hf[trackio]"'),
        ("tensorboard", '--report_to tensorboard: it is not installed: pip install "deepseek-hf[tensorboard]"'),
        (["wandb"], "--report_to wandb: it is not installed: pip install wandb"),
        (["wandbb"], "--report_to wandbb: no such choice (did you mean 'wandb'?); there is none, all, "),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line_before_data_are_read(trackers, message, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_arguments, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingArguments(str(tmp_path), report_to=trackers)
    TrainingArguments(str(tmp_path), report_to="none")


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [({"freeze": ["mtp"]}, {"3", "4"}), ({"train_last_n_layers": 1}, {"0", "1"}), ({"freeze": ["attention"]}, set())],
)
def test_prediction_layers_are_a_group_of_their_own(settings, frozen, tmp_path):
    model = DeepSeekForCausalLM(preset("tiny_v3_mtp"))
    freeze_weights(model, frozen_arguments(tmp_path, **settings))
    layers = {name.split(".")[2]: [] for name, _ in model.named_parameters() if ".layers." in name}
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            layers[name.split(".")[2]].append(not parameter.requires_grad)
    assert {layer for layer, states in layers.items() if all(states)} == frozen
    assert not any(layers["2"]) or settings == {"freeze": ["attention"]}


def test_groups_and_dropouts_that_the_model_lacks(tmp_path):
    with pytest.raises(ValueError, match="--freeze router: the model has no such weights; it has attention, dense, e"):
        freeze_weights(tiny_llama(), frozen_arguments(tmp_path, freeze="router"))
    arguments = ModelArguments(preset="x", hidden_dropout=0.1)
    with pytest.raises(ValueError, match="--hidden_dropout: a model of model_type 'llama' has none"):
        with_dropout(LlamaConfig(), arguments)
    assert OTHER not in GROUPS
