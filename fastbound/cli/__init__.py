"""The command line, `fastbound COMMAND ...`: each command is a module of this folder."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Sequence

import fastbound
from fastbound.cli import evaluate, lab, profile, tune, unlearn
from fastbound.errors import InputError, NonFiniteError

# Each has HELP, DESCRIPTION, EPILOG, add_arguments(parser) and RUN, which names the function that
# does the work, (arguments) -> int. Torch stays out until a command is chosen: help is instant.
COMMANDS = {"unlearn": unlearn, "tune": tune, "profile": profile, "evaluate": evaluate, "lab": lab}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 stopped on the way, 2 cannot be done as asked."""
    arguments = _parser().parse_args(argv)
    try:
        return int(pkgutil.resolve_name(arguments.run)(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; a run with checkpoints goes on with --resume", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
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
