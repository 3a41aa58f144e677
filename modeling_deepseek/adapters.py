"""Adapters as transformers opens them, with what their training changed in the config of their base.

deepseek_hf.json beside adapter_config.json says it (pooling, prefixes, direction, labels). Opened without, an adapter
answers, but otherwise than it was trained to.
"""

import copy
import json
import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, logging

from .configuration_deepseek import DeepSeekConfig
from .whole_folders import base_folder, current

logger = logging.get_logger(__name__)

RECORD_FILE = "deepseek_hf.json"
ADAPTER_PATH = "_adapter_model_path"  # by which an Auto class hands an adapter on, beside its base's name
PLACE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
LABELS = ("id2label", "label2id", "problem_type", "num_labels")


def with_changes(model_class: type, source: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of `from_pretrained` for what `source` names: its own, or of an adapter those that open its base as
    its training left it, of the revision that it was trained on, and the adapter on it.

    Raises:
        ValueError: for a record that changes what is no field of a config; for a base that isn't there, or is another
            model than in training.
    """
    handed_on = dict(kwargs.get("adapter_kwargs") or {})
    adapter = handed_on.get(ADAPTER_PATH) or source
    place = {name: kwargs[name] for name in PLACE if name in kwargs}
    if adapter != source:
        place |= {"revision": handed_on.get("revision"), "subfolder": ""}
    file = find_adapter_config_file(os.fspath(adapter), **place) if adapter else None
    if file is None or (adapter == source and os.path.isfile(os.path.join(adapter, "config.json"))):
        return source, kwargs
    record = record_of(adapter, **place)
    with open(file, encoding="utf-8") as opened:
        adapter_config = json.load(opened)
    kwargs = kwargs | {"adapter_kwargs": {"revision": place.get("revision")} | handed_on | {ADAPTER_PATH: adapter}}
    if "revision" in kwargs or adapter_config.get("revision"):
        kwargs["revision"] = adapter_config.get("revision")  # else that of the adapter
    _say_its_class(model_class, adapter, record.get("architecture"))
    if adapter == source:
        source = _base(adapter, adapter_config["base_model_name_or_path"], record.get("base") or {})
    else:  # an Auto class has found it
        source = _base(adapter, source, (record.get("base") or {}) | {"beside": None})
    changes, config = changes_in(record, adapter), kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        kwargs["config"] = changed(config, changes)
        return source, kwargs
    return source, changes | kwargs


def record_of(adapter: Any, **place: Any) -> dict[str, Any]:
    """deepseek_hf.json beside an adapter; empty if there is none."""
    place |= {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(current(adapter, RECORD_FILE), RECORD_FILE, **place)
    if file is None:
        return {}
    with open(file, encoding="utf-8") as opened:
        return json.load(opened)


def changes_in(record: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """The fields of its base's config that training changed.

    Raises:
        ValueError: for what is no field: it would be an argument of `from_pretrained`, which no file may give.
    """
    changes = record.get("changes") or {}
    foreign = sorted(changes.keys() - {*DeepSeekConfig.field_names(), *LABELS})
    if foreign:
        raise ValueError(f"{adapter}: {RECORD_FILE} changes {foreign[0]}, which is no field of the config; remove it")
    if "id2label" in changes:  # JSON has no numbers for keys
        changes = changes | {"id2label": {int(number): label for number, label in changes["id2label"].items()}}
    return changes


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of the config with the changes."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tell_what_differs(config: Any, adapter: Any, **place: Any) -> None:
    """Warn where an adapter is put on a base that isn't as its training left it."""
    changes = changes_in(record_of(adapter, **place), adapter)
    differing = [name for name, value in changes.items() if getattr(config, name, None) != value]
    if differing:
        told = ", ".join(f"{name}={changes[name]!r}" for name in differing)
        logger.warning(
            f"{adapter} was trained on its base with {told}, which this model has not: it will answer otherwise. Open "
            "the adapter by from_pretrained, or its base with these."
        )


def _say_its_class(model_class: type, adapter: Any, architecture: str | None) -> None:
    if architecture and architecture != model_class.__name__:
        logger.warning(
            f"{adapter} is an adapter of a {architecture}, and this is a {model_class.__name__}; "
            f"use {architecture}.from_pretrained."
        )


def _base(adapter: Any, name: str, recorded: dict[str, Any]) -> str:
    """Where its base is: beside it or in the folder of that name, as it was in training; else on the Hub.

    Raises:
        ValueError: if another model is there, or nothing where there was a folder.
    """
    found = base_folder(adapter, name, recorded)
    if found is not None:
        return str(found)
    if recorded.get("print") and recorded.get("name") == name:
        raise ValueError(
            f"{adapter}: its base model {name} is not there: put it where it was, or correct adapter_config.json."
        )
    return name
