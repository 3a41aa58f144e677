"""The README's commands and Python lines do what they say; both languages show the same ones."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_deepseek import TASKS
from finetune_deepseek.commands.finetune import task_flags
from finetune_deepseek.commands.help import VERBS as ALL_VERBS
from finetune_deepseek.commands.parsing.runs import draft_command

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
PAIRS = [("one", "eins"), ("two", "zwei"), ("three", "drei")]
VERBS = ("evaluate", "predict", "generate", "translate", "export", "inspect")
# What makes a run of the README's commands small; appended, so it wins.
SMALL = ["--max_steps", "1", "--vocab_size", "300", "--per_device_train_batch_size", "2", "--max_target_length", "8"]


def blocks(readme: str, language: str) -> list[str]:
    """The fenced code blocks of one language, comments stripped."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return [re.sub(r"\s+#.*", "", block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(readme: str) -> list[list[str]]:
    text = "\n".join(blocks(readme, "bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_both_languages_show_the_same_code():
    english, chinese = ((commands(readme), blocks(readme, "python")) for readme in READMES)
    assert english == chinese
    assert len(english[0]) >= 8 and len(english[1]) == 2


def test_files_named_in_the_map_exist_and_none_is_left_out():
    for page in ("docs/architecture.md", "docs/architecture.zh-CN.md"):
        block = re.search(r"```\n(configuration_deepseek/ .*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
        assert block is not None
        named = set(re.findall(r"[\w.]+\.(?:py|yaml)\b", block[1]))
        there = {path.name for path in ROOT.glob("*_deepseek/*.*") if path.suffix in (".py", ".yaml")}
        assert named == there - {"__init__.py"}, page
        rooms = {path.parent.name for path in ROOT.glob("finetune_deepseek/**/__init__.py")} - {"finetune_deepseek"}
        assert rooms <= set(re.findall(r"(\w+)/", block[1])), page


def task_commands(readme: str) -> dict[str, list[str]]:
    """The command of each task in the table, without `deepseek-hf finetune`."""
    text = (ROOT / readme).read_text("utf-8")
    found = re.findall(r"^\| (\w+) \| .*`deepseek-hf finetune ([^`]+)`", text, re.MULTILINE)
    return {task: shlex.split(command) for task, command in found}


def test_the_table_has_every_task_and_a_command_that_it_takes():
    english, chinese = map(task_commands, READMES)
    assert english == chinese and list(english) == list(TASKS)
    for task, (name, *flags) in english.items():
        (draft,) = draft_command(task, task_flags(task), flags)
        assert name == task and {"preset", "output_dir"} < draft.given
        assert draft.given & set(task_flags(task).SOURCES or {"train_dir"})


def test_the_table_has_every_verb():
    for readme in READMES:
        verbs = re.findall(r"^\| `(\w+) \[?[A-Z]", (ROOT / readme).read_text("utf-8"), re.MULTILINE)
        assert verbs == [verb for verb in ALL_VERBS if verb not in ("presets", "help")]


def test_readmes_are_short():
    assert all(len((ROOT / readme).read_text("utf-8").splitlines()) < 200 for readme in READMES)


def test_headings_that_are_linked_to_exist():
    for readme in READMES:
        text = (ROOT / readme).read_text("utf-8")
        links = [*re.findall(r"(docs/[\w.-]+)#([^)\s]+)", text)]
        assert len(links) >= 9
        for page, anchor in links:
            headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\s-]", "", line).lower().replace(" ", "-") for line in headings], anchor


def test_make_targets_are_the_pip_commands():
    shown = commands("README.md")
    for target in ("quickstart", "test"):
        assert ["make", target] in shown
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
    fresh = run(["make", "-n", "quickstart", "VENV=absent"], ROOT)
    assert '-c constraints.txt -e ".[dev]"' in fresh
    assert ["pip", "install", "-c", "constraints.txt", "-e", ".[dev]"] in shown


def test_python_lines_run(tmp_path):
    code = "\n".join(blocks("README.md", "python"))
    out = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(ROOT))
    assert re.search(r"tensor\(\[\[\s*0,\s*5,\s*8,\s*13,", out)


def test_translation_commands_run(tmp_path):
    rows = [{"translation": {"en": english, "de": german}} for english, german in PAIRS]
    for name in ("train.json", "dev.json", "test.json"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    shown = [command for command in commands("README.md") if "--train_file" in command or "--help" in command]
    assert len(shown) == 3
    verbs = [command for command in commands("README.md") if command[1] in VERBS]
    assert len(verbs) == 9
    (tmp_path / "english.txt").write_text("one\n\ntwo\n")
    for command in shown + verbs:
        assert command[0] == "deepseek-hf"
        small = SMALL if "--train_file" in command else []
        run([sys.executable, "-m", "finetune_deepseek", *command[1:], *small], tmp_path, PYTHONPATH=str(ROOT))
    assert (tmp_path / "runs/en-de/model.safetensors").is_file()
    assert (tmp_path / "runs/en-de-lora/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/en-de-dev/eval_results.json").is_file()
    assert (tmp_path / "runs/predict-en-de-lora/generated_predictions.jsonl").is_file()
    for name in ("native/config.json", "merged/config.json", "en-de.gguf", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "exported" / name).is_file()
    assert (tmp_path / "completions.jsonl").read_text(encoding="utf-8").count("\n") == 3
    assert (tmp_path / "german.txt").read_text(encoding="utf-8").count("\n") == 3


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart's folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "finetune_deepseek", "translation", "--output_dir", str(folder)]
    run(command, folder, PYTHONPATH=str(ROOT))
    return folder


@pytest.mark.slow
def test_quickstart_reaches_what_it_promises(quickstart):
    results = json.loads((quickstart / "all_results.json").read_text())
    assert results["test_exact_match"] >= 0.75
    assert results["test_exact_match"] > results["baseline_exact_match"]
    assert results["adapter_exact_match"] > results["adapter_baseline_exact_match"]
    assert results["adapter_parameters_trainable_share"] <= 0.1


@pytest.mark.slow
def test_the_wheel_alone_translates_as_the_tested_versions_do(quickstart, tmp_path):
    """Installed without constraints.txt, so with the newest of everything."""
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "project", ignore=unwanted)  # else an old build folder is packed too
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", ".", "./project"], tmp_path)
    run([sys.executable, "-m", "venv", "bare"], tmp_path)
    bin_folder = tmp_path / "bare" / "bin"
    install = [str(bin_folder / "python"), "-m", "pip", "install", "-q", str(next(tmp_path.glob("*.whl")))]
    run(install, tmp_path, PYTHONPATH="")
    predictions = (quickstart / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    sources = [json.loads(line)["source"] for line in predictions[:200]]
    (tmp_path / "sources.txt").write_text("\n".join(sources) + "\n", encoding="utf-8")
    arguments = ["translate", str(quickstart), "--input", "sources.txt", "--output"]
    run([sys.executable, "-m", "finetune_deepseek", *arguments, "tested.txt"], tmp_path, PYTHONPATH=str(ROOT))
    run([str(bin_folder / "deepseek-hf"), *arguments, "newest.txt"], tmp_path, PYTHONPATH="")
    tested, newest = ((tmp_path / name).read_text(encoding="utf-8") for name in ("tested.txt", "newest.txt"))
    assert tested.count("\n") == 200 and newest == tested
