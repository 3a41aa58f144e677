"""What the screen takes: every character, and bars for what lasts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import datasets

LONG = 20_000  # rows, from which on their tokenization gets a bar


@contextmanager
def screen(is_shown: bool) -> Iterator[None]:
    """Standard output that takes every character, as an escape where its encoding lacks it; or none at all."""
    if not is_shown:
        with redirect_stdout(None):
            yield
        return
    stream: Any = sys.stdout
    reconfigure, before = getattr(stream, "reconfigure", None), getattr(stream, "errors", "strict")
    if reconfigure:
        reconfigure(errors="backslashreplace")
    try:
        with dataset_bars(False):
            yield
    finally:
        if reconfigure:
            reconfigure(errors=before)


@contextmanager
def dataset_bars(are_shown: bool) -> Iterator[None]:
    """The bars of `datasets`, which else draws one for each file and each split."""
    were_shown = datasets.are_progress_bars_disabled() is False
    (datasets.enable_progress_bars if are_shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if were_shown else datasets.disable_progress_bars)()
