"""Dialogues as prompts, in the wording of TDEC's dialogue sets."""

from __future__ import annotations

from collections.abc import Sequence

_SPACED = ((".", " ."), (",", " ,"), ("?", " ?"), ("!", " !"), ("'", " ' "))
_FIRST_PERSON = ("i", "i'm", "i've", "i'll", "i'd")
# After these a sentence begins. The original asks for a substring of "?.!", which "" is.
_ENDS = ("?", ".", "!", "")


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
