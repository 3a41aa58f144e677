"""What was measured is written before anything is shown, and what can be refused is refused before the first step."""

import io
import json
import sys
from pathlib import Path

import pytest

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.training import run as run_module
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.task import Scores
from finetune_deepseek.translation.task import Translation
from tests.small_runs import TINY, flags
from tests.training.test_new_task import Uppercase

WRITTEN = {"train_results.json", "eval_results.json", "test_results.json", "all_results.json", "README.md"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_screen_of_few_characters_shows_the_others_as_escapes(finetune, data, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    results = finetune(output_dir=tmp_path, max_steps=1, **data)
    shown.flush()
    text = shown.buffer.getvalue().decode("ascii")
    assert r"reference   zwei V\xf6gel" in text
    assert shown.errors == "strict"  # as it was
    assert json.loads((tmp_path / "all_results.json").read_text()) == results


def test_what_was_measured_is_written_before_it_is_shown(finetune, data, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            if "reference" in text:
                raise BrokenPipeError
            return len(text)

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        finetune(output_dir=tmp_path, max_steps=1, **data)
    assert names(tmp_path) >= WRITTEN | {"generated_predictions.jsonl", "model.safetensors"}
    assert "test_loss" in json.loads((tmp_path / "all_results.json").read_text())


def test_the_log_fits_a_screen_and_ends_with_what_to_type_next(finetune, data, tmp_path, capfd):
    lasting = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 20, "disable_tqdm": False}
    results = finetune(output_dir=tmp_path / "a run", **lasting, **data)
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) < 60
    assert len([line for line in lines if line.startswith("step ") and ": loss " in line]) == 10
    assert [line.split(":")[0] for line in lines if " eval loss " in line] == ["step 20", "step 40"]
    assert len([line for line in lines if line.startswith("  reference ")]) == 3
    row = next(line.split() for line in lines if line.startswith("exact_match"))
    assert [float(cell) for cell in row[1:]] == [
        pytest.approx(results[f"{split}_exact_match"], rel=1e-4) for split in ("eval", "test", "baseline")
    ]
    folder = f"'{tmp_path / 'a run'}'"
    assert lines[-1] == f"everything is in {folder}; next: deepseek-hf translate {folder} --input FILE"
    bars = {
        line.split("%")[0].split()[0]
        for line in shown.err.replace("\r", "\n").splitlines()
        if "%|" in line or "% |" in line
    }
    assert {"training", "scoring"} <= bars <= {"training", "scoring", "Loading"}


@pytest.mark.parametrize("count", [0, 1])
def test_as_many_predictions_are_shown_as_are_asked_for(count, finetune, data, tmp_path, capsys):
    finetune(output_dir=tmp_path, max_steps=1, examples_shown=count, **data)
    assert capsys.readouterr().out.count("  reference ") == count


class FailingReport(Uppercase):
    """Fails after its scores."""

    def report(self, predictions, rows, train):
        raise ValueError("no report")


class SpeakingReport(Uppercase):
    """Has a file, a number and a line."""

    def report(self, predictions, rows, train):
        return Scores({"above": 1}, files={"more.txt": "more"}, text="one line more")


def uppercase(task, folder, **settings):
    kept = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
    argv = flags(kept | {"output_dir": folder, "max_steps": 1, "words": ["ab", "cat"]} | settings)
    return run_stages(task, parse_command(task.name, task.arguments_class, argv))


def test_a_report_that_fails_loses_nothing_of_what_came_before_it(tmp_path):
    with pytest.raises(ValueError, match="no report"):
        uppercase(FailingReport, tmp_path)
    assert names(tmp_path) >= WRITTEN | {"generated_predictions.jsonl", "model.safetensors"}
    assert "test_right" in json.loads((tmp_path / "test_results.json").read_text())
    assert "capital letters" in (tmp_path / "README.md").read_text()


def test_a_report_is_written_and_shown(tmp_path, capsys):
    assert uppercase(SpeakingReport, tmp_path)["above"] == 1
    assert (tmp_path / "more.txt").read_text() == "more"
    assert json.loads((tmp_path / "test_results.json").read_text())["above"] == 1
    assert "one line more" in capsys.readouterr().out


@pytest.fixture
def never_trained(monkeypatch):
    def train(prepared, built):
        pytest.fail("it was trained")

    monkeypatch.setattr(run_module, "train", train)


def test_an_adapter_that_changes_its_base_fails_when_all_is_written(finetune, data, tmp_path):
    finetune(output_dir=tmp_path / "base", max_steps=1, **data)
    path = tmp_path / "base" / "generated_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[1]["prediction"] = "vier"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = {"preset": None, "vocab_size": None, "model_name_or_path": tmp_path / "base", "use_peft": True}
    with pytest.raises(ValueError, match="1 of 3 outputs differ"):
        finetune(output_dir=tmp_path / "lora", adapter_off_check=path, max_steps=1, **lora, **data)
    assert names(tmp_path / "lora") >= WRITTEN | {"adapter_model.safetensors", "generated_predictions.jsonl"}
    results = json.loads((tmp_path / "lora" / "all_results.json").read_text())
    assert (results["adapter_off_equal"], results["adapter_off_different"]) == (2, 1) and "test_loss" in results


@pytest.mark.parametrize("rows", [['{"prompt": "x"}'], ["not JSON"], ['{"prompt": "x", "prediction": "y"}']])
def test_rows_of_an_adapter_check_are_looked_at_first(rows, finetune, data, tmp_path, never_trained):
    (tmp_path / "off.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="--adapter_off_check .*off.jsonl"):
        finetune(output_dir=tmp_path / "out", use_peft=True, adapter_off_check=tmp_path / "off.jsonl", **data)


def test_checkpoints_of_two_runs_are_scored_apart(finetune, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["--validation_file", data["validation_file"], "--test_file", data["test_file"], "--target_lang", "de"]
    models = [f"{folder}/checkpoint-1" for folder in ("a", "b", "c/b")]
    for model in models:
        finetune(output_dir=Path(model).parent, max_steps=1, save_steps=1, do_train=True, **data)
    for model in [*models, models[0]]:  # the first once more, where it was
        assert guarded(["translation", model, *files], "evaluate") == 0
    kept = {path.parent.name: json.loads(path.read_text()) for path in Path("runs").glob("*/all_results.json")}
    assert {"evaluate-a-checkpoint-1", "evaluate-b-checkpoint-1"} < set(kept) and len(kept) == 3
    assert len({results["scored_model"] for results in kept.values()}) == 3
    assert guarded(["translation", models[0], *files], "predict") == 0
    assert "eval_loss" not in json.loads(Path("runs/predict-a-checkpoint-1/all_results.json").read_text())


def test_scores_of_two_models_do_not_meet(finetune, data, tmp_path, capsys):
    for name in ("one", "two"):
        finetune(output_dir=tmp_path / name, max_steps=1, do_train=True, **data)
    once = {"preset": None, "vocab_size": None, "do_eval": True, **data}
    finetune(output_dir=tmp_path / "scores", model_name_or_path=tmp_path / "one", **once)
    finetune(output_dir=tmp_path / "scores", model_name_or_path=tmp_path / "one", **once | {"do_predict": True})
    for folder in ("scores", "one"):
        with pytest.raises(ValueError, match="holds the results of another model"):
            finetune(output_dir=tmp_path / folder, model_name_or_path=tmp_path / "two", **once)
    results = json.loads((tmp_path / "scores/all_results.json").read_text())
    assert "eval_loss" in results and "test_loss" in results


def test_scores_of_earlier_weights_go_when_a_model_is_trained_again(finetune, data, tmp_path, capsys):
    model, scores = tmp_path / "model", tmp_path / "scores"
    scored = {"preset": None, "vocab_size": None, "model_name_or_path": model, "output_dir": scores, **data}
    finetune(output_dir=model, max_steps=1, **data)
    finetune(**scored, do_predict=True)
    finetune(**scored, do_eval=True)
    results = json.loads((scores / "all_results.json").read_text())
    assert "eval_loss" in results and "test_loss" in results
    finetune(output_dir=model, max_steps=2, do_train=True, overwrite_output_dir=True, **data)
    assert not names(model) & {"test_results.json", "eval_results.json", "generated_predictions.jsonl"}
    finetune(**scored, do_eval=True)
    results = json.loads((scores / "all_results.json").read_text())
    assert "eval_loss" in results and "test_loss" not in results
    assert not names(scores) & {"test_results.json", "generated_predictions.jsonl"}
    assert "its scores are of the model before it was trained again, and are dropped" in capsys.readouterr().out


def test_folders_of_all_stages_are_looked_at_first(data, tmp_path, never_trained):
    (tmp_path / "out/second/checkpoint-5").mkdir(parents=True)
    settings = TINY | data | {"do_train": True, "stages": [{}, {"name": "second"}]}
    (tmp_path / "two.yaml").write_text(json.dumps(settings))
    argv = [str(tmp_path / "two.yaml"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="second holds checkpoints of an earlier run"):
        run_stages(Translation, parse_command("translation", Translation.arguments_class, argv))
