"""Every numeric flag of every task and verb, transformers' own among them, says what numbers it takes."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from finetune_deepseek import TASKS
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.finetune import task_class
from finetune_deepseek.data.ranges import ANY, RANGES
from finetune_deepseek.language.serving.arguments import ChatArguments, GenerateArguments
from finetune_deepseek.question_answering.arguments import AnswerArguments
from finetune_deepseek.recommendation.arguments import RecommendArguments
from finetune_deepseek.training.arguments import LoraArguments, ModelArguments
from finetune_deepseek.training.trainer_arguments import TrainingArguments
from finetune_deepseek.translation.arguments import TranslateArguments

NEEDED = {
    "AnswerArguments": {"knowledge": "notes"},
    "RecommendArguments": {"history": "clicks.csv"},
    "TrainingArguments": {"output_dir": "out"},
    "ClassificationArguments": {"train_file": "rows.csv"},
    "LanguageModelingArguments": {"train_file": "rows.csv"},
    "ConversationArguments": {"train_file": "rows.csv"},
    "EmbeddingArguments": {"train_file": "rows.csv"},
    "ImageArguments": {"train_file": "rows.parquet"},
    "ImageGenerationArguments": {"train_file": "rows.parquet"},
    "DetectionArguments": {"train_file": "rows.parquet"},
    "NewsArguments": {"train_dir": "MIND"},
}
CLASSES = [ModelArguments, LoraArguments, TrainingArguments, AnswerArguments, RecommendArguments, TranslateArguments]
CLASSES += [ChatArguments, GenerateArguments]
CLASSES += [task_class(name).arguments_class for name in TASKS]


def numeric(arguments_class):
    """Flags whose values, or the values in whose lists, are numbers."""

    def kinds(hint):
        return {hint}.union(*map(kinds, get_args(hint)))

    hints = get_type_hints(arguments_class)
    return [f.name for f in fields(arguments_class) if f.init and kinds(hints[f.name]) & {int, float}]


@pytest.mark.parametrize("arguments_class", CLASSES, ids=lambda it: it.__name__)
def test_each_number_has_a_range_and_is_held_to_it(arguments_class):
    needed = NEEDED.get(arguments_class.__name__, {})
    arguments_class(**needed)
    names = numeric(arguments_class)
    assert names and not set(names) - set(RANGES)
    for name in names:
        for wrong in (math.nan, math.inf, *([-7] if RANGES[name][0] != ANY else [])):
            is_list = "list" in str(get_type_hints(arguments_class)[name])
            with pytest.raises(ValueError, match=f"^--{name} {wrong}: (it|each) must be {RANGES[name][0]}\\.$"):
                arguments_class(**needed, **{name: [wrong] if is_list else wrong})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_train_epochs": -1}, "--num_train_epochs -1: it must be above 0"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0: it must be above 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: it must be 1 or more"),
        ({"max_steps": 0}, "--max_steps 0: it must be 1 or more, or -1 for none"),
        ({"seed": -1}, "--seed -1: it must be from 0 to 4294967295"),
    ],
)
def test_the_command_says_so_before_it_reads_or_makes_anything(flags, says, tmp_path, capsys):
    argv = [f"--{name}={value}" for name, value in flags.items()]
    assert guarded(["translation", "--output_dir", f"{tmp_path}/out", "--train_file", "absent.csv", *argv]) == 2
    assert capsys.readouterr().err == f"deepseek-hf: error: {says}.\n"
    assert not (tmp_path / "out").exists()


def test_epochs_have_no_effect_beside_steps():
    assert TrainingArguments("out", num_train_epochs=-1, max_steps=3).max_steps == 3
