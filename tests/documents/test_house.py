"""The shape of the code: what no test of behaviour would notice, read from the files themselves."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MOST_ENTRIES = 14
# Triton is optional: the engine that needs it is imported where a plan asks for it.
MAY_IMPORT_OURS_IN_FUNCTIONS = {"fastbound/operator/engine.py"}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def folders(root: str) -> Iterator[Path]:
    """The folder and every one below it that holds code."""
    top = REPOSITORY / root
    yield from sorted({top, *(path.parent for path in top.rglob("*.py"))})


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that is imported somewhere in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno} imports relatively"
            yield node.lineno, node.module


def ours(module: str) -> bool:
    return module.split(".")[0] in ("fastbound", "benchmarks", "kernels")


def test_kernels_is_no_package_of_its_own():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "kernels").glob("*.py")), ids=relative)
def test_a_kernel_imports_torch_triton_and_kernels_alone(path):
    foreign = [
        f"{relative(path)}:{line} imports {module}"
        for line, module in imports(ast.parse(path.read_text()))
        if module.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and module.split(".")[:2] != ["fastbound", "kernels"]
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize("folder", [*folders("fastbound"), *folders("benchmarks")], ids=relative)
def test_every_folder_opens_by_saying_what_lives_there(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


@pytest.mark.parametrize("folder", [*folders("fastbound"), *folders("benchmarks")], ids=relative)
def test_no_function_imports_modules_of_ours(folder):
    hidden = {
        f"{relative(path)}:{line} imports {module}"
        for path in sorted(folder.glob("*.py"))
        if relative(path) not in MAY_IMPORT_OURS_IN_FUNCTIONS
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for line, module in imports(function)
        if ours(module)
    }
    assert not hidden, "\n".join(sorted(hidden))


@pytest.mark.parametrize(
    "folder", [*folders("fastbound"), *folders("benchmarks"), *folders("tests")], ids=relative
)
def test_a_folder_is_listed_at_a_glance(folder):
    entries = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
