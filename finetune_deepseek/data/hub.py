"""What a model is named by, a folder or an id on the Hub, and what to say when it can't be had."""

import os
import tempfile
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from .words import nearest_match

OWN_CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")  # else they are folders of HF_HOME


def is_hub_id(name: str) -> bool:
    """Whether an id on the Hub may be written so: `owner/name`, or a name alone."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~", "/"))


@cache  # what was found once is not asked for again; an error is not kept
def check_source(name: str, kind: str = "model") -> None:
    """Refuse a model that isn't there, after one question to the Hub at most and before loading asks it many times.

    Args:
        kind: "model", or "dataset".

    Raises:
        ValueError: with one line that begins with the name.
    """
    if Path(name).exists():
        return
    missing = f"{name}: no such folder{_near(Path(name))}"
    if not is_hub_id(name):
        raise ValueError(f"{missing}; an id on the Hub is written owner/name.")
    if any(folder.is_dir() for folder in _cached(name, kind)):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type=kind))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{missing}, and no such {kind} on the Hub; if it is private, `hf auth login` comes first."
        ) from error
    except HfHubHTTPError:
        return  # it is there, without that file or without leave to read it: loading says which
    except Exception as error:  # of a client that huggingface_hub has changed before
        cause = " ".join(str(error).split())
        raise ValueError(f"{missing}, and the Hub can't be asked for a {kind} of that name ({cause}).") from error


def check_named(flag: str, name: str, kind: str = "model") -> None:
    """`check_source` for what a flag names.

    Raises:
        ValueError: with one line that begins with the flag.
    """
    try:
        check_source(name, kind)
    except ValueError as error:
        raise ValueError(f"--{flag} {error}") from error


def _near(path: Path) -> str:
    """The folder beside it that may have been meant, in words."""
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return nearest_match(path.name, folders)


def _cached(name: str, kind: str) -> list[Path]:
    """Where the files of an earlier download would be, and what `datasets` makes of them."""
    folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"]
    if kind == "dataset":
        from datasets import config

        folders.append(Path(config.HF_DATASETS_CACHE) / name.replace("/", "___"))
    return folders


def home_advice(error: BaseException | None) -> str:
    """`"; ..."` with what to do if an error is of Hugging Face's caches, which can't be written; else nothing."""
    named = {name: os.environ[name] for name in OWN_CACHES if name in os.environ} | {"HF_HOME": constants.HF_HOME}
    caches = {name: Path(place).expanduser().absolute() for name, place in named.items()}
    while error is not None:
        if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
            at = Path(error.filename).absolute()
            for name, place in caches.items():
                if (at.is_relative_to(place) or place.is_relative_to(at)) and not can_be_written(place):
                    return f"; the cache {place} can't be written: set {name} to a folder that can"
        error = error.__cause__ or error.__context__
    return ""


def can_be_written(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made if it isn't there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
