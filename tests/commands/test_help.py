"""What the command says of itself, and that it answers before torch and transformers are imported."""

import contextlib
import io
import json
import re
import subprocess
import sys
from argparse import SUPPRESS
from importlib.metadata import version

import pytest
from transformers import HfArgumentParser

from finetune_deepseek import TASKS
from finetune_deepseek.__main__ import guarded, main
from finetune_deepseek.checkpoints import checkpoint
from finetune_deepseek.checkpoints import export as checkpoint_export
from finetune_deepseek.commands import export
from finetune_deepseek.commands.finetune import task_class, task_flags
from finetune_deepseek.commands.help import OWN_HELP, VERBS
from finetune_deepseek.commands.parsing.runs import FIRST, ArgumentParser, draft_command, examples, parse_command
from finetune_deepseek.commands.parsing.transformers_flags import training_flags
from finetune_deepseek.training.trainer_arguments import TrainingArguments

HEAVY = ("torch", "datasets", "peft", "pandas", "scipy", "sklearn", "accelerate", "pyarrow", "transformers.trainer")
# Runs commands one after the other in a process of its own; prints code, standard error and heavy imports of each.
CHILD = f"""
import contextlib, io, json, sys
from finetune_deepseek.__main__ import main
found = []
for argv in json.loads(sys.argv[1]):
    sys.argv = ["deepseek-hf", *argv]
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    found.append([code, error.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]])
print(json.dumps(found))
"""


def answers(commands, folder):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_version_and_presets_import_nothing_heavy(tmp_path):
    commands = [["--help"], ["--version"], ["presets"], *([verb, "--help"] for verb in VERBS)]
    commands += [[verb, task, "--help"] for verb in ("finetune", "evaluate") for task in TASKS]
    commands += [["help", name] for name in (*TASKS, *OWN_HELP)]
    for command, found in zip(commands, answers(commands, tmp_path), strict=True):
        assert found == [0, "", []], command


MISTYPED = {
    **{
        (verb, "runs/none", "--outptu", "x"): "--outptu"
        for verb in ("chat", "generate", "translate", "recommend", "answer")
    },
    ("export", "a", "b", "--dtyp", "bf16"): "'--dtyp' (did you mean '--dtype'?)",
    ("inspect", "a", "--jsn"): "'--jsn' (did you mean '--json'?)",
    ("finetune", "translation", "--preset", "tiny_v3", "--output_dri", "x"): "(did you mean '--output_dir'?)",
    ("finetune", "translation", "--lora_r", "0", "--output_dir", "x"): "--lora_r 0: it must be 1 or more.",
    ("predict", "translation", "runs/none", "--seeed", "1"): "--seeed (did you mean '--seed'?)",
    ("evalute", "translation"): "unknown verb 'evalute' (did you mean 'evaluate'?)",
    ("finetune", "translatoin"): "(did you mean 'translation'?)",
    ("help", "translatoin"): "(did you mean 'translation'?)",
    ("presets", "tiny"): "unexpected argument 'tiny'",
}
TRAIN, OUT = ("--train_file", "train.josn"), ("--output_dir", "x")
ABSENT = {
    ("finetune", "translation", "--preset", "tiny_v3", *TRAIN, *OUT): "no such file (did you mean 'train.json'?)",
    ("finetune", "embedding", "--preset", "tiny_v3", "--data_dir", "none", *OUT): "none: no such folder",
    ("finetune", "news_recommendation", "--train_dir", "none", *OUT): "--train_dir none: no such folder",
    ("finetune", "recommendation", "--interactions_file", "none.csv", *OUT): "none.csv: no such file",
    ("finetune", "translation", "none.yaml"): "none.yaml: can't be read",
    ("finetune", "translation", "--model_name_or_path", "./none", *OUT): "./none: no such folder",
    ("predict", "translation", "./none"): "./none: no such folder",
    ("translate", "./none"): "./none: no such folder",
    ("chat", "./none"): "./none: no such folder",
    ("generate", "./none", "hello"): "./none: no such folder",
    ("generate", ".", "--input", "train.josn"): "no such file (did you mean 'train.json'?)",
    ("recommend", "./none", "--history", "train.json"): "./none: no such folder",
    ("recommend", "./none", "--history", "none.json"): "--history none.json: no such file",
    ("answer", "./none", "--knowledge", ".", "Who?"): "./none: no such folder",
    ("answer", "--knowledge", "none", "Who?"): "--knowledge none: no such file or folder",
    ("answer", "--knowledge", ".", "--retriever", "./none", "Who?"): "--retriever ./none: no such folder",
    ("export", "./none", "x", "--to", "native"): "./none: no such folder",
    ("export", ".", "x", "--to", "native", "--merge-adapter", "./none"): "--merge-adapter ./none: no such folder",
    ("inspect", "./none"): "./none: no such folder",
}  # fmt: skip


@pytest.mark.parametrize("cases", [MISTYPED, ABSENT], ids=["mistyped", "absent"])
def test_bad_input_is_answered_before_anything_heavy_is_imported(cases, tmp_path):
    (tmp_path / "train.json").write_text("{}")
    for (command, message), (code, error, heavy) in zip(cases.items(), answers([*cases], tmp_path), strict=True):
        assert (code, error.count("\n"), heavy) == (2, 1, []), (command, error)
        assert error.startswith("deepseek-hf: error: ") and message in error, (command, error)


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_shows_what_people_use_first(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            draft_command(task, task_flags(task), [flag])
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    short, whole = texts
    assert short.count("\n") < 80
    lines = short.splitlines()
    assert lines[2:4] == ["example:", examples(task_flags(task))[0].splitlines()[0]]
    shown = set(re.findall(r"^  --(\w+)", short, re.MULTILINE))
    assert shown == {"help_all", *FIRST, *task_flags(task).FIRST}
    everything = set(re.findall(r"^  --(\w+)", whole, re.MULTILINE))
    assert everything >= {action.dest for action in ArgumentParser(task, task_flags(task))._actions} - {"help"}
    assert "(default: 8)" in short and "\n--help_all lists every flag" in short
    assert all(command in whole for command in examples(task_flags(task)))


def test_help_of_a_task_by_the_verb_help(capsys):
    texts = []
    for argv in (["help", "classification"], ["finetune", "classification", "--help"]):
        with pytest.raises(SystemExit):
            guarded(argv[1:], argv[0])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "--label_column" in texts[0]


def test_version_names_what_a_report_should(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-hf", "--version"])
    assert main() == 0
    assert re.match(
        rf"deepseek-hf \S+ .*transformers {re.escape(version('transformers'))}, torch \d", capsys.readouterr().out
    )


def actions(flags_class):
    parser = HfArgumentParser(flags_class, allow_abbrev=False)
    return {
        tuple(action.option_strings): (action.dest, action.nargs, action.const, action.default, action.help)
        for action in parser._actions
        if action.help != SUPPRESS
    }


def test_flags_read_from_the_source_of_transformers_are_those_of_its_class():
    light, real = actions(training_flags()), actions(TrainingArguments)
    pinning = ("--dataloader_pin_memory", "--dataloader-pin-memory")
    assert real.pop(pinning)[:3] == light.pop(pinning)[:3]  # its default depends on the machine
    assert light == real and len(light) > 130


def test_values_of_all_kinds_reach_transformers_class():
    argv = [
        "--output_dir=x",
        "--preset=tiny_v3",
        "--eval_strategy=epoch",
        "--save_strategy=best",
        "--seed=7",
        "--bf16",
    ]
    argv += [
        '--lr_scheduler_kwargs={"a": 1}',
        "--label_names",
        "a",
        "b",
        "--no_predict_with_generate",
        "--report_to=none",
    ]
    argv += ["--adam_beta2=0.5", "--metric_for_best_model=f1", "--generation_config=c.json", "--fsdp=full_shard"]
    (draft,) = draft_command("translation", task_flags("translation"), argv)
    assert draft.training["lr_scheduler_kwargs"] == '{"a": 1}'
    del draft.training["fsdp"]  # needs several processes
    training = draft.stage().training
    assert (training.eval_strategy.value, training.save_strategy.value, training.seed) == ("epoch", "best", 7)
    assert (training.lr_scheduler_kwargs, training.label_names) == ({"a": 1}, ["a", "b"])
    assert (training.bf16, training.predict_with_generate, training.adam_beta2) == (True, False, 0.5)
    assert training.learning_rate == 1e-3 and training.optim == "adamw_torch_fused"


def test_a_word_of_transformers_own_is_refused_in_one_line():
    for flag, message in (
        ("log_level=loud", "--log_level loud: no such choice"),
        ("eval_strategy=often", "invalid choice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_command(
                "translation", task_flags("translation"), ["--output_dir=x", "--preset=tiny_v3", f"--{flag}"]
            )


def test_what_light_files_repeat_is_what_heavy_ones_have():
    assert (*checkpoint_export.FORMS,) == export.FORMS and (*checkpoint.DTYPES,) == export.DTYPES
    assert all(task_class(name).arguments_class is task_flags(name) for name in TASKS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_reaches_a_pipe_of_another_encoding(verb, monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, "cp1252"))
    monkeypatch.setattr("sys.argv", ["deepseek-hf", verb, "--help"])
    with contextlib.suppress(SystemExit):
        assert main() == 0
    sys.stdout.flush()
    assert b"deepseek-hf" in pipe.getvalue()


def test_pretraining_says_that_it_takes_texts():
    flag = next(action for action in ArgumentParser("x", task_flags("language_modeling"))._actions
                if action.dest == "train_file")  # fmt: skip
    assert flag.help.startswith(".txt, .text or .md (see --document_separator), or .json, ") and flag.nargs == "+"
