"""The dialogues of TDEC's validation sets as rows: prompt and reply in the original's wording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.data.files import parse_json, read_text
from fastbound.unlearning.data.rows import Row, as_text

_SPACED = ((".", " ."), (",", " ,"), ("?", " ?"), ("!", " !"), ("'", " ' "))
_FIRST_PERSON = ("i", "i'm", "i've", "i'll", "i'd")
# After these a sentence begins. The original asks for a substring of "?.!", which "" is.
_ENDS = ("?", ".", "!", "")


def read_dialogues(path: Path) -> list[Row]:
    value = parse_json(read_text(path), str(path), "write one object", lines=True)
    dialogues = value.get("text") if isinstance(value, dict) else None
    if not isinstance(dialogues, dict) or not dialogues:
        raise InputError(f'{path}: {{"text": {{id: [turn, turn, ...]}}}} is needed')
    return [_dialogue(turns, f"{path}, dialogue {id}") for id, turns in dialogues.items()]


def _dialogue(turns: Any, where: str) -> Row:
    if not isinstance(turns, list) or len(turns) < 2:
        raise InputError(f"{where}: a list of two turns or more is needed, got {turns!r}")
    for number, turn in enumerate(turns, start=1):
        as_text(turn, f"turn {number}", where)
    return Row(dialogue_prompt(turns[:-1]), normalise_reply(turns[-1]), where)


def dialogue_prompt(turns: Sequence[str]) -> str:
    """Both users' turns, `normalise_reply` of each, and the tag of the user whose turn it is."""
    said = (f"User {1 + i % 2}: {normalise_reply(turn)}\n" for i, turn in enumerate(turns))
    return "".join(said) + f"User {1 + len(turns) % 2}:"


def normalise_reply(text: str) -> str:
    """A turn in lower case but for sentence starts and "i", spaced as written text, with an end.

    The rule of ParlAI (`normalize_reply`, version 2) that the dialogue sets are scored with.
    """
    text = text.lower()
    for mark, spaced in _SPACED:
        text = text.replace(mark, spaced).replace("  ", " ")
    words = text.split(" ")
    begins = (
        i == 0 or word in _FIRST_PERSON or (i > 1 and words[i - 1] in _ENDS)
        for i, word in enumerate(words)
    )
    text = " ".join(
        word[:1].upper() + word[1:] if begin else word
        for word, begin in zip(words, begins, strict=True)
    )
    text = f" {text} "
    for mark, spaced in _SPACED:
        text = text.replace(spaced, mark)
    text = text.strip().replace("  ", " ")
    return text if not text or text[-1] in "!.?)\"'" else text + "."
