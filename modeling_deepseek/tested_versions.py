"""The newest transformers that this code was tested with (docs/versions.md), told to who runs a newer one."""

from transformers import __version__
from transformers.utils import logging

NEWEST_TESTED = (5, 24)

logger = logging.get_logger(__name__)


def tell_if_untested(version: str = __version__) -> None:
    """Say once, in one line, that a minor version of transformers is newer than all that were tested."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) > NEWEST_TESTED:
        logger.warning_once(
            f"transformers {version} is newer than {'.'.join(map(str, NEWEST_TESTED))}, the newest that this code was "
            "tested with; if results look wrong, upgrade deepseek-hf or install that version"
        )
