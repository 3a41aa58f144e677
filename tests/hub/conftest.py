"""Fixtures of the Hub tests: a Hub on 127.0.0.1 and child processes that talk to it.

The code of a child is a function of the test file, run in a fresh Python process (child.py); arguments and result
travel as JSON. It imports all but the standard library itself, after the child's environment is set. Starting a child
and importing transformers takes seconds, so one child does many things and returns what several tests look at.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from server import HubServer

# The last commit before the cache was read under its new word, and before the heads had files of their own.
EARLIER = "9e8363e06d4aadb10a99f163c2353e098171ce2f"
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "finetune_deepseek")
TOKEN = "hf_alice"


class Run(Protocol):
    def __call__(
        self, function: Callable, *arguments: Any, hub: HubServer | None = None, token: str | None = TOKEN
    ) -> Any:
        """Call `function(*arguments)` in a child process and return its result.

        With `hub` the child's Hub is that server, and `token` (None: nobody) signs its user in; without, the child is
        offline. A failed child fails the test and shows the child's output.
        """


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """An empty Hub for the tests of one file, with the users alice (token hf_alice) and bob (hf_bob)."""
    with HubServer({"hf_alice": "alice", "hf_bob": "bob"}) as server:
        yield server


@pytest.fixture(scope="session")
def run_client(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a function in a child process that has our packages."""
    return _runner(tmp_path_factory.mktemp("client"), stranger=False)


@pytest.fixture(scope="session")
def run_stranger(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a function in a child process in which importing any of our packages fails."""
    return _runner(tmp_path_factory.mktemp("stranger"), stranger=True)


def _runner(folder: Path, stranger: bool) -> Run:
    numbers = itertools.count()

    def run(function: Callable, *arguments: Any, hub: HubServer | None = None, token: str | None = TOKEN) -> Any:
        home = folder / str(next(numbers))
        home.mkdir()
        result = home / "result.json"
        command = [sys.executable, "-P", str(Path(__file__).with_name("child.py")), inspect.getfile(function)]
        command += [function.__name__, json.dumps(arguments), str(result), *(PACKAGES if stranger else ())]
        child = subprocess.run(
            command, cwd=home, env=_environment(home, hub, token), capture_output=True, text=True, timeout=900
        )
        if child.returncode != 0:
            pytest.fail(f"{function.__name__} failed in its process:\n{child.stdout[-2000:]}\n{child.stderr[-6000:]}")
        return json.loads(result.read_text())

    return run


def _environment(home: Path, hub: HubServer | None, token: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    if hub is None:
        return env | {"HF_HUB_OFFLINE": "1"}
    return env | {"HF_ENDPOINT": hub.endpoint} | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="session")
def earlier_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages as they were at `EARLIER`."""
    code = tmp_path_factory.mktemp("earlier")
    command = ["git", "-C", str(ROOT), "archive", EARLIER]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode != 0:
        pytest.skip(f"commit {EARLIER} is not in this copy's history")
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive.stdout, check=True)
    return code
