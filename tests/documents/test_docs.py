"""Every Python example of docs/ runs as it stands, in the folder of a user; named files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SLOW = {"stability", "vision"}  # they train a model
EXAMPLES = [
    pytest.param(
        path.name,
        code,
        id=f"{path.stem}-{number}",
        marks=[pytest.mark.slow] if path.stem in SLOW else [],
    )
    for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)
    )
]


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_python_examples_run_as_they_stand(user_folder, page, code):
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_files_that_a_page_names_are_there(repository):
    pages = [*repository.glob("*.md"), *repository.glob("*/*.md")]
    rooms = "tests|docs|fastbound|kernels|benchmarks"
    gone = {
        f"{page.name} names {name}"
        for page in pages
        for name in re.findall(rf"`((?:{rooms})/[a-z0-9_/]+\.\w+)`", page.read_text())
        if not (repository / name).exists()
    }
    assert not gone, "\n".join(sorted(gone))
