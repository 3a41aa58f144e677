"""Run tests in environments of several sets of versions, each made by uv in .matrix/; `make matrix` and .ci/run.

    python .ci/matrix.py                                        lowest, pinned and newest; every group; every Python
    python .ci/matrix.py --sets newest --pythons 3.13
    python .ci/matrix.py --sets transformers==5.24.0 --tests suite

A set is one of
    lowest   the lower bounds of pyproject.toml (the lowest that has a wheel for this Python)
    pinned   constraints.txt
    newest   whatever the package index has
    NAME==X  constraints.txt with that one line changed; several are joined by commas
It ends with a table for docs/versions.md, and with exit code 1 if anything failed. Packages come from where pip takes
them: what `pip config` says of indexes, links and constraints is handed to uv, unless uv's own variables are set
(UV_DEFAULT_INDEX, UV_TORCH_BACKEND=cpu, ...). Interpreters are looked for, not downloaded.
"""

import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SHOWN = ("transformers", "torch", "peft", "datasets", "accelerate", "huggingface-hub")
SOURCE_ONLY = "opencc-python-reimplemented"  # has no wheel in any version
GENERATION = ("tests/modeling/test_generation.py", "tests/parity/test_generation.py")
# Group -> what pytest is given.
GROUPS: dict[str, tuple[str, ...]] = {
    "modeling": ("tests/modeling", f"--ignore={GENERATION[0]}"),
    "parity": ("tests/parity", f"--ignore={GENERATION[1]}"),
    "generation": GENERATION,
    "tokenization": ("tests/tokenization",),
    "hub": ("tests/hub",),
    "commands": ("tests/test_readme.py", "tests/test_recipes.py"),  # every verb and task, one step each
}
CLOSING = re.compile(r"\d+ (passed|failed|skipped|error).* in [\d.]+s")
SUITE = {"suite": ("tests",)}


def pip_settings() -> dict[str, str]:
    """What pip is told by its files and variables; the name of a setting without its section, variables last."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    found = [re.fullmatch(r"(global|install|:env:)\.([\w-]+)='(.*)'", line) for line in lines]
    settings = [(match[1], match[2], match[3].replace("\\n", " ")) for match in found if match]
    settings.sort(key=lambda setting: ("global", "install", ":env:").index(setting[0]))
    return {name: value for _, name, value in settings}


def uv_environment(settings: dict[str, str]) -> dict[str, str]:
    """The variables by which uv takes packages from where pip does."""
    wanted = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": settings.get("extra-index-url", ""),
        "UV_FIND_LINKS": ",".join(settings.get("find-links", "").split()),
        "UV_CONSTRAINT": settings.get("constraint", ""),
        "UV_INSECURE_HOST": settings.get("trusted-host", ""),
        "SSL_CERT_FILE": settings.get("cert", ""),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if "extra-index-url" in settings else "",  # all indexes alike, as pip
        "UV_PYTHON_DOWNLOADS": "never",
    }
    return {name: value for name, value in wanted.items() if value} | dict(os.environ)


def uv() -> str:
    """The command: the one on the path, or one that pip puts into .matrix/uv."""
    if on_path := shutil.which("uv"):
        return on_path
    folder = FOLDER / "uv"
    if not (folder / "bin" / "uv").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True)
    return str(folder / "bin" / "uv")


def find_python(version: str) -> str | None:
    """An interpreter of that version: this one, one on the path, or one of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return str(candidate)
    return None


def requirements(name: str, folder: Path, constraints: Sequence[str]) -> list[str]:
    """The arguments of `uv pip install` for a set.

    Args:
        constraints: files that hold for every set, pip's own.

    Raises:
        ValueError: for a name that is no set.
    """
    arguments = ["-e", ".[dev]", *(word for file in constraints for word in ("-c", file))]
    if name == "lowest":
        # Not from source: an old sdist builds for no later Python.
        return [*arguments, "--resolution", "lowest-direct", "--only-binary", ":all:", "--no-binary", SOURCE_ONLY]
    if name == "newest":
        return arguments
    lines = (ROOT / "constraints.txt").read_text().split()
    for pin in () if name == "pinned" else name.split(","):
        package, separator, _ = pin.partition("==")
        others = [line for line in lines if line.partition("==")[0] != package]
        if not separator or len(others) != len(lines) - 1:
            raise ValueError(
                f"{pin!r} is no set: use lowest, pinned, newest, or NAME==X for a name in constraints.txt."
            )
        lines = [*others, pin]
    changed = folder / "constraints.txt"
    changed.write_text("\n".join(lines) + "\n")
    return [*arguments, "-c", str(changed)]


def versions(python: Path) -> list[str]:
    """The interpreter's version and those of the packages in `SHOWN`."""
    code = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, {SHOWN}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def run_group(python: Path, group: str, workers: int, log: Path) -> tuple[bool, str]:
    """Whether the group's tests passed, and pytest's closing line."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "--dist", "loadfile"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, *(GROUPS | SUITE)[group]],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text(errors="replace").splitlines() or ["no output"]
    if done.returncode != 0:
        print("\n".join(lines[-60:]))
    # Behind it stand lines that packages print when the process ends.
    return done.returncode == 0, next((line for line in lines[::-1] if CLOSING.search(line)), lines[-1]).strip("= ")


def run_set(name: str, version: str, groups: Sequence[str], workers: int) -> tuple[bool, str]:
    """Make the environment and run the groups; whether all passed, and the table's row."""
    settings = pip_settings()
    environment = uv_environment(settings)
    interpreter = find_python(version)
    folder = FOLDER / f"{name}-{version}"
    uv_command, python = uv(), folder / "bin" / "python"
    arguments = requirements(name, FOLDER, shlex.split(environment.pop("UV_CONSTRAINT", "")))
    subprocess.run(
        [uv_command, "venv", "-q", "--clear", "--seed", "-p", str(interpreter), folder], check=True, env=environment
    )
    install = [uv_command, "pip", "install", "-q", "-p", str(python), *arguments]
    if subprocess.run(install, cwd=ROOT, env=environment).returncode != 0:
        return False, f"| {name} | {version} | not installed |"
    outcomes: list[str] = []
    passed = True
    row = [name, *versions(python)]
    for group in groups:
        print(f"\n== {' '.join(row)}: {group}", flush=True)
        group_passed, closing = run_group(python, group, workers, folder / f"{group}.log")
        print(closing, flush=True)
        passed &= group_passed
        outcomes.append(f"{group}: {re.sub(r' in .*', '', closing)}")
    return passed, f"| {' | '.join(row)} | {'; '.join(outcomes)} | {datetime.date.today()} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["lowest", "pinned", "newest"])
    parser.add_argument("--pythons", nargs="+", default=[version for version in PYTHONS if find_python(version)])
    parser.add_argument("--tests", nargs="+", default=list(GROUPS), choices=[*GROUPS, *SUITE])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if absent := [version for version in arguments.pythons if not find_python(version)]:
        parser.error(f"no interpreter of {', '.join(absent)} found; install one, or leave it out of --pythons.")
    FOLDER.mkdir(exist_ok=True)
    results = [
        run_set(name, version, arguments.tests, arguments.workers)
        for name in arguments.sets
        for version in arguments.pythons
    ]
    print(f"\n| set | Python | {' | '.join(SHOWN)} | tests | day |")
    print("|" + "---|" * (len(SHOWN) + 4))
    print("\n".join(row for _, row in results))
    return int(not all(passed for passed, _ in results))


if __name__ == "__main__":
    sys.exit(main())
