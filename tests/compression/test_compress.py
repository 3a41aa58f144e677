"""`deepseek-hf compress` as a run: scored, made smaller, written whole, opened by every verb; and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.compress import check_rest, compress, parser
from finetune_deepseek.commands.finetune import finetune, task_flags
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.commands.translate import translate
from finetune_deepseek.compression import numbers
from finetune_deepseek.compression.sparsity import has_pattern
from finetune_deepseek.training import loading
from modeling_deepseek import DeepSeekForCausalLM
from tests.recommendation.test_benchmarks import BENCHMARKS, benchmark
from tests.small_runs import PAIRS, TINY, flags, write_jsonl

OVERRIDES = "n_group=1,topk_group=1,num_hidden_layers=3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A translator that knows three rows by heart, and the flags that name these."""
    folder = tmp_path_factory.mktemp("compress")
    path = str(write_jsonl(folder / "rows.jsonl", PAIRS))
    data = {
        "train_file": path,
        "validation_file": path,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_target_length": 24,
    }
    settings = TINY | data | {"output_dir": folder / "model", "num_train_epochs": 6, "do_train": True}
    finetune(["translation", *flags(settings | {"config_overrides": OVERRIDES, "save_strategy": "no"})])
    return str(folder / "model"), [*flags(data), "--target_lang=de"]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "compression.json").read_text())


def refused(capsys, *argv: str) -> str:
    assert guarded([*argv], "compress") == 2
    return capsys.readouterr().err


def test_a_pruned_and_recovered_model_opens_as_any_other(trained, tmp_path):
    model, data = trained
    (tmp_path / "empty").mkdir()
    ways = ["--prune-experts", "0.5", "--prune-layers", "1", "--sparsity", "2:4", "--recover-steps", "3"]
    compress([model, str(tmp_path / "empty"), *ways, "--learning_rate", "1e-3", *data])
    report, folder = report_of(tmp_path / "empty"), tmp_path / "empty"
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_hidden_layers"]) == (4, 2)
    assert report["bytes_after"] == (folder / "model.safetensors").stat().st_size < report["bytes_before"]
    assert len(report["layers_left_out"]) == 1 and 0 < report["zeros_by_pattern"] < 0.5
    assert report["after"]["parameters_total"] < report["before"]["parameters_total"]
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        map(
            has_pattern, (opened.model.layers[0].self_attn.o_proj.weight, opened.model.layers[1].mlp.experts.down_proj)
        )
    )
    card = (folder / "README.md").read_text()
    assert "deepseek-hf compress --prune-experts 0.5 --prune-layers 1 --sparsity 2:4 --recover-steps 3" in card
    assert "| eval_loss |" in card and "# empty" in card and str(tmp_path) not in card
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert json.loads((folder / "deepseek_hf.json").read_text())["task"] == "translation"


@pytest.mark.slow
def test_scores_are_those_of_evaluate(trained, tmp_path):
    model, data = trained
    compress([model, str(tmp_path / "small"), "--prune-layers", "1", *data])
    from finetune_deepseek.commands.evaluate import evaluate

    for folder, when in ((model, "before"), (str(tmp_path / "small"), "after")):
        evaluate(["translation", folder, *data, f"--output_dir={tmp_path / when}"])
        found = json.loads((tmp_path / when / "all_results.json").read_text())
        known = report_of(tmp_path / "small")[when]
        assert known["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
        assert known["eval_chrf2"] == found["eval_chrf2"]


def error_bounds(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> [R, 1], how far a number of so many bits may be off: the largest step between two of them."""
    return weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("way", ["--int8", pytest.param("--int4", marks=pytest.mark.slow)])
def test_numbers_of_fewer_bits_give_nearly_the_same(trained, tmp_path, way):
    pytest.importorskip("torchao")
    model, data = trained
    compress([model, str(tmp_path / "small"), way, *data])
    report = report_of(tmp_path / "small")
    assert report["after"]["eval_loss"] == pytest.approx(report["before"]["eval_loss"], rel=0.1, abs=0.05)
    assert report["bytes_after"] < 0.6 * report["bytes_before"]
    whole = AutoModelForCausalLM.from_pretrained(model, fused_experts=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    weights, quantized = whole.state_dict(), 0
    for name, weight in small.named_parameters():
        if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
            bounds = error_bounds(weights[name], 4 if "Intx" in type(weight).__name__ and "layers" in name else 8)
            assert ((weight.dequantize() - weights[name]).abs() <= 1.01 * bounds).all(), name
            quantized += 1
    assert quantized == sum(name.endswith(("_proj.weight", "_mqa.weight", "tokens.weight", "head.weight"))
                            for name in weights)  # fmt: skip
    ids = torch.tensor([[5, 9, 30, 12]])
    with torch.no_grad():
        found = small(ids).logits
    small.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, found)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == report["bytes_after"]
    (tmp_path / "lines").write_text("one\nthree\n")
    translate([str(tmp_path / "small"), "--input", str(tmp_path / "lines"), "--output", str(tmp_path / "out")])
    assert len((tmp_path / "out").read_text().splitlines()) == 2


@pytest.mark.slow
def test_small_numbers_are_neither_compressed_nor_trained_again(trained, tmp_path, capsys):
    pytest.importorskip("torchao")
    model, data = trained
    small = str(tmp_path / "small")
    compress([model, small, "--int8", *data])
    assert "its numbers are small already" in refused(capsys, small, str(tmp_path / "b"), "--int4", *data)
    argv = ["translation", f"--model_name_or_path={small}", f"--output_dir={tmp_path / 'c'}", *data]
    assert guarded([small, str(tmp_path / "d"), "--to", "native"], "export") == 2
    assert "of fewer bits (compress --int8 or --int4)" in capsys.readouterr().err
    for more in ([], ["--use_peft"]):
        assert guarded([*argv, "--do_train=true", "--max_steps=1", *more], "finetune") == 2
        assert "train the model that they were made from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ways, message",
    [
        (["--prune-experts", "0"], "a share of the experts lies between 0 and 1"),
        (["--prune-experts", "1"], "a share of the experts lies between 0 and 1"),
        (["--prune-experts", "nan"], "a share of the experts lies between 0 and 1"),
        (["--prune-layers", "0"], "at least one layer goes"),
        (["--prune-layers", "3"], "of which 2 can go"),
        ([], "nothing to do"),
        (["--int8", "--recover-steps", "3"], "trains what pruning has left"),
        (["--int8", "--int4"], "keep one of them"),
        (["--prune-layer", "1"], "did you mean"),
        (["--prune-layers", "1", "--sparsity", "1:4"], "invalid choice"),
        (["--prune-layers", "1", "--output_dir=other"], "--output_dir: SRC, DST and --recover-steps decide this"),
        (["--prune-layers", "1", "--recover-steps=2", "--max-steps", "3"], "--max-steps: SRC, DST and"),
        (["--prune-layers", "1", "--push_to_hub"], "--push_to_hub: SRC, DST and"),
    ],
)
def test_ways_that_are_none(trained, tmp_path, capsys, ways, message):
    model, data = trained
    assert message in refused(capsys, model, str(tmp_path / "small"), *ways, *data)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["--prune-experts=0.25", pytest.param("--int8", marks=pytest.mark.slow)])
def test_half_precision_stays(trained, tmp_path, way):
    if way == "--int8":
        pytest.importorskip("torchao")
    model, data = trained
    shutil.copytree(model, tmp_path / "half")
    DeepSeekForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    compress([str(tmp_path / "half"), str(tmp_path / "small"), way, *data])
    report, opened = report_of(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert report["bytes_after"] < report["bytes_before"]
    assert opened.dtype == opened.model.norm.weight.dtype == torch.bfloat16
    assert opened.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert report["after"]["eval_loss"] == pytest.approx(report["before"]["eval_loss"], abs=0.1)


def test_one_process_writes(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in one process" in refused(capsys, trained[0], str(tmp_path / "small"), "--prune-layers", "1", *trained[1])


def test_all_layers_of_an_image_classifier_can_go(tmp_path, capsys):
    for number, label in enumerate(("dark", "light", "dark", "light")):
        (tmp_path / "train" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 + 100 * (number % 2) + number).save(tmp_path / "train" / label / f"{number}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    data = [f"--data_dir={tmp_path}", "--use_cpu=true", "--disable_tqdm=true"]
    model, small = str(tmp_path / "model"), str(tmp_path / "small")
    finetune(["image_classification", "--preset=tiny_llm", f"--output_dir={model}", "--max_steps=1", *data])
    assert "of which 3 can go" in refused(capsys, model, small, "--prune-layers", "4", *data)
    compress([model, small, "--prune-layers", "3", *data])
    assert AutoModelForImageClassification.from_pretrained(small).config.num_hidden_layers == 0
    assert (
        "eval_accuracy" not in report_of(Path(small))["after"] and "test_accuracy" in report_of(Path(small))["after"]
    )
    assert "has 0 layers, of which 0 can go" in refused(capsys, small, str(tmp_path / "b"), "--prune-layers=1", *data)


def test_data_and_places_that_do_not_fit(trained, tmp_path, capsys):
    model, data = trained
    validation = [word for word in data if not word.startswith("--train_file")]
    train = [word for word in data if not word.startswith("--validation_file")]
    small = str(tmp_path / "small")
    assert "no training rows to calibrate by" in refused(capsys, model, small, "--prune-layers", "1", *validation)
    assert "no rows to score by" in refused(capsys, model, small, "--prune-layers", "1", *train)
    assert "exists" in refused(capsys, model, model, "--prune-layers", "1", *data)
    assert "made for translation" in refused(capsys, model, small, "--int8", "--task", "embedding")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_adapter_is_merged_first(trained, tmp_path, capsys):
    model, data = trained
    argv = [f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'adapter'}", "--use_peft", "--max_steps=1"]
    finetune(["translation", *argv, "--do_train=true", *data])
    line = refused(capsys, str(tmp_path / "adapter"), str(tmp_path / "small"), "--prune-layers", "1", *data)
    assert "merge it into its base first" in line and not (tmp_path / "small").exists()


def test_without_torchao(trained, tmp_path, capsys, monkeypatch):
    model, data = trained
    monkeypatch.setattr(numbers, "is_torchao_available", lambda: False)
    assert 'pip install "deepseek-hf[compress]"' in refused(capsys, model, str(tmp_path / "small"), "--int8", *data)
    shutil.copytree(model, tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "torchao"}
    }
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loading, "is_torchao_available", lambda: False)
    assert guarded(["translation", str(tmp_path / "made"), *data, f"--output_dir={tmp_path / 'out'}"], "evaluate") == 2
    assert "made: its numbers of fewer bits need torchao: pip install" in capsys.readouterr().err


def test_the_flags_of_the_benchmark_are_known(tmp_path, monkeypatch):
    module = benchmark(monkeypatch, "compression")
    for entry in module.read_table(BENCHMARKS / "compression.yaml")["models"].values():
        task, places = entry["task"], {"data": "data"}
        settings = module.training_of(entry, BENCHMARKS) | {"output_dir": tmp_path, "use_cpu": True}
        (stage,) = parse_command(task, task_flags(task), module.flags(settings, places))
        assert stage.training.do_train and set(entry["ways"]) <= set(module.WAYS)
        check_rest(parser(), task, task_flags(task), module.flags(entry["flags"], places))
