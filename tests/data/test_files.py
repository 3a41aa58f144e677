"""Files that are written have the same bytes on every system."""

from pathlib import Path, PureWindowsPath

from finetune_deepseek.checkpoints import shards
from finetune_deepseek.data import files
from finetune_deepseek.training import model_card

WRITE = Path.write_text


def as_windows(self, data, encoding=None, errors=None, newline=None):
    """Text written there ends its lines by two characters unless it is told otherwise."""
    return WRITE(self, data, encoding, errors, "\r\n" if newline is None else newline)


def test_lines_end_by_a_line_feed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", as_windows)
    files.write_text(tmp_path / "README.md", "---\nlanguage: de\n---\n")
    files.write_json(tmp_path / "results.json", {"bleu": 1.5, "chrf2": None})
    shards.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {}})
    for path in tmp_path.iterdir():
        assert b"\r" not in path.read_bytes() and path.read_bytes().endswith(b"\n")


def test_a_card_names_its_folder_with_slashes(monkeypatch):
    assert model_card.shown_folder("runs/translation") == "runs/translation"
    assert model_card.shown_folder("/home/anna/runs/translation") == "translation"
    monkeypatch.setattr(model_card, "Path", PureWindowsPath)
    assert model_card.shown_folder(r"runs\translation") == "runs/translation"
    assert model_card.shown_folder(r"C:\Users\anna\translation") == "translation"
