"""The house stays in order: what a kernel may import, docstrings of rooms, imports, listings."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OWN = {"", "fastbound", "benchmarks", "kernels"}  # "": a relative import
# PyTorch's engine runs where there is no Triton to import.
IMPORTED_WHERE_USED = [("fastbound/operator/engine.py", "fastbound.operator.triton_engine")]
LISTING = 14


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (REPOSITORY / room).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_kernels_import_torch_triton_and_each_other_alone():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in sources("kernels"):
        for name in imported(ast.parse(path.read_text())):
            fine = name.split(".")[0] in allowed or name.startswith("fastbound.kernels")
            assert fine, f"{named(path)} imports {name}"


@pytest.mark.parametrize("room", ["fastbound", "benchmarks"])
def test_a_docstring_opens_every_room(room):
    folders = {path.parent for path in sources(room)}
    assert folders
    for folder in folders:
        opening = folder / "__init__.py"
        assert opening.exists(), f"{named(folder)} has no __init__.py"
        assert ast.get_docstring(ast.parse(opening.read_text())), f"{named(opening)} says nothing"


def test_own_modules_are_imported_at_the_top():
    """So that the import graph is what it looks like; third parties may be imported where used."""
    found = []
    for path in sources("fastbound", "kernels", "benchmarks"):
        nodes = ast.walk(ast.parse(path.read_text()))
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        names = {name for function in functions for name in imported(function)}
        found += [(named(path), name) for name in sorted(names) if name.split(".")[0] in OWN]
    assert [offence for offence in found if offence not in IMPORTED_WHERE_USED] == []


def test_no_listing_is_longer_than_a_reader_takes_in():
    hidden = re.compile(r"^(\.|__pycache__$)|\.egg-info$")
    rooms = [REPOSITORY / room for room in ("fastbound", "kernels", "benchmarks", "tests")]
    folders = {*rooms, *(p for room in rooms for p in room.rglob("*") if p.is_dir())}
    for folder in folders:
        if any(hidden.search(part) for part in folder.relative_to(REPOSITORY).parts):
            continue
        entries = [entry.name for entry in folder.iterdir() if not hidden.search(entry.name)]
        assert len(entries) <= LISTING, f"{named(folder)} holds {len(entries)}: {sorted(entries)}"


def test_files_that_the_documentation_names_are_there():
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("*/*.md")]
    for page in pages:
        for name in re.findall(
            r"`((?:tests|docs|fastbound|kernels)/[\w/]+\.\w+)`", page.read_text()
        ):
            assert (REPOSITORY / name).exists(), f"{named(page)} names {name}"
