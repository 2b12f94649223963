"""Covering arrays: few rows in which every pair of choices occurs."""

import itertools
from collections.abc import Sequence


def pairs_of(row: Sequence) -> set:
    """The pairs of a row, each choice with the number of its factor."""
    return set(itertools.combinations(enumerate(row), 2))


def all_pairs(factors: Sequence[Sequence]) -> set:
    """Every pair of choices of two factors."""
    return set().union(*map(pairs_of, itertools.product(*factors)))


def covering_array(factors: Sequence[Sequence]) -> list[tuple]:
    """Rows, one choice per factor, in which every pair of choices of two factors occurs."""
    return cover(list(itertools.product(*factors)))


def cover(candidates: Sequence[tuple]) -> list[tuple]:
    """Some of the candidates, in which every pair of choices that occurs in any of them occurs.

    Greedy: again and again the row that adds the most new pairs; ties go to the first, so that the
    result is the same every time.
    """
    rows, missing = [], set().union(*map(pairs_of, candidates))
    while missing:
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        rows.append(best)
        missing -= pairs_of(best)
    return rows
