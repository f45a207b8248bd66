"""The plots of a report and of a comparison, as PNG bytes. Equal figures give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from semids.metrics import BucketBin, IdFigures, LevelFigures
from semids.text import format_rate, printable, shorten

# pyplot keeps global state, and flows draw in threads: figures and canvases are made one by one.
DOTS_PER_INCH = 100
WIDTH = 9.0
# Okabe and Ito (2008): told apart by every common kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
GREY = "#666666"
LOG_SPREAD = 20
LABELLED_CELLS = 40
# Beside the axes, where it hides no point.
LEGEND: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
# Right, left, above, below, then the corners.
LABEL_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def plot_report(figures: IdFigures) -> dict[str, bytes]:
    """Draw a report's plots, 900 pixels wide: `prefixes`, `buckets` and `loads`; none for 0 items."""
    if not figures.items:
        return {}
    return {
        "prefixes": _plot_prefixes(figures),
        "buckets": _plot_buckets(figures.bucket_histogram),
        "loads": _plot_loads(figures.levels),
    }


def plot_comparison(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw the collision rate over the relative MSE of `comparison_rows`, and over the recall; None if none has both.

    Lines join the cells of the mapping capacity that differ in their bounds alone: what fewer collisions cost.
    """
    points = [row for row in rows if row.get("collision_rate") is not None and row.get("relative_mse") is not None]
    if not points:
        return None
    with_recall = all(row.get("recall") is not None for row in points)
    figure, (axes, *others) = _figure(1 + with_recall, 5.4 + 3.8 * with_recall)
    _plot_trade_off(axes, points, "relative_mse")
    _name_axes(axes, "relative MSE at full depth (0 is perfect)", "collision rate")
    axes.set_title("Lower left is better; dashes mark each cell's floor", fontsize=10, color=GREY, loc="left")
    if any(row.get("mapping") is not None for row in points):
        for text in axes.legend(title="mapping", **LEGEND).get_texts():
            text.set_parse_math(False)
    for panel in others:
        _plot_trade_off(panel, points, "recall")
        _name_axes(panel, "10-NN recall (1 is perfect)", "collision rate")
        panel.set_title("Lower right is better", fontsize=10, color=GREY, loc="left")
    if len(points) <= LABELLED_CELLS:
        _label_points(figure, axes, points)
    return _png(figure)


def _plot_trade_off(axes: Axes, points: Sequence[Mapping[str, Any]], figure: str) -> None:
    """Draw the collision rates of cells over a figure of theirs."""
    for index, mapping in enumerate(sorted({str(row.get("mapping")) for row in points})):
        chosen = [row for row in points if str(row.get("mapping")) == mapping]
        colour, marker = (BLUE, ORANGE, GREEN, PURPLE, SKY)[index % 5], "osD^v"[index % 5]
        for line in _lines_of_bounds(chosen) if mapping == "capacity" else []:
            axes.plot([row[figure] for row in line], [row["collision_rate"] for row in line], "-", color=colour, lw=1)
        x, y = [row[figure] for row in chosen], [row["collision_rate"] for row in chosen]
        axes.plot(x, y, marker, color=colour, markersize=8, label=_label(mapping), zorder=3, clip_on=False)
        for row in chosen:
            if row.get("floor") is not None:
                axes.plot([row[figure]] * 2, [row["floor"], row["collision_rate"]], color=colour, lw=1, alpha=0.4)
                axes.plot(row[figure], row["floor"], "_", color=colour, markersize=11)
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _lines_of_bounds(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the cells of each shape and quantizer by their collision rate, where there are several."""
    lines: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["collision_rate"]):
        lines.setdefault((row.get("shape"), row.get("quantizer")), []).append(row)
    return [line for line in lines.values() if len(line) > 1]


def plot_training(note: Mapping[str, Any]) -> bytes:
    """Draw how a training went, 900 pixels wide: losses by epoch, and what held-out contents say of it.

    Args:
        note: of a training that has `losses`, reconstruction and quantization by epoch, and `evaluations`.
    """
    figure, (left, right) = _figure(2, 3.4, columns=2)
    losses = np.asarray(note["losses"], dtype=np.float64)
    epochs = np.arange(1, len(losses) + 1)
    left.plot(epochs, losses[:, 0], "-", color=BLUE, label="reconstruction", lw=1.8)
    # Before the codebooks join there is nothing to quantize.
    joined = losses[:, 1] > 0
    left.plot(epochs[joined], losses[joined, 1], "-", color=ORANGE, label="quantization", lw=1.8)
    left.set_ylim(bottom=0)
    _name_axes(left, "epoch", "loss")
    left.legend(frameon=False)
    found = note["evaluations"]
    seen = [row["epoch"] for row in found]
    errors = [np.nan if row["relative_mse"] is None else row["relative_mse"] for row in found]
    right.plot(seen, errors, "o-", color=BLUE, label="relative MSE", lw=1.8, markersize=4)
    right.plot(seen, [row["collision_rate"] for row in found], "s-", color=ORANGE, label="collision rate", markersize=4)
    right.plot(seen, [row["floor"] for row in found], "--", color=GREY, label="its floor", lw=1.2)
    right.axvline(note["best_epoch"], color=GREEN, lw=1, label=f"kept: epoch {note['best_epoch']}")
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    _name_axes(right, "epoch", "of held-out contents")
    right.legend(frameon=False)
    return _png(figure)


def _plot_prefixes(figures: IdFigures) -> bytes:
    """Draw collision rates of prefixes with the floor and uniform hashing of as many codes."""
    depths = list(range(1, len(figures.levels) + 1))
    figure, (axes,) = _figure(1, 3.8)
    rates = [rate if rate is not None else 0.0 for rate in figures.prefix_collision_rate]
    references = _prefix_references(figures)
    for label, values, colour, style in references:
        axes.plot(depths, values, style, color=colour, label=label, lw=1.6, markersize=6)
    axes.plot(depths, rates, "o-", color=BLUE, label="collision rate", lw=2.2, markersize=7, zorder=3)
    for depth, rate in zip(depths, rates, strict=True):
        # On the left, above falling curves, the label would be cut by the curve: put it up and to the right.
        axes.annotate(format_rate(rate), (depth, rate), (7, 7), textcoords="offset points", color=BLUE, zorder=4)
    axes.set_xticks(depths)
    axes.set_xlim(0.8, len(depths) + 0.35)
    axes.set_ylim(-0.03, 1.12)
    _name_axes(axes, "codes in the prefix", "1 − distinct prefixes / items")
    axes.legend(**LEGEND)
    return _png(figure)


def _prefix_references(figures: IdFigures) -> list[tuple[str, list[float], str, str]]:
    items, contents = figures.items, figures.distinct_contents
    capacities = np.cumprod([float(level.codebook_size or np.nan) for level in figures.levels])
    if contents is None:
        return []
    if np.isnan(capacities).any():
        return [("duplicate floor", [1 - contents / items] * len(capacities), GREY, "_--")]
    hashing = 1 + capacities * np.expm1(-contents / capacities) / items
    floors = np.maximum(1 - contents / items, 1 - capacities / items)
    return [
        ("uniform hashing", np.maximum(hashing, 0).tolist(), ORANGE, "s:"),
        ("floor", floors.tolist(), GREY, "_--"),
    ]


def _plot_buckets(histogram: Sequence[BucketBin]) -> bytes:
    """Draw how many IDs have 1, 2, 3, … items; each bar says what share of the items it holds."""
    bins = _powers_of_two(histogram)
    total = sum(entry.items for entry in bins)
    figure, (axes,) = _figure(1, 3.6)
    heights = [entry.ids for entry in bins]
    bars = axes.bar(
        range(len(bins)), heights, color=[BLUE if entry.largest == 1 else ORANGE for entry in bins], width=0.7
    )
    axes.set_yscale("log")
    axes.set_ylim(0.7, max(heights) * 12)
    _count_ticks(axes)
    for bar, entry in zip(bars, bins, strict=True):
        share = 100 * entry.items / total
        percent = f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
        axes.annotate(
            f"{_short_count(entry.ids)} {'ID' if entry.ids == 1 else 'IDs'}\n{percent} of items",
            (bar.get_x() + bar.get_width() / 2, entry.ids),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8 if len(bins) <= 9 else 6,
        )
    ranges = [
        f"{entry.smallest:,}" if entry.smallest == entry.largest else f"{entry.smallest:,}–{entry.largest:,}"
        for entry in bins
    ]
    crowded = len(bins) > 7
    axes.set_xticks(range(len(bins)), ranges, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.6, max(len(bins), 4) - 0.4)
    _name_axes(axes, "items on the ID", "IDs (log)")
    return _png(figure)


def _powers_of_two(histogram: Sequence[BucketBin]) -> list[BucketBin]:
    """Merge the histogram's bins into 1, 2, 3, 4, 5 to 8, 9 to 16 and so on."""
    merged: dict[int, BucketBin] = {}
    for entry in histogram:
        largest = entry.largest if entry.largest <= 4 else 1 << (entry.largest - 1).bit_length()
        smallest = largest if largest <= 4 else largest // 2 + 1
        before = merged.get(largest, BucketBin(smallest, largest, 0, 0))
        merged[largest] = BucketBin(smallest, largest, before.ids + entry.ids, before.items + entry.items)
    return [merged[largest] for largest in sorted(merged)]


def _plot_loads(levels: Sequence[LevelFigures]) -> bytes:
    """Draw each level's items per code, codes sorted by load, beside the load of an even level."""
    columns = min(len(levels), 4)
    figure, panels = _figure(len(levels), 3.2 * -(-len(levels) // columns), columns=columns)
    for number, (axes, level) in enumerate(zip(panels, levels, strict=True), start=1):
        _draw_loads(axes, level)
        codes = level.codebook_size or level.codes_used
        used = f"{level.codes_used:,} of {codes:,} codes used" if level.codebook_size else f"{codes:,} codes used"
        axes.set_title(f"level {number}\n{used}", fontsize=9, loc="left")
        first = (number - 1) % columns == 0
        _name_axes(axes, "codes, most used first", "items per code" if first else "")
    return _png(figure)


def _draw_loads(axes: Axes, level: LevelFigures) -> None:
    loads = np.array(level.load_curve, dtype=np.float64)
    codes = level.codebook_size or level.codes_used
    ranks = np.linspace(1, codes, len(loads))
    # The curve is a sample of the codes where there are many, so its mean is near, but not, items / K.
    even = float(loads.mean()) if len(loads) == codes else float(np.trapezoid(loads, ranks)) / (codes - 1)
    is_log = loads.max() > LOG_SPREAD * max(even, 1.0)
    # An unused code lies below a log axis; the title counts them.
    lowest = 0.5 if is_log else 0.0
    shown = np.maximum(loads, lowest)
    axes.fill_between(ranks, shown, lowest, color=SKY, alpha=0.6, step="mid", lw=0)
    axes.plot(ranks, shown, color=BLUE, lw=1.4, drawstyle="steps-mid")
    axes.axhline(even, color=ORANGE, ls="--", lw=1.4)
    axes.set_xlim(0.5, codes + 0.5)
    if is_log:
        axes.set_yscale("log")
    axes.set_ylim(lowest, loads.max() * 4 if is_log else max(float(loads.max()), 1.0) * 1.2)
    _count_ticks(axes)
    axes.annotate(
        f"even: {_short_count(even)}",
        (1.0, even),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=ORANGE,
    )


def _figure(panels: int, height: float, *, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = -(-panels // columns)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", lw=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
    return figure, axes


def _name_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)


def _count_ticks(axes: Axes) -> None:
    # Plain numbers: the default of a log axis is mathtext.
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_label))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick_label(value: float, _position: int) -> str:
    return _short_count(value)


def _short_count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:.3g}{unit}" if value / scale < 1000 else f"{value / scale:,.0f}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _label(text: str) -> str:
    return shorten(printable(text), 40)


def _label_points(figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write each cell's name at the first place beside its point that is free; where none is, the table has it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    points = [(row["relative_mse"], row["collision_rate"]) for row in rows]
    frame = axes.get_window_extent(renderer)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axes.transData.transform(points)]
    for row, point in zip(rows, points, strict=True):
        for across, up in LABEL_PLACES:
            label = axes.annotate(
                _label(str(row["cell"])),
                point,
                (9 * across, 9 * up),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[across],
                va={1: "bottom", 0: "center", -1: "top"}[up],
                fontsize=8,
                # A $ in a name is not a formula.
                parse_math=False,
            )
            box = label.get_window_extent(renderer)
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and not box.count_overlaps(taken):
                taken.append(Bbox.from_extents(*box.extents))
                break
            label.remove()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without this the file names the version of matplotlib.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
