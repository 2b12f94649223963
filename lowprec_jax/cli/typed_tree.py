"""Turns a plain mapping into a tree of dataclasses, strictly.

Knows no field of ours: types, defaults and names come from the dataclass. Public names:
`build`, `is_text`, `option_names`, `unknown_option`, `type_text`, `literal_values`.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union

from lowprec_jax.errors import ConfigError, did_you_mean, nearest

__all__ = ["build", "is_text", "literal_values", "option_names", "type_text", "unknown_option"]

T = TypeVar("T")
Keys = tuple[str, ...]
Origin = Callable[[Keys], str]

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class _Source(NamedTuple):
    """Where values come from, and every option of the root, for messages."""

    origin: Origin
    known: dict[str, str]


def build(cls: type[T], values: Mapping[str, Any], origin: Origin, keys: Keys = ()) -> T:
    """Returns an instance of the dataclass `cls` with `values` over its defaults.

    Nothing is guessed: an int stays out of a bool, text stays out of an int. Two things are
    accepted besides the declared type: an int where a float is declared, and text that spells
    a number where a float is declared (YAML 1.1 reads ``1e-3`` as text).

    Args:
      cls: dataclass; its fields may be dataclasses, tuples or lists of them, Literals, unions.
      values: nested mapping with text keys.
      origin: gives the name of the file that holds a key.
      keys: where `values` stands in the whole tree.

    Raises:
      ConfigError: an unknown or a missing key, a wrong type, or a `ValueError` of a
        `__post_init__`; names the dotted key and the file.
      TypeError: `cls` declares a type this loader does not know (an error of the program).
    """
    return _build(cls, values, keys, _Source(origin, option_names(cls, keys)))


def option_names(cls: type, prefix: Keys = ()) -> dict[str, str]:
    """Returns every dotted option of `cls` with its type and default as text.

    Sections are in it too, as ``"a section"``. The items of lists are not.

    Args:
      cls: dataclass.
      prefix: section that `cls` is.
    """
    names: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        dotted = ".".join((*prefix, field.name))
        section = _section_class(hints[field.name])
        if section is not None:
            names[dotted] = "a section"
            names.update(option_names(section, (*prefix, field.name)))
        else:
            default = _default(field)
            tail = f"default {default}" if default is not None else "required"
            names[dotted] = f"{type_text(hints[field.name])}, {tail}"
    return names


def unknown_option(keys: Keys, source: str, known: Mapping[str, str]) -> ConfigError:
    """Returns the error for an option that does not exist, with the nearest that does.

    The same last name in another section comes first, then the part of the key that exists,
    then a name alike in the same section, and at last one in any section.

    Args:
      keys: what was given, from the root.
      source: file, or "the command line".
      known: every dotted option, with its type and default.
    """
    dotted = ".".join(keys)
    section = ".".join(keys[:-1])
    siblings = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == section}
    match = _nearest_option(keys, siblings, known)
    if match is not None:
        hint = f"Nearest: {match} ({known[match]})."
    else:
        hint = f"Known: {', '.join(list(siblings.values()) or sorted(known))}."
    nested = " Write it as a section, not with dots." if "." in keys[-1] else ""
    return ConfigError(f"No option '{dotted}'. {hint}{nested} From {source}.")


def type_text(tp: Any) -> str:
    """Returns a declared type in the words of a config file, such as ``int or null``."""
    tp = _bare(tp)
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(a) for a in args)
    if origin in (tuple, list):
        return f"list of {type_text(args[0])}"
    if dataclasses.is_dataclass(tp):
        return "section with " + ", ".join(f.name for f in dataclasses.fields(tp))
    return getattr(tp, "__name__", str(tp))


def literal_values(tp: Any) -> tuple[Any, ...]:
    """Returns what a Literal allows, or () for any other type."""
    tp = _bare(tp)
    return typing.get_args(tp) if typing.get_origin(tp) is Literal else ()


def is_text(text: str) -> bool:
    """Whether a file can hold `text` and be named by it: no NUL, and nothing but UTF-8."""
    return _NOT_TEXT.search(text) is None


def _nearest_option(
    keys: Keys, siblings: Mapping[str, str], known: Mapping[str, str]
) -> str | None:
    dotted = ".".join(keys)
    anywhere = {name.rpartition(".")[2]: name for name in reversed(list(known))}
    if dotted in known or keys[-1] in anywhere:
        return dotted if dotted in known else anywhere[keys[-1]]
    if not siblings:  # below a list, or in a section that does not exist
        parents = (".".join(keys[:length]) for length in range(len(keys) - 1, 0, -1))
        parent = next((p for p in parents if p in known), None)
        if parent is not None:
            return parent
    for candidates in (siblings, anywhere):
        last = nearest(keys[-1], candidates)
        if last is not None:
            return candidates[last]
    return None


def _build(cls: type[T], values: Mapping[str, Any], keys: Keys, source: _Source) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            here = option_names(cls, keys)
            raise unknown_option((*keys, name), source.origin((*keys, name)), source.known | here)
    missing = [n for n, f in fields.items() if n not in values and _default(f) is None]
    if missing:
        name = ".".join((*keys, missing[0]))
        text = type_text(hints[missing[0]])
        raise ConfigError(f"Option '{name}' ({text}) must be given. From {source.origin(keys)}.")
    given = {n: _convert(v, hints[n], (*keys, n), source) for n, v in values.items()}
    try:
        return cls(**given)
    except ValueError as error:
        section = f"{'.'.join(keys)}: " if keys else ""
        raise ConfigError(f"{section}{error} From {source.origin(keys)}.") from error


def _convert(value: Any, tp: Any, keys: Keys, source: _Source) -> Any:
    tp = _bare(tp)
    kind, args = typing.get_origin(tp), typing.get_args(tp)
    if kind in (Union, types.UnionType):
        return _convert_union(value, tp, keys, source)
    if kind is Literal:
        if any(type(value) is type(a) and value == a for a in args):
            return value
        raise _wrong(value, tp, keys, source)
    if kind in (tuple, list):
        return _convert_list(value, tp, keys, source)
    if dataclasses.is_dataclass(tp):
        if not isinstance(value, dict):
            raise _wrong(value, tp, keys, source)
        return _build(typing.cast(type, tp), value, keys, source)
    return _convert_scalar(value, tp, keys, source)


def _convert_scalar(value: Any, tp: Any, keys: Keys, source: _Source) -> Any:
    if tp not in (bool, int, float, str, type(None)):
        raise TypeError(f"{'.'.join(keys)}: the config loader does not know the type {tp!r}.")
    if type(value) is tp and (tp is not str or is_text(value)):
        return value
    spelled = isinstance(value, str) and _NUMBER.fullmatch(value) is not None
    if tp is float and (type(value) is int or spelled):
        try:
            return float(value)
        except OverflowError:
            pass
    raise _wrong(value, tp, keys, source)


def _convert_union(value: Any, tp: Any, keys: Keys, source: _Source) -> Any:
    members = typing.get_args(tp)
    if value is None and type(None) in members:
        return None
    rest = [m for m in members if m is not type(None)]
    # A mapping that fails in the only section of the union deserves that section's message.
    if len(rest) == 1 and isinstance(value, dict | list):
        return _convert(value, rest[0], keys, source)
    exact = [m for m in rest if m is type(value)]
    for member in (*exact, *rest):
        try:
            return _convert(value, member, keys, source)
        except ConfigError:
            continue
    raise _wrong(value, tp, keys, source)


def _convert_list(value: Any, tp: Any, keys: Keys, source: _Source) -> Any:
    kind, args = typing.get_origin(tp), typing.get_args(tp)
    if not isinstance(value, list):
        raise _wrong(value, tp, keys, source)
    if kind is tuple and args[-1] is not Ellipsis and len(args) != len(value):
        dotted = ".".join(keys)
        raise ConfigError(
            f"'{dotted}' has {len(value)} items; allowed: {len(args)}. From {source.origin(keys)}."
        )
    types_ = args if kind is tuple and args[-1] is not Ellipsis else (args[0],) * len(value)
    items = (
        _convert(item, t, (*keys, str(i)), source)
        for i, (item, t) in enumerate(zip(value, types_, strict=True))
    )
    return tuple(items) if kind is tuple else list(items)


def _wrong(value: Any, tp: Any, keys: Keys, source: _Source) -> ConfigError:
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    kind = {dict: "section", list: "list", type(None): "null"}.get(type(value))
    given = f"{shown} ({kind or type(value).__name__})" if value is not None else "nothing (null)"
    hint = ""
    if isinstance(value, str) and any(isinstance(a, str) for a in literal_values(tp)):
        hint = did_you_mean(value, [a for a in literal_values(tp) if isinstance(a, str)])
    elif tp is int and isinstance(value, float) and value.is_integer():
        hint = f" Write {int(value)}."
    elif tp is bool:
        hint = " Write true or false."
    elif tp is str and isinstance(value, bool | int | float):
        hint = " Put it in quotes."
    elif tp is str and isinstance(value, str):
        hint = " Leave out NUL, and what is not UTF-8."
    allowed = f"allowed: {type_text(tp)}.{hint}"
    return ConfigError(f"'{'.'.join(keys)}' is {given}; {allowed} From {source.origin(keys)}.")


def _bare(tp: Any) -> Any:
    return typing.get_args(tp)[0] if typing.get_origin(tp) is typing.Annotated else tp


def _section_class(tp: Any) -> type | None:
    members = (_bare(tp), *typing.get_args(_bare(tp)))
    if typing.get_origin(_bare(tp)) in (tuple, list):
        return None
    return next((m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def _default(field: dataclasses.Field) -> str | None:
    """Returns the default as text, or None for a field that must be given."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return None
