"""What a run writes: whole files or none, a valid card template, a push that carries everything."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.data.files import replaced_folder, write_text
from finetune_deepseek.training.callbacks import plot_losses
from finetune_deepseek.training.model_card import SLOT, TEMPLATE, fill
from tests.small_runs import TINY, flags

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk():
    """No file can grow beyond 300 kB: the tokenizer fits, the weights don't."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end"])
def test_a_disk_that_is_full_ends_with_one_line_and_nothing_half_written(when, data, tmp_path, small_disk, capsys):
    out = tmp_path / "out"
    settings = TINY | data | {"output_dir": out, "max_steps": 2, "config_overrides": "hidden_size=128"}
    settings |= {"save_steps": 1} if when == "at a checkpoint" else {"save_strategy": "no"}
    assert guarded(["translation", *flags(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("deepseek-hf: error: ")
    assert not any("Traceback" in line for line in error)
    left = ["data_report.json", *["loss_plot.png"] * (when == "at the end")]
    assert sorted(path.name for path in out.rglob("*")) == left


def test_a_failed_save_keeps_what_was_there(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="full"), replaced_folder(folder) as beside:
        (beside / "weights").write_text("new")
        raise OSError("full")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    assert (folder / "weights").read_text() == "old"
    with replaced_folder(folder) as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "more").write_text("more")
        (beside / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert (folder / "sub" / "more").read_text() == "more"
    assert os.listdir(tmp_path) == ["model"]


def test_write_text_is_whole_or_nothing(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "x" * 100_000 + "\ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_template_is_one_file_and_a_valid_card():
    assert (ROOT / "model_card.md").read_bytes() == TEMPLATE.read_bytes()  # a link here, a copy in a source archive
    card = ModelCard.load(ROOT / "model_card.md", ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert "deepseek" in card.data.tags


def test_slots_are_filled_to_the_end_of_their_line():
    template = "# <!-- title -->Model\n<!-- usage -->\nend <!-- data -->kept"
    assert fill(template, {"title": "T", "usage": "a\nb"}) == "# T\na\nb\nend <!-- data -->kept"
    assert set(SLOT.findall(TEMPLATE.read_text())) == {
        *("title", "summary", "usage", "results", "data", "protocol"),
    }


def test_loss_plot_without_any_loss(tmp_path):
    plot_losses([], tmp_path / "loss_plot.png")
    plot_losses([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}], tmp_path / "loss_plot.png")
    assert os.listdir(tmp_path) == ["loss_plot.png"]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    """With one name beside the file for all, the later rename would find nothing to rename."""
    path = tmp_path / "config.json"
    code = (
        "import sys, pathlib; from finetune_deepseek.data.files import write_text; path = pathlib.Path(sys.argv[1])\n"
    )
    code += "for _ in range(500): write_text(path, 'content')"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    assert path.read_text() == "content" and list(tmp_path.iterdir()) == [path]
