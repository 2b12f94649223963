"""The generator of covering arrays."""

import itertools

import pytest
from transforms.pairwise import all_pairs, covering_array, pairs_of

FACTORS = [
    ["abc", "xy", "12"],
    ["abc", "xyz", "123456"],
    ["ab", "cd", "ef", "gh"],
    ["a", "bcd"],
]


@pytest.mark.parametrize("factors", FACTORS)
def test_covering_array__any_factors__every_pair_occurs(factors):
    rows = covering_array(factors)
    for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2):
        for a, b in itertools.product(one, other):
            assert any(row[i] == a and row[j] == b for row in rows)


def test_covering_array__two_large_factors__has_hardly_more_rows_than_their_pairs():
    rows = covering_array(["abc", "xyz", "123456"])
    assert 18 <= len(rows) <= 20  # the pairs of the two largest factors; the product has 54


def test_covering_array__same_factors__same_rows():
    assert covering_array(FACTORS[1]) == covering_array(FACTORS[1])


def test_pairs__of_a_row__are_told_apart_by_factor():
    assert pairs_of("aab") == {
        ((0, "a"), (1, "a")),
        ((0, "a"), (2, "b")),
        ((1, "a"), (2, "b")),
    }
    assert len(all_pairs(["ab", "ab"])) == 4
