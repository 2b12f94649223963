"""Reads a YAML config file and the files it extends into one plain mapping.

Knows nothing of dataclasses. Stricter than `yaml.safe_load`: a key given twice, a tag, an
anchor and an alias are errors, and scalars follow YAML 1.2's core rules (``1e-3`` is a number,
``on`` and ``2020-01-01`` are text). Public names: `Layers`, `read_layers`,
`scalar_from_text`, `is_file`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lowprec_jax.config_text import SCALARS
from lowprec_jax.errors import ConfigError

__all__ = ["Layers", "is_file", "read_layers", "scalar_from_text"]

EXTENDS = "extends"
_MAX_DEPTH = 50  # far above any tree of dataclasses, far below Python's stack


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 that rejects a key given twice."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # not hashable: SafeLoader reports it
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice; keep one",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


for _name, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


class Layers(NamedTuple):
    """A merged mapping and the file every key came from."""

    values: dict[str, Any]
    origins: dict[tuple[str, ...], Path]

    def origin(self, keys: tuple[str, ...]) -> str:
        """Returns the file that gave `keys`, or its nearest parent that a file gave."""
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.origins:
                return str(self.origins[keys[:length]])
        raise AssertionError("the root always has an origin")  # our own invariant


def read_layers(path: Path) -> Layers:
    """Returns the content of `path` merged over the files it extends.

    ``extends: other.yaml`` is relative to the file that says it. Sections merge key by key;
    a list or a scalar replaces what it overrides. An empty file is an empty mapping.

    Args:
      path: YAML file.

    Raises:
      ConfigError: a file cannot be read or parsed, uses a tag, an anchor or a key twice, or
        the chain of `extends` comes back to itself.
    """
    return _read_chain(path, ())


def scalar_from_text(text: str) -> Any:
    """Returns one word read as a config file reads it: ``"1e-3"`` is a float, ``"on"`` is text.

    Args:
      text: one word of a command line.

    Raises:
      yaml.YAMLError: `text` is not YAML.
      ValueError: a number Python refuses to read.
    """
    return yaml.load(text, Loader=_Loader)


def is_file(path: Path) -> bool:
    """Whether a file is there; not where the name can be none, such as one too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_chain(path: Path, seen: tuple[Path, ...]) -> Layers:
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, links in a circle
        raise ConfigError(f"Cannot read config file {str(path)!r}: {error}.") from error
    if resolved in seen:
        chain = " -> ".join(p.name for p in (*seen, resolved))
        raise ConfigError(f"{EXTENDS}: the files extend one another: {chain}. Remove one of them.")
    values = _read_file(path)
    base = values.pop(EXTENDS, None)
    if base is None:
        layers = Layers({}, {})
    elif isinstance(base, str):
        target = path.parent / base
        if not is_file(target):
            raise ConfigError(
                f"{EXTENDS}: no file {base!r} next to {path} ({target} does not exist). "
                f"The name is relative to the file that says it."
            )
        layers = _read_chain(target, (*seen, resolved))
    else:
        raise ConfigError(
            f"{EXTENDS} is {base!r} ({type(base).__name__}); allowed: one file name. From {path}."
        )
    layers.origins[()] = path
    _merge(layers.values, values, layers.origins, (), path)
    return layers


def _merge(
    below: dict[str, Any],
    above: Mapping[str, Any],
    origins: dict[tuple[str, ...], Path],
    prefix: tuple[str, ...],
    path: Path,
) -> None:
    for key, value in above.items():
        keys = (*prefix, key)
        origins[keys] = path
        if isinstance(value, dict):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            _merge(below[key], value, origins, keys, path)
        else:
            below[key] = value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"Cannot read config file {str(path)!r}: {error}.") from error
    try:
        _refuse_what_is_not_plain(text, path)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not a valid config file: {_one_line(error)}.") from error
    except ConfigError:
        raise
    except ValueError as error:  # a number Python refuses to read
        raise ConfigError(f"{path} is not a valid config file: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; allowed: 'key: value' lines.")
    _require_text_keys(values, (), path)
    return values


def _refuse_what_is_not_plain(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{path} line {line} is nested too deeply; allowed: {_MAX_DEPTH}.")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(
                f"{path} line {line} uses the tag {event.tag!r}; config files hold plain values "
                f"only. Remove the tag."
            )
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(
                f"{path} line {line} uses the anchor or alias {event.anchor!r}; write the value "
                f"out, or share it with '{EXTENDS}: other.yaml'."
            )


def _require_text_keys(value: Any, keys: tuple[str, ...], path: Path) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _require_text_keys(item, (*keys, str(index)), path)
    elif isinstance(value, dict):
        for key, item in value.items():
            dotted = ".".join((*keys, str(key)))
            if not isinstance(key, str):
                raise ConfigError(
                    f"Key '{dotted}' is a {type(key).__name__}; allowed: names of options. "
                    f"From {path}."
                )
            _require_text_keys(item, (*keys, key), path)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem
