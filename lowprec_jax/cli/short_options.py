"""Short forms of options that are typed often, such as ``--target`` for ``--precision.target``.

A row of `SHORT_OPTIONS` is one. Public names: `SHORT_OPTIONS`, `short_options_of`,
`expand_short_options`.
"""

from collections.abc import Collection, Mapping, Sequence

from lowprec_jax.errors import ConfigError

__all__ = ["SHORT_OPTIONS", "expand_short_options", "short_options_of"]

SHORT_OPTIONS = {"target": "precision.target"}


def short_options_of(known: Collection[str]) -> dict[str, str]:
    """Returns the short options of a config and what they stand for.

    Args:
      known: every dotted option of the config; one that has the name of a short form keeps it.
    """
    return {k: v for k, v in SHORT_OPTIONS.items() if v in known and k not in known}


def expand_short_options(args: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Returns the words of a command line with short options written out.

    Args:
      args: words, such as ``["--target", "amd-mi300"]`` or ``["--target=amd-mi300"]``.
      short: out of `short_options_of`.

    Raises:
      ConfigError: the option is given in both forms, with different values.
    """
    words = list(args)
    for name, dotted in short.items():
        brief, full = _values(words, name), _values(words, dotted)
        if brief and full and len({*brief, *full}) > 1:
            raise ConfigError(
                f"--{name} is {brief[-1]!r} and --{dotted} is {full[-1]!r}; the first is short for "
                "the second. Keep one. From the command line."
            )
        words = [_written_out(word, name, dotted) for word in words]
    return words


def _values(words: Sequence[str], name: str) -> list[str]:
    """What follows each ``--name``, as the next word or after ``=``."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            found.append(value if equals else following)
    return found


def _written_out(word: str, short: str, dotted: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--{dotted}{equals}{value}" if flag == f"--{short}" else word
