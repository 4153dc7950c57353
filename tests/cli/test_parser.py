"""The command line before any work: what is unknown is named with what was meant."""

from __future__ import annotations

import errno
import pkgutil
import subprocess
import sys

import pytest

from fastbound.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unlern"], "unknown command 'unlern': did you mean unlearn? See fastbound --help"),
        (["xyzzy"], "unknown command 'xyzzy'; see fastbound --help"),
        ([], "give a command: unlearn, evaluate, lab, profile, tune; see fastbound --help"),
        (["--versoin"], "unknown option --versoin: did you mean --version? See fastbound --help"),
        (
            ["unlearn", "--rnak=3"],
            "unknown option --rnak: did you mean --rank? See fastbound unlearn --help",
        ),
        (
            ["profile", "--xyzzy", "1"],
            "unknown option --xyzzy; see fastbound profile --help",
        ),
        (["lab", "stray"], "unexpected argument 'stray'; see fastbound lab --help"),
        (
            ["evaluate", "--benchmark", "tofu"],
            "--model and --output are missing; see fastbound evaluate --help",
        ),
        (["unlearn", "--device", "cdua"], "got 'cdua': did you mean cuda?"),
        (["unlearn", "--form", "factor"], "got 'factor': did you mean factors?"),
        (["unlearn", "--loss", "nop"], "did you mean npo?"),
        (["unlearn", "--adapter", ""], "is empty: give a value, or leave it out"),
        (["profile", "--mode", "steps"], "did you mean step?"),
        (["profile", "--model-shape", "llama-3-8"], "did you mean llama-3-8b?"),
        (["profile", "--dtype", "bfloat61"], "did you mean bfloat16?"),
        (["lab", "--adapters", "loar"], "did you mean lora?"),
        (["evaluate", "--benchmark", "tofuu", "--model", "m", "--output", "o"], "mean tofu?"),
        (
            ["evaluate", "--benchmark=tofu", "--template=fhi", "--model=m", "--output=o"],
            "did you mean phi?",
        ),
    ],
)
def test_an_error_is_one_line_with_the_nearest_name(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's own errors
        status = end.code
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["unlearn", "--help"]])
def test_what_only_prints_imports_nothing_heavy(arguments, repository):
    code = (
        "import sys\n"
        "from fastbound.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'accelerate', 'tqdm', 'yaml'}\n"
        "print('imported', sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("imported []\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_default_and_ends_in_two_examples(command, capsys):
    module = COMMANDS[command]
    parser = _Collector()
    module.add_arguments(parser)
    silent = [flag for flag, text in parser.helps.items() if "default" not in text]
    assert not silent, f"no default in the help of {', '.join(silent)}"
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.rpartition("examples:\n")[2].splitlines()
    assert sum(line.startswith(f"  fastbound {command}") for line in examples) == 2


class _Collector:
    """Takes the options of a command for their help; required ones have no default."""

    def __init__(self) -> None:
        self.helps: dict[str, str] = {}

    def add_argument_group(self, title: str) -> _Collector:
        return self

    def add_argument(self, flag: str, *, help: str = "", required: bool = False, **_) -> None:
        if not required:
            self.helps[flag] = help


def test_interruption_has_a_line_of_its_own(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbound.unlearning.command.run", interrupt)
    assert main(["unlearn"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["unlearn"]) == 130
    assert capsys.readouterr().err.startswith("\nerror: interrupted; --resume goes on")


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        ("unlearn", True),
        ("lab --output map", True),
        ("evaluate --benchmark tofu --model m --output out", True),
        ("evaluate --attack relearn --model m --output out", False),
        ("profile", False),
    ],
)
def test_only_a_command_that_can_be_resumed_is_told_to_be(command, goes_on, capsys, monkeypatch):
    name = command.split()[0]
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")):

        def fail(arguments, error=error):
            raise error

        monkeypatch.setattr(pkgutil, "resolve_name", lambda run, fail=fail: fail)
        assert main(command.split()) in (1, 130)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and ("--resume" in said) == goes_on, name


def test_the_package_lists_its_public_names_alone():
    import fastbound

    names = [name for name in dir(fastbound) if not name.startswith("_")]
    assert names == sorted(fastbound.__all__)


def test_help_of_the_package_finds_the_public_names():
    import inspect

    import fastbound

    found = dict(inspect.getmembers(fastbound))  # what pydoc goes through
    assert set(fastbound.__all__) <= set(found)
    assert inspect.getdoc(found["inject"]) and inspect.isclass(found["FusedBoundedLinear"])
