"""The flags of transformers' Seq2SeqTrainingArguments, read from its source: importing the class takes seconds.

Only names, types, defaults and help are taken from there, for the parser. What runs is transformers' own class, made
of the flags that were given (training/trainer_arguments.py); a test holds the two against each other.
"""

import ast
import dataclasses
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ...training.arguments import TrainingFlags

CLASSES = (("training_args.py", "TrainingArguments"), ("training_args_seq2seq.py", "Seq2SeqTrainingArguments"))
FACTORIES: dict[str, Any] = {"list": list, "dict": dict}
KNOWN: dict[str, Any] = {"Any": Any, "Literal": Literal, "Path": Path, "bool": bool, "float": float, "int": int}
KNOWN |= FACTORIES


def training_flags() -> type:
    """A dataclass of all flags of `TrainingArguments`, ours over those of transformers; without its checks."""
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None  # it is a dependency
    folder = Path(spec.submodule_search_locations[0])
    names = KNOWN | _enums(_parsed(folder / "trainer_utils.py"))
    found = [field for file, name in CLASSES for field in _fields(_parsed(folder / file), name, names)]
    base = dataclasses.make_dataclass("TransformersFlags", found)
    return dataclasses.dataclass(type("TrainingFlags", (TrainingFlags, base), {}))


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _enums(module: ast.Module) -> dict[str, Any]:
    """The enumerations of words that a file defines."""
    return {
        node.name: Enum(node.name, {part.targets[0].id: ast.literal_eval(part.value) for part in node.body
                                    if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)})
        for node in module.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]
    }  # fmt: skip


def _fields(module: ast.Module, name: str, names: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and declaration of each field of a class. A type that isn't known here counts as text."""
    (found,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            words = {word.id for word in ast.walk(node.annotation) if isinstance(word, ast.Name)}
            kind = eval(ast.unparse(node.annotation), {word: names.get(word, str) for word in words})
            yield node.target.id, kind, _declaration(node.value)


def _declaration(value: ast.expr | None) -> Any:
    """The field with default and metadata; None stands for a default that only running the file would give."""
    if not isinstance(value, ast.Call):
        return dataclasses.field(default=_literal(value))
    parts = {part.arg: part.value for part in value.keywords}
    metadata: dict[str, Any] = {}
    if isinstance(parts.get("metadata"), ast.Dict):
        pairs = zip(parts["metadata"].keys, parts["metadata"].values, strict=True)  # type: ignore[attr-defined]
        metadata = {key: text for key, text in ((_literal(key), _literal(text)) for key, text in pairs) if text}
    factory = parts.get("default_factory")
    if isinstance(factory, ast.Name) and factory.id in FACTORIES:
        return dataclasses.field(default_factory=FACTORIES[factory.id], metadata=metadata)
    return dataclasses.field(default=_literal(parts.get("default")), metadata=metadata)


def _literal(value: ast.expr | None) -> Any:
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
