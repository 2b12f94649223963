"""Command-line overrides ``--section.field value`` on top of a loaded config.

tyro parses them and writes the help. Where tyro refuses, its boxed message is replaced by one
sentence from the strict builder, so that a flag and a file key fail in the same words. Public
name: `apply_overrides`.
"""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import tyro
import yaml

from lowprec_jax.cli.short_options import expand_short_options, short_options_of
from lowprec_jax.cli.typed_tree import (
    Keys,
    build,
    is_text,
    literal_values,
    option_names,
    unknown_option,
)
from lowprec_jax.cli.yaml_layers import scalar_from_text
from lowprec_jax.errors import ConfigError

__all__ = ["apply_overrides"]

T = TypeVar("T")

COMMAND_LINE = "the command line"
_BOX = re.compile(r"[─│╭╮╰╯]+|-{5,}")


class _Flag(NamedTuple):
    """One ``--name`` with the words that follow it."""

    keys: Keys
    values: tuple[str, ...]


def apply_overrides(
    loaded: T,
    args: Sequence[str],
    *,
    prog: str,
    description: str = "",
    extra_options: Mapping[str, str] | None = None,
) -> T:
    """Returns `loaded` with the overrides of `args` on top.

    ``--help`` prints every option with its type, its present value and its docstring, and ends
    the program with code 0. A boolean may be given as ``--flag``, ``--flag true`` or
    ``--flag False``; an optional value is cleared with ``None`` or ``null``.

    Args:
      loaded: instance of a dataclass.
      args: words of the command line.
      prog: name of the program in the help.
      description: text above the options in the help.
      extra_options: options that the caller has taken out of `args` already, with a
        description; named when a flag is misspelt.

    Raises:
      ConfigError: an unknown flag (the nearest is named), a value of the wrong type, or a
        value that the dataclass refuses.
    """
    short = short_options_of(option_names(type(loaded)))
    words = _normalise(type(loaded), expand_short_options(args, short))
    notes = [f"--{name} is short for --{dotted}." for name, dotted in short.items()]
    description = " ".join([description, *notes]).strip()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if all(map(is_text, words)):
                return tyro.cli(
                    type(loaded),
                    default=loaded,
                    args=words,
                    prog=prog,
                    description=description or None,
                    use_underscores=True,
                    config=(tyro.conf.FlagConversionOff,),
                )
    except SystemExit as exit_:
        if not exit_.code:
            raise  # --help
    _explain(loaded, words, {**(extra_options or {}), **short})
    text = " ".join(_BOX.sub(" ", complaint.getvalue()).split())
    raise ConfigError(f"{text} From {COMMAND_LINE}.")


def _normalise(cls: type, args: Sequence[str]) -> list[str]:
    """Spells booleans and nulls the way tyro reads them, and flags with underscores."""
    words: list[str] = []
    for position, word in enumerate(args):
        name, equals, value = word.partition("=")
        tp = _type_at(cls, _keys(name)) if name.startswith("--") else None
        if tp is None:
            previous = _type_at(cls, _keys(words[-1])) if words and "=" not in words[-1] else None
            words.append(_spell(word, previous))
            continue
        words.append("--" + ".".join(_keys(name)))
        following = args[position + 1] if position + 1 < len(args) else "--"
        if equals:
            words[-1] += "=" + _spell(value, tp)
        elif tp is bool and following.startswith("--"):
            words.append("True")
    return words


def _spell(word: str, tp: Any) -> str:
    if tp is bool and word.lower() in ("true", "false"):
        return word.capitalize()
    if type(None) in typing.get_args(tp) and word == "null":
        return "None"
    return word


def _explain(loaded: Any, words: Sequence[str], extra_options: Mapping[str, str]) -> None:
    """Raises the ConfigError that says why `words` do not fit; returns if none does."""
    cls = type(loaded)
    known = {**option_names(cls), **extra_options}
    values = dataclasses.asdict(loaded)
    for flag in _flags(words):
        dotted = ".".join(flag.keys)
        parent, tp = _parent_at(values, flag.keys), _type_at(cls, flag.keys)
        if parent is None or tp is None:
            raise unknown_option(flag.keys, COMMAND_LINE, known)
        if dataclasses.is_dataclass(tp):
            raise ConfigError(
                f"'{dotted}' is a section; give its options, such as "
                f"--{dotted}.{dataclasses.fields(tp)[0].name}. From {COMMAND_LINE}."
            )
        many = typing.get_origin(tp) in (tuple, list)
        if not many and len(flag.values) != 1:
            given = " ".join(flag.values) or "nothing"
            raise ConfigError(
                f"'{dotted}' takes one value, given: {given}. Known: {dotted} "
                f"({known.get(dotted, 'an item of a list')}). From {COMMAND_LINE}."
            )
        read = [_from_text(v, tp) for v in flag.values]
        _set(parent, flag.keys[-1], read if many else read[0])
    build(cls, _listed(values), lambda keys: COMMAND_LINE)


def _flags(words: Sequence[str]) -> list[_Flag]:
    flags: list[_Flag] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags.append(_Flag(_keys(name), (value,) if equals else ()))
        elif not flags or word == "-h":
            raise ConfigError(
                f"'{word}' is not an option; allowed: --section.field value. From {COMMAND_LINE}."
            )
        else:
            flags[-1] = _Flag(flags[-1].keys, (*flags[-1].values, word))
    return flags


def _from_text(text: str, tp: Any) -> Any:
    """Reads one word as the file would, except that text stays text where text is allowed."""
    members = (tp,) if literal_values(tp) else (tp, *typing.get_args(tp))
    if text == "None" and type(None) in members:
        return None
    if any(m is str or _is_text_literal(m) for m in members):
        return text
    try:
        value = scalar_from_text(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None else value


def _is_text_literal(tp: Any) -> bool:
    return any(isinstance(value, str) for value in literal_values(tp))


def _keys(flag: str) -> Keys:
    return tuple(flag.removeprefix("--").replace("-", "_").split("."))


def _type_at(tp: Any, keys: Keys) -> Any | None:
    """Returns the declared type of an option below `tp`; None where there is no such option."""
    for key in keys:
        members = [tp, *typing.get_args(tp)]
        if typing.get_origin(tp) in (tuple, list):
            tp = members[1] if key.isdecimal() else None
        else:
            section = next((m for m in members if dataclasses.is_dataclass(m)), None)
            tp = typing.get_type_hints(section).get(key) if section is not None else None
        if tp is None:
            return None
    return tp


def _parent_at(values: Any, keys: Keys) -> Any | None:
    """Returns the mapping or list that holds the last key; None where there is none."""
    for position, key in enumerate(keys):
        parent = values
        if isinstance(values, dict) and key in values:
            values = values[key]
        elif isinstance(values, tuple | list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
        if position == len(keys) - 1:
            return parent
    return None


def _set(parent: Any, key: str, value: Any) -> None:
    if isinstance(parent, dict):
        parent[key] = value
    elif isinstance(parent, list):
        parent[int(key)] = value


def _listed(values: Any) -> Any:
    """Returns `values` with every tuple as a list, as a file would hold them."""
    if isinstance(values, dict):
        return {k: _listed(v) for k, v in values.items()}
    if isinstance(values, tuple | list):
        return [_listed(v) for v in values]
    return values
