"""Figures as inline SVG whose colours follow the page, light or dark; the same values give the same bytes."""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from evaluation.reporting.headlines import Column, Row, Value
from evaluation.reporting.values import Contender, PrecisionRecall

# Stand-ins that the page's own colours replace: matplotlib knows no CSS variables.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_SERIES = [f"#0400{number:02x}" for number in range(1, 6)]
_CSS_COLOURS = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_LINE_STYLES = ("-", "--", "-.", ":")
_WIDTH = 11.4  # inches of 72 points: as wide as the page
_MAX_NAME = 34  # characters of a name

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "lookalike",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.color": _LINE,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def interval_bars(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A panel per column, a line per row: point and interval, bounds without a point, hollow points where published."""
    with _drawing():
        figure, panels = _panels(len(columns), height=0.9 + 0.3 * len(rows), sharey=True)
        for axes, column in zip(panels, columns, strict=True):
            for place, row in enumerate(rows):
                if column in row.values:
                    _draw_value(axes, place, row.values[column], is_published=row.is_published, colour=_colour(place))
            axes.set_title(f"{_short(column.section)}\n{column.label}")
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(len(rows) - 0.5, -0.5)  # first row on top
        panels[0].set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
            label.set_color(_SOFT if row.is_published else _INK)
        panels[0].get_yticklabels()[0].set_fontweight("bold")
        return _inline_svg(figure, "intervals")


def distractor_curve(contenders: Sequence[Contender]) -> str:
    """A panel per section: mAP in percent over the number of distractors."""
    curves = [(place, own) for place, own in enumerate(contenders) if len(own.result.curve) > 1]
    sections = list(dict.fromkeys(name for _, own in curves for point in own.result.curve for name in point.maps))
    counts = [point.num_distractors for _, own in curves for point in own.result.curve]
    with _drawing():
        figure, panels = _panels(len(sections), height=3.4)
        for axes, section in zip(panels, sections, strict=True):
            for place, own in curves:
                axes.plot(
                    [point.num_distractors for point in own.result.curve],
                    [100 * point.maps.get(section, math.nan) for point in own.result.curve],
                    marker="o",
                    markersize=4,
                    color=_colour(place),
                    linestyle=_LINE_STYLES[place % len(_LINE_STYLES)],
                    label=_short(own.name),
                )
            axes.set_title(_short(section))
            axes.set_xlabel("distractors")
            _count_axis(axes, counts)
        panels[0].set_ylabel("mAP, %")
        _legend(figure, panels[0])
        return _inline_svg(figure, "distractors")


def precision_recall_curves(curves: Sequence[PrecisionRecall]) -> str:
    with _drawing():
        figure, (axes,) = _panels(1, height=4.0, width=6.0)
        for place, curve in enumerate(curves):
            axes.plot(
                [100 * value for value in curve.recall],
                [100 * value for value in curve.precision],
                color=_colour(place),
                linestyle=_LINE_STYLES[place % len(_LINE_STYLES)],
                label=_short(curve.section),
            )
        axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 103))
        _legend(figure, axes)
        return _inline_svg(figure, "precision-recall")


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style alone, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are drawn by the browser, which has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _panels(
    num_panels: int, *, height: float, width: float = _WIDTH, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", wspace=0.05)
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False, sharey=sharey)[0])


def _draw_value(axes: Axes, place: int, value: Value, *, is_published: bool, colour: str) -> None:
    if is_published:
        axes.plot([value.mean], [place], "o", markerfacecolor="none", markeredgecolor=_SOFT, markersize=6)
        return
    ends = "|" if value.is_bounded_only else ""
    if not math.isnan(value.low):
        axes.plot([value.low, value.high], [place, place], color=colour, linewidth=2, marker=ends, markersize=10)
    if not value.is_bounded_only:
        axes.plot([value.mean], [place], "o", color=colour, markersize=7)


def _count_axis(axes: Axes, counts: Sequence[int]) -> None:
    """Logarithmic, with a place for 0."""
    least = min((count for count in counts if count), default=1)
    powers = [10**power for power in range(len(str(least)) - 1, len(str(max(counts))) + 1)]
    axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator([0] * (0 in counts) + [p for p in powers if least <= p <= max(counts)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _short_count(float(count))))


def _short_count(count: float) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


def _colour(place: int) -> str:
    return _SERIES[place % len(_SERIES)]


def _short(name: str) -> str:
    """Without what an SVG cannot hold, and without the underscores that keep a name out of matplotlib's legends."""
    kept = "".join(letter for letter in " ".join(name.split()) if letter.isprintable()).lstrip("_") or "?"
    return kept if len(kept) <= _MAX_NAME else kept[: _MAX_NAME - 1] + "…"


def _inline_svg(figure: Figure, prefix: str) -> str:
    """An svg element for a page: no prolog, no metadata, ids that other figures of the page do not have."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its style would be the whole page's
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib |= {name: _own_attribute(name, value, prefix) for name, value in attributes.items()}
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "aria-hidden": "true", "style": f"max-width: {width}pt"}
    return ElementTree.tostring(root, encoding="unicode")


def _own_attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "style":
        return _with_css_colours(value, _CSS_COLOURS)
    return value.replace("#", f"#{prefix}-", 1) if name in ("href", "clip-path") else value


def _with_css_colours(style: str, colours: Mapping[str, str]) -> str:
    for stand_in, colour in colours.items():
        style = style.replace(stand_in, colour)
    return style
