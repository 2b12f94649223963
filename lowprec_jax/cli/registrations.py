"""``--import MODULE``: a project's own recipes, formats, backends and chips, known to a command.

Modules that register something when they are imported are named on the command line, after the
subcommand, or in LOWPREC_IMPORT with commas between them. What the command line names is put into
that variable too, so that the processes a command starts (``launch``, ``sweep``) know the same.
Imports no JAX itself. Public name: `take_imports`.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from lowprec_jax.errors import UserError

__all__ = ["take_imports"]

_VARIABLE = "LOWPREC_IMPORT"


def take_imports(words: Sequence[str]) -> list[str]:
    """Imports what the words and LOWPREC_IMPORT name, and returns the other words.

    Modules of the working directory are found too. An error inside a module is its own and stays
    as it is.

    Args:
      words: of a subcommand; what follows ``--`` is for another and is left as it is.

    Raises:
      UserError: no module of that name, or no name.
    """
    end = list(words).index("--") if "--" in words else len(words)
    named, others = _split(words[:end])
    known = [name for name in os.environ.get(_VARIABLE, "").split(",") if name.strip()]
    modules = list(dict.fromkeys(name.strip() for name in (*known, *named)))
    if modules:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        for module in modules:
            _import(module)
        os.environ[_VARIABLE] = ",".join(modules)
    return [*others, *words[end:]]


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules after ``--import``, and the words that are left."""
    modules: list[str] = []
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag == "--import":
            modules.append(value if equals else next(remaining, ""))
        else:
            others.append(word)
    return modules, others


def _import(module: str) -> None:
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(
            f"--import {module or 'without a value'}; allowed: the dotted name of a module, such "
            "as --import my_project.recipes."
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what the module itself imports
        raise UserError(
            f"--import {module}: no module {error.name!r} in the working directory or among the "
            "installed packages. Run in the directory that holds it, or set PYTHONPATH."
        ) from error
