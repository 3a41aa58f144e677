"""llama.cpp for the slow tests: llama-cpp-python, built from its sdist where it isn't installed."""

import importlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

REQUIREMENT = "llama-cpp-python==0.3.36"
# What pip says where there is no network, or an index without the package.
UNREACHABLE = ("No matching distribution found", "Could not find a version", "NewConnectionError", "name resolution")


class CannotBuild(Exception):
    """What this machine lacks for building llama.cpp."""


def install_command(python: str | Path) -> list[str]:
    """Builds from source, though there may be a wheel: a wheel may be for instructions that this machine lacks."""
    flags = ["--no-binary", "llama-cpp-python", "--disable-pip-version-check", "--retries", "1", "--timeout", "30"]
    return [str(python), "-m", "pip", "install", *flags, REQUIREMENT]


def check_tools() -> None:
    """Raises CannotBuild without compilers; cmake and ninja come with the build's requirements."""
    for variable, word in (("CC", "cc"), ("CXX", "c++")):
        program = (os.environ.get(variable) or word).split()[0]
        if shutil.which(program) is None:
            raise CannotBuild(f"building llama.cpp needs a compiler, and there is no {program}")


def run(command: list[str]) -> None:
    """Run pip.

    Raises:
        CannotBuild: if the package can't be had.
        RuntimeError: if building it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if done.returncode and any(word in said for word in UNREACHABLE):
        raise CannotBuild(f"{REQUIREMENT} can't be had: {said.splitlines()[-1]}")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-3000:]}")


def llama_cpp(folder: Path) -> ModuleType:
    """The module llama_cpp; where it isn't installed it is built into a virtual environment in `folder`.

    Takes some minutes of all cores.

    Raises:
        CannotBuild, RuntimeError: see `run`.
    """
    try:
        return importlib.import_module("llama_cpp")
    except ImportError:
        check_tools()
    venv.create(folder, with_pip=True)
    run(install_command(folder / "bin" / "python"))
    return import_from(folder)


def import_from(folder: Path) -> ModuleType:
    """The module of a virtual environment, whose other packages come after those that are here."""
    sys.path.append(str(next(folder.glob("lib/python*/site-packages"))))
    importlib.invalidate_caches()
    return importlib.import_module("llama_cpp")
