"""Examples of the README work, its commands and those of its results are run, or this fails."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "docs" / "results.md").read_text()


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.M | re.S)


BLOCKS = blocks_of(README)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    " ".join(command.split())
    for language, lines in [*BLOCKS, *blocks_of(RESULTS)]
    if language == "bash"
    for line in lines.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
]

# What runs each command of the README: a line of .ci/run, a test beside this one, or a test here.
RUN_BY_CI = {
    **dict.fromkeys(
        ("fastbound unlearn", "fastbound unlearn --seed 1 --output seed-1"),
        'step fastbound unlearn --quick --output "$work/demo"',
    ),
    'pip install -e ".[test]"': 'step pip install --quiet -e ".[test]"',
    "pytest": "step pytest --durations=10",
    "pytest benchmarks/ --benchmark-only --benchmark-json benchmarks.json": (
        'step pytest benchmarks/ --benchmark-only --smoke --benchmark-json "$work/benchmarks.json"'
    ),
    **dict.fromkeys(
        (
            'pytest benchmarks/bench_linear.py --benchmark-only -k "1k and 4x"',
            "pytest benchmarks/bench_mlp.py --benchmark-only -k llama-1k --rounds 15",
        ),
        'step pytest benchmarks/ --benchmark-only --smoke --benchmark-json "$work/benchmarks.json"',
    ),
    "python -m benchmarks.report benchmarks.json": (
        'step python -m benchmarks.report "$work/benchmarks.json" --output "$work"'
    ),
    "python -m benchmarks.static.traffic": "step python -m benchmarks.static.traffic",
    "python -m benchmarks.static.predictions": "step python -m benchmarks.static.predictions",
    "python -m benchmarks.static.product_form": "step python -m benchmarks.static.product_form",
    "fastbound profile --mode mlp": (
        "step fastbound profile --mode mlp --device cpu --tokens 32,64 --rounds 2"
        ' --output "$work/profile"'
    ),
}
RUN_BY_TESTS = {
    "pip install .": ("documents/test_packaging.py", "test_installed_from_the_folder"),
    (
        "fastbound evaluate --benchmark tofu --split forget10 --model my-model"
        " --adapter run/adapter --output scores"
    ): ("unlearning/evaluation/test_evaluate.py", "test_tofu_from_the_command_line"),
    "fastbound lab": (
        "unlearning/lab/test_stability.py",
        "test_the_command_writes_summary_and_pictures",
    ),
    "fastbound tune": (
        "performance/tuning/test_tune.py",
        "test_the_command_tunes_resumes_and_leaves_what_dispatch_reads",
    ),
    "python -m benchmarks.compile_report": (
        "benchmarks/static/test_compile_report.py",
        "test_every_kernel_compiles_without_faults",
    ),
}
_OWN = "fastbound unlearn --model my-model --forget forget.jsonl --retain retain.jsonl --output"
OWN_TEXT = {
    "run": f"{_OWN} run",
    "gentle": f"{_OWN} gentle --loss flooding=1,level=2.3 --loss retain --lr 3e-3",
}


def test_every_block_is_of_a_kind_that_is_checked():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run_as_they_stand(user_folder, code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_every_command_is_run_somewhere(repository):
    assert set(COMMANDS) == {*RUN_BY_CI, *RUN_BY_TESTS, *OWN_TEXT.values()}
    steps = (repository / ".ci" / "run").read_text().splitlines()
    assert set(RUN_BY_CI.values()) <= set(steps)
    for file, test in RUN_BY_TESTS.values():
        assert f"def {test}(" in (repository / "tests" / file).read_text()


@pytest.mark.parametrize("output", OWN_TEXT)
def test_the_commands_on_own_text_leave_what_the_readme_says(user_folder, output):
    from fastbound.cli import main

    program, *arguments = shlex.split(OWN_TEXT[output])
    assert program == "fastbound"
    assert not main([*arguments, "--epochs", "2", "--batch-size", "2"])
    left = {path.relative_to(output).as_posix() for path in Path(output).rglob("*")}
    named = {"log.jsonl", "report.json", "curves.png", "adapter/adapter_model.safetensors"}
    assert named <= left


def test_pictures_are_there_and_small(repository):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (repository / picture).stat().st_size < 150_000, picture


def test_links_lead_to_files_and_headings():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
        if not leads_somewhere(page, target)
    ]
    assert not broken, "\n".join(broken)


def leads_somewhere(page: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    to = page.parent / file if file else page
    if not to.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", to.read_text(), flags=re.M) if anchor else []
    return not anchor or anchor in {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
