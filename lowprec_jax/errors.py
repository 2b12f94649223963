"""Errors of people who run a program, and the words that help them.

Imports nothing of the package. Public names: `UserError`, `ConfigError`, `TrainingFailedError`,
`nearest`, `did_you_mean`.
"""

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "TrainingFailedError", "UserError", "did_you_mean", "nearest"]


class UserError(ValueError):
    """Bad input of a person who runs a program.

    Shown as one paragraph with exit code 2, without a traceback. Its message says what
    failed, what was given, what is allowed and what to do.

    Attributes:
      exit_code: of the program.
    """

    exit_code = 2


class TrainingFailedError(UserError):
    """A run went wrong again and again; its report says where."""

    exit_code = 5


class ConfigError(UserError):
    """A config file or a command-line override is wrong; the message names the key."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word most like `word`, or None when none is alike.

    Letter case is ignored. Ties go to the word that comes first in the alphabet.

    Args:
      word: what was given.
      known: what is allowed; may be empty.

    Example:
      >>> nearest("delayd", ["none", "delayed"])
      'delayed'
    """
    by_lower = {candidate.lower(): candidate for candidate in sorted(known, reverse=True)}
    matches = difflib.get_close_matches(word.lower(), sorted(by_lower), n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` (with its leading space), or "" when nothing is alike.

    Args:
      word: what was given.
      known: what is allowed; may be empty.

    Example:
      >>> did_you_mean("delayd", ["none", "delayed"])
      " Did you mean 'delayed'?"
    """
    match = nearest(word, known)
    return f" Did you mean {match!r}?" if match is not None else ""
