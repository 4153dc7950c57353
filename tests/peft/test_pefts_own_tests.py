"""PEFT's own tests with BoundedConfig for LoraConfig, where PEFT's source distribution is at hand.

FASTBOUND_PEFT_TESTS names the folder `tests` of that source distribution, of the PEFT that is
installed. They also need `diffusers` and `parameterized`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

SELECTED = "(TestPeftCustomModel and Vanilla) or TestMultipleActiveAdapters or TestMixedAdapter"

# What bounded adapters do not have, each refused by name.
REFUSED = [
    "and only linear layers",
    "init_weights must be True",
    'only combination_type="cat" does',
]


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the tests, as a package."""
    named = os.environ.get("FASTBOUND_PEFT_TESTS")
    if named is None:
        pytest.skip("FASTBOUND_PEFT_TESTS does not name the tests of PEFT's source distribution")
    for module in ("diffusers", "parameterized"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"PEFT's tests need {module}, which is not installed")
    folder = tmp_path / "suite" / "tests"
    shutil.copytree(named, folder)
    (folder / "__init__.py").touch()
    return folder.parent


@pytest.mark.slow
def test_every_case_passes_or_is_refused_by_name(source, repository):
    results = source / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={source}"]
    options = ["-p", "peft_suite", "-p", "no:cacheprovider", f"--junitxml={results}"]
    # Beside their tests, whose package has the name of these.
    shutil.copy(repository / "tests" / "support" / "peft_suite.py", source)
    run = subprocess.run(
        [*command, *options, "-k", SELECTED, "tests/test_custom_models.py"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{repository}"},
        capture_output=True,
        text=True,
    )
    assert results.exists(), run.stdout + run.stderr
    cases = list(xml.etree.ElementTree.parse(results).getroot().iter("testcase"))
    assert sum(not list(case) for case in cases) > 200
    left = {}
    for case in cases:
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is None:
            continue
        text = f"{failure.get('message')}\n{failure.text}"
        if not any(re.search(re.escape(reason), text) for reason in REFUSED):
            left[case.get("name")] = failure.get("message")
    assert left == {}
