"""Loads, writes, compares and finds config files; knows no field of ours.

A config is a tree of frozen dataclasses. A YAML file holds the values that differ from their
defaults, may extend another file, and command-line overrides come last. Imports no JAX. Public
names: `load_config`, `config_to_dict`, `dump_config`, `diff_configs`, `resolve_config_path`,
`config_names`, and `ConfigError`.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowprec_jax.cli.overrides import apply_overrides
from lowprec_jax.cli.typed_tree import build
from lowprec_jax.cli.yaml_layers import is_file, read_layers
from lowprec_jax.config_text import config_to_dict, dump_config
from lowprec_jax.errors import ConfigError, did_you_mean

__all__ = [
    "ConfigError",
    "config_names",
    "config_to_dict",
    "diff_configs",
    "dump_config",
    "load_config",
    "resolve_config_path",
]

T = TypeVar("T")


def load_config(
    cls: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    prog: str = "train",
    description: str = "",
    extra_options: Mapping[str, str] | None = None,
) -> T:
    """Returns an instance of `cls` from a YAML file and command-line overrides.

    The file must be valid by itself. ``--help`` among the overrides prints the options and
    ends the program with code 0.

    Args:
      cls: frozen dataclass; its sections are dataclasses.
      path: YAML file; see `resolve_config_path` for files by name.
      overrides: words such as ``["--optim.learning_rate", "1e-3"]``.
      prog: name of the program in the help.
      description: text above the options in the help.
      extra_options: options the caller handles itself, named when a flag is misspelt.

    Raises:
      ConfigError: the file or an override is wrong; names the dotted key, where it comes from
        and what is allowed.
    """
    layers = read_layers(Path(path))
    loaded = build(cls, layers.values, layers.origin)
    if not overrides:
        return loaded
    return apply_overrides(
        loaded, overrides, prog=prog, description=description, extra_options=extra_options
    )


def diff_configs(old: Any, new: Any) -> list[str]:
    """Returns one line ``"section.field: old -> new"`` for each value that differs.

    Args:
      old: instance of a dataclass.
      new: instance to compare with; an item only one of them has shows as ``(absent)``.
    """
    before, after = _flat(config_to_dict(old)), _flat(config_to_dict(new))
    keys = [*before, *(k for k in after if k not in before)]
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def resolve_config_path(name_or_path: str | Path) -> Path:
    """Returns the file of a config given by path or by name.

    An existing file wins. Otherwise ``quickstart``, ``quickstart.yaml`` and
    ``configs/quickstart.yaml`` are the file that comes with the package.

    Args:
      name_or_path: path of a YAML file, or a name out of `config_names`.

    Raises:
      ConfigError: no such file and no such name; lists the names and the nearest.
    """
    text = str(name_or_path)
    path = Path(text)
    if is_file(path):
        return path
    name = text.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    known = _shipped_configs()
    if name in known:
        return known[name]
    raise ConfigError(
        f"No config file {text!r} and no config of that name. Known names: "
        f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
    )


def config_names() -> list[str]:
    """Returns the names of the configs that come with the package, sorted."""
    return list(_shipped_configs())


def _shipped_configs() -> dict[str, Path]:
    package = Path(str(importlib.resources.files("lowprec_jax")))
    folders = [package / "configs"]
    if (package.parent / "pyproject.toml").is_file():  # a source checkout
        folders.append(package.parent / "configs")
    found: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("*.yaml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Returns dotted keys with the text of their values; empty lists stay visible."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value:
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: repr(value)}
    flat: dict[str, str] = {}
    for key, item in items:
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else key))
    return flat
