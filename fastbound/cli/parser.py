"""How every command reads its options: from the command line, from `--config`, and by default."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from fastbound.cli.config import NOT_KEPT, Setting, read_config
from fastbound.errors import InputError, did_you_mean


class Once(argparse.Action):
    """One value of an option: an empty one is refused, a second one replaces the first and says so.

    It relies on the parser having no defaults: what the namespace holds was given.
    """

    def __call__(
        self, parser: Any, namespace: Any, value: Any, option_string: str | None = None
    ) -> None:
        if isinstance(value, str) and not value.strip():
            raise argparse.ArgumentError(self, "is empty: give a value, or leave it out")
        held = getattr(namespace, self.dest, value)
        if repr(held) != repr(value):  # a NaN is no other value than itself
            print(
                f"warning: {option_string} is given twice: {value} takes the place of {held}",
                file=sys.stderr,
            )
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line each and name the command's help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in (None, "store"):
            self.register("action", name, Once)

    def error(self, message: str) -> NoReturn:
        """One line, like every other error, and where to read on."""
        self.exit(2, f"error: {see_help(message, self.prog)}\n")


def unknown_word(words: Sequence[str], flags: Iterable[str], program: str) -> str:
    """A message about the first option that is none of `flags`, or the first stray argument."""
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return see_help(f"unexpected argument {words[0]!r}", program)
    name = flag.partition("=")[0]
    # Without the dashes, which would make any two options look alike.
    near = did_you_mean(name.lstrip("-"), [each[2:] for each in flags], before="--")
    return see_help(f"unknown option {name}{near}", program)


def see_help(message: str, program: str) -> str:
    """The message, and where to read on."""
    return message + (" See" if message.endswith("?") else "; see") + f" {program} --help"


class Command:
    """One command of the command line: its parser, and the order in which its options are found.

    The command line comes first, then the file of `--config`, then the defaults.

    Args:
        parser: with all options of the command; its defaults and its required options are taken
            over by this object, so that a file can give them too.
    """

    def __init__(self, parser: Parser) -> None:
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="read options from a YAML or JSON file, under the same names without the dashes; "
            "the command line overrides it (default: no file)",
        )
        self.parser = parser
        # The usage line shows what is required, and must be made before that is taken over.
        self._actions = {a.dest: a for a in parser._actions if a.dest != "help"}
        parser.usage = parser.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        self._required = [a for a in self._actions.values() if a.required]
        self._defaults = {dest: a.default for dest, a in self._actions.items()}
        for action in self._actions.values():
            action.required, action.default = False, argparse.SUPPRESS

    def complete(self, given: argparse.Namespace, unknown: Sequence[str]) -> argparse.Namespace:
        """All options, where `given` holds those of the command line.

        `given` of the result names what was given, by either way.

        Raises:
            InputError: an option is unknown, a required one is missing, or the file cannot be used.
        """
        if unknown:
            raise InputError(unknown_word(unknown, self._flags(), self.parser.prog))
        values = vars(given)
        if "config" in values:
            for setting in read_config(values["config"]):
                action = self._action_of(setting)
                if action.dest not in values:
                    self._apply(action, setting, given)
        missing = [self.flag(a.dest) for a in self._required if a.dest not in values]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise InputError(see_help(f"{' and '.join(missing)} {verb} missing", self.parser.prog))
        return argparse.Namespace(
            **{**self._defaults, **values}, given=frozenset(values) & set(self._defaults)
        )

    def flag(self, dest: str) -> str:
        return self._actions[dest].option_strings[0]

    def _flags(self) -> list[str]:
        return [self.flag(dest) for dest in self._actions]

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the file of `--config` holds them: by the names of the flags.

        An option that takes no value is true where its value is the one that the flag gives.

        Args:
            values: by destination; None, and what is not an option of the command, are left out.
        """
        kept: dict[str, Any] = {}
        for dest, action in self._actions.items():
            value = values.get(dest)
            if dest in NOT_KEPT or value is None:
                continue
            if action.nargs == 0:
                if value == action.const:
                    kept[self.flag(dest)[2:]] = True
            else:
                kept[self.flag(dest)[2:]] = list(value) if isinstance(value, tuple) else value
        return kept

    def _action_of(self, setting: Setting) -> argparse.Action:
        names = {self.flag(dest)[2:]: dest for dest in self._actions if dest not in ("config",)}
        name = setting.name.replace("_", "-")
        if name not in names:
            raise InputError(
                f"{setting.where}: {self.parser.prog} has no option {setting.name!r}"
                f"{did_you_mean(name, names)}"
            )
        return self._actions[names[name]]

    def _apply(self, action: argparse.Action, setting: Setting, given: argparse.Namespace) -> None:
        """As if the setting stood on the command line, so that both are read alike."""
        flag = action.option_strings[0]
        if action.nargs == 0:
            if setting.as_switch():
                self.parser.parse_args([flag], given)
            return
        values = setting.values
        if isinstance(action, Once):
            values = (",".join(values),)
        try:
            for value in values:
                action(self.parser, given, _converted(action, value), flag)
        except argparse.ArgumentError as error:
            raise InputError(f"{setting.where}: {setting.name}: {error.message}") from error


def _converted(action: argparse.Action, value: str) -> Any:
    """As argparse converts the text of an option. Raises argparse.ArgumentError."""
    if not callable(action.type):
        return value
    try:
        return action.type(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentError(action, str(error)) from error
    except ValueError as error:
        kind = getattr(action.type, "__name__", "value")
        raise argparse.ArgumentError(action, f"invalid {kind} value: {value!r}") from error
