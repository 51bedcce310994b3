"""The course of runs over their steps: an image in the run folder, and inline SVG for the page that compares runs."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from lookalike.artifacts import write_atomically
from lookalike.errors import DataError
from training.batch_metrics import METRIC_KS
from training.reporting.run_history import RunHistory, read_run
from training.reporting.run_record import explaining_never_fails

CURVES_NAME = "curves.png"
# Of a line: more are not to be seen, and a page should stay small.
_MAX_POINTS = 200
_NUM_COLUMNS = 3

_INK, _SOFT, _LINE = "#1d2321", "#5d6764", "#d5d2c9"
_SERIES = ("#0b7566", "#b4570f", "#3d5fc4", "#8a3f9c", "#6e6a00")
_DASHES = ("none", "6 2", "6 2 1 2", "1 2")  # in widths of the line, as SVG has them
# In a page its own colours take over, light or dark.
_CSS_COLOURS = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "lookalike",  # the same runs give the same bytes
    "font.size": 9,
    "axes.titlesize": 10,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
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
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    fields: Mapping[str, str]  # label -> name in events; the first stands for all where runs are compared
    of: Literal["steps", "validations"] = "steps"
    is_share: bool = False
    starts_at_zero: bool = False


PANELS = (
    Panel("loss above floor", {"": "loss_above_floor"}),
    Panel("loss", {"": "loss"}),
    Panel("hit rate in the batch", {f"at {k}": f"hit_rate_at_{k}" for k in METRIC_KS}, is_share=True),
    Panel("recall in the batch", {f"at {k}": f"recall_at_{k}" for k in reversed(METRIC_KS)}, is_share=True),
    Panel("validation", {"": "value"}, of="validations"),
    Panel("live fraction", {"": "live_fraction"}, is_share=True),
    Panel("learning rate", {"": "lr"}),
    Panel("images/s", {"": "images_per_second"}, starts_at_zero=True),
)


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a run is drawn: runs of one recipe share a colour."""

    colour: str
    dashes: str  # as SVG has them

    @property
    def css_colour(self) -> str:
        return _CSS_COLOURS[self.colour]


def write_curves(run: Path) -> Path:
    """Draws `curves.png` from the events of a run, and returns its place; a failure is logged and nothing more."""
    path = run / CURVES_NAME
    with explaining_never_fails(CURVES_NAME):
        with _drawing():
            figure = draw_curves([read_run(run)])
            FigureCanvasAgg(figure)
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=110)
        write_atomically(path, stream.getvalue())
    return path


def curves_svg(histories: Sequence[RunHistory], styles: Sequence[LineStyle]) -> str | None:
    """An svg element for a page, which holds no other figure of ours; None where no run has events.

    Holds no text that others chose: which line is whose, the page says.
    """
    if not any(_shown_panels(histories)):
        return None
    with _drawing():
        figure = draw_curves(histories, styles if len(histories) > 1 else None)
        FigureCanvasSVG(figure)
        stream = io.StringIO()
        unsaid = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=unsaid, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]  # without the prolog, which is not HTML
    for colour, css in _CSS_COLOURS.items():
        text = text.replace(colour, css)
    return text


def line_styles(num_runs: Sequence[int]) -> list[list[LineStyle]]:
    """A colour for each recipe and dashes for each of its runs, given how many runs each has."""
    return [
        [
            LineStyle(_SERIES[number % len(_SERIES)], _DASHES[(number // len(_SERIES) + own) % len(_DASHES)])
            for own in range(count)
        ]
        for number, count in enumerate(num_runs)
    ]


def draw_curves(histories: Sequence[RunHistory], styles: Sequence[LineStyle] | None = None) -> Figure:
    """A panel for each number that a run has.

    Args:
        styles: Of the runs, of which each panel then shows one number; None draws all numbers of a single run.

    Raises:
        DataError: no run has events.
    """
    panels = list(_shown_panels(histories))
    if not panels:
        raise DataError("there are no events to draw: nothing was trained yet")
    num_rows = math.ceil(len(panels) / _NUM_COLUMNS)
    figure = Figure(figsize=(11.4, 2.5 * num_rows))
    figure.set_layout_engine("constrained", wspace=0.04, hspace=0.06)
    places: list[Axes] = list(figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        if styles is None:
            _draw_all_fields(axes, panel, histories[0])
        else:
            _draw_first_field(axes, panel, histories, styles)
        axes.set_xlabel("steps")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if panel.is_share:
            axes.set_ylim(-0.03, 1.03)
        elif panel.starts_at_zero:
            axes.set_ylim(bottom=0)
    for axes in places[len(panels) :]:
        axes.remove()
    return figure


def binned(
    values: Mapping[int, float], *, num_bins: int = _MAX_POINTS
) -> tuple[Float64[ndarray, "points"], Float64[ndarray, "points"]]:
    """Steps and values, those of neighbouring steps as their means where there are more than `num_bins`.

    Values that are not finite are left out.
    """
    table = np.array([pair for pair in values.items() if math.isfinite(pair[1])], np.float64).reshape(-1, 2)
    if len(table) <= num_bins:
        return table[:, 0], table[:, 1]
    means = np.stack([part.mean(axis=0) for part in np.array_split(table, num_bins)])
    return means[:, 0], means[:, 1]


def _draw_all_fields(axes: Axes, panel: Panel, history: RunHistory) -> None:
    for (label, field), colour in zip(panel.fields.items(), _SERIES, strict=False):
        axes.plot(*binned(_course(history, panel, field)), color=colour, label=label, marker=_marker(panel))
    if panel.of == "validations" and history.best_step is not None and history.best_validation is not None:
        best = (history.best_step, history.best_validation)
        axes.plot(*best, "o", color=_SERIES[1])
        axes.annotate(f"{best[1]:.4f}", best, (0, 5), textcoords="offset points", ha="center", color=_SERIES[1])
        axes.margins(y=0.2)
    axes.set_title(panel.title)
    if len(panel.fields) > 1:
        axes.legend(ncols=len(panel.fields), fontsize=8)


def _draw_first_field(axes: Axes, panel: Panel, histories: Sequence[RunHistory], styles: Sequence[LineStyle]) -> None:
    label, field = next(iter(panel.fields.items()))
    for history, style in zip(histories, styles, strict=True):
        line = (0, tuple(map(float, style.dashes.split()))) if style.dashes != "none" else "-"
        steps, values = binned(_course(history, panel, field))
        axes.plot(steps, values, color=style.colour, linestyle=line, marker=_marker(panel))
    axes.set_title(f"{panel.title} {label}".strip())


def _shown_panels(histories: Sequence[RunHistory]) -> Iterator[Panel]:
    for panel in PANELS:
        if any(_course(history, panel, field) for history in histories for field in panel.fields.values()):
            yield panel


def _course(history: RunHistory, panel: Panel, field: str) -> dict[int, float]:
    """By the number of steps done; the whole loss only where its floor is not known."""
    if field == "loss" and history.loss_name != "loss":
        return {}
    first = 1 if panel.of == "steps" else 0  # the step that is number 0 is the first one done
    return {step + first: value for step, value in history.column(field, of=panel.of).items()}


def _marker(panel: Panel) -> str:
    return "." if panel.of == "validations" else ""


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style alone, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _STYLE]):
        yield
