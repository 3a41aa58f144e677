"""What tells a model from others: every file that counts, parts of large ones, an adapter's base, not the place."""

import json
import shutil

import pytest

from finetune_deepseek.training import identity as module
from finetune_deepseek.training.identity import content_of, identity
from finetune_deepseek.training.saved import Saved


def mark(folder):
    return identity(Saved.open(None, str(folder)))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "deepseek"}')
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt", "vocab.txt",
     "spiece.model", "model-00001-of-00002.safetensors", "modeling_own.py", "catalogue/tokenizer.json"],
)  # fmt: skip
def test_every_file_that_counts_counts(name, base):
    before = mark(base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("{}")
    assert mark(base) != before


def test_place_results_and_outputs_do_not_count(base, tmp_path):
    before = mark(base)
    for name in ("all_results.json", "README.md", "out.jsonl", "out.jsonl.settings.json", "training_args.bin"):
        (base / name).write_text("{}")
    shutil.move(base, tmp_path / "moved")
    assert mark(tmp_path / "moved") == before


def test_the_base_of_an_adapter_counts(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(bytes(10))
    before = mark(adapter)
    (base / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert mark(adapter) != before


def test_large_files_are_read_from_end_to_end_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(module, "PART_BYTES", 10)
    monkeypatch.setattr(module, "PARTS", 3)
    seen = set()
    path = tmp_path / "weights"
    for place in (None, 0, 9, 10, 95, 104, 105, 190, 199):
        content = bytearray(200)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        seen.add(content_of(path))
    assert len(seen) == 1 + 6  # 10 and 105 lie between the parts 0-9, 95-104, 190-199
