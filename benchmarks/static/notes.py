"""Regenerate the generated sections of NOTES.md: `python -m benchmarks.static.notes`.

A section lies between `<!-- NAME: written by ... -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.static import floor, in_the_interpreter, saved, traffic

NOTES = Path(__file__).parent.parent / "NOTES.md"


# The function that writes each section.
SECTIONS: dict[str, Callable[[], str]] = {
    "floor": floor.layers_document,
    "mlp_floor": floor.blocks_document,
    "saved": saved.document,
    "traffic": traffic.document,
}


def with_section(notes: str, name: str, text: str) -> str:
    """The notes with one section replaced.

    Raises:
        ValueError: the notes have no such section, or more than one.
    """
    pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n\n).*?(\n\n<!-- end of {name} -->)", re.DOTALL)
    found = pattern.findall(notes)
    if len(found) != 1:
        raise ValueError(f"expected one section {name!r} between its comments, found {len(found)}")
    return pattern.sub(lambda match: match[1] + text + match[2], notes)


def main() -> None:
    notes = NOTES.read_text()
    for name, document in SECTIONS.items():
        notes = with_section(notes, name, document())
    NOTES.write_text(notes)


if __name__ == "__main__":
    in_the_interpreter()
    main()
