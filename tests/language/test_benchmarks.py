"""The language models of benchmarks/: their flags are known, and their sizes are what the tables say."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from configuration_deepseek import preset
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.language.arguments import LanguageModelingArguments
from finetune_deepseek.training.loading import parse_overrides
from finetune_deepseek.training.weights.lora import census
from tests.recommendation.test_benchmarks import BENCHMARKS, benchmark


def active(model, vocab_size):
    if model.preset:
        config = preset(model.preset, **parse_overrides(model.config_overrides), vocab_size=vocab_size)
    else:
        config = AutoConfig.from_pretrained(model.config_name, vocab_size=vocab_size)
    return sum(group.active for group in census(AutoModelForCausalLM.from_config(config)).values())


def sizes_of(name, vocab_size, folder, monkeypatch):
    """Each system's active parameters; every flag is read on the way."""
    compare = benchmark(monkeypatch, "compare")
    table = compare.read_table(BENCHMARKS / f"{name}.yaml")
    sizes = {}
    for system, settings in compare.systems_of(table).items():
        places = {"data": str(folder), "here": str(BENCHMARKS)}
        for more in ({}, table.get("choose", {}).get("settings", {})):
            told = settings | more | {"output_dir": folder, "use_cpu": True, "learning_rate": 0.01}
            (stage,) = parse_command("language_modeling", LanguageModelingArguments, compare.flags(told, places))
        sizes[system] = active(stage.model, vocab_size)
    return sizes


@pytest.mark.parametrize(
    ("name", "vocab_size", "limit"),
    [
        ("tinyshakespeare", 279, 800_000),
        ("tinyshakespeare_muon", 279, 800_000),
        ("song_ci_language", 6000, 3_050_000),
    ],
)
def test_flags_are_known_and_sizes_are_alike(name, vocab_size, limit, tmp_path, monkeypatch):
    sizes = sizes_of(name, vocab_size, tmp_path, monkeypatch)
    assert sizes["ours"] == sizes["native DeepSeek-V3"]
    assert all(0.95 * limit < size <= limit for size in sizes.values())


@pytest.mark.parametrize("name", ["tinyshakespeare_parts", "tinyshakespeare_20_minutes"])
def test_one_thing_changed_leaves_about_as_much_active(name, tmp_path, monkeypatch):
    sizes = sizes_of(name, 279, tmp_path, monkeypatch)
    assert all(0.95 * 800_000 < size <= 1.3 * 800_000 for size in sizes.values()), sizes  # an MTP layer counts
