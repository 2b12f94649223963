"""The report of a run: its files, that the page stands alone, and that text stays text."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.training import report_theme
from lowprec_jax.training.report import write_report
from lowprec_jax.training.report_data import read_run
from lowprec_jax.training.report_figures import loss_figure
from lowprec_jax.training.report_theme import COLORS, style, svg

EVIL = '</pre><script>alert(1)</script><img src="http://x/y" onerror=alert(1)>$a_{b$ & \0'
OPERANDS = [
    f"blocks/{site}[{layer}] {role}"
    for site in ("attention/qkv", "mlp/down")
    for layer in range(2)
    for role in ("lhs", "rhs", "output_grad")
] + ["<b>\0$x_{$ lhs"]  # a label of the heat map


def log_line(step: int) -> dict:
    """A step of a run that is in FP8 from step 11 on."""
    record = {"step": step, "loss": 5 / step, "grad_norm": 1.0, "skipped": 0, "seconds": 0.1}
    record |= {"tokens_per_second": 1e4, "data_seconds": 0.001, "mfu": 0.3, "recipe": "none"}
    if step > 10:
        record |= {"recipe": f"fp8{EVIL}", "saturated": 1e-4, "underflow": 0.01}
        record |= {"nonfinite": 0.0, "scale_age": 3.0, "worst": OPERANDS[0]}
    if step > 10 and step % 5 == 0:
        record["operands"] = {name: [2.0, 0.1, 0.0, 0.1, 0, 2] for name in OPERANDS}
        record["sqnr"] = {"blocks/mlp/down/kernel[0]": 21.0, "blocks/mlp/down/kernel[1]": None}
        record["loss_gap"] = 0.001
    return record


def write_log(path, records) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"st', encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with everything, evil text wherever text can be; and its report."""
    path = tmp_path_factory.mktemp("full")
    steps = [log_line(step) for step in range(1, 41)]
    write_log(path / "metrics.jsonl", [*steps, {"step": 40, "validation_loss": 1.25}])
    alarm = {"operand": EVIL, "what": "saturated", "value": 0.1, "limit": 0.01}
    events = [
        {"event": "start", "recipe": "none"},
        {"event": "rollback", "to": 2, "reason": EVIL, "operands": [EVIL]},
        {"event": "alarm", **alarm},
        {"event": EVIL, EVIL: EVIL},
    ]
    write_log(path / "events.jsonl", [{"time": EVIL, "step": 20, **e} for e in events])
    for name in ("summary.json", "environment.json", "data_card.json"):
        values = {"steps": 40, "mfu": 0.3, "seconds": {"step": 4.0}, EVIL: EVIL}
        (path / name).write_text(json.dumps(values), encoding="utf-8")
    (path / "config.yaml").write_text(f"name: {json.dumps(EVIL)}\n", encoding="utf-8")
    (path / "samples.txt").write_text(EVIL, encoding="utf-8")
    return path, write_report(path)


class Page(HTMLParser):
    """Collects elements, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def test_write_report__a_full_run__writes_page_and_pictures(full):
    path, files = full
    names = ["report.html", "report.png", "loss.png", "health.png", "operands.png"]
    assert files == [path / name for name in names]
    for picture in files[1:]:
        assert picture.read_bytes().startswith(b"\x89PNG"), picture
    assert not list(path.glob(".*"))


def test_page__of_a_full_run__has_every_section(full):
    page = Page(full[1][0])
    text = "".join(page.text)
    for title in [
        "Loss", "Precision phases", "Speed", "Where the time went", "FP8 health",
        "FP8 health of every operand", "Operands that lose most", "Gradient SQNR", "Alarms",
        "Events", "Sample", "Environment", "Config", "Data",
    ]:  # fmt: skip
        assert title in page.text
    assert page.tags.count("svg") == 5
    assert "blocks/mlp/down[1] output_grad" in text
    assert "1.25" in text


def test_page__text_that_is_markup__stays_text(full):
    page = Page(full[1][0])
    assert not {"script", "img", "b", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(EVIL.replace("\0", "␀") in text for text in page.text)
    text = "".join(page.text)
    assert "0 mlp/down" in text  # labels are text, and
    assert "<b>␀$x_{$" in text  # so is this one
    assert "\0" not in text


def test_page__what_it_refers_to__is_in_it(full):
    page = Page(full[1][0])
    references = [v for name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert references
    assert all(v.startswith(("#", "data:image/png;base64,")) for v in references)
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    inside = {v[1:] for v in references if v.startswith("#")}
    styles = [v for name, v in page.attributes if name in ("clip-path", "style")]
    inside |= set(re.findall(r"url\(#([^)]*)\)", " ".join(styles)))
    assert inside <= set(names)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )
    assert "@import" not in full[1][0].read_text(encoding="utf-8")


def test_page__its_figures__follow_the_colours_of_the_page(full):
    text = full[1][0].read_text(encoding="utf-8")
    drawn = text[text.index("<body>") :]
    assert not [name for name, light in COLORS.items() if light in drawn]
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"ink", "muted", "rule", "panel", "blue", "orange"} <= used <= COLORS.keys()


def test_palette__light_colours__are_told_apart():
    assert len(set(COLORS.values())) == len(COLORS)
    assert report_theme.css_variables(dark=True) != report_theme.css_variables(dark=False)


def test_write_report__an_unfinished_run_without_fp8__has_what_there_is(tmp_path):
    write_log(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0, "skipped": 0}])
    files = write_report(tmp_path)
    assert [file.name for file in files] == ["report.html", "report.png", "loss.png"]
    text = "".join(Page(files[0]).text)
    assert "unfinished: step 1 is the last in the log" in text
    assert "FP8" not in text


def test_write_report__only_losses_that_are_not_finite__does_not_fail(tmp_path):
    records = [{"step": i, "loss": None, "grad_norm": None, "skipped": 1} for i in range(1, 4)]
    write_log(tmp_path / "metrics.jsonl", records)
    assert "skipped updates" in write_report(tmp_path)[0].read_text(encoding="utf-8")


def test_write_report__a_file_that_cannot_be_written__is_named(tmp_path):
    write_log(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"Cannot write report\.html"):
        write_report(tmp_path)


def test_write_report__no_matplotlib__says_how_to_get_it(tmp_path, monkeypatch):
    write_log(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lowprec-jax\[train\]'"):
        write_report(tmp_path)


def test_loss_figure__a_hundred_thousand_steps__is_no_larger_than_of_two_thousand(tmp_path):
    sizes = []
    for count in (2000, 100_000):
        losses = 2 + np.random.default_rng(0).normal(size=count)
        losses[-7] = 4321.0
        records = [{"step": i, "loss": x} for i, x in enumerate(losses.tolist(), 1)]
        write_log(tmp_path / "metrics.jsonl", records)
        with style():
            sizes.append(svg(loss_figure(read_run(tmp_path)), "loss", "Loss"))
    assert "above the axis, up to 4321" in sizes[1]
    assert len(sizes[1]) < 1.2 * len(sizes[0]) < 300_000
