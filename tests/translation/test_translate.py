"""The verbs on saved models: translate, evaluate, predict."""

import io
import json
import shutil
import sys

import pytest

from finetune_deepseek import __main__ as command
from finetune_deepseek.commands.translate import parse
from finetune_deepseek.training.batches import batches_by_length
from finetune_deepseek.training.saved import Saved
from finetune_deepseek.translation.arguments import TranslateArguments, TranslationArguments
from finetune_deepseek.translation.translator import prompts_of
from tests.small_runs import PAIRS, TINY, flags, write_jsonl

SOURCES, TARGETS = ([pair[side] for pair in PAIRS] for side in (0, 1))
TEMPLATE = r"{source_lang}>{target_lang}\n{source} ="  # not the default: the verbs must take it from the card


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `model`, which learned the three rows, and `adapter`, which learned them the other way round."""
    folder = tmp_path_factory.mktemp("models")
    path = write_jsonl(folder / "rows.jsonl", PAIRS)
    settings = TINY | {"train_file": path, "prompt_template": TEMPLATE, "max_steps": 40}
    assert command.guarded(["translation", *flags(settings | {"output_dir": folder / "model"})]) == 0
    settings |= {"preset": None, "model_name_or_path": folder / "model", "use_peft": True, "lora_target": ["all"]}
    settings |= {"source_lang": "de", "target_lang": "en", "output_dir": folder / "adapter", "max_steps": 80}
    assert command.guarded(["translation", *flags(settings)]) == 0
    return folder


@pytest.fixture
def main(monkeypatch, capfd):
    """Run `deepseek-hf ...` with text on standard input; gives exit code, standard output, standard error."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = command.main()
        return code, *capfd.readouterr()

    return run


def text(lines):
    return "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_lines_keep_their_places(models, main, batch_size, tmp_path):
    source = tmp_path / "in.txt"
    lines = ["three", "", "two birds", "  ", "one", "three"]
    source.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())  # neither the mark nor the ends are text
    target = tmp_path / "out.txt"
    code, out, err = main(
        "translate", models / "model", "--input", source, "--output", target, "--batch_size", batch_size
    )
    assert (code, out) == (0, "")
    assert target.read_text(encoding="utf-8") == text(["drei", "", "zwei Vögel", "", "eins", "drei"])
    assert "4/4" in err


def test_standard_input_to_standard_output(models, main):
    code, out, _ = main("translate", models / "model", "--num_beams", 3, stdin=text(SOURCES).encode())
    assert (code, out) == (0, text(TARGETS))
    assert main("translate", models / "model")[:2] == (0, "")
    assert main("translate", models / "model", stdin=b"\n\n")[:2] == (0, "\n\n")


def test_a_translation_ends_before_the_stop_text(models, main, tmp_path):
    """For models that go on after a translation, as a few-shot prompt makes them do."""
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    out = tmp_path / "out"
    argv = ("predict", "translation", models / "model", "--test_file", rows, "--output_dir", out, "--stop_text", "ei")
    assert main(*argv, "--use_cpu", "true")[0] == 0
    found = [json.loads(line)["prediction"] for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert found == ["", "zw", "dr"]


def test_beam_options_reach_the_search(models, main, monkeypatch):
    seen = []

    def look(lines, model, tokenizer, prompts, generation_config, batch_size, report):
        seen.append(generation_config)
        return list(lines)

    monkeypatch.setattr("finetune_deepseek.translation.translator.translate_lines", look)
    argv = ("--num_beams", 4, "--length_penalty", 0.6, "--max_target_length", 9)
    assert main("translate", models / "model", *argv, stdin=b"one\n")[0] == 0
    (found,) = seen
    assert (found.num_beams, found.length_penalty, found.max_new_tokens, found.do_sample) == (4, 0.6, 9, False)


def test_an_adapter_translates_its_own_pair(models, main):
    code, out, _ = main("translate", models / "adapter", stdin=text(TARGETS).encode())
    assert (code, out) == (0, text(SOURCES))
    code, _, err = main("translate", models / "adapter", "--target_lang", "de")
    assert code == 2 and "adapter is for de to en; name another model." in err


def test_the_folder_has_what_the_model_depends_on(models):
    settings = Saved.open(None, str(models / "model")).settings_for("translation", TranslationArguments)
    assert settings == {
        **{
            "source_lang": "en",
            "target_lang": ["de"],
            "both_directions": False,
            "preprocess": "none",
            "stop_text": None,
            "max_source_length": 104,  # of 128 positions, those that the target leaves
            "max_target_length": 24,
        },
        "prompt_template": TEMPLATE.replace("\\n", "\n"),
    }
    with pytest.raises(ValueError, match="made for translation, not for other; name another model"):
        Saved.open(None, str(models / "model")).settings_for("other", TranslationArguments)


@pytest.mark.parametrize(
    ("card", "arguments", "message"),
    [
        (None, {}, "no card says which languages it translates; give --source_lang, --target_lang"),
        ("language: [en, de]", {"source_lang": "en", "target_lang": "fr"}, "--target_lang fr: by its card, .* en, de"),
        ("language: [en, de]", {"source_lang": "de"}, "give --source_lang, --target_lang"),
        (
            "deepseek_hf: {source_lang: en, target_lang: de}",
            {"target_lang": "fr"},
            "--target_lang fr: .* en to de;",
        ),
        ("deepseek_hf: {source_lang: en, target_lang: [de, zh]}", {}, "is for en to de, en to zh; choose by"),
        ("language: [en", {}, "README.md: the metadata can't be read"),
        ("deepseek_hf: {task: other}", {}, "made for other, not for translation"),
    ],
)
def test_language_pairs_are_checked(tmp_path, card, arguments, message):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek"}')
    if card:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=message):
        prompts_of(str(tmp_path), TranslateArguments(**arguments))


def test_a_model_without_our_card_takes_flags(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek"}')
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n")
    with pytest.raises(ValueError, match="--target_lang de"):
        prompts_of(str(tmp_path), TranslateArguments(source_lang="en", target_lang="de"))
    (tmp_path / "README.md").unlink()
    prompts = prompts_of(str(tmp_path), TranslateArguments(source_lang="en", target_lang="de", max_target_length=7))
    assert (prompts.prompt("one", "en", "de"), prompts.arguments.max_target_length) == ("de: one\n", 7)


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["--input=missing.txt"], b"", "--input missing.txt: can't be read (No such file or directory)."),
        ([], "one\nzw\xf6lf\n".encode("latin-1"), "standard input, line 2: not UTF-8 text"),
        ([], b"one\n" + b"word " * 200, "line 2: "),
        (["--output=missing/out.txt"], b"one", "--output missing/out.txt: there is no such folder"),
        (["--num_beams=0"], b"", "--num_beams 0: it must be 1 or more."),
        (["--length_penalty=2"], b"", "--length_penalty has no effect without beams"),
        (
            ["--beams=2"],
            b"",
            "unexpected argument '--beams=2' (did you mean '--num_beams'?); see deepseek-hf translate --help.",
        ),
    ],
)
def test_bad_input_is_one_line(models, main, argv, stdin, message):
    code, out, err = main("translate", models / "model", *argv, stdin=stdin)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"deepseek-hf: error: {message}")
    assert "Traceback" not in err


def test_texts_longer_than_in_training_are_said(models, main):
    code, out, err = main("translate", models / "model", "--max_target_length", 4, stdin=b"one\n" + b"word " * 20)
    assert code == 0 and out.count("\n") == 2
    assert "note" not in err
    card = models / "model" / "deepseek_hf.json"
    content = card.read_text()
    card.write_text(content.replace('"max_source_length": 104', '"max_source_length": 20'))
    err = main("translate", models / "model", "--max_target_length", 4, stdin=b"one\n" + b"word " * 20)[2]
    card.write_text(content)
    assert "note: 1 texts (first: line 2) have more than the 20 prompt tokens of training" in err


def test_batches_are_of_like_length():
    assert list(batches_by_length([3, 9, 1, 9, 4], 2)) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_predict_and_evaluate_ask_as_in_training(models, main, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data_dir", tmp_path / "data"]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", PAIRS)
    assert main("predict", "translation", models / name, *data)[0] == 0
    folder = tmp_path / "runs" / f"predict-{name}"
    results = json.loads((folder / "all_results.json").read_text())
    assert results["test_exact_match"] == 1.0
    assert not any(key.startswith(("train_", "eval_")) for key in results)
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == (TARGETS if name == "model" else SOURCES)

    (tmp_path / "flags.yaml").write_text("do_train: true\nmax_eval_samples: 2\nuse_cpu: true\n")
    argv = ["evaluate", "translation", models / name, "flags.yaml", *data, "--output_dir", tmp_path / "out"]
    assert main(*argv)[0] == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["eval_exact_match"], results["eval_samples"]) == (1.0, 2)
    assert not any(key.startswith(("train_", "test_")) for key in results)


def test_verbs_say_what_is_missing(main):
    code, out, _ = main("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in command.VERBS)
    assert main("tranlsate")[2].startswith(
        "deepseek-hf: error: unknown verb 'tranlsate' (did you mean 'translate'?); there is"
    )
    assert "evaluate translation: name the model next" in main("evaluate", "translation")[2]
    assert "evaluate translation: name the model next" in main("evaluate", "translation", "--max_steps", "1")[2]
    assert "the model comes first (a folder or a Hub id), found --input." in main("translate", "--input", "x")[2]
    assert "unknown task 'x'" in main("predict", "x", "model")[2]
    with pytest.raises(SystemExit):
        parse(["--help"])


def test_what_a_model_would_return_beside_its_ids_changes_nothing(models, main, tmp_path):
    shutil.copytree(models / "model", tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    returns = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2, "do_sample": True}
    returns |= {"stop_strings": "X"}
    path.write_text(json.dumps(json.loads(path.read_text()) | returns))
    for beams in (1, 2):
        code, out, err = main("translate", tmp_path / "model", "--num_beams", beams, stdin=text(SOURCES).encode())
        assert (code, out) == (0, text(TARGETS)), err
