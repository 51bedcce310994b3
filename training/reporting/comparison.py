"""Runs side by side: what was set differently, how far they came, and means over seeds with their intervals."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import special

from lookalike.artifacts import write_text_atomically
from lookalike.progress import duration
from training.reporting.run_history import RunHistory, read_run
from training.reporting.run_record import explaining_never_fails

TABLE_NAME = "table.md"

# The last part of a run, whose mean is its hit rate at the end: one batch says little.
_LAST_SHARE = 0.1
_CONFIDENCE = 0.95
_UNKNOWN = "-"
# Of validation: who is searched for among whom, and what the value is.
_VALIDATION_MEANING = tuple(f"validation.{name}" for name in ("class_share", "seed", "max_pictures", "chosen_by"))


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean over seeds and its 95% t-interval, which one seed does not have."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run in numbers; None where its events do not tell one."""

    name: str  # the end of its folder's path, as much as sets it apart
    history: RunHistory
    settings: Mapping[str, Any]  # those that differ between the runs and that it has; plain JSON
    values: Mapping[str, float | None]  # by the names of MEASURES

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return max(self.history.steps, default=-1) + 1

    @property
    def num_planned_steps(self) -> int | None:
        planned = self.history.settings.get("num_steps")
        return planned if isinstance(planned, int) and planned else None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "run": str(self.history.folder),
            "recipe": self.history.recipe,
            "seed": _plain(self.history.seed),
            "is_finished": self.history.is_finished,
            "steps": self.num_steps,
            "num_planned_steps": self.num_planned_steps,
            "seconds": _finite(self.history.seconds),
            "loss_name": self.history.loss_name,
            **self.values,
            "best_step": self.history.best_step,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True)
class RecipeRows:
    """Runs that differ by their seed alone; a run of an unknown recipe is alone."""

    recipe: str | None
    rows: Sequence[RunRow]

    @property
    def counted(self) -> list[RunRow]:
        """The runs whose mean is taken: finished ones, or all where none is."""
        return [row for row in self.rows if row.history.is_finished] or list(self.rows)

    @property
    def num_seeds(self) -> int:
        return len({_key(row.history.seed) for row in self.counted})

    @property
    def intervals(self) -> dict[str, Interval]:
        """By the names of MEASURES, without those that no run has; runs of one seed count as one, by their mean."""
        found = {}
        for measure in MEASURES:
            by_seed: dict[str, list[float]] = {}
            for row in self.counted:
                value = row.values[measure.name]
                if value is not None:
                    by_seed.setdefault(_key(row.history.seed), []).append(value)
            if by_seed:
                found[measure.name] = t_interval([statistics.fmean(values) for values in by_seed.values()])
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "runs": [row.name for row in self.rows],
            "counted_runs": [row.name for row in self.counted],
            "num_seeds": self.num_seeds,
            "means": {name: asdict(interval) for name, interval in self.intervals.items()},
        }


@dataclass(frozen=True, slots=True)
class RunComparison:
    recipes: Sequence[RecipeRows]  # in the order in which the first run of each was given
    differing_settings: Sequence[str]  # full names
    remarks: Sequence[str]  # what stands against comparing

    @property
    def rows(self) -> list[RunRow]:
        return [row for recipe in self.recipes for row in recipe.rows]

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": [row.as_json() for row in self.rows],
            "recipes": [recipe.as_json() for recipe in self.recipes],
            "differing_settings": list(self.differing_settings),
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a run that a mean over seeds makes sense for."""

    name: str
    heading: str
    of: Callable[[RunHistory], float | None]
    shown: Callable[[float], str]


def last_hit_rate(history: RunHistory) -> float | None:
    """Mean hit rate at 1 of the batches in the last tenth of the steps."""
    values = list(history.column("hit_rate_at_1").values())
    return statistics.fmean(values[-max(1, round(_LAST_SHARE * len(values))) :]) if values else None


MEASURES = (
    Measure("best_validation", "best validation", lambda run: run.best_validation, "{:.4f}".format),
    Measure("final_validation", "final validation", lambda run: run.final_validation, "{:.4f}".format),
    Measure("final_loss", "final loss above floor", lambda run: run.final_loss, "{:.4f}".format),
    Measure("last_hit_rate_at_1", "hit rate@1, last steps", last_hit_rate, "{:.3f}".format),
    Measure("images_per_second", "images/s", lambda run: run.images_per_second, "{:.1f}".format),
)


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Reads runs, finished or not; a folder that is given twice counts once.

    Raises:
        ValueError: there are no folders.
        ArtifactError: a folder holds no run; the message names it.
    """
    if not folders:
        raise ValueError("no runs to compare")
    histories = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    settings = [flat_settings(history.settings) for history in histories]
    differing = differing_names(settings)
    by_recipe: dict[str, list[RunRow]] = {}
    for number, (name, history, own) in enumerate(zip(short_names(histories), histories, settings, strict=True)):
        values = {measure.name: _finite(measure.of(history)) for measure in MEASURES}
        row = RunRow(name, history, {name: own[name] for name in differing if name in own}, values)
        by_recipe.setdefault(history.recipe or f"unknown {number}", []).append(row)
    recipes = [RecipeRows(rows[0].history.recipe, rows) for rows in by_recipe.values()]
    return RunComparison(recipes, differing, list(remarks(recipes, differing)))


def t_interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of the mean of independent values; at least one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    quantile = float(special.stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2))
    half_width = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half_width, mean + half_width, len(values))


def flat_settings(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`batch.chunk_size` -> its value, as plain JSON, for each leaf; without `run`, where no two runs agree."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat_settings(value, f"{name}.")
        elif name != "run":
            found[name] = _plain(value)
    return found


def differing_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same everywhere, or that not all have."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if len({_key(own[name]) if name in own else None for own in settings}) > 1]


def short_names(histories: Sequence[RunHistory]) -> list[str]:
    """Of each folder's path as many last parts as make the names of all differ."""
    paths = [history.folder.parts for history in histories]
    for num_parts in range(1, max(map(len, paths))):
        names = ["/".join(parts[-num_parts:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(history.folder) for history in histories]


def remarks(recipes: Sequence[RecipeRows], differing: Sequence[str]) -> Iterator[str]:
    """Sentences on what is missing, and on what makes numbers hard to compare."""
    rows = [row for recipe in recipes for row in recipe.rows]
    for row in rows:
        if not row.history.steps and not row.history.validations:
            yield f"{row.name} has no events: nothing was trained yet, or its event files are gone"
        elif not row.history.is_finished:
            planned = f" of {row.num_planned_steps}" if row.num_planned_steps else ""
            yield f"{row.name} is not finished: {row.num_steps}{planned} steps are done"
    for recipe in recipes:
        left_out = [row.name for row in recipe.rows if row not in recipe.counted]
        if left_out:
            yield f"left out of a mean over seeds, since not finished: {', '.join(left_out)}"
    whole = [row.name for row in rows if row.history.steps and row.history.loss_name == "loss"]
    if whole:
        yield f"the floor of the loss is not known, so the whole loss is shown: {', '.join(whole)}"
    losses = [name for name in differing if name.startswith("loss.")]
    if losses:
        yield f"the numbers are of different losses: {', '.join(losses)}"
    for name in _VALIDATION_MEANING:
        if len({_key(row.settings[name]) for row in rows if name in row.settings}) > 1:
            yield f"the validation values are not of the same pictures or measure: {name}"
    shards = {_key(own["fingerprint"]) for own in map(_shards_of, rows) if "fingerprint" in own}
    if len(shards) > 1:
        yield f"the runs were trained on {len(shards)} different shard sets"


@dataclass(frozen=True, slots=True)
class TableLine:
    """A run's line, or that of the mean over seeds of the runs above it."""

    name: str
    cells: Sequence[str]
    is_mean: bool


HEADINGS = ("seed", "steps", "wall time", *(measure.heading for measure in MEASURES))


def table_lines(recipe: RecipeRows) -> Iterator[TableLine]:
    """The runs of a recipe and, where there are several, their mean; cells in the order of HEADINGS."""
    for row in recipe.rows:
        done = f"{row.num_steps:,}"
        if not row.history.is_finished and row.num_planned_steps:
            done += f" of {row.num_planned_steps:,}"
        seconds, values = _finite(row.history.seconds), row.values
        cells = [_UNKNOWN if value is None else measure.shown(value) for measure, value in _measured(values)]
        seed = str(row.history.seed) if isinstance(row.history.seed, int) else _UNKNOWN
        yield TableLine(row.name, [seed, done, _UNKNOWN if seconds is None else duration(seconds), *cells], False)
    if len(recipe.rows) > 1:
        seeds = f"{recipe.num_seeds} {'seed' if recipe.num_seeds == 1 else 'seeds'}"
        cells = [_UNKNOWN if own is None else _shown(own, measure) for measure, own in _measured(recipe.intervals)]
        yield TableLine("mean", [seeds, "", "", *cells], True)


def settings_lines(comparison: RunComparison) -> Iterator[TableLine]:
    """A line for each setting that differs, a cell for each run; a setting that a run does not have is a dash."""
    for name in comparison.differing_settings:
        cells = [shown_setting(row.settings[name]) if name in row.settings else _UNKNOWN for row in comparison.rows]
        yield TableLine(name, cells, False)


def comparison_lines(comparison: RunComparison) -> list[str]:
    """Markdown: a table of the runs, one of the settings that differ, and the remarks."""
    body = [
        [line.name if line.is_mean else code(line.name), *line.cells]
        for recipe in comparison.recipes
        for line in table_lines(recipe)
    ]
    lines = markdown_table(["run", *HEADINGS], body)
    if any(recipe.num_seeds > 1 for recipe in comparison.recipes):
        lines += ["", "Means with 95% t-intervals over seeds."]
    if comparison.differing_settings:
        names = [code(row.name) for row in comparison.rows]
        settings = [[code(line.name), *map(code, line.cells)] for line in settings_lines(comparison)]
        lines += ["", *markdown_table(["setting", *names], settings)]
    if comparison.remarks:
        lines += ["", *(f"- {escaped(remark)}" for remark in comparison.remarks)]
    return lines


def write_table(run: Path) -> Path:
    """Writes what `comparison_lines` says of one run into its folder; a failure is logged and nothing more."""
    path = run / TABLE_NAME
    with explaining_never_fails(TABLE_NAME):
        write_text_atomically(path, "\n".join(comparison_lines(compare_runs([run]))) + "\n")
    return path


def markdown_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Cells padded to the width of their column, all but the first to the right."""
    widths = [max(3, *map(len, column)) for column in zip(heading, *body, strict=True)]
    rows = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (heading, *body)
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (rows[0], rule, *rows[1:])]


def code(text: str) -> str:
    """A name or value as Markdown code, in which nothing but a backtick or a table's bar has a meaning."""
    shown = printable(text).replace("`", "'").replace("|", "¦")
    return f"`{shown or '?'}`"


def escaped(text: str) -> str:
    """As Markdown text that holds no markup but, for the sake of terminals, underscores."""
    return re.sub(r"([\\`*\[<&|])", r"\\\1", printable(text))


def printable(text: str) -> str:
    """In one line, without what moves a terminal's cursor."""
    return "".join(letter for letter in re.sub(r"\s+", " ", text).strip() if letter.isprintable())


def shown_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shards_of(row: RunRow) -> Mapping[str, Any]:
    shards = row.history.record.get("shards")
    return shards if isinstance(shards, Mapping) else {}


def _measured(values: Mapping[str, Any]) -> list[tuple[Measure, Any]]:
    return [(measure, values.get(measure.name)) for measure in MEASURES]


def _shown(interval: Interval, measure: Measure) -> str:
    if interval.low is None or interval.high is None:
        return measure.shown(interval.mean)
    return f"{measure.shown(interval.mean)} [{measure.shown(interval.low)}, {measure.shown(interval.high)}]"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Without what JSON does not know; YAML has dates and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _key(value: Any) -> str:
    """Equal for equal settings; 1 and true are not."""
    return json.dumps(_plain(value), sort_keys=True)
