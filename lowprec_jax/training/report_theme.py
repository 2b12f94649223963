"""One palette for the page and its figures, in light and in dark; figures as PNG and as SVG.

A figure is drawn once, in the light colours. In the SVG each of them becomes a CSS variable, so
that the figure follows the page. Public names: `COLORS`, `BAD`, `LEVEL`, `css_variables`, `figure`,
`png`, `svg`, `style`.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

from lowprec_jax.errors import UserError

# Name: light, dark. The light ones differ from each other: a figure is translated by them.
_PALETTE = {
    "page": ("#f7f7f5", "#14161a"),
    "panel": ("#ffffff", "#1b1e24"),
    "blank": ("#eef0f3", "#252a32"),
    "rule": ("#dfe2e8", "#323843"),
    "muted": ("#5f6876", "#9aa4b4"),
    "ink": ("#1c2028", "#e7e9ee"),
    "blue": ("#2858b0", "#86aef5"),
    "faint": ("#b3c5e6", "#3a5280"),
    "orange": ("#c14d16", "#f39a63"),
    "green": ("#2a7a52", "#66c79a"),
    "amber": ("#a86f0f", "#e2b450"),
    "violet": ("#7048a8", "#b899ee"),
    "red": ("#b3221c", "#f57f76"),
}
COLORS = {name: light for name, (light, _) in _PALETTE.items()}

# Colour maps that are readable on both grounds: how bad, from nothing to all, and how large.
BAD = ("#2a3147", "#57407a", "#b0456b", "#ee7b3e", "#fbe38e")
LEVEL = "viridis"

_RESOLUTION = 144  # pixels per inch of a PNG, and of a heat map inside an SVG


def css_variables(*, dark: bool) -> str:
    """The palette as declarations of CSS variables."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in _PALETTE.items())


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it figures are drawn and saved in the style of the report.

    Raises:
      UserError: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "Matplotlib, which draws the report, is not installed. Run: "
            "pip install 'lowprec-jax[train]'"
        ) from None
    ink, muted, rule = COLORS["ink"], COLORS["muted"], COLORS["rule"]
    settings: Any = {
        "font.size": 8.5,
        "text.color": ink,
        "text.parse_math": False,  # names may hold a dollar sign
        "axes.edgecolor": rule,
        "axes.facecolor": COLORS["panel"],
        "axes.labelcolor": muted,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "grid.color": rule,
        "grid.linewidth": 0.6,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "figure.facecolor": COLORS["panel"],
        "legend.frameon": False,
        "lines.linewidth": 1.3,
        "lines.solid_joinstyle": "round",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn for it
        yield


def figure(height: float, width: float = 10.4) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(drawn: Any) -> bytes:
    """A figure as a PNG file in the light colours."""
    target = io.BytesIO()
    drawn.savefig(target, format="png", dpi=_RESOLUTION)
    return target.getvalue()


def svg(drawn: Any, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element for a page that declares `css_variables`.

    Args:
      drawn: the figure.
      name: differs from those of the other figures of the page; identifiers are made of it.
      label: what a screen reader says.
    """
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawn.savefig(target, format="svg", dpi=_RESOLUTION, transparent=False)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=<g) id="[^"]*"| id="image[0-9a-f]*"', "", text)  # nothing refers to them
    text = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r"#[0-9a-f]{6}\b", _variable, text)
    size = re.search(r'viewBox="[^"]*"', text)
    box = size.group() if size else ""
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{label}">'
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :])


def _font(found: re.Match[str]) -> str:
    """The family is that of the page."""
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}px"


def _variable(found: re.Match[str]) -> str:
    name = _NAMES.get(found.group())
    return f"var(--{name})" if name else found.group()


_NAMES = {light: name for name, light in COLORS.items()}
