"""A saved thing, described once: a folder or a Hub id, a model or an adapter, its task, settings and base.

Whatever opens a model asks here first. Only small files are read, no weight, and no code runs. What a run of ours
knows beside config.json stands in deepseek_hf.json, beside the weights:

    {"format": 1, "task": "embedding", "settings": {"max_query_length": 64},
     "architecture": "DeepSeekForEmbedding",           # of an adapter, and the rest too: the class of its base,
     "changes": {"pooling": "last_token"},             # what training put into the base's config,
     "base": {"name": "runs/base", "commit": null, "beside": "../base", "print": "5e88..."}}

README.md is for people; only folders of earlier versions, which have no such file, are read by it.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from configuration_deepseek.fields import FIELD_NAMES
from configuration_deepseek.official import SOURCES
from tokenization_deepseek.tokenization_deepseek import BOS
from tokenization_deepseek.whole_folders import base_folder, current, fingerprint_of, model_files

from ..data.files import read_json, write_json
from ..data.hub import check_source, is_hub_id

RECORD_FILE, FORMAT = "deepseek_hf.json", 1
CONFIG_FILE, ADAPTER_FILE, CARD_FILE = "config.json", "adapter_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALL_FILES = ["*.json", "*.jinja", "*.model", CARD_FILE, "LICENSE*", "adapter_model.*"]
HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "Embedding",
         "Recommendation", "ImageTextToText", "ImageClassification", "ObjectDetection")  # fmt: skip
WRITING = ("CausalLM", "ImageTextToText")  # the second is a language model, too
HEADS_BY_TASK_TYPE = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
# Fields that are no change of a model: how it is stored or run, and what a load decides anew.
OTHER_FIELDS = {"architectures", "auto_map", "dtype", "torch_dtype", "model_type", "quantization_config"}
OTHER_FIELDS |= {"source_quantization_config", "transformers_version", "use_cache"}
LABEL_FIELDS = {"id2label", "label2id", "problem_type"}


@dataclass(frozen=True)
class Saved:
    """A folder or a snapshot of a Hub repository; make it by `open`."""

    where: str  # what an error begins with: the flag, if there is one, and the name
    name: str
    folder: Path  # of the small files: nearly always `name`; of a Hub id the cached snapshot
    commit: str | None  # of a Hub id
    own_config: dict[str, Any]  # config.json as it stands there; empty if there is none
    adapter: dict[str, Any] | None  # adapter_config.json
    record: dict[str, Any]  # deepseek_hf.json; of older folders, what their card has of it

    @classmethod
    def open(cls, flag: str | None, name: str, revision: str | None = "main", where: str | None = None) -> "Saved":
        """Read the small files of a folder or, with one question, of a Hub repository (cached, if it can't be asked).

        Args:
            flag: what named it, for errors; None for a word without a flag.
            where: what errors begin with instead.

        Raises:
            ValueError: if it isn't there; for a file that is damaged, or of a later format.
        """
        where = where or (f"--{flag} {name}" if flag else name)
        folder, commit = Path(name), None
        if folder.is_dir():
            folder = Path(current(current(folder, CONFIG_FILE), ADAPTER_FILE))
        else:
            folder = download(where, name, revision, SMALL_FILES)
            commit = folder.name
        try:
            config, adapter = (read_json(folder / file, missing={}) for file in (CONFIG_FILE, ADAPTER_FILE))
            if commit and config and adapter:
                base = adapter.get("base_model_name_or_path")
                note(f"{where}: it holds a {CONFIG_FILE} and an adapter; the adapter on {base} is taken.")
            return cls(where, name, folder, commit, config, adapter or None, _record(folder))
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error

    def require_model(self) -> "Saved":
        """This, if it is a model or an adapter.

        Raises:
            ValueError: if it is neither, or both.
        """
        if not self.own_config and not self.is_adapter:
            raise ValueError(f"{self.where}: no model there, for it has no {CONFIG_FILE} and no {ADAPTER_FILE}.")
        both = model_files(self.folder)
        if self.is_adapter and both and self.commit is None:
            raise ValueError(
                f"{self.where}: it holds an adapter ({ADAPTER_FILE}) and a model ({both[0].name}); move one of them "
                "into a folder of its own."
            )
        return self

    # -- what it is --

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of PEFT's."""
        return self.adapter is not None

    @property
    def at(self) -> dict[str, str]:
        """What `from_pretrained` is told beside the name: the revision, of a Hub id."""
        return {} if self.commit is None else {"revision": self.commit}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; an adapter's is its base's with the changes. Empty for a tokenizer alone."""
        return self.own_config if self.base is None else self.base.config | self.changes

    @property
    def is_ours(self) -> bool:
        """Whether this package's classes read it. They are preferred to transformers' own, whose LoRA targets PEFT
        rewrites."""
        return self.config.get("model_type") in SOURCES

    @property
    def is_deepseek(self) -> bool:
        """Whether it is a DeepSeek checkpoint in our form or a published one.

        Those get this package's tokenizer even where transformers has one of its own, which loses the
        beginning-of-sentence token. LLM, Math and Coder, of a type that others share (llama), are told by that token,
        and so are tokenizers without a model.
        """
        if self.is_ours and str(self.config["model_type"]).startswith("deepseek"):
            return True
        if self.config and not self.is_ours:
            return False
        folder = self.with_tokenizer.folder
        begins = read_json(folder / TOKENIZER_FILES[1], missing={}).get("bos_token")
        begins = begins.get("content") if isinstance(begins, dict) else begins
        return begins == BOS and (folder / TOKENIZER_FILES[0]).is_file()

    @property
    def architecture(self) -> str:
        """The class that it was saved from, of an adapter its base's; "" if that isn't known."""
        beside = {} if self.is_adapter else self.own_config  # an adapter's, if there, names what its base was saved as
        return str(self.record.get("architecture") or (beside.get("architectures") or [""])[0])

    @property
    def head(self) -> str | None:
        """What follows `For` in its class's name, of `HEADS`; None if that isn't known."""
        if self.architecture.endswith("LMHeadModel"):
            return "CausalLM"
        of_adapter = HEADS_BY_TASK_TYPE.get(str(self.adapter.get("task_type"))) if self.adapter else None
        return next((head for head in HEADS if self.architecture.endswith(f"For{head}")), of_adapter)

    @property
    def with_tokenizer(self) -> "Saved":
        """This, or the base of an adapter that was saved without a tokenizer."""
        has_own = any(any(self.folder.glob(name)) for name in ("tokenizer*", "*.model", "preprocessor_config.json"))
        return self if has_own or self.base is None else self.base

    # -- its task --

    @property
    def task(self) -> str | None:
        """The task that it was trained for; None if no run of ours made it."""
        return self.record.get("task")

    @property
    def settings(self) -> dict[str, Any]:
        """What its record says of settings, not looked at: see `settings_for`."""
        return self.record.get("settings") or {}

    @property
    def card(self) -> dict[str, Any]:
        """The metadata of README.md; empty if there is none.

        Raises:
            ValueError: if they aren't YAML.
        """
        return _card(self.folder)

    def settings_for(self, task: str, arguments_class: type) -> dict[str, Any]:
        """The settings that its training chose: fields of the task's dataclass that are in its `SAVED`.

        Raises:
            ValueError: if it was made for another task, or a value is of another type than the field.
        """
        self.check_task(task)
        names, types = getattr(arguments_class, "SAVED", ()), get_type_hints(arguments_class)
        foreign = sorted(self.settings.keys() - {*names, *FIELD_NAMES})
        if foreign:
            names_of_others = ", ".join(map(str, foreign))
            note(f"{self.where}: {names_of_others} in its settings are none of a model for {task}, and are not used.")
        chosen = {name: self.settings[name] for name in names if name in self.settings}
        return {name: self._typed(name, value, types[name]) for name, value in chosen.items()}

    def _typed(self, name: str, value: Any, expected: Any) -> Any:
        if expected is float and type(value) is int:
            value = float(value)
        if get_origin(expected) is list and isinstance(value, str):  # as cards of old and habit have it
            value = [value]
        try:
            type_validator(name, value, expected)
        except TypeError as error:
            kind = getattr(expected, "__name__", None) or str(expected)
            raise ValueError(f"{self.where}: its setting {name} is {value!r}, which is no {kind}.") from error
        return value

    def check_task(self, task: str, head: str | None = None, is_trained: bool = False) -> None:
        """Refuse a model that was made for another task, or has another head.

        Args:
            head: the one that the task asks for, of `HEADS`; None for any.
            is_trained: training may also begin from a language model, whatever it was trained for, or from a trunk.

        Raises:
            ValueError: naming both.
        """
        is_trunk = not self.is_adapter and self.head is None and self.architecture.endswith("Model")
        if is_trained and not self.is_adapter and (self.head in WRITING or is_trunk):
            return
        if self.task not in (None, task):
            raise ValueError(f"{self.where}: it was made for {self.task}, not for {task}; name another model.")
        if head is not None and (is_trunk or self.head not in (None, head)):
            kind = self.architecture or f"model for {self.head}"
            raise ValueError(f"{self.where}: it is a {kind}, where {task} needs a model for {head}; name another.")

    # -- an adapter's base --

    @cached_property
    def base(self) -> "Saved | None":
        """The model that an adapter was trained on: a folder beside it, one in the working directory, or on the Hub.

        Raises:
            ValueError: if it isn't there, is another one than in training, or is an adapter itself.
        """
        if self.adapter is None:
            return None
        base = self._find_base(str(self.adapter.get("base_model_name_or_path") or ""), self.record.get("base") or {})
        if base.is_adapter:
            raise ValueError(
                f"{base.where} is an adapter itself; merge it into its base first, by `deepseek-hf export`."
            )
        return base.require_model()

    def _find_base(self, name: str, recorded: dict[str, Any]) -> "Saved":
        where = f"{self.where}: its base model {name}"
        if not name:
            raise ValueError(f"{self.where}: {ADAPTER_FILE} names no base model (base_model_name_or_path); add it.")
        if recorded.get("commit"):
            return Saved.open(None, name, recorded["commit"], where)
        here = recorded if self.commit is None else recorded | {"beside": None}
        there = base_folder(self.folder, name, here, self.where)
        if there is not None:
            return Saved.open(None, str(there), where=where)
        if (recorded.get("print") and recorded.get("name") == name) or not is_hub_id(name):
            raise ValueError(f"{where} is not there: put it where it was, or correct {ADAPTER_FILE}.")
        return Saved.open(None, name, self.adapter.get("revision") if self.adapter else None, where)

    @property
    def changes(self) -> dict[str, Any]:
        """What training put into the config of an adapter's base."""
        return {} if self.base is None else self.changes_to(self.base.config)

    def changes_to(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same, with the config of that base given."""
        if "changes" in self.record:
            found = self.record["changes"]
        elif self.own_config:  # earlier versions: beside heads of labels
            found = differences(config, self.own_config)
        else:  # and in the card, among the settings
            found = {name: self.settings[name] for name in self.settings if name in FIELD_NAMES}
        return {name: found[name] for name in found if _may_change(name)}

    @cached_property
    def fingerprint(self) -> str | None:
        """Of a folder, what it is recognised by as a base; see `fingerprint_of`."""
        return fingerprint_of(self.folder) if self.commit is None else None


# Reading -------------------------------------------------------------------------------------------------------------


def download(where: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot of a Hub repository with the files of those patterns.

    Raises:
        ValueError: if it can't be had.
    """
    if Path(name).exists():
        raise ValueError(f"{where}: this is a file; name the folder of a checkpoint, or a Hub id.")
    try:
        check_source(name)
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns="checkpoint-*"
        )
    except Exception as error:  # of the Hub's client, which has many kinds
        reason = " ".join(str(error).split()).removeprefix(f"{name}: ")
        raise ValueError(f"{where}: {reason}") from error
    return Path(found)


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Loading something: errors begin with what named it, in one line.

    Raises:
        ValueError: for whatever the loading raises for missing or broken files, or for packages that a model's own
            code needs.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error


def note(text: str) -> None:
    """A line for people, which results on standard output don't mix with."""
    print(f"deepseek-hf: note: {text}", file=sys.stderr)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    record = read_json(path, missing=None)
    if record is None:
        return _record_of_card(folder)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: its format {record.get('format')!r} isn't read here; update deepseek-hf.")
    for name in ("settings", "changes", "base"):
        if not isinstance(record.get(name, {}), dict):
            raise ValueError(f"{path}: {name} is no mapping; it was written by something else.")
    return record


def _record_of_card(folder: Path) -> dict[str, Any]:
    """What earlier versions wrote into the card; cards of others are nobody's business here, broken or not."""
    path = folder / CARD_FILE
    if not path.is_file() or "deepseek_hf:" not in path.read_text(encoding="utf-8", errors="replace"):
        return {}
    settings = dict(_card(folder).get("deepseek_hf") or {})
    return {"task": settings.pop("task", None), "settings": settings}


def _card(folder: Path) -> dict[str, Any]:
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the metadata can't be read: {error}") from error


# Changes of a config -------------------------------------------------------------------------------------------------


def _may_change(name: str) -> bool:
    return name not in OTHER_FIELDS and not name.startswith("_")


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config (in our form or a published one, both) that training has changed."""
    if before.get("model_type") in SOURCES:
        from configuration_deepseek import DeepSeekConfig  # it brings torch, which takes seconds

        before, after = (DeepSeekConfig.from_dict(dict(config)).to_dict() for config in (before, after))
    before, after = (json.loads(json.dumps(config, default=str)) for config in (before, after))
    return {name: value for name, value in after.items() if _may_change(name) and before.get(name) != value}


def known_fields(changes: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The changes, labels by numbers, if all of them are fields of the config. Others would be arguments of
    `from_pretrained`, which no file may give.

    Raises:
        ValueError: for any other.
    """
    foreign = sorted(changes.keys() - set(fields) - LABEL_FIELDS)
    if foreign:
        raise ValueError(f"{foreign[0]} is no field of the config, so nothing that training can have changed.")
    return numbered(changes)


def numbered(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with numbers for the keys of `id2label`, which are text in JSON."""
    labels = changes.get("id2label")
    return changes if labels is None else changes | {"id2label": {int(n): label for n, label in labels.items()}}


# Writing -------------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    task: str | None,
    settings: dict[str, Any],
    base: Saved | None = None,
    config: dict[str, Any] | None = None,
    architecture: str = "",
    home: Path | None = None,
) -> None:
    """Write deepseek_hf.json beside a model.

    Args:
        base: of an adapter, the model that it was trained on.
        home: where `folder` will be, if it is moved; else it stays, or is moved to a place beside it.
        config, architecture: of an adapter, its base's config and class as they are after training; what differs from
            the base's own config is kept.
    """
    record: dict[str, Any] = {"format": FORMAT, "task": task, "settings": settings}
    if base is not None:
        beside = None if base.commit else _relative(base.folder, home or folder)
        record |= {
            "architecture": architecture,
            "changes": differences(base.config, config or base.config),
            "base": {"name": base.name, "commit": base.commit, "beside": beside, "print": base.fingerprint},
        }
    write_json(folder / RECORD_FILE, record)


def check_place(folder: Path, is_adapter: bool) -> None:
    """Refuse to save an adapter into a model's folder, or a model into an adapter's: what opened it would be neither.

    Raises:
        ValueError: naming the folder.
    """
    if is_adapter:
        others = [path.name for path in model_files(folder)]
    else:
        others = [ADAPTER_FILE] if (folder / ADAPTER_FILE).is_file() else []
    if others:
        kinds = ("a model", "an adapter") if is_adapter else ("an adapter", "a model")
        raise ValueError(f"--output_dir {folder} holds {kinds[0]} ({others[0]}); name another folder for {kinds[1]}.")


def _relative(path: Path, folder: Path) -> str | None:
    """The way from one folder to another; None on Windows between two drives."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return None
