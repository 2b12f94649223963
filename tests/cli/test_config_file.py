"""Loading, overriding, writing and comparing configs of a made-up dataclass tree."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest

from lowprec_jax.cli.config_file import (
    ConfigError,
    config_names,
    config_to_dict,
    diff_configs,
    dump_config,
    load_config,
    resolve_config_path,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    path: str
    level: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = 1e-3
    count: int = 4
    flag: bool = True
    limit: int | None = None
    mode: Literal["slow", "steady", "fast"] = "slow"
    items: tuple[Item, ...] = ()
    key: int | str = 1
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}; allowed: 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    name: str = "x"
    steps: int = 10
    part: Part = dataclasses.field(default_factory=Part)

    def __post_init__(self) -> None:
        if self.steps < self.part.count:
            raise ValueError(f"steps {self.steps} is below part.count {self.part.count}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Required:
    width: int
    height: int = 2


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def error_of(path: Path, *overrides: str, cls: type = Root) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value)


# Values


def test_load_config__empty_file__gives_defaults(write):
    assert load_config(Root, write("# nothing\n")) == Root()


def test_load_config__every_kind_of_value__is_read(write):
    path = write(
        "name: on\nsteps: 20\npart:\n  rate: 1\n  count: 3\n  flag: false\n  limit: 7\n"
        "  mode: fast\n  items:\n  - path: a/.*\n    level: 2\n  - {path: b}\n  sizes: [3]\n"
    )
    part = Part(
        rate=1.0,
        count=3,
        flag=False,
        limit=7,
        mode="fast",
        items=(Item(path="a/.*", level=2), Item(path="b")),
        sizes=[3],
    )
    loaded = load_config(Root, path)
    assert loaded == Root(name="on", steps=20, part=part)
    assert type(loaded.part.rate) is float
    assert type(loaded.part.items) is tuple


@pytest.mark.parametrize("text", ["1e-3", "'1e-3'", "1.0e-3", ".001", "0.001"])
def test_load_config__spellings_of_a_float__are_accepted(write, text):
    assert load_config(Root, write(f"part: {{rate: {text}}}")).part.rate == 1e-3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: '20'", ["'steps'", "'20' (str)", "allowed: int"]),
        ("steps: true", ["'steps'", "True (bool)", "int"]),
        ("steps: 1e3", ["'steps'", "1000.0 (float)", "Write 1000"]),
        ("steps: [1]", ["'steps'", "[1] (list)", "int"]),
        ("steps: ", ["'steps'", "nothing (null)", "int"]),
        ("steps: {a: 1}", ["'steps'", "(section)", "int"]),
        ("name: 12", ["'name'", "12 (int)", "str", "quotes"]),
        ("part: 3", ["'part'", "3 (int)", "section with rate"]),
        ("part:", ["'part'", "nothing", "section"]),
        ("part: {flag: 1}", ["'part.flag'", "1 (int)", "bool", "true or false"]),
        ("part: {flag: yes}", ["'part.flag'", "'yes' (str)", "true or false"]),
        ("part: {rate: fast}", ["'part.rate'", "'fast' (str)", "float"]),
        ("part: {rate: nan}", ["'part.rate'", "'nan' (str)", "float"]),
        ("part: {rate: true}", ["'part.rate'", "True (bool)", "float"]),
        ("part: {rate: 1" + "0" * 400 + "}", ["'part.rate'", "(int)", "float"]),
        ("part: {limit: x}", ["'part.limit'", "'x' (str)", "int or null"]),
        ("part: {key: }", ["'part.key'", "nothing", "int or str"]),
        ("part: {key: 1.5}", ["'part.key'", "1.5 (float)", "int or str"]),
        ("part: {limit: {}}", ["'part.limit'", "int"]),
        ("part: {mode: fats}", ["'part.mode'", "'slow', 'steady', 'fast'", "mean 'fast'"]),
        ("part: {mode: 1}", ["'part.mode'", "'slow', 'steady', 'fast'"]),
        ("part: {sizes: 3}", ["'part.sizes'", "3 (int)", "list of int"]),
        ("part: {sizes: [1, a]}", ["'part.sizes.1'", "'a' (str)", "int"]),
        ("part: {items: {path: a}}", ["'part.items'", "(section)", "list of"]),
        ("part: {items: [{path: a, level: b}]}", ["'part.items.0.level'", "'b'", "int"]),
        ("part: {items: [{level: 1}]}", ["'part.items.0.path'", "str", "must be given"]),
    ],
)
def test_load_config__wrong_type__names_key_given_allowed_and_file(write, text, parts):
    message = error_of(write(text))
    for part in [*parts, "c.yaml"]:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stpes: 1", ["'stpes'", "Nearest: steps (int, default 10)"]),
        ("part: {rat: 1}", ["'part.rat'", "Nearest: part.rate (float, default 0.001)"]),
        ("rate: 1", ["'rate'", "Nearest: part.rate (float, default 0.001)"]),
        ("part.rate: 1", ["'part.rate'", "Nearest: part.rate", "section, not with dots"]),
        ("prat: {rate: 1}", ["'prat'", "Nearest: part (a section)"]),
        ("part: {items: [{pth: a}]}", ["'part.items.0.pth'", "part.items.0.path (str, required)"]),
        ("part: {steps: 1}", ["'part.steps'", "Nearest: steps (int"]),
        ("part: {zzzzz: 1}", ["'part.zzzzz'", "Known: part.rate, part.count"]),
        ("1: 2", ["'1'", "int"]),
        ("part: {1: 2}", ["'part.1'", "int"]),
    ],
)
def test_load_config__unknown_key__names_the_nearest_and_the_file(write, text, parts):
    message = error_of(write(text))
    for part in [*parts, "c.yaml"]:
        assert part in message


def test_load_config__missing_required__is_named(write):
    message = error_of(write("height: 3"), cls=Required)
    assert "'width' (int) must be given" in message


def test_load_config__refused_by_a_section__names_the_section(write):
    assert "part: count is -1; allowed: 0 or more." in error_of(write("part: {count: -1}"))


def test_load_config__refused_by_the_root__names_the_file(write):
    message = error_of(write("steps: 1"))
    assert "steps 1 is below part.count 4" in message
    assert "c.yaml" in message


def test_load_config__type_the_loader_does_not_know__is_an_error_of_the_program(write):
    @dataclasses.dataclass
    class Odd:
        value: complex = 0j

    with pytest.raises(TypeError, match=r"value.*complex"):
        load_config(Odd, write("value: 1"))


# Files


def test_load_config__extends_chain__merges_deeply(write):
    write("steps: 50\npart: {rate: 0.5, count: 1, sizes: [1, 2, 3]}", "a.yaml")
    write("extends: a.yaml\npart: {count: 2, flag: false}", "b.yaml")
    loaded = load_config(Root, write("extends: b.yaml\npart: {rate: 0.25, sizes: [9]}"))
    assert loaded == Root(steps=50, part=Part(rate=0.25, count=2, flag=False, sizes=[9]))


def test_load_config__extends__is_relative_to_the_file(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("extends: ../base.yaml\n", "sub/c.yaml")
    write("steps: 33", "base.yaml")
    assert load_config(Root, tmp_path / "sub" / "c.yaml").steps == 33


def test_load_config__error_in_the_base__names_the_base(write):
    write("part: {rate: x}", "base.yaml")
    message = error_of(write("extends: base.yaml\npart: {count: 1}"))
    assert "'part.rate'" in message
    assert "base.yaml" in message


@pytest.mark.parametrize("names", [["c"], ["c", "b"], ["c", "b", "a"]])
def test_load_config__extends_cycle__is_rejected(write, names):
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        write(f"extends: {following}.yaml", f"{name}.yaml")
    message = error_of(write(f"extends: {[*names, 'c'][1]}.yaml"))
    assert "extend one another" in message
    assert message.count("c.yaml") == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("extends: gone.yaml", ["extends", "'gone.yaml'"]),
        ("extends: [a]", ["extends", "list"]),
        ("steps: 1\nsteps: 2", ["'steps' is given twice", "line 2"]),
        ("part: {rate: 1, rate: 2}", ["'rate' is given twice"]),
        ("name: !!python/object/apply:os.getcwd []", ["tag", "python/object", "line 1"]),
        ("name: !mine x", ["tag", "!mine"]),
        ("steps: !!int '3'", ["tag"]),
        ("steps: &a 3", ["anchor", "'a'"]),
        ("part: &p {items: *p}", ["anchor", "'p'"]),
        ("steps: 3\n---\nsteps: 4", ["not a valid config file"]),
        ("steps: [1", ["not a valid config file", "line"]),
        ("steps: \t- 3\n\t", ["not a valid config file"]),
        ("- 1", ["list", "key: value"]),
        ("just text", ["str", "key: value"]),
        ("? [1]\n: 2", ["c.yaml"]),
        ("steps: " + "[" * 3000 + "]" * 3000, ["nested too deeply"]),
        ("steps: " + "9" * 5000, ["not a valid config file"]),
        ("steps: \x01", ["not a valid config file"]),
    ],
)
def test_load_config__bad_file__is_rejected_by_name(write, text, parts):
    message = error_of(write(text))
    for part in [*parts, "c.yaml"]:
        assert part in message


def test_load_config__not_utf8__is_rejected_by_name(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\xfe")
    assert "c.yaml" in error_of(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["gone.yaml", ".", "a\0b"])
def test_load_config__no_such_file__is_rejected_by_name(tmp_path, name):
    assert "Cannot read config file" in error_of(Path(f"{tmp_path}/{name}"))


# Overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--steps", "7"], {"steps": 7}),
        (["--steps=7", "--name=a=b"], {"steps": 7, "name": "a=b"}),
        (["--name", "None"], {"name": "None"}),
        (["--part.rate", "1e-5"], {"part": {"rate": 1e-5}}),
        (["--part.flag"], {"part": {"flag": True}}),
        (["--part.flag", "--steps", "8"], {"part": {"flag": True}, "steps": 8}),
        (["--part.flag", "True"], {"part": {"flag": True}}),
        (["--part.flag", "false"], {"part": {"flag": False}}),
        (["--part.flag=False"], {"part": {"flag": False}}),
        (["--part.limit", "null"], {"part": {"limit": None}}),
        (["--part.limit", "None"], {"part": {"limit": None}}),
        (["--part.limit=3"], {"part": {"limit": 3}}),
        (["--part.sizes", "4", "5"], {"part": {"sizes": [4, 5]}}),
        (["--part.items.0.level", "-1"], {"part": {"items": (Item(path="a", level=-1),)}}),
    ],
)
def test_load_config__overrides__win_over_the_file(write, overrides, expected):
    text = "name: file\nsteps: 30\npart: {flag: false, limit: 9, items: [{path: a, level: 1}]}"
    before = load_config(Root, write(text))
    part = dataclasses.replace(before.part, **expected.pop("part", {}))
    assert load_config(Root, write(text), overrides) == dataclasses.replace(
        before, part=part, **expected
    )


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--stpes", "7"], ["'stpes'", "Nearest: steps (int, default 10)"]),
        (["--part.rat", "7"], ["'part.rat'", "Nearest: part.rate"]),
        (["--rate", "7"], ["'rate'", "Nearest: part.rate"]),
        (["--part.items.0.path", "a"], ["'part.items.0.path'", "Nearest: part.items"]),
        (["--steps", "many"], ["'steps'", "'many' (str)", "allowed: int"]),
        (["--steps", "1.5"], ["'steps'", "1.5 (float)", "allowed: int"]),
        (["--part.rate", "many"], ["'part.rate'", "'many'", "float"]),
        (["--part.flag", "7"], ["'part.flag'", "7 (int)", "bool"]),
        (["--part.limit", "x"], ["'part.limit'", "int or null"]),
        (["--part.limit", "&a"], ["'part.limit'", "'&a'", "int or null"]),
        (["--part.mode", "fats"], ["'part.mode'", "'slow', 'steady', 'fast'", "'fast'?"]),
        (["--part.sizes", "1", "x"], ["'part.sizes.1'", "'x'", "int"]),
        (["--part", "1"], ["'part'", "section"]),
        (["--steps"], ["'steps' takes one value", "nothing"]),
        (["--steps", "1", "2"], ["'steps' takes one value", "1 2"]),
        (["steps", "1"], ["'steps' is not an option", "--section.field value"]),
        (["-s", "1"], ["'-s' is not an option"]),
        (["--part.count", "-1"], ["part: count is -1; allowed: 0 or more."]),
        (["--part.count", "99"], ["steps 10 is below part.count 99"]),
    ],
)
def test_load_config__bad_override__names_flag_and_command_line(write, overrides, parts):
    message = error_of(write(""), *overrides)
    for part in [*parts, "From the command line"]:
        assert part in message
    assert "─" not in message


def test_load_config__misspelt_option_of_the_caller__is_named(write):
    with pytest.raises(ConfigError, match=r"Nearest: config \(a file\)"):
        load_config(Root, write(""), ["--confg", "x"], extra_options={"config": "a file"})


def test_load_config__help__shows_values_of_the_file(write, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(Root, write("steps: 4321"), ["--help"], prog="trainer", description="Words.")
    assert not caught.value.code
    shown = capsys.readouterr().out
    for part in ["trainer", "Words.", "--steps", "4321", "--part.rate"]:
        assert part in shown


# Writing and comparing


@pytest.mark.parametrize(
    "name",
    ["on", "1e-3", "007", "12:30", "2020-01-01", "null", "~", "", "\n", "é", "# a", "!x", "&a",
     "true", "a: b", "1_000", "=", "<<", " x ", "\x85", "\x07", "0x1f", "+12e03"],
)  # fmt: skip
def test_dump_config__round_trip__is_equal(write, name):
    part = Part(rate=1e-05, items=(Item(path=".*", level=3),), sizes=[], limit=2)
    config = Root(name=name, part=part)
    assert load_config(Root, write(dump_config(config))) == config


@pytest.mark.parametrize("rate", [1e22, 1.5e-300, 0.1, -0.0, float("inf")])
def test_dump_config__floats__keep_every_bit(write, rate):
    loaded = load_config(Root, write(dump_config(Root(part=Part(rate=rate)))))
    assert repr(loaded.part.rate) == repr(rate)


def test_config_to_dict__nested__holds_plain_values():
    plain = config_to_dict(Root(part=Part(items=(Item(path="a"),))))
    assert plain["part"]["items"] == [{"path": "a", "level": 0}]
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain) == ["name", "steps", "part"]


def test_diff_configs__changes__are_dotted_lines():
    new = Root(steps=11, part=Part(rate=0.5, items=(Item(path="a"),)))
    assert diff_configs(Root(), new) == [
        "steps: 10 -> 11",
        "part.rate: 0.001 -> 0.5",
        "part.items: [] -> (absent)",
        "part.items.0.path: (absent) -> 'a'",
        "part.items.0.level: (absent) -> 0",
    ]


def test_diff_configs__same__is_empty():
    assert diff_configs(Root(), Root()) == []


# Names


@pytest.mark.parametrize("name", ["smoke", "smoke.yaml", "configs/smoke.yaml", "configs/smoke"])
def test_resolve_config_path__name__is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config_path(name).name == "smoke.yaml"
    assert resolve_config_path(name).is_file()


def test_resolve_config_path__existing_file__wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smoke").write_text("", encoding="utf-8")
    assert resolve_config_path("smoke") == Path("smoke")


@pytest.mark.parametrize("name", ["smok", "configs/smok.yaml", "smok\0e"])
def test_resolve_config_path__unknown__lists_names_and_the_nearest(name):
    with pytest.raises(ConfigError) as caught:
        resolve_config_path(name)
    assert "Did you mean 'smoke'?" in str(caught.value)
    for known in config_names():
        assert known in str(caught.value)


# Generated bad configs


def _scalars() -> list[Any]:
    return ["text", "1.5x", True, 3, 2.5, None, [1], {"a": 1}, [], {}, "é", -7]


def _accepted(key: str, value: Any) -> bool:
    """What the dataclasses declare, said a second time and by hand."""
    kind = type(value)
    return {
        "name": kind is str,
        "steps": kind is int,
        "part": kind is dict and not value,
        "part.rate": kind in (int, float),
        "part.count": kind is int,
        "part.flag": kind is bool,
        "part.limit": kind is int or value is None,
        "part.mode": False,
        "part.key": kind in (int, str),
        "part.items": kind is list and not value,
        "part.sizes": kind is list,
    }[key]


def _bad_config(seed: int) -> tuple[str, str]:
    """Returns the YAML of a config with one mistake, and the dotted key the error must name."""
    draw = random.Random(seed)
    good: dict[str, Any] = {"name": "a", "steps": 20, "part": {"rate": 0.5, "flag": False}}
    keys = ["name", "steps", "part", *(f"part.{f.name}" for f in dataclasses.fields(Part))]
    key = draw.choice(keys)
    section, _, last = key.rpartition(".")
    target = good[section] if section else good
    if draw.random() < 0.4:  # an unknown key: a letter doubled, lost or exchanged
        at = draw.randrange(len(last))
        last = draw.choice([last[:at] + last[at] + last[at:], last[:at] + last[at + 1 :] + "_q"])
        key = f"{section}.{last}" if section else last
        target[last] = draw.choice(_scalars())
        return json.dumps(good), key
    bad = [v for v in _scalars() if not _accepted(key, v)]
    target[last] = draw.choice(bad)
    return json.dumps(good), key


@pytest.mark.parametrize("seed", range(200))
def test_load_config__generated_mistake__is_a_config_error_with_the_key(write, seed):
    text, key = _bad_config(seed)
    assert key in error_of(write(text))
