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
from fastbound.cli.config import Keeper
from fastbound.cli.parser import Command, Parser, see_help, unknown_word
from fastbound.errors import InputError, NonFiniteError, StoppedError, did_you_mean

# Each module has HELP, DESCRIPTION, EPILOG, add_arguments(parser) and RUN, the name of the function
# that does the work, (arguments) -> int. Torch is imported only once a command runs: help is quick.
COMMANDS = {"unlearn": unlearn, "evaluate": evaluate, "lab": lab, "profile": profile, "tune": tune}
DESCRIPTION = """\
Bounded low-rank adapters, fused into the layers they adapt, for machine unlearning of language
models.
"""
EPILOG = """\
examples:
  fastbound unlearn            a small model learns about invented authors and forgets two of them
  fastbound unlearn --help     the options of a command, with examples
"""
_AsWritten = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 if it is done, 1 if it was stopped on the way,
    2 if it cannot be done as asked."""
    for stream in (sys.stdout, sys.stderr):  # for terminals without some character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = None
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
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
        print(f"error: {_told(error, resumable=_resumable(arguments))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # A terminal shows ^C where the cursor was, so that the message needs a line of its own.
        start = "\n" if sys.stderr.isatty() else ""
        remedy = "; --resume goes on from what is written" if _resumable(arguments) else ""
        print(f"{start}error: interrupted{remedy}", file=sys.stderr)
        return 130


def _resumable(arguments: argparse.Namespace | None) -> bool:
    """Whether the command that was given has --resume; an attack refuses it."""
    return hasattr(arguments, "resume") and getattr(arguments, "attack", None) is None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    **dict.fromkeys(_FULL, "what was written before is intact: make room there"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to"
    ),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "there is a file where a folder should be: give another name",
}


def _told(error: OSError, *, resumable: bool) -> str:
    """What the system said about which file, and what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    number = error.errno or 0
    remedy = _REMEDIES.get(number, "correct that")
    goes_on = resumable and (number in _FULL or number not in _REMEDIES)
    return f"{where}{reason}; {remedy}{', then continue with --resume' * goes_on}"


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Print warnings of the project itself as one line, without the place in the code."""
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for what argparse itself does not refuse."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = did_you_mean(argv[0], COMMANDS)
        raise InputError(see_help(f"unknown command {argv[0]!r}{near}", "fastbound"))
    parser = Parser(
        prog="fastbound", description=DESCRIPTION, epilog=EPILOG, formatter_class=_AsWritten
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"fastbound {fastbound.__version__}",
        help="print the version and leave",
    )
    chosen = parser.add_subparsers(metavar="COMMAND", dest="command")
    commands = {}
    for name, module in COMMANDS.items():
        each = chosen.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=_AsWritten,
        )
        module.add_arguments(each)
        commands[name] = Command(each)
    given, unknown = parser.parse_known_args(argv)
    name = vars(given).pop("command")
    if name is None:
        raise InputError(
            unknown_word(unknown, ("--version", "--help"), "fastbound")
            if unknown
            else see_help(f"give a command: {', '.join(COMMANDS)}", "fastbound")
        )
    arguments = commands[name].complete(given, unknown)
    arguments.run = COMMANDS[name].RUN
    held = {dest: getattr(arguments, dest) for dest in arguments.given}
    arguments.keeping_config = Keeper(f"fastbound {name}", commands[name].settings, held)
    return arguments
