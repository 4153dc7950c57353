"""The command line, `fastbound COMMAND ...`: each command is a module of this folder."""

from __future__ import annotations

import argparse
import contextlib
import errno
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import fastbound
from fastbound.cli import evaluate, lab, profile, tune, unlearn
from fastbound.errors import InputError, NonFiniteError, StoppedError

# Each has HELP, DESCRIPTION, EPILOG, add_arguments(parser) and RUN, which names the function that
# does the work, (arguments) -> int. Torch stays out until a command is chosen: help is instant.
COMMANDS = {"unlearn": unlearn, "tune": tune, "profile": profile, "evaluate": evaluate, "lab": lab}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 stopped on the way, 2 cannot be done as asked."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a name or a terminal that knows no such character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _warnings_of_one_line():
            status = int(pkgutil.resolve_name(arguments.run)(arguments))
        print(end="", flush=True)
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, StoppedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nerror: interrupted; a run with checkpoints goes on with --resume", file=sys.stderr)
        return 130


_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "what was written before is whole: make room there, then go on with --resume",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give a place that may be written to"
    ),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file lies where a folder should: give another name",
}


def _told(error: OSError) -> str:
    """What the system said, of which file, and what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0, "put that right, then go on with --resume")
    return f"{where}{reason}; {remedy}"


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """What the project itself warns of, without the place in its code."""
    honest = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], *more: Any, **named: Any) -> str:
        if category.__module__.partition(".")[0] == "fastbound":
            return f"warning: {message}\n"
        return honest(message, category, *more, **named)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = honest


class _Once(argparse.Action):
    """One value of an option: an empty one is refused; a second replaces it, and that is said."""

    def __call__(
        self, parser: Any, namespace: Any, value: Any, option_string: str | None = None
    ) -> None:
        if isinstance(value, str) and not value.strip():
            raise argparse.ArgumentError(self, "is empty: give a value, or leave it out")
        given = vars(namespace).setdefault("given", {})
        if self.dest in given and given[self.dest] != value:
            replaced = f"{value} takes the place of {given[self.dest]}"
            print(f"warning: {option_string} is given twice: {replaced}", file=sys.stderr)
        given[self.dest] = value
        setattr(namespace, self.dest, value)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, like every other error, and where to read on."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastbound", description="Bounded low-rank adapters, fused.")
    parser.add_argument("--version", action="version", version=f"fastbound {fastbound.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.RUN)
    return parser
