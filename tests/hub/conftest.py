"""Fixtures of the Hub tests: a Hub on 127.0.0.1 and child processes that talk to it.

The code of a child is a function of the test file that imports all it needs itself; its source is run in a fresh
Python process, its arguments and its result travel as JSON. Starting a child and importing transformers takes
seconds, so one child does many things and returns the facts that several tests look at.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from server import HubServer

PACKAGES = ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "finetune_deepseek")
TOKEN = "hf_alice"

CHILD = """
import json, sys

class NoProject:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (this process is a stranger to it)", name=name)

if {stranger}:
    sys.meta_path.insert(0, NoProject())

{source}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    result = {function}(*arguments)
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)
"""


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
        source = textwrap.dedent(inspect.getsource(function))
        script, result = home / "child.py", home / "result.json"
        script.write_text(
            CHILD.format(packages=PACKAGES, stranger=stranger, source=source, function=function.__name__)
        )
        command = [sys.executable, str(script), json.dumps(arguments), str(result)]
        child = subprocess.run(
            command, cwd=home, env=_environment(home, hub, token), capture_output=True, text=True, timeout=240
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
