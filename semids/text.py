"""Text that people read: untrusted strings made inert, numbers in few digits, tables that line up."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

UNKNOWN = "–"
# Invisible, but part of correct spelling in Persian and Indic scripts and of emoji; they hide and reorder nothing.
JOINERS = "\u200c\u200d"
# An underscore inside a word never opens emphasis.
MARKDOWN_SPECIALS = re.compile(r"[&<>`|\[\]!*~#\\$^@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
# Only at the start of a line do these make headings, lists, quotes and rules.
MARKDOWN_OPENERS = re.compile(r"^(?P<number>\d+)?(?P<mark>(?(number)[.)](?=\s|$)|[-+=:]))")


def printable(text: str) -> str:
    """Return text on one line that moves no cursor, sets no colour and reorders nothing.

    White space becomes single spaces; every other control, format or surrogate character becomes U+FFFD.
    """
    spaced = " ".join(text.split())
    return "".join("\ufffd" if _is_unsafe(character) else character for character in spaced)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in JOINERS


def escape_markdown(text: str) -> str:
    """Return text that a Markdown renderer shows as it is, on one line, whatever it holds.

    HTML, images, links, bare addresses, code, emphasis, table cells, headings and formulas are inert: what could
    begin them is escaped by a backslash (CommonMark, section 2.4). Character references would be inert too, but
    Prefect's dashboard shows them as they are written.
    """
    escaped = MARKDOWN_SPECIALS.sub(lambda found: f"\\{found[0]}", printable(text))
    return MARKDOWN_OPENERS.sub(lambda found: f"{found['number'] or ''}\\{found['mark']}", escaped)


def shorten(text: str, width: int) -> str:
    """Return text of at most `width` characters, its end replaced by … where it was longer."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def format_count(count: int | None) -> str:
    """Return an integer with thousands separators, or a dash."""
    return UNKNOWN if count is None else f"{count:,}"


def count_of(count: int, one: str) -> str:
    """Return, for example, `1 item` or `1,234 items`."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def format_rate(rate: float | None) -> str:
    """Return a number with 4 decimals, or a dash; what is not zero never reads as zero."""
    if rate is None or not math.isfinite(rate):
        return UNKNOWN
    return "<0.0001" if 0 < rate < 0.00005 else f"{rate:.4f}"


def format_percent(share: float) -> str:
    """Return a share of 1 in percent, with two digits that count."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "less than 0.01 %"
    if 99.5 <= percent < 100:
        return "more than 99 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"


def format_ratio(ratio: float | None) -> str:
    """Return a factor such as 1.3× or 64,000×, or a dash."""
    if ratio is None:
        return UNKNOWN
    if ratio >= 1e6:
        return f"{ratio:.1e}×"
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.3g}×"


def format_seconds(seconds: float | None) -> str:
    """Return a duration as 0.42 s, 12.3 s, 5 min 07 s or 3 h 05 min, or a dash."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(size: int | None) -> str:
    """Return bytes in MiB or GiB, or a dash."""
    if size is None:
        return UNKNOWN
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Return a table whose columns in `left` align left, the others right; cells must already be safe Markdown."""
    rule = [":--" if column in left else "--:" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Return a table for a terminal, columns two spaces apart; those in `left` align left, the others right."""
    cells = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(display_width(row[column]) for row in cells) for column in range(len(headings))]
    lines: list[str] = []
    for row in cells:
        padded = [
            cell + " " * (width - display_width(cell)) if column in left else " " * (width - display_width(cell)) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Return the columns that text takes in a terminal: 2 for East Asian wide characters, 0 for marks and joiners."""
    return sum(
        0
        if unicodedata.combining(character) or character in JOINERS
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )
