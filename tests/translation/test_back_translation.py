"""Back-translation: rows by the reverse model, made once, counted and said; what doesn't fit is one line."""

import json
import shutil

import pytest
import torch

from finetune_deepseek.translation import back_translation
from finetune_deepseek.translation.arguments import TranslationArguments
from finetune_deepseek.translation.task import Translation
from tests.small_runs import PAIRS, write_jsonl

TEXT = "eins\n\n  drei\nzwei Vögel\n"


@pytest.fixture(scope="module")
def reverse(tmp_path_factory):
    """A model from German to English that knows the three rows by heart."""
    from finetune_deepseek.__main__ import guarded
    from tests.small_runs import TINY, flags

    folder = tmp_path_factory.mktemp("reverse")
    path = write_jsonl(folder / "rows.jsonl", PAIRS)
    settings = TINY | {"train_file": path, "source_lang": "de", "target_lang": "en", "max_steps": 40}
    assert guarded(["translation", *flags(settings | {"output_dir": folder / "de-en"})]) == 0
    return folder / "de-en"


@pytest.fixture
def settings(reverse, tmp_path):
    (tmp_path / "mono.de").write_text(TEXT, encoding="utf-8")
    return {
        "train_file": str(write_jsonl(tmp_path / "rows.jsonl", PAIRS[:1])),
        "target_lang": "de",
        "back_translation_file": str(tmp_path / "mono.de"),
        "back_translation_model": str(reverse),
    }


def load(**settings):
    return Translation(TranslationArguments(**settings), seed=0).load_splits()["train"]


def test_rows_are_added_counted_and_made_once(settings, finetune, tmp_path, monkeypatch, capsys):
    results = finetune(**settings, max_steps=1, output_dir=tmp_path / "first")
    assert results["train_samples"] == 1 + 3
    (kept,) = tmp_path.glob("mono.de.de-en-*.jsonl")
    rows = [json.loads(line)["translation"] for line in kept.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"en": en, "de": de} for en, de in (PAIRS[0], PAIRS[2], PAIRS[1])]
    line = "3 training rows back-translated from mono.de by de-en"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "first" / "README.md").read_text(encoding="utf-8")

    def fail(*args):
        raise AssertionError("generated again")

    monkeypatch.setattr(back_translation, "generate", fail)
    again = finetune(**settings, max_steps=1, output_dir=tmp_path / "again")
    assert again["train_loss"] == results["train_loss"]  # generation drew no random numbers from the run
    (tmp_path / "mono.de").write_text("eins\n")
    with pytest.raises(AssertionError, match="generated again"):  # another text, another file
        load(**settings)
    with pytest.raises(AssertionError, match="generated again"):
        load(**settings, back_translation_beams=2)


def test_only_the_direction_to_the_real_side_gets_rows(settings):
    rows = load(**settings, both_directions=True)
    assert [(row["source_lang"], row["target_lang"]) for row in rows][-3:] == [("en", "de")] * 3
    assert len(rows) == 2 + 3
    streamed = list(load(**settings, streaming=True))
    assert sorted(row["target"] for row in streamed) == ["drei", "eins", "eins", "zwei Vögel"]


def test_an_interrupted_generation_leaves_nothing(settings, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(back_translation, "translate_lines", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(**settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mono.de", "rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"back_translation_model": None}, "--back_translation_file and --back_translation_model need each other"),
        ({"back_translation_file": "missing"}, "--back_translation_file missing: no such file"),
        ({"back_translation_model": "missing"}, "--back_translation_model missing: no such folder"),
        ({"target_lang": "zh"}, "--source_lang zh --target_lang en: .* is for de to en; name another"),
        ({"source_lang": "de", "target_lang": "en"}, "--source_lang en --target_lang de: .* is for de to en"),
        ({"preprocess": "moses_lower"}, "was trained with --preprocess none, this run has moses_lower"),
    ],
)
def test_what_does_not_fit_is_one_line(change, message, settings, tmp_path):
    rows = [{"translation": {"en": "one", "de": "eins", "zh": "一"}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message) as error:
        load(**(settings | change))
    assert "\n" not in str(error.value)


def test_a_broken_file_of_pairs_is_not_used(settings, tmp_path):
    load(**settings)
    (kept,) = tmp_path.glob("mono.de.de-en-*.jsonl")
    kept.write_text("{")
    with pytest.raises(ValueError, match="jsonl: broken; remove it, and it will be made again"):
        load(**settings)
    (tmp_path / "mono.de").write_text(" \n")
    with pytest.raises(ValueError, match="mono.de: no text"):
        load(**settings)


def test_another_base_of_the_adapter_is_another_model(settings, reverse, finetune, tmp_path):
    """Nothing is translated, or taken from what is kept, by an adapter on other weights than its training's."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(reverse, base, ignore=shutil.ignore_patterns("checkpoint-*"))
    adapter = {"model_name_or_path": base, "preset": None, "vocab_size": None, "use_peft": True, "max_steps": 1}
    pairs = {"train_file": settings["train_file"], "source_lang": "de", "target_lang": "en"}
    finetune(**pairs, **adapter, output_dir=tmp_path / "adapter")
    settings |= {"back_translation_model": str(tmp_path / "adapter")}
    load(**settings)
    load(**settings)
    assert len(list(tmp_path.glob("mono.de.adapter-*.jsonl"))) == 1
    weights = load_file(base / "model.safetensors")
    save_file({name: torch.zeros_like(w) for name, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its base model"):  # the adapter was trained on other weights
        load(**settings)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "deepseek_hf.json"])
def test_each_file_that_decides_what_a_model_writes_makes_another_one(name, settings, reverse, tmp_path):
    """Of an adapter's changes to its base, and of a tokenizer's BOS, nothing else may speak."""
    model = tmp_path / "model"
    shutil.copytree(reverse, model, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings |= {"back_translation_model": str(model)}
    load(**settings)
    (model / "training_args.bin").write_bytes(b"of no concern")
    load(**settings)
    assert len(list(tmp_path.glob("mono.de.model-*.jsonl"))) == 1
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {"more": 1}))
    load(**settings)
    assert len(list(tmp_path.glob("mono.de.model-*.jsonl"))) == 2
