"""Codebooks as data: against their definitions, and what is derived from them."""

import numpy as np
import pytest

from halfbyte.errors import ArgumentError
from halfbyte.formats import Codebook, codebook, codebook_names, dynamic, register
from halfbyte.formats.codebook import _REGISTRY
from tests.reference import textbook
from tests.support.tolerances import TOLERANCES


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    error = np.abs(codebook("nf4").table - textbook.quantiles_of_the_normal()).max()
    assert error <= TOLERANCES["published NF4 table"].relative


def test_fp4_levels_are_twelfths_in_bit_pattern_order() -> None:
    np.testing.assert_array_equal(codebook("fp4").table, textbook.FP4.astype(np.float32))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_middles_of_equal_parts_of_decades(signed: bool) -> None:
    np.testing.assert_allclose(dynamic.dynamic_map(signed), textbook.dynamic(signed), rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", codebook_names(4))
def test_every_code_decodes_and_encodes_to_itself(name: str) -> None:
    book = codebook(name)
    magnitudes = book.table if book.sign_bit is None else book.table[: 1 << book.sign_bit]
    for code, value in enumerate(magnitudes):
        rank = int((value > book.midpoints).sum())
        assert book.rank_to_code[rank] == code


@pytest.mark.parametrize("name", codebook_names(4))
def test_midpoints_rise_and_lie_halfway(name: str) -> None:
    book = codebook(name)
    ordered = book.table[list(book.rank_to_code)].astype(np.float64)
    assert (np.diff(ordered) > 0).all()
    np.testing.assert_allclose(book.midpoints, (ordered[1:] + ordered[:-1]) / 2, rtol=1e-7)


@pytest.mark.parametrize("name", codebook_names(4))
def test_the_zero_code_stands_for_zero(name: str) -> None:
    assert codebook(name).table[codebook(name).zero_code] == 0.0


def test_a_codebook_has_a_level_for_every_code() -> None:
    with pytest.raises(ArgumentError, match="3 levels; expected 8"):
        Codebook(name="short", bits=3, levels=(0.0, 1.0, 2.0), source="made up")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ArgumentError, match="registered already"):
        register(codebook("nf4"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'nf5' is unknown; expected one of .*nf4"):
        codebook("nf5")


def test_a_three_bit_codebook_needs_no_other_code() -> None:
    book = register(Codebook(name="three", bits=3, levels=tuple(i / 7 for i in range(8)), source="a test"))
    try:
        assert codebook("three") is book
        assert "three" not in codebook_names(4)
        assert len(book.midpoints) == 7
    finally:
        del _REGISTRY["three"]
