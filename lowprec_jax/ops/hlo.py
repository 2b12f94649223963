"""HLO text, as compiled programs print it: computations, instructions, what they call."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """``name = type opcode(operands), attributes``, as text; `split` takes lists apart."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """The instructions of every computation by its name, and the name of the entry (None: none)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif body := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            current.append(_instruction(body[1], re.sub(r"/\*.*?\*/", "", body[2])))
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Takes ``type opcode(operands), attributes`` apart."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].lstrip().partition("(")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    return Instruction(
        name, text[:end], opcode.strip(), text[opening + 1 : closing - 1], text[closing:]
    )


def _closing(text: str, opening: int) -> int:
    """The position behind the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"Unbalanced brackets in HLO: {text[opening : opening + 80]!r}.")


def split(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def callees(i: Instruction) -> list[tuple[str, int, bool]]:
    """``(computation, how often the instruction runs it, whether that is exact)``."""

    def named(pattern: str) -> list[str]:
        lists = re.findall(rf"\b(?:{pattern})=(\{{[^}}]*\}}|%?[\w.\-]+)", i.attributes)
        return [name for names in lists for name in re.findall(r"[\w.\-]+", names)]

    if i.opcode == "while":
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes)
        trips, known = (int(count[1]), True) if count else (1, False)
        # The condition runs once more than the body.
        return [(name, trips + known, known) for name in named("condition")] + [
            (name, trips, known) for name in named("body")
        ]
    if i.opcode == "conditional":
        branches = named("branch_computations|true_computation|false_computation")
        return [(name, 1, False) for name in branches]
    if i.opcode.endswith(("-done", "-update")):
        return []  # counted where it starts
    return [(name, 1, True) for name in named("calls|to_apply")]
