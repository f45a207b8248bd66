"""A report as one page that a person understands in a minute, in Markdown, and in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from semids.curves import find_curves, render_curves
from semids.metrics import IdFigures
from semids.report import Report, SplitFigures
from semids.text import (
    UNKNOWN,
    count_of,
    escape_markdown,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
    markdown_table,
    plain_table,
    printable,
    shorten,
)

PLOTS = {
    "prefixes": "Collision rate by prefix depth",
    "buckets": "IDs by the number of items that share them",
    "loads": "Items per code, level by level",
}
"""Names and captions of the plots of a report, in the order shown; `semids.plots.plot_report` draws them."""

LONGEST_NOTE = 400
MANY_DUPLICATES = 0.1


def render_markdown(report: Report, image: Callable[[str], str]) -> str:
    """Return the report as a Markdown page.

    Whatever stems from data, such as titles and split names, is escaped: see `escape_markdown`.

    Args:
        image: returns the address, a relative path or a data URI, of the plot of the given name (see `PLOTS`).
            It is not called for a report of no items, which has no plots. `curves.PLOT` is asked for where a network
            was trained.
    """
    warnings = describe_problems(report)
    sections = [
        f"# {escape_markdown(shorten(printable(report.title), LONGEST_NOTE))}",
        f"**{describe_collisions(report.overall.ids)}**",
        _what_ran(report),
        "\n".join(f"- ⚠ {escape_markdown(warning)}" for warning in warnings),
        "## Collisions",
        _collision_table(report.overall.ids),
        _split_table(report),
        _plots(report, image, ("prefixes", "buckets")),
        "## Levels",
        _level_table(report.overall),
        _plots(report, image, ("loads",)),
        "## What reconstructions keep",
        _distortion_table(report),
        render_curves(curves, image) if (curves := find_curves(report.training)) else "",
        "## Run",
        _catalogue_table(report.catalogue),
        _timing_table(report),
        _plan_table(report),
        _versions(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_text(report: Report) -> str:
    """Return the gist of the report as plain text for a terminal: the headline, warnings, splits and levels."""
    ids = report.overall.ids
    splits = plain_table(["split", *SPLIT_HEADINGS], _split_rows(report), left=[0])
    levels = plain_table(["level", *LEVEL_HEADINGS], _level_rows(report.overall), left=[])
    parts = [printable(report.title), describe_collisions(ids), splits, levels]
    parts += ["\n".join(f"warning: {printable(warning)}" for warning in describe_problems(report))]
    return "\n\n".join(part for part in parts if part)


def describe_collisions(ids: IdFigures) -> str:
    """Return, in a sentence or two, how many items share an ID, against the floor."""
    if ids.collision_rate is None or ids.colliding_share is None:
        return "There are no items, so there is nothing to measure."
    sharing = round(ids.colliding_share * ids.items)
    count = f"{sharing:,} of {count_of(ids.items, 'item')}" if sharing else f"None of {count_of(ids.items, 'item')}"
    share = f" ({format_percent(ids.colliding_share)})" if sharing else ""
    verb = "shares" if sharing <= 1 else "share"
    sentence = f"{count}{share} {verb} an ID with another item: the collision rate is {format_rate(ids.collision_rate)}"
    floor, name = (ids.floor, "floor") if ids.floor is not None else (ids.duplicate_floor, "duplicate floor")
    if floor is None:
        return f"{sentence}."
    if ids.excess_collisions == 0:
        return f"{sentence}, and every distinct content has an ID of its own."
    if ids.collision_rate - floor < 1e-12:
        return f"{sentence}, as low as duplicates and capacity allow."
    return (
        f"{sentence}, where the {name} is {format_rate(floor)}; "
        f"{count_of(ids.excess_collisions or 0, 'more ID')} would give every distinct content its own."
    )


def describe_guidance(capacity_ratio: float | None) -> str:
    """Return the collision rate that the sheet of industry practice in the seed document names for C/D."""
    if capacity_ratio is None:
        return UNKNOWN
    if capacity_ratio < 1:
        return "below 1×: collisions are forced, see the floor"
    if capacity_ratio <= 1.5:
        return "1-1.5×: high (10-20 %)"
    if capacity_ratio < 2:
        return "1.5-2×: between high (10-20 %) and low (3-5 %)"
    if capacity_ratio <= 3:
        return "2-3×: low (3-5 %)"
    return "3-5×: at most low (3-5 %)" if capacity_ratio < 5 else "5× and more: diminishing returns"


def describe_problems(report: Report) -> list[str]:
    """Return what a person should know before trusting the report, one plain, unescaped line each; empty if nothing."""
    ids = report.overall.ids
    problems = [
        f"A solver did not converge: {_note(note)}" for note in report.training if note.get("converged") is False
    ]
    contents = ids.distinct_contents
    if contents and ids.capacity is not None and contents > ids.capacity:
        problems.append(
            f"{count_of(contents, 'distinct content')} but only {count_of(ids.capacity, 'ID')}: collisions are forced."
        )
    for number, level in enumerate(ids.levels, start=1):
        size = level.codebook_size
        if not ids.items or size is None or level.codes_used == size:
            continue
        unused = f"Level {number}: {size - level.codes_used:,} of {size:,} codes are unused"
        forced = f"; {count_of(contents, 'distinct content')} cannot use more" if contents and contents < size else ""
        problems.append(f"{unused}{forced}.")
    if ids.duplicate_floor is not None and ids.duplicate_floor >= MANY_DUPLICATES:
        problems.append(
            f"{format_percent(ids.duplicate_floor)} of the items repeat the content of another: no quantizer separates "
            "them, a suffix does."
        )
    for name, split in ({"all splits": report.overall} | dict(report.splits)).items():
        if split.relative_mse_undefined:
            problems.append(f"No relative MSE for {name}: {split.relative_mse_undefined}.")
        elif not split.ids.items:
            problems.append(f"No items in {name}.")
    quarantined = report.catalogue.get("quarantined")
    if quarantined:
        problems.append(f"Rows of the catalogue that were quarantined: {_count(quarantined)}.")
    return problems


def _note(note: Mapping[str, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in note.items() if key != "converged")
    return shorten(printable(described), LONGEST_NOTE) + "."


def _what_ran(report: Report) -> str:
    named = {"shape": report.shape, "mapping": report.mapping, "quantizer": report.quantizer}
    return " · ".join(f"{name} {escape_markdown(value)}" for name, value in named.items() if value)


def _collision_table(ids: IdFigures) -> str:
    headings = ["collision rate", "floor", "duplicate floor", "uniform hashing"]
    rates = [ids.collision_rate, ids.floor, ids.duplicate_floor, ids.uniform_hash_reference]
    capacity = f"practice at {format_ratio(ids.capacity_ratio)} capacity"
    table = markdown_table(
        [*headings, capacity], [[*map(format_rate, rates), describe_guidance(ids.capacity_ratio)]], left=()
    )
    return (
        f"{table}\n\nCollision rate: 1 − unique IDs / items. Floor: the lowest that exact duplicates and the "
        f"{format_count(ids.capacity)} possible IDs allow. Uniform hashing: what IDs drawn at random would give."
    )


SPLIT_HEADINGS = (
    "items",
    "distinct contents",
    "unique IDs",
    "collision rate",
    "floor",
    "colliding share",
    "excess",
    "largest bucket",
    "IDs used",
)


def _split_rows(report: Report) -> list[list[str]]:
    splits = dict(report.splits)
    # A single split says nothing that all of them do not.
    named = ({} if len(splits) == 1 else splits) | {"all": report.overall}
    return [
        [
            shorten(printable(name), 40),
            format_count(split.ids.items),
            format_count(split.ids.distinct_contents),
            format_count(split.ids.unique_ids),
            format_rate(split.ids.collision_rate),
            format_rate(split.ids.floor),
            format_rate(split.ids.colliding_share),
            format_count(split.ids.excess_collisions),
            format_count(split.ids.largest_bucket),
            UNKNOWN if split.ids.id_space_utilization is None else format_percent(split.ids.id_space_utilization),
        ]
        for name, split in named.items()
    ]


def _split_table(report: Report) -> str:
    rows = [[escape_markdown(cell) for cell in row] for row in _split_rows(report)]
    return markdown_table(["split", *SPLIT_HEADINGS], rows)


LEVEL_HEADINGS = (
    "codebook",
    "codes used",
    "perplexity",
    "items per code, fewest",
    "most",
    "unique prefixes",
    "prefix collision rate",
    "relative MSE",
)


def _level_rows(split: SplitFigures) -> list[list[str]]:
    ids = split.ids
    return [
        [
            str(index + 1),
            format_count(level.codebook_size),
            format_count(level.codes_used),
            UNKNOWN if level.perplexity is None else f"{level.perplexity:,.1f}",
            format_count(level.load_min),
            format_count(level.load_max),
            format_count(ids.unique_prefixes[index]),
            format_rate(ids.prefix_collision_rate[index]),
            format_rate(split.relative_mse[index]) if split.relative_mse else UNKNOWN,
        ]
        for index, level in enumerate(ids.levels)
    ]


def _level_table(split: SplitFigures) -> str:
    return markdown_table(["level", *LEVEL_HEADINGS], _level_rows(split), left=())


def _distortion_table(report: Report) -> str:
    rows = [
        [f"relative MSE, {escape_markdown(shorten(printable(name), 40))}", *map(format_rate, split.relative_mse)]
        for name, split in _named_splits(report).items()
        if split.relative_mse
    ]
    depths = [f"{index + 1} levels" if index else "1 level" for index in range(len(report.overall.ids.levels))]
    neighbours = report.neighbours
    sentence = ""
    if neighbours is not None and neighbours.prefix_agreement is not None and neighbours.chance is not None:
        rows.append(["prefix agreement of neighbours", *map(format_rate, neighbours.prefix_agreement)])
        rows.append(["the same by chance", *map(format_rate, neighbours.chance)])
        sentence = (
            f"\n\nOf an item's {neighbours.k} nearest neighbours, the share that stays among the nearest after "
            f"quantization is **{format_rate(neighbours.recall)}** ({neighbours.queries:,} queries in a sample of "
            f"{neighbours.sample:,})."
        )
    return markdown_table(["", *depths], rows) + sentence if rows else "Not measured."


def _named_splits(report: Report) -> dict[str, SplitFigures]:
    return {"all": report.overall} | (dict(report.splits) if len(report.splits) > 1 else {})


def _plots(report: Report, image: Callable[[str], str], names: tuple[str, ...]) -> str:
    if not report.overall.ids.items:
        return ""
    # Percent-encoded: a space or a parenthesis would end the address.
    return "\n\n".join(f"![{PLOTS[name]}]({quote(image(name), safe=':/;,+=%?&#.-_~')})" for name in names)


def _catalogue_table(catalogue: Mapping[str, Any]) -> str:
    keys = [key for key in ("items", "distinct_texts", "distinct_products", "quarantined") if key in catalogue]
    splits = catalogue.get("splits")
    named: dict[str, Any] = {str(name): split for name, split in splits.items()} if isinstance(splits, Mapping) else {}
    rows = [
        [escape_markdown(shorten(name, 40)), *(_count(split.get(key)) for key in keys)]
        for name, split in (named | {"all": catalogue}).items()
        if isinstance(split, Mapping)
    ]
    return markdown_table(["catalogue", *(key.replace("_", " ") for key in keys)], rows) if keys else ""


def _count(value: Any) -> str:
    return format_count(value) if isinstance(value, int) else escape_markdown(str(UNKNOWN if value is None else value))


def _timing_table(report: Report) -> str:
    if not report.timings:
        return ""
    rows = [[escape_markdown(name), format_seconds(seconds)] for name, seconds in report.timings.items()]
    rows.append(["all stages", format_seconds(sum(report.timings.values()))])
    return f"{markdown_table(['stage', 'time'], rows)}\n\nPeak memory: {format_bytes(report.peak_rss_bytes)}."


PLAN_HEADINGS = ("predicted time", "took", "predicted memory", "peak", "predicted disk", "wrote")
DEVICE_HEADINGS = ("predicted GPU memory", "peak GPU memory")


def _plan_table(report: Report) -> str:
    device = any("peak_device_bytes" in stage for stage in report.planned)
    rows = [
        [
            escape_markdown(str(stage["stage"])),
            "done" if stage["predicted_seconds"] is None else format_seconds(stage["predicted_seconds"]),
            format_seconds(stage["seconds"]),
            format_bytes(stage["predicted_memory_bytes"]),
            format_bytes(stage["peak_bytes"]),
            format_bytes(stage["predicted_disk_bytes"]),
            format_bytes(stage["written_bytes"]),
            *(_device_cells(stage) if device else ()),
        ]
        for stage in report.planned
    ]
    headings = ["stage", *PLAN_HEADINGS, *(DEVICE_HEADINGS if device else ())]
    return f"What `semids plan` predicted:\n\n{markdown_table(headings, rows)}" if rows else ""


def _device_cells(stage: Mapping[str, Any]) -> list[str]:
    names = ("predicted_device_bytes", "peak_device_bytes")
    return [format_bytes(stage[name]) if name in stage else "" for name in names]


def _versions(report: Report) -> str:
    versions = ", ".join(f"{escape_markdown(name)} {escape_markdown(value)}" for name, value in report.versions.items())
    fingerprint = f"Fingerprint {escape_markdown(report.fingerprint[:16])}." if report.fingerprint else ""
    return " ".join(part for part in (fingerprint, f"Versions: {versions}." if versions else "") if part)
