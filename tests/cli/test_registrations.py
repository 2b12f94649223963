"""``--import``: a project's registrations reach a command and the processes it starts."""

import os
import subprocess
import sys

import pytest

from lowprec_jax.cli import registrations
from lowprec_jax.cli.launch import launch
from lowprec_jax.cli.registrations import take_imports
from lowprec_jax.cli.sweep import _run_child
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import get_recipe, registry

NAMES = ("my_first", "my_second", "my_package", "my_package.recipes")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with modules that note their import; none is imported before or after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.setenv("LOWPREC_IMPORT", "")
    (tmp_path / "my_package").mkdir()
    for name in NAMES:
        file = "my_package/__init__" if name == "my_package" else name.replace(".", "/")
        text = f"with open('imported.txt', 'a') as file: file.write('{name} ')\n"
        (tmp_path / f"{file}.py").write_text(text, encoding="utf-8")
    (tmp_path / "my_broken.py").write_text("import my_missing\n", encoding="utf-8")
    yield tmp_path
    for name in NAMES:
        sys.modules.pop(name, None)


def imported(project) -> list[str]:
    file = project / "imported.txt"
    return file.read_text(encoding="utf-8").split() if file.exists() else []


def test_take_imports__named_modules__are_imported_once_and_taken_out(project):
    words = ["--steps", "3", "--import", "my_second", "--import=my_first", "--import", "my_first"]
    assert take_imports([*words, "--seed", "1"]) == ["--steps", "3", "--seed", "1"]
    assert imported(project) == ["my_second", "my_first"]
    assert os.environ["LOWPREC_IMPORT"] == "my_second,my_first"


def test_take_imports__variable__comes_first(project, monkeypatch):
    monkeypatch.setenv("LOWPREC_IMPORT", "my_package.recipes, my_first,")
    assert take_imports(["--import", "my_second"]) == []
    assert imported(project) == ["my_package", "my_package.recipes", "my_first", "my_second"]
    assert os.environ["LOWPREC_IMPORT"] == "my_package.recipes,my_first,my_second"


def test_take_imports__nothing_named__changes_nothing(project):
    path = list(sys.path)
    assert take_imports(["--steps", "3"]) == ["--steps", "3"]
    assert (sys.path, os.environ["LOWPREC_IMPORT"]) == (path, "")


def test_take_imports__words_of_another_subcommand__are_left(project):
    words = ["--processes", "2", "--", "train", "--import", "my_first"]
    assert take_imports(words) == words
    assert imported(project) == []


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--import"], "--import without a value; allowed: the dotted name"),
        (["--import", "my_first.py.x-y"], "--import my_first.py.x-y; allowed"),
        (["--import", "my_missing"], "no module 'my_missing' in the working directory"),
        (["--import", "my_package.missing"], r"no module 'my_package\.missing'"),
    ],
)
def test_take_imports__no_such_module__is_refused(words, message):
    with pytest.raises(UserError, match=message):
        take_imports(words)
    assert os.environ["LOWPREC_IMPORT"] == ""


@pytest.mark.usefixtures("project")
def test_take_imports__error_inside_a_module__stays_as_it_is():
    with pytest.raises(ModuleNotFoundError, match="No module named 'my_missing'"):
        take_imports(["--import", "my_broken"])


MODULE = """
from lowprec_jax.recipes import Recipe, register_recipe
register_recipe(Recipe(name="of_mine", margin=5))
"""
CHILD = """
import os
from pathlib import Path
from lowprec_jax.cli.registrations import take_imports
from lowprec_jax.recipes import get_recipe
take_imports([])
file = Path("seen" + os.environ.get("LOWPREC_PROCESS_ID", ""))
file.write_text(str(get_recipe("of_mine").margin))
"""


def test_take_imports__children_of_launch_and_sweep__know_the_recipe(project, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (project / "my_first.py").write_text(MODULE, encoding="utf-8")
    (project / "child.py").write_text(CHILD, encoding="utf-8")
    command = [sys.executable, "child.py"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    take_imports(["--import", "my_first"])
    assert get_recipe("of_mine").margin == 5
    assert launch(command, processes=2) == 0
    assert _run_child(command) == 0
    assert [(project / f"seen{i}").read_text() for i in ("0", "1", "")] == ["5"] * 3


def test_registrations__module__starts_no_jax():
    code = f"import sys, {registrations.__name__}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
