"""The command line, `fastbound COMMAND ...`: each command is a module named in `COMMANDS`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastbound

# Name -> module with HELP, DESCRIPTION, EPILOG, add_arguments(parser) and run(arguments) -> int.
# Such a module imports nothing heavy at its top: all of them are read to show the help.
COMMANDS = {
    "unlearn": "fastbound.unlearning.command",
    "tune": "fastbound.performance.tuning.command",
    "profile": "fastbound.performance.profiling.command",
    "evaluate": "fastbound.unlearning.evaluation.command",
    "lab": "fastbound.unlearning.lab.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 stopped on the way, 2 cannot be done as asked."""
    from fastbound.errors import InputError, NonFiniteError

    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
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
    for name, where in COMMANDS.items():
        module = importlib.import_module(where)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
