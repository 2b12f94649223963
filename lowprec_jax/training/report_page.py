"""The page of a report: HTML with its style and its figures inside, no script, no network.

All text of the run is escaped, and a content security policy forbids whatever got through. Public
name: `build_page`.
"""

import html
import json
from collections.abc import Mapping, Sequence

from lowprec_jax.training.report_data import Run
from lowprec_jax.training.report_tables import (
    Figure,
    Table,
    alarm_rows,
    event_rows,
    figures_of,
    operand_rows,
    phase_rows,
    state_of,
    time_rows,
)
from lowprec_jax.training.report_theme import css_variables
from lowprec_jax.training.report_words import clock, flatten

__all__ = ["build_page"]

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
header h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;
 overflow-wrap:anywhere}
header p{margin:2px 0;color:var(--muted)}
.state{display:inline-block;margin-bottom:12px;padding:1px 11px;border-radius:99px;
 border:1px solid currentColor;font-size:13px;font-weight:600}
.finished{color:var(--green)}.stopped{color:var(--red)}.unfinished{color:var(--amber)}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em}
h2+p{margin:0 0 12px;color:var(--muted)}
h2+.card,h2+.figures,h2+.scroll{margin-top:12px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));
 margin:26px 0 0;background:var(--panel);border:1px solid var(--rule);border-radius:10px;
 overflow:hidden}
.figures div{padding:13px 16px;box-shadow:1px 1px 0 var(--rule)}
.figures dt{font-size:13px;color:var(--muted)}
.figures dd{margin:0;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.figures small{display:block;font-size:12px;font-weight:400;line-height:1.35;color:var(--muted)}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:14px}
.card svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;background:var(--panel);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px;text-align:left;vertical-align:top;border-top:1px solid var(--rule);
 overflow-wrap:anywhere}
thead th{border-top:0;font-weight:600;color:var(--muted);font-size:13px}
tbody th{font-weight:400;color:var(--muted);width:34%}
.note{font-size:13px;color:var(--muted);margin:8px 2px 0}
details{background:var(--panel);border:1px solid var(--rule);border-radius:10px;margin-top:10px}
summary{padding:11px 16px;font-weight:600;cursor:pointer}
details pre,details table{margin:0;border-top:1px solid var(--rule)}
pre{padding:14px 16px;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;
 font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:48px;font-size:13px;color:var(--muted)}
@media print{body{background:none}details::details-content{content-visibility:visible}}
"""

# What the reader sees for a control character: its picture, as U+2400 for NUL.
_CONTROLS = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}


def build_page(run: Run, figures: Mapping[str, str]) -> str:
    """The report as one HTML document.

    Args:
      run: the run.
      figures: ``<svg>`` elements by name: "loss", "speed", "health", "operands", "sqnr", as many
        as there are.
    """
    sections = [
        _header(run),
        _figure("Loss", "Next-token loss of each step and of the validation text. Shaded: the "
                "recipe in force. Below: what happened when.", figures.get("loss")),
        _table("Precision phases", phase_rows(run)),
        _figure("Speed", "Tokens per second; the time of a step and of waiting for its data.",
                figures.get("speed")),
        _table("Where the time went", time_rows(run)),
        _figure("FP8 health", "Elements that the cast clipped (saturated) or rounded to zero "
                "(underflow), over all operands of a step, and the age of the scale that has not "
                "moved for longest.", figures.get("health")),
        _figure("FP8 health of every operand", "Layers from the top. A cell shows the worst "
                "report in its steps; grey: not in FP8 then.", figures.get("operands")),
        _table("Operands that lose most", operand_rows(run)),
        _figure("Gradient SQNR", "Signal to quantization noise of the gradients against those in "
                "high precision, in dB: the lowest sample in a cell. Loss gap: the loss in FP8 "
                "less that of the same weights in high precision.", figures.get("sqnr")),
        _table("Alarms", alarm_rows(run)),
        _table("Events", event_rows(run)),
        _sample(run),
        _details(run),
    ]  # fmt: skip
    light, dark = css_variables(dark=False), css_variables(dark=True)
    style = (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_text(run.name)}: run report</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}<footer>Written by lowprec_jax from the files of "
        f"{_text(run.path)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _header(run: Run) -> str:
    kind, sentence = state_of(run)
    recipes = [phase.recipe for phase in run.phases if phase.recipe]
    if len(recipes) > 5:
        recipes = list(dict.fromkeys(recipes))
    recipes = recipes or [str(run.summary.get("recipe", ""))]
    devices = run.environment.get("devices")
    count = f"{len(devices)} x " if isinstance(devices, list) else ""
    facts = [
        f"recipe {' → '.join(recipes)}" if recipes[0] else "",
        f"{count}{run.environment['device_kind']}" if "device_kind" in run.environment else "",
        f"started {clock(run.environment['started'])} UTC" if "started" in run.environment else "",
    ]
    found = figures_of(run)
    long = [f for f in found if len(f.note) > 60]
    notes = "".join(f'<p class="note">{_text(f.name)}: {_text(f.note)}.</p>\n' for f in long)
    tiles = "".join(_tile(f._replace(note="") if f in long else f) for f in found)
    return (
        f'<header><span class="state {kind}">{_text(sentence)}</span>\n'
        f"<h1>{_text(run.name)}</h1>\n<p>{_text(' · '.join(filter(None, facts)))}</p>\n"
        f'<dl class="figures">{tiles}</dl>\n{notes}</header>\n'
    )


def _tile(figure: Figure) -> str:
    note = f"<small>{_text(figure.note)}</small>" if figure.note else ""
    return f"<div><dt>{_text(figure.name)}</dt><dd>{_text(figure.value)}{note}</dd></div>\n"


def _figure(title: str, caption: str, svg: str | None) -> str:
    if svg is None:
        return ""
    return (
        f'<h2>{title}</h2>\n<p>{caption}</p>\n<div class="card">{svg.translate(_CONTROLS)}</div>\n'
    )


def _table(title: str, table: Table) -> str:
    if not table.rows:
        return ""
    note = f'<p class="note">{_text(table.note)}</p>\n' if table.note else ""
    return f'<h2>{title}</h2>\n<div class="scroll">{_grid(table)}</div>\n{note}'


def _grid(table: Table) -> str:
    heads = "".join(f"<th>{_text(head)}</th>" for head in table.heads)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows
    )
    return f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _sample(run: Run) -> str:
    text = run.texts.get("samples.txt", "").strip("\n")
    if not text:
        return ""
    caption = "Text that the trained model wrote."
    return (
        f'<h2>Sample</h2>\n<p>{caption}</p>\n<div class="scroll"><pre>{_text(text)}</pre></div>\n'
    )


def _details(run: Run) -> str:
    found = [
        _fold("All figures of the summary", _pairs(flatten(run.summary))),
        _fold("Environment", _pairs(flatten(run.environment))),
        _fold("Config", _pre(run.texts.get("config.yaml", ""))),
        _fold("Data", _pre(json.dumps(run.data_card, indent=2) if run.data_card else "")),
    ]
    folds = "".join(found)
    return f"<h2>What was run</h2>\n{folds}" if folds else ""


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>\n" if content else ""


def _pre(text: str) -> str:
    return f"<pre>{_text(text)}</pre>" if text else ""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(text)}</td></tr>\n" for name, text in pairs
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _text(value: object) -> str:
    return html.escape(str(value).translate(_CONTROLS))
