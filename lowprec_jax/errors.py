"""What a person did wrong, said so that they can put it right."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input of a person who runs a program; shown as one paragraph with exit code 2."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for an error message, or nothing when no known word is close."""
    match = nearest(word, known)
    return f" Did you mean {match!r}?" if match else ""
