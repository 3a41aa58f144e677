"""The rooms of finetune_deepseek: none is left out of a wheel, and names that saved things hold still work."""

import importlib
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from setuptools import find_packages
from test_readme import ROOT

from finetune_deepseek import TASKS
from finetune_deepseek.commands.finetune import task_class
from finetune_deepseek.commands.help import HOMES, VERBS

PACKAGE = ROOT / "finetune_deepseek"
APPLICATIONS = ("translation", "classification", "images", "drawing", "question_answering", "recommendation")


def test_a_wheel_holds_every_room_and_what_lies_beside_its_code():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {path.parent for path in ROOT.glob("*_deepseek/**/*.py")}
    assert set(found) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    beside = {path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    taken = {path for folder in folders for name in settings["package-data"]["*"] for path in folder.glob(name)}
    assert beside <= taken and {path.suffix for path in beside} == {".yaml", ".md", ".typed"}


def test_no_room_and_no_file_is_too_large_to_look_over():
    for room in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len(list(room.glob("*.py"))) <= 15, room
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in ROOT.glob("*_deepseek/**/*.py")}
    assert {path.name: count for path, count in lines.items() if count > 500} == {}


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("recommend.load", "recommendation.serving"),
        ("encoding.encode", "retrieval.encoding"),
        ("retrieval.PassageIndex", "retrieval.passage_index"),
        ("retrieval.Retriever", "retrieval.passage_index"),
        ("prompt_ranking.rank", "recommendation.prompt_ranking"),
    ],
)
def test_names_in_saved_cards_and_folders_are_those_of_the_rooms(name, home):
    module, _, attribute = name.partition(".")
    persisted = getattr(importlib.import_module(f"finetune_deepseek.{module}"), attribute)
    assert persisted is getattr(importlib.import_module(f"finetune_deepseek.{home}"), attribute)


def test_the_module_that_sentence_transformers_folders_name_is_that_of_the_room():
    pytest.importorskip("sentence_transformers")
    from finetune_deepseek import sentence_module
    from finetune_deepseek.retrieval.sentence_module import SentenceModule

    assert sentence_module.SentenceModule is SentenceModule


def test_every_task_and_verb_has_its_file():
    assert {task_class(name).name for name in TASKS} == set(TASKS)
    homes = {HOMES.get(verb, verb) for verb in VERBS}
    assert {path.stem for path in (PACKAGE / "commands").glob("*.py")} == {*homes, "__init__"}
    assert all(find_spec(f"finetune_deepseek.{room}.task") for room in (*APPLICATIONS, "retrieval", "language"))


def test_served_models_are_those_of_the_tasks():
    from finetune_deepseek.recommendation.recommender import SERVED

    assert [task_class(name).name for name in SERVED] == list(SERVED)


def test_recipes_lie_where_their_tasks_look():
    recipes = {name: task_class(name).arguments_class.RECIPE for name in TASKS}
    assert all(path is None or Path(path).is_file() for path in recipes.values())
    assert [name for name, path in recipes.items() if path is None] == [
        "language_modeling",
        "conversation",
        "classification",
        "image_classification",
        "image_generation",
        "object_detection",
        "embedding",
        "news_recommendation",
    ]
