"""The file of `--config`: options of a command as YAML (JSON is YAML), read and written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError, NotThereError
from fastbound.files import replace_files
from fastbound.version import __version__

CONFIG = "config.yaml"  # in the output folder of every run
NOT_KEPT = ("config", "dry_run", "output", "resume")  # where and how, not what


@dataclass(frozen=True)
class Setting:
    """One entry of the file.

    Attributes:
        name: as the file has it.
        values: its scalars as text; several for a list.
        where: file and line, for messages.
    """

    name: str
    values: tuple[str, ...]
    where: str

    def as_switch(self) -> bool:
        """Of an option that takes no value. Raises InputError."""
        known = {"true": True, "false": False}
        if len(self.values) != 1 or self.values[0].lower() not in known:
            raise InputError(
                f"{self.where}: {self.name} takes true or false, got {', '.join(self.values)!r}"
            )
        return known[self.values[0].lower()]


def read_config(name: str) -> list[Setting]:
    """The entries of the file in their order, all scalars as the text that stands there.

    Raises:
        InputError: the file is not there, is not YAML, or is more than names with one value or a
            list of values each.
    """
    import yaml

    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotThereError(f"config {name} does not exist: give a YAML or JSON file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"config {name} cannot be read: {reason}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise InputError(f"config {name}{place} is not YAML: {problem}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"config {name} must be one option per line, such as 'rank: 8'")
    found: dict[str, Setting] = {}
    for key, value in root.value:
        where = f"{name}, line {key.start_mark.line + 1}"
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in (key, *nodes)):
            raise InputError(
                f"{where}: an option takes a value or a list of values, no nested ones"
            )
        if not nodes or any(node.tag == "tag:yaml.org,2002:null" for node in nodes):
            raise InputError(f"{where}: {key.value} has no value: give one, or leave the line out")
        plain = key.value.replace("_", "-")
        if plain in found:
            raise InputError(f"{where}: {key.value} is given twice, first in {found[plain].where}")
        found[plain] = Setting(key.value, tuple(node.value for node in nodes), where)
    return list(found.values())


class Keeper:
    """Writes the options of a run into its output folder.

    Args:
        command: such as "fastbound unlearn".
        settings: turns values by destination into those of a file.
        given: the options of this call.
    """

    def __init__(
        self,
        command: str,
        settings: Callable[[Mapping[str, Any]], dict[str, Any]],
        given: Mapping[str, Any],
    ) -> None:
        self._command, self._settings, self._given = command, settings, given

    def text(self, chosen: Mapping[str, Any]) -> str:
        """The file. `chosen` holds what the run made of options that were not given."""
        import yaml

        settings = self._settings({**self._given, **chosen})
        head = (
            f"# The options of this run, of fastbound {__version__}. To repeat it:\n"
            f"# {self._command} --config {CONFIG} --output ANOTHER_FOLDER\n"
        )
        body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
        return head + (body if settings else "")

    @contextlib.contextmanager
    def __call__(self, output: Path, marker: str, chosen: Mapping[str, Any]) -> Iterator[None]:
        """Around a run: writes the file once the run has begun, however it ends.

        A run that is refused has not begun, whatever its folder holds.

        Args:
            marker: the file in `output` that a run writes when it begins.
        """
        try:
            yield
        except InputError:
            raise
        except BaseException:
            self._write(output, marker, chosen)
            raise
        self._write(output, marker, chosen)

    def _write(self, output: Path, marker: str, chosen: Mapping[str, Any]) -> None:
        if (output / marker).exists():
            replace_files({output / CONFIG: self.text(chosen).encode()})
