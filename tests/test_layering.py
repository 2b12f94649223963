"""Who may import whom, what must not be in the package, and how large its parts may be.

A scan of the syntax trees, and a subprocess for what is really loaded. The table is section
"Layers" of the design: an arrow never points back.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowprec_jax"

# Part -> the parts it may import. "errors" and "compat" are open to all.
LAYERS = {
    "errors": (),
    "compat": (),
    "config_text": (),
    "numerics": (),
    "recipes": ("numerics",),
    "ops": ("numerics", "recipes"),
    "state": ("numerics", "recipes", "ops"),
    "linen": ("numerics", "recipes", "ops", "state"),
    "nnx": ("numerics", "recipes", "ops", "state"),
    "optim": ("numerics", "recipes", "ops", "state"),
    "sharding": ("numerics", "recipes", "ops", "state"),
    "data": (),
    "models": ("numerics", "recipes", "ops", "state", "linen", "nnx", "optim", "sharding"),
    "roofline": ("numerics", "recipes", "ops", "nnx", "sharding", "models"),
}
LIBRARY = tuple(LAYERS)
LAYERS["training"] = LIBRARY
LAYERS["cli"] = (*LIBRARY, "training")
LAYERS["__main__"] = ("cli",)
LAYERS["__init__"] = (*LIBRARY, "training")  # by name and when used: see test_import
OPEN = {"errors", "compat"}

NO_FLAX_NO_OPTAX = ("numerics", "recipes", "ops", "state", "compat", "errors", "sharding", "data")
MODULE_LINES, FUNCTION_LINES = 320, 60
# Docstrings that are a specification; their code is short.
LONG_FUNCTIONS = {"ops/dot_general.py dot_general", "optim/master_weights.py master_weights"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_parts(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "lowprec_jax" and len(name) > 1}


def test_layers__every_part__is_in_the_table():
    assert {part_of(path) for path in modules()} == set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_layers__imports__point_down_only(part):
    allowed = {part, *LAYERS[part], *OPEN}
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(imported_parts(path) - allowed)
        for path in modules()
        if part_of(path) == part and imported_parts(path) - allowed
    }
    assert wrong == {}


def test_layers__the_table__points_down_itself():
    order = list(LAYERS)
    for part, below in LAYERS.items():
        assert all(order.index(other) < order.index(part) for other in below), part


@pytest.mark.parametrize("part", NO_FLAX_NO_OPTAX)
def test_layers__the_core__imports_neither_flax_nor_optax(part):
    heavy = {
        f"{path.name}: {name}"
        for path in modules()
        if part_of(path) == part
        for name in imports(path)
        if name.split(".")[0] in ("flax", "optax", "orbax", "chex")
    }
    assert heavy == set()


def loaded_by(statement: str) -> set[str]:
    code = (
        f"import sys\n{statement}\n"
        "print(*sorted(sys.modules.keys() & {'jax', 'flax', 'optax', 'orbax', 'matplotlib'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import lowprec_jax", set()),
        ("import lowprec_jax.training.config", set()),
        ("import lowprec_jax.ops, lowprec_jax.state, lowprec_jax.sharding", {"jax"}),
    ],
)
def test_import__loads__only_what_it_needs(statement, expected):
    assert loaded_by(statement) == expected


FORBIDDEN = {
    "jax's internals": r"\bjax\._src\b",
    "varying-axes check off": r"check_vma\s*=\s*False",
    "pickle": r"^\s*(import|from) (pickle|cloudpickle|dill)\b|allow_pickle\s*=\s*True",
    "eval": r"(?<![\w.])(eval|exec)\(",
    "unfinished": r"\b(TODO|FIXME|XXX|HACK)\b",
}


@pytest.mark.parametrize("pattern", FORBIDDEN.values(), ids=FORBIDDEN)
def test_source__what_is_forbidden__is_not_there(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*modules(), ROOT / "train.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["utils.py", "util.py", "helpers.py", "common.py", "misc.py"])
def test_source__files_named_for_nothing__do_not_exist(name):
    assert [path for path in modules() if path.name == name] == []


def test_source__modules__are_short():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules()
    }
    assert {name: n for name, n in lengths.items() if n > MODULE_LINES} == {}


def test_source__functions__are_short():
    lengths = {
        f"{path.relative_to(PACKAGE)} {node.name}": node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    too_long = {name: n for name, n in lengths.items() if n > FUNCTION_LINES}
    assert too_long.keys() <= LONG_FUNCTIONS, too_long
