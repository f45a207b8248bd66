"""Suffixes, tokens, vocabulary, and code columns read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semids.cli import main
from semids.errors import CodesError, UsageError
from semids.semantic_ids import (
    number_equal_ids,
    read_code_columns,
    token,
    vocabulary,
    write_ids,
    write_tokens,
)


def write_items(path: Path, ids: list[object], contents: list[int]) -> Path:
    pl.DataFrame({"item_id": ids, "content_id": pl.Series(contents, dtype=pl.UInt32)}).write_parquet(path)
    return path


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([(3, 2), (2, 2, 2), (65536,) * 5]))
def test_suffixes_make_ids_unique_whatever_the_order_of_rows(seed: int, rows: int, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    per_content = np.column_stack([rng.integers(0, min(size, 3), rows) for size in sizes]).astype(np.uint16)
    contents = rng.integers(0, rows, rows).astype(np.uint32)
    codes = per_content[contents]
    ids = pl.Series([f"item {number}" for number in rng.permutation(rows)])
    suffixes = number_equal_ids(ids, contents, codes, sizes)
    keys = [(*row, suffix) for row, suffix in zip(codes.tolist(), suffixes.tolist(), strict=True)]
    assert len(set(keys)) == rows
    groups: dict[tuple[int, ...], list[tuple[int, int, str]]] = {}
    for row in range(rows):
        groups.setdefault(tuple(codes[row].tolist()), []).append((int(suffixes[row]), int(contents[row]), ids[row]))
    for members in groups.values():
        numbers = [number for number, _, _ in sorted(members, key=lambda member: member[1:])]
        assert numbers == list(range(len(members)))
    order = rng.permutation(rows)
    assert np.array_equal(number_equal_ids(ids[order.tolist()], contents[order], codes[order], sizes), suffixes[order])


def test_ids_and_tokens_follow_the_items_and_share_codes_by_content(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", ["x", 'quo"te\n', "z"], [1, 0, 1])
    codes = np.array([[0, 5], [2, 3]], dtype=np.uint8)
    write_ids(tmp_path / "ids.parquet", items, codes, None)
    assert pl.read_parquet(tmp_path / "ids.parquet").rows() == [("x", 2, 3), ('quo"te\n', 0, 5), ("z", 2, 3)]
    write_tokens(tmp_path / "tokens.json", items, codes, np.array([0, 0, 1], dtype=np.uint32))
    assert json.loads((tmp_path / "tokens.json").read_text()) == {
        "x": ["<a_2>", "<b_3>", "<c_0>"],
        'quo"te\n': ["<a_0>", "<b_5>", "<c_0>"],
        "z": ["<a_2>", "<b_3>", "<c_1>"],
    }


def test_item_ids_are_written_as_json_writes_them(tmp_path: Path) -> None:
    names = ["plain ~!#[]", "naïve", "tab\t", "back\\slash", "\x7f", "", "\U0001f600", "</script>", "7"]
    items = write_items(tmp_path / "items.parquet", names, [0] * len(names))
    write_tokens(tmp_path / "tokens.json", items, np.array([[4]], dtype=np.uint8), None)
    lines = [f'{json.dumps(name)}: ["<a_4>"]' for name in names]
    assert (tmp_path / "tokens.json").read_text() == "{\n" + ",\n".join(lines) + "\n}\n"
    items = write_items(tmp_path / "items.parquet", [-7, 1 << 62], [0, 0])
    write_tokens(tmp_path / "tokens.json", items, np.array([[4]], dtype=np.uint8), None)
    assert (tmp_path / "tokens.json").read_text() == f'{{\n"-7": ["<a_4>"],\n"{1 << 62}": ["<a_4>"]\n}}\n'


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 9, (40, 2)).astype(np.uint8)
    items = write_items(tmp_path / "items.parquet", list(range(500)), rng.integers(0, 40, 500).tolist())
    suffixes = np.arange(500, dtype=np.uint32)
    written = []
    for rows in (1 << 16, 7):
        monkeypatch.setattr("semids.semantic_ids.BATCH_ROWS", rows)
        write_tokens(tmp_path / "tokens.json", items, codes, suffixes)
        write_ids(tmp_path / "ids.parquet", items, codes, suffixes)
        written.append(((tmp_path / "tokens.json").read_bytes(), pl.read_parquet(tmp_path / "ids.parquet").rows()))
    assert written[0] == written[1]


def test_the_vocabulary_holds_every_token_once() -> None:
    words = vocabulary((3, 2), suffixes=2)
    assert words == ["<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<c_0>", "<c_1>"]
    assert token(3, 41) == "<d_41>"


def test_more_levels_than_letters_are_refused() -> None:
    with pytest.raises(UsageError, match="expected at most 26 levels"):
        vocabulary([2] * 26, suffixes=1)


def test_code_columns_are_read_back_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "codes.parquet"
    pl.DataFrame({"c1": [3, 0], "item_id": ["a", "b"], "c0": [1, 2]}).write_parquet(path)
    assert read_code_columns(path, None).tolist() == [[1, 3], [2, 0]]
    with pytest.raises(CodesError, match="expected codes from 0 to 2 on level 2 of 4x3"):
        read_code_columns(path, (4, 3))
    for columns, message in (
        ({"item_id": ["a"]}, r"expected code columns c0, c1, …, got item_id"),
        ({"c0": [1], "c2": [1]}, "expected code columns"),
        ({"c0": [1.5]}, "expected integer codes without nulls, got others in c0"),
        ({"c0": [None, 1]}, "expected integer codes without nulls"),
    ):
        pl.DataFrame(columns).write_parquet(path)
        with pytest.raises(UsageError, match=message):
            read_code_columns(path, None)
    path.write_text("no Parquet")
    with pytest.raises(UsageError, match="as Parquet"):
        read_code_columns(path, None)


def test_numbers_that_are_no_codes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "codes.parquet"
    for values, message in (
        ([0, 10**13], "got 10000000000000 on level 2: are these codes, or packed or hashed IDs?"),
        ([0, -1], "got -1 to -1"),
    ):
        pl.DataFrame({"c0": [values[0]], "c1": [values[1]]}).write_parquet(path)
        assert main(["report", str(path)]) == 65
        assert message in capsys.readouterr().err
    signed_and_unsigned = {"c0": pl.Series([1, 2], dtype=pl.Int64), "c1": pl.Series([3, 1], dtype=pl.UInt64)}
    pl.DataFrame(signed_and_unsigned).write_parquet(path)
    assert read_code_columns(path, (4, 4)).tolist() == [[1, 3], [2, 1]]
    pl.DataFrame(signed_and_unsigned | {"c1": pl.Series([0, 1 << 63], dtype=pl.UInt64)}).write_parquet(path)
    with pytest.raises(CodesError, match="expected codes, got numbers of 63 bits and more"):
        read_code_columns(path, None)
