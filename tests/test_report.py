"""The report: its JSON, what a person reads, and that no text from the data acts in a browser or a terminal."""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from semids.distortion import NeighbourFigures
from semids.errors import DataError
from semids.metrics import IdFigures, measure_ids
from semids.page import PLOTS, describe_collisions, describe_guidance, describe_problems, render_markdown, render_text
from semids.plots import plot_comparison, plot_report
from semids.report import FailedCell, Report, SplitFigures, comparison_rows, format_table, render_comparison
from semids.text import escape_markdown, format_percent, format_rate, format_ratio, format_seconds, printable

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1)) | <img src=x onerror=alert(1)>",
    "a|b|c\n| --- | --- |",
    "`code` **bold** _it_ ~~s~~ $x$",
    "\x1b[31mred\x1b[0m\x07\x00\u202etxt\ud800",
    "# heading",
    "1. list",
    "- list",
    "=cmd()|' /C calc'!A0",
    "---",
    "&lt;script&gt; &#60;b&#62;",
    "http://evil.example www.evil.example me@evil.example <http://evil.example>",
    "x\\",
    "[label]: http://evil.example",
    "\\<b>",
]
CONTROLS = set("\x1b\x07\x00\u202e\ud800")


def figures_of(seed: int = 0, rows: int = 3_000, sizes: tuple[int, ...] = (8, 8, 16)) -> IdFigures:
    generator = np.random.default_rng(seed)
    codes = np.stack([generator.integers(0, size, rows) for size in sizes], axis=1).astype(np.uint8)
    return measure_ids([codes], [generator.integers(0, 3, rows).astype(np.uint32)], sizes=sizes)


def report_of(title: str = "8x8x16 nearest", **changes: Any) -> Report:
    split = SplitFigures(figures_of(), (0.8, 0.6, 0.5))
    report = Report(
        title=title,
        overall=split,
        splits={"train": split, "test": SplitFigures(figures_of(1), None, "all vectors are equal")},
        shape="8x8x16",
        mapping="nearest",
        quantizer="residual_kmeans",
        neighbours=NeighbourFigures(2_000, 500, 10, 0.25, (0.4, 0.2, 0.1), (0.1, 0.02, 0.001)),
        training=({"level": 1, "converged": True},),
        catalogue={"items": 3_000, "quarantined": 0, "splits": {"train": {"items": 2_500}, "test": {"items": 500}}},
        timings={"embed": 12.5, "train": 1.25},
        peak_rss_bytes=2**30,
        versions={"numpy": "2.4.6"},
        fingerprint="0123456789abcdef" * 4,
    )
    return replace(report, **changes)


def visible_text(markdown: str) -> tuple[str, set[str]]:
    """Return what a CommonMark renderer with tables, strikethrough and raw HTML shows, and the tokens it made."""
    kinds: set[str] = set()
    texts: list[str] = []

    def walk(tokens: Any) -> None:
        for token in tokens:
            kinds.add(token.type)
            if token.type == "text":
                texts.append(token.content)
            walk(token.children or [])

    walk(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown))
    return "".join(texts), kinds


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["{}", "before {} after", "# {}", "| head |\n| --- |\n| {} |\n"])
def test_hostile_text_is_shown_as_it_is_and_does_nothing(text: str, place: str) -> None:
    shown, kinds = visible_text(place.format(escape_markdown(text)))
    blocks = ("paragraph", "heading", "table", "thead", "tbody", "tr", "th", "td")
    plain = {f"{block}_{end}" for block in blocks for end in ("open", "close")}
    assert kinds <= plain | {"text", "inline"}
    assert printable(text) in shown


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_escaping_as_plain_text(text: str) -> None:
    escaped = escape_markdown(text)
    assert not set("<>|`[]!*~\n\r\x1b") & set(re.sub(r"\\.", "", escaped))
    shown, kinds = visible_text(escaped)
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text"}
    assert shown == printable(text)


def test_hostile_names_leave_no_html_image_or_control_character_in_any_rendering() -> None:
    for text in HOSTILE:
        split = SplitFigures(figures_of(), (0.8, 0.6, 0.5))
        report = report_of(
            title=text,
            splits={text: split, f"{text}2": split},
            shape=text,
            mapping=text,
            quantizer=text,
            training=({text: text, "converged": False},),
            catalogue={"items": 1, "quarantined": text, "splits": {text: {"items": text}}},
            timings={text: 1.0},
            versions={text: text},
            fingerprint=text,
        )
        page = render_markdown(report, lambda name: f"{name}.png")
        rows = comparison_rows([report, FailedCell(text, text)])
        for markdown in (page, render_comparison(rows)):
            _, kinds = visible_text(markdown)
            assert not {"html_block", "html_inline", "code_inline", "link_open", "fence"} & kinds
            assert markdown.count("![") == (len(PLOTS) if markdown is page else 0)
            assert not set(markdown) & CONTROLS
        # An unescaped | in a name would give its row another number of cells than the headings have.
        tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("| ")]
        assert len(tables) == 6
        assert all(len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1 for table in tables)
        for terminal in (render_text(report), format_table(rows)):
            assert not set(terminal) & CONTROLS


def test_json_round_trip_keeps_every_figure() -> None:
    report = report_of()
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text.encode()).to_json() == text
    many_ids = replace(report, overall=SplitFigures(replace(report.overall.ids, capacity=65_536**5), None))
    assert Report.from_json(many_ids.to_json()).overall.ids.capacity == 65_536**5


def test_top_level_of_the_json_holds_the_figures_of_all_splits() -> None:
    values = json.loads(report_of().to_json())
    keys = (
        "items distinct_contents unique_ids collision_rate colliding_share duplicate_floor excess_collisions "
        "largest_bucket largest_bucket_contents capacity capacity_ratio capacity_floor uniform_hash_reference "
        "id_space_utilization relative_mse levels timings peak_rss_bytes versions fingerprint splits "
        "neighbours training"
    )
    assert set(keys.split()) <= values.keys()
    assert {"codebook_size", "codes_used", "utilization", "perplexity", "load_min", "load_max"} <= set(
        values["levels"][0]
    )
    assert values["items"] == report_of().overall.ids.items
    assert values["splits"]["test"]["relative_mse"] is None
    assert values["splits"]["train"]["unique_ids"] == values["unique_ids"]


def test_numbers_that_json_lacks_become_strings() -> None:
    note = {"level": np.int64(1), "converged": False, "error": float("nan"), "loads": np.arange(2), "shape": (1, 2)}
    values = json.loads(report_of(training=(note,)).to_json())
    assert values["training"] == [{"level": 1, "converged": False, "error": "nan", "loads": [0, 1], "shape": [1, 2]}]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": {}}', '{"splits": 3}'])
def test_text_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="expected the JSON of a report"):
        Report.from_json(text)


def test_a_figure_of_the_wrong_type_is_refused_by_name() -> None:
    values = report_of().to_dict() | {"unique_ids": "many"}
    with pytest.raises(DataError, match="unique_ids"):
        Report.from_dict(values)


def test_the_headline_says_how_many_items_share_an_id_against_the_floor() -> None:
    codes = np.array([[0, 0], [0, 0], [1, 1], [2, 2]], dtype=np.uint8)

    def headline(*counts: int, rows: int = 4, sizes: tuple[int, ...] | None = (4, 4)) -> str:
        return describe_collisions(measure_ids([codes[4 - rows :]], [np.array(counts, np.uint32)], sizes=sizes))

    assert headline(1, 1, 1, 1) == (
        "2 of 4 items (50 %) share an ID with another item: the collision rate is 0.2500, where the floor is 0.0000; "
        "1 more ID would give every distinct content its own."
    )
    assert headline(5, 1, rows=2).startswith("5 of 6 items (83 %) share an ID with another item")
    assert headline(5, 1, rows=2).endswith("0.6667, and every distinct content has an ID of its own.")
    assert headline(1, 1, rows=2).startswith("None of 2 items shares an ID")
    assert "the duplicate floor is 0.2000" in headline(1, 1, 1, 2, sizes=None)
    assert headline(0, 0, 0, 0).startswith("There are no items")
    published = describe_collisions(measure_ids([codes], None, sizes=None))
    assert published == "2 of 4 items (50 %) share an ID with another item: the collision rate is 0.2500."
    every_id = measure_ids([np.arange(8)[:, None] % 4], [np.ones(8, np.uint32)], sizes=(4,))
    assert describe_collisions(every_id).endswith("as low as duplicates and capacity allow.")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (None, "–"),
        (0.5, "forced"),
        (1.2, "10-20 %"),
        (1.7, "between"),
        (2.5, "3-5 %"),
        (4, "at most"),
        (9, "diminishing"),
    ],
)
def test_guidance_follows_the_capacity_ratio(ratio: float | None, words: str) -> None:
    assert words in describe_guidance(ratio)


def test_a_solver_that_did_not_converge_is_a_warning_on_the_page_and_in_the_table() -> None:
    report = report_of(
        training=[{"level": 1, "converged": True}, {"level": 2, "converged": False, "marginal_error": 0.5}]
    )
    assert describe_problems(report)[0] == "A solver did not converge: level 2, marginal_error 0.5."
    assert "did not converge" in render_markdown(report, str)
    assert comparison_rows([report])[0]["status"] == "a solver did not converge"
    assert not any("converge" in problem for problem in describe_problems(report_of()))


def test_eight_distinct_rows_with_32_codewords_are_explained() -> None:
    codes = np.repeat(np.arange(8, dtype=np.uint8)[:, None], 2, axis=1)
    figures = measure_ids([codes], [np.full(8, 1_000, dtype=np.uint32)], sizes=(32, 32))
    undefined = "all vectors are equal, so there is no variance to compare the errors with"
    problems = describe_problems(Report("few", SplitFigures(figures, None, undefined), catalogue={"quarantined": 2}))
    assert "Level 1: 24 of 32 codes are unused; 8 distinct contents cannot use more." in problems
    assert any("repeat the content of another" in problem for problem in problems)
    assert f"No relative MSE for all splits: {undefined}." in problems
    assert "Rows of the catalogue that were quarantined: 2." in problems


def test_more_contents_than_ids_are_said_to_force_collisions() -> None:
    codes = np.stack([np.arange(40) % 4, np.arange(40) % 2], axis=1).astype(np.uint8)
    figures = measure_ids([codes], [np.ones(40, dtype=np.uint32)], sizes=(4, 2))
    assert "40 distinct contents but only 8 IDs: collisions are forced." in describe_problems(
        Report("tight", SplitFigures(figures))
    )


def test_the_page_shows_splits_levels_and_plots_of_its_figures() -> None:
    report = report_of()
    page = render_markdown(report, lambda name: f"plots/{name}.png")
    assert [f"![{caption}](plots/{name}.png)" in page for name, caption in PLOTS.items()] == [True] * 3
    ids = report.overall.ids
    assert (
        f"| all | {ids.items:,} | {ids.distinct_contents:,} | {ids.unique_ids:,} | {ids.collision_rate:.4f} |" in page
    )
    # Splits, catalogue and, by chance, a stage.
    assert page.count("| train |") == 3
    assert "**0.2500** (500 queries in a sample of 2,000)" in page
    assert "Peak memory: 1.00 GiB." in page
    data = "data:image/png;base64," + base64.b64encode(b"\xff\xfe??>").decode()
    assert f"]({data})" in render_markdown(report, lambda _: data)
    assert "(a%20b%29.png)" in render_markdown(report, lambda _: "a b).png")


def test_a_report_of_no_items_renders_without_plots() -> None:
    empty = measure_ids([], [], sizes=(4, 4))
    report = Report("empty", SplitFigures(empty, None, "no vectors"))
    assert plot_report(empty) == {}
    page = render_markdown(report, lambda name: pytest.fail(f"asked for plot {name}"))
    assert "There are no items" in page
    assert "There are no items" in render_text(report)
    assert Report.from_json(report.to_json()) == report
    assert "empty" in format_table(comparison_rows([report]))


def test_a_published_index_renders_with_what_is_known() -> None:
    figures = measure_ids([np.array([[0, 1], [0, 2], [3, 1]], dtype=np.uint8)], None, sizes=None)
    report = Report("published", SplitFigures(figures))
    assert "| – |" in render_markdown(report, str)
    assert "None of 3 items" in render_text(report)
    assert set(plot_report(figures)) == set(PLOTS)


def test_the_comparison_has_a_row_a_cell_and_the_reason_of_a_failed_one() -> None:
    rows = comparison_rows([report_of(), FailedCell("512x512", "needs 9 GB | has 8")])
    assert rows[0]["codes_used"] == [8, 8, 16]
    assert (rows[0]["relative_mse"], rows[0]["recall"], rows[0]["seconds"]) == (0.5, 0.25, 13.75)
    assert rows[1] == {"cell": "512x512", "status": "failed: needs 9 GB | has 8"}
    assert json.loads(json.dumps(rows)) == rows
    markdown = render_comparison(rows)
    assert "- 512x512: failed: needs 9 GB \\| has 8" in markdown
    assert "**1 of 2 cells have no report:**" in markdown
    assert render_comparison(rows, plot="all.png").rstrip().endswith("![Collision rate against relative MSE](all.png)")
    assert "![" not in markdown
    assert render_comparison([]) == "No cells.\n"
    assert render_comparison(rows[1:]).startswith("**1 of 1 cells")


def test_a_quantizer_that_all_cells_have_is_named_once() -> None:
    nearest = "8x8x16-nearest-residual-kmeans"
    alike = render_comparison(comparison_rows([report_of(nearest, quantizer="residual_kmeans")]))
    assert "| 8x8x16-nearest |" in alike
    assert "Quantizer of all cells: residual_kmeans." in alike
    other = report_of("8x8x16-nearest-rqvae", quantizer="rqvae")
    unlike = render_comparison(comparison_rows([report_of(nearest, quantizer="residual_kmeans"), other]))
    assert f"| {nearest} |" in unlike
    assert "Quantizer of all cells" not in unlike


def test_the_terminal_table_lines_up_whatever_the_alphabet() -> None:
    rows = comparison_rows([report_of("日本語 8x8"), report_of("café"), FailedCell("x", "out of memory")])
    lines = format_table(rows).splitlines()
    assert lines[1].startswith("─" * 10)
    # 3 wide characters take 6 columns, so the row is 3 characters shorter than its neighbours.
    assert lines[2].index("8x8x16") + 3 == lines[3].index("8x8x16")
    assert lines[4].endswith("failed: out of memory")
    assert "capacity" in lines[0]
    assert "recall" not in format_table(comparison_rows([report_of(neighbours=None)]))


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (format_rate(0.12346), "0.1235"),
        (format_rate(0.00001), "<0.0001"),
        (format_rate(0.0), "0.0000"),
        (format_rate(None), "–"),
        (format_rate(float("inf")), "–"),
        (format_percent(0.0084), "0.84 %"),
        (format_percent(0.00001), "less than 0.01 %"),
        (format_percent(0.9998), "more than 99 %"),
        (format_percent(1.0), "100 %"),
        (format_ratio(1.28), "1.28×"),
        (format_ratio(64_000.4), "64,000×"),
        (format_ratio(2.5e9), "2.5e+09×"),
        (format_seconds(0.123), "0.12 s"),
        (format_seconds(99.96), "1 min 40 s"),
        (format_seconds(7_199.9), "2 h 00 min"),
    ],
)
def test_numbers_are_short_and_never_lie_about_zero(formatted: str, expected: str) -> None:
    assert formatted == expected


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_plots_are_900_pixels_wide_and_equal_byte_for_byte_in_every_thread() -> None:
    figures = figures_of()
    plots = plot_report(figures)
    assert set(plots) == set(PLOTS)
    assert {png_size(data)[0] for data in plots.values()} == {900}
    assert not any(b"tEXt" in data for data in plots.values())
    drawn: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: drawn.append(plot_report(figures))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [plots, plots]


@pytest.mark.parametrize(
    ("codes", "counts", "sizes"),
    [
        (np.zeros((1, 1)), [1], (2,)),
        (np.zeros((1, 7)), [5_000_000], (65_536,) * 7),
        (np.arange(600)[:, None] % 512, [1] * 600, (512,)),
    ],
)
def test_extreme_figures_have_plots(codes: Any, counts: list[int], sizes: tuple[int, ...]) -> None:
    figures = measure_ids([codes.astype(np.uint16)], [np.array(counts, np.uint32)], sizes=sizes)
    assert set(plot_report(figures)) == set(PLOTS)


def test_the_comparison_plot_leaves_out_what_it_cannot_place() -> None:
    assert plot_comparison(comparison_rows([FailedCell("a", "b")])) is None
    assert plot_comparison([]) is None
    reports = [report_of(title) for title in (r"$\frac{$", *HOSTILE[:6])]
    picture = plot_comparison(comparison_rows([*reports, FailedCell("a", "b")]))
    assert picture is not None
    assert png_size(picture)[0] == 900
