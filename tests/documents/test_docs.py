"""Python examples of docs/ run as they stand; commands take the flags they show; files exist."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from fastbound.cli import main

REPOSITORY = Path(__file__).parents[2]
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
SLOW = {"stability", "vision"}  # they train a model
EXAMPLES = [
    pytest.param(
        path.name,
        code,
        id=f"{path.stem}-{number}",
        marks=[pytest.mark.slow] if path.stem in SLOW else [],
    )
    for path in PAGES
    if path.parent.name == "docs"
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)
    )
]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a fenced bash block or an indented block, without comments."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S))
    indented = "\n".join(
        re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    )
    found = [
        shlex.split(part, comments=True)
        for line in f"{fenced}\n{indented}".splitlines()
        if re.match(r"(fastbound|python|accelerate|torchrun) ", line)
        for part in line.split("&&")
    ]
    return [[word for word in words if word != "..."] for words in found if words]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]
OURS = [
    pytest.param(words[words.index("fastbound") + 1 :], id=f"{page}-{number}")
    for number, (page, words) in enumerate(COMMANDS)
    if "fastbound" in words
]
MODULES = sorted({words[2] for _, words in COMMANDS if words[:2] == ["python", "-m"]})


@pytest.mark.parametrize("arguments", OURS)
def test_every_command_has_the_flags_that_a_page_shows(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(pkgutil, "resolve_name", lambda name: lambda arguments: 0)
    monkeypatch.chdir(tmp_path)
    if "--config" in arguments:  # the settings of an earlier run
        config = Path(arguments[arguments.index("--config") + 1])
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text("seed: 0\n")
    assert main(arguments) == 0


@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_a_page_runs_is_there(module):
    assert importlib.util.find_spec(module)


def test_every_extra_that_a_page_names_is_declared(repository):
    declared = (repository / "pyproject.toml").read_text()
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", declared, flags=re.M | re.S)
    assert extras
    known = {*re.findall(r"^([\w-]+) = \[", extras[1], flags=re.M)}
    named = {
        extra
        for page in PAGES
        for extras in re.findall(r"(?:fastbound|\.)\[([a-z,-]+)\]\"", page.read_text())
        for extra in extras.split(",")
    }
    assert named and named <= known


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_python_examples_run_as_they_stand(user_folder, page, code):
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_files_that_a_page_names_are_there(repository):
    pages = [*PAGES, *repository.glob("benchmarks/*.md")]
    rooms = "tests|docs|fastbound|kernels|benchmarks"
    gone = {
        f"{page.name} names {name}"
        for page in pages
        for name in re.findall(rf"`((?:{rooms})/[a-z0-9_/]+\.\w+)`", page.read_text())
        if not (repository / name).exists()
    }
    assert not gone, "\n".join(sorted(gone))
