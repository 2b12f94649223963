"""A config as plain values and as YAML text; knows no field of ours.

What training writes beside a run and what the command line reads back. Imports no JAX. Public
names: `config_to_dict`, `dump_config`, and `SCALARS` for the reader.
"""

import dataclasses
import re
from typing import Any

import yaml

__all__ = ["SCALARS", "config_to_dict", "dump_config"]

# The scalars of YAML 1.2's core schema: tag, pattern, first characters.
SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which the reader of configs would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in SCALARS:
    # Added to YAML 1.1's, so that a file we write means the same to both kinds of reader.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested dicts, lists and scalars, in the order of its fields.

    Args:
      config: instance of a dataclass.
    """
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def dump_config(config: Any) -> str:
    """Returns a config as YAML with every field written out; `load_config` reads it back.

    Args:
      config: instance of a dataclass.
    """
    values = config_to_dict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
