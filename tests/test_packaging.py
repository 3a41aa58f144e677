"""What is installed: every import is declared, every bound is a bound, and the archives hold what they should."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("configuration_deepseek", "tokenization_deepseek", "modeling_deepseek", "finetune_deepseek")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}


def imports(node: ast.AST, optional: bool = False) -> Iterator[tuple[str, bool]]:
    """Each package that the code imports, and whether it can do without: inside a function or a `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], optional) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
            yield child.module.partition(".")[0], optional
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from ((arg.value, True) for arg in child.args if isinstance(arg, ast.Constant))
        within = optional or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try))
        yield from imports(child, within)


def third_party(optional: bool) -> set[str]:
    """The distributions that the packages import, by their canonical names."""
    sources = [path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    named = {name for source in sources for name, is_optional in imports(ast.parse(source)) if is_optional == optional}
    installed = packages_distributions()
    return {
        canonicalize_name(installed.get(name, [name])[0])
        for name in named
        if name not in sys.stdlib_module_names and name not in PACKAGES
    }


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_what_is_always_imported_is_a_dependency_and_the_rest_is_in_an_extra():
    always = third_party(optional=False)
    assert {"torch", "numpy", "tqdm", "pyyaml", "scikit-learn"} <= always  # the walk finds them, under these names
    assert always - names(DEPENDENCIES) == set()
    extras = names([requirement for name in EXTRAS if name != "dev" for requirement in EXTRAS[name]])
    optional = third_party(optional=True)
    assert {"faiss-cpu", "sacremoses", "sentence-transformers"} <= optional
    assert optional - names(DEPENDENCIES) - extras == set()


def test_nothing_is_a_dependency_that_is_not_imported():
    assert names(DEPENDENCIES) - third_party(optional=False) - third_party(optional=True) == set()


def test_every_requirement_has_a_lower_bound_that_the_tested_versions_meet():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    tested = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in [*DEPENDENCIES, *(requirement for extra in EXTRAS.values() for requirement in extra)]:
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(EXTRAS)
            continue
        assert {specifier.operator for specifier in requirement.specifier} & {">=", "=="}, requirement
        version = tested.get(canonicalize_name(requirement.name))
        assert version is not None or requirement in EXTRAS["tensorboard"] + EXTRAS["trackio"], requirement
        assert version is None or requirement.specifier.contains(version), (requirement, version)


def lower_bound(requirement: Requirement) -> Version | None:
    bounds = [Version(specifier.version) for specifier in requirement.specifier if specifier.operator == ">="]
    return max(bounds, default=None)


def test_no_lower_bound_is_below_what_transformers_asks_for():
    """Its extras too: it refuses chat templates with an older jinja2, which nothing else would raise."""
    ours = {canonicalize_name(requirement.name): lower_bound(requirement) for requirement in DEPENDENCIES}
    theirs = [Requirement(text) for text in requires("transformers") or ()]
    bounds = [(canonicalize_name(their.name), lower_bound(their)) for their in theirs]
    assert ("jinja2" in {name for name, _ in bounds}) and len(bounds) > 10
    assert [(name, bound) for name, bound in bounds if bound and ours.get(name) and ours[name] < bound] == []


def test_links_of_the_readme_work_on_another_site_too():
    """PyPI shows README.md alone: a link is an address of the repository, and the file is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    base = PROJECT["urls"]["Repository"] + "/blob/main/"
    targets = [*re.findall(r"\]\(([^)]*)\)", text), *re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)]
    assert len(targets) >= 4
    for target in targets:
        assert target.startswith(base) and (ROOT / target.removeprefix(base).partition("#")[0]).is_file(), target


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive's and the wheel's names of files, and what building them printed."""
    tree, out = tmp_path_factory.mktemp("tree") / "project", tmp_path_factory.mktemp("out")
    unwanted = shutil.ignore_patterns(".git", ".venv", ".matrix", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # it warns of that
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with tarfile.open(next(out.glob("*.tar.gz"))) as source:
        in_source = {name.partition("/")[2] for name in source.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    return in_source, in_wheel, done.stdout + done.stderr


def test_building_warns_of_nothing(archives):
    assert [line for line in archives[2].splitlines() if re.search("warning|deprecat|absent", line, re.I)] == []


def test_the_source_archive_holds_the_tests_and_what_they_read(archives):
    in_source, _, _ = archives
    wanted = {path for folder in ("tests", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.*")}
    wanted |= {path for name in PACKAGES for path in (ROOT / name).rglob("*.*")}
    there = {str(path.relative_to(ROOT)) for path in wanted if path.is_file() and "__pycache__" not in path.parts}
    there |= {"Makefile", "constraints.txt", "model_card.md", "README.zh-CN.md", "CHANGELOG.md", ".ci/run"}
    assert len(there) > 250
    assert there - in_source == set()


def test_the_wheel_holds_the_packages_and_nothing_else(archives):
    _, in_wheel, _ = archives
    files = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.*")}
    files = {file for file in files if "__pycache__" not in file and (ROOT / file).is_file()}
    assert {file for file in in_wheel if ".dist-info/" not in file} == files
