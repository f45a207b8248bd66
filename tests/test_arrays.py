"""Shapes, checks at the door, and code packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semids.arrays import (
    capacity_of,
    check_codes,
    check_vectors,
    code_dtype,
    format_shape,
    pack_codes,
    parse_shape,
    unpack_codes,
    unusable_rows,
    word_layout,
)
from semids.errors import CodesError, ShapeError, UsageError

SIZES = st.lists(st.sampled_from([2, 3, 100, 128, 512, 2048, 65536]), min_size=1, max_size=6)


@given(st.lists(st.integers(2, 65536), min_size=1, max_size=8))
def test_parsing_a_shape_undoes_formatting_it(sizes: list[int]) -> None:
    assert parse_shape(format_shape(sizes)) == tuple(sizes)


@pytest.mark.parametrize("shape", ["", "x", "16x", "16xx16", "-4x4", "16.0x16", "ax4", "16,16", "٣x4 x"])
def test_a_malformed_shape_is_refused(shape: str) -> None:
    with pytest.raises(UsageError, match="expected a shape such as 256x256x256"):
        parse_shape(shape)


@pytest.mark.parametrize(("shape", "level"), [("1x4", 1), ("4x0", 2), ("4x4x65537", 3)])
def test_a_codebook_size_out_of_range_is_refused_with_its_level(shape: str, level: int) -> None:
    with pytest.raises(UsageError, match=f"on level {level}"):
        parse_shape(shape)


@given(SIZES, st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing_at_any_width_and_depth(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.column_stack([rng.integers(0, size, 50) for size in sizes]).astype(code_dtype(sizes))
    codes[0], codes[1] = 0, np.array(sizes) - 1
    packed = pack_codes(codes, sizes)
    assert np.array_equal(unpack_codes(packed, sizes), codes)
    bits = sum((size - 1).bit_length() for size in sizes)
    assert packed.shape[1] >= -(-bits // 64)


@given(SIZES, st.integers(0, 2**32 - 1))
def test_packed_keys_sort_as_the_ids_do(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.column_stack([rng.integers(0, size, 40) for size in sizes]).astype(code_dtype(sizes))
    by_key = sorted(range(40), key=lambda row: (*pack_codes(codes, sizes)[row].tolist(), row))
    assert by_key == sorted(range(40), key=lambda row: (*codes[row].tolist(), row))


def test_six_levels_of_eleven_bits_take_two_words() -> None:
    assert word_layout([2048] * 6)[-1] == (1, 0)
    assert word_layout([512] * 6) == [(0, 45), (0, 36), (0, 27), (0, 18), (0, 9), (0, 0)]


def test_capacity_is_the_product_of_the_codebook_sizes() -> None:
    assert capacity_of([128] * 4) == 268_435_456


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20, 1e-25])
def test_a_row_with_an_unusable_value_is_found_and_named(value: float) -> None:
    rows = np.ones((6, 4), dtype=np.float32)
    rows[4] = value
    assert unusable_rows(rows).tolist() == [4]
    with pytest.raises(ShapeError, match=r"1 of 6 vectors are not usable .* first rows \[4\]"):
        check_vectors(rows)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones(4, np.float32), r"expected vectors of shape \(n, d\), got \(4,\)"),
        (np.ones((2, 4), np.int32), "expected floating-point vectors, got int32"),
        (np.ones((0, 4), np.float32), "expected at least one vector"),
        (np.ones((2, 5), np.float32), r"expected vectors of shape \(n, 4\), got \(2, 5\)"),
        (np.zeros((2, 4), np.float32), "2 of 2 vectors are not usable"),
    ],
)
def test_vectors_that_are_not_vectors_are_refused(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_vectors(vectors, dimensions=4)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 8]]), "expected codes from 0 to 7 on level 2 of 8x8, got 8 to 8: .*bit-packed"),
        (np.array([[-1, 0]]), "on level 1 of 8x8, got -1"),
        (np.array([[0, 0, 0]]), r"expected codes of shape \(n, 2\) for 8x8, got \(1, 3\)"),
        (np.array([[0.0, 1.0]]), "expected integer codes"),
    ],
)
def test_codes_outside_their_codebooks_are_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(CodesError, match=message):
        check_codes(codes, [8, 8])
