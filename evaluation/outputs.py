"""How every evaluation ends: the JSON file, the report, the comparison with earlier results, and the lines printed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.compare import comparison_lines, open_result
from evaluation.galleries import Illustrations
from evaluation.reporting.folder import REPORT_NAME, require_replaceable, write_report
from evaluation.reporting.values import Contender, PrecisionRecall
from evaluation.result import Result, summary_tree, table_lines, write_result
from lookalike.errors import SettingsError
from lookalike.ranking_metrics import RECALL_LEVELS

# Of all differences to an earlier result the terminal shows these.
_HEADLINES = ("map", "map@r", "hit_rate@1", "map@100")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a result goes."""

    json_file: Path | None = None
    report: Path | None = None  # folder
    previous: tuple[Path, ...] = ()  # earlier results of the same queries, to compare with
    command: str = ""  # that makes this result

    def check(self) -> None:
        """Before the first slow step.

        Raises:
            SettingsError: the numbers cannot be written where they should go.
            ArtifactError: something that is not an evaluation lies where the report should go.
            DataError: an earlier result cannot be read.
        """
        if self.json_file and (self.json_file.is_dir() or not self.json_file.parent.is_dir()):
            reason = "is a folder" if self.json_file.is_dir() else f"has no folder {self.json_file.parent} to lie in"
            raise SettingsError(f"the numbers cannot be written: {self.json_file} {reason}.")
        if self.report:
            require_replaceable(self.report)
        for path in self.previous:
            open_result(path)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a report shows beside the numbers, gathered only where one is asked for."""

    pictures: Callable[[], Illustrations] = Illustrations
    parents: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def conclude(
    result: Result, outputs: Outputs, *, name: str, title: str, shown: Shown = Shown()
) -> tuple[dict[str, Any], list[str]]:
    """Writes what `outputs` asks for; returns the numbers without values per query, and lines of text.

    Args:
        name: Of the result, beside the names of earlier ones.
    """
    baselines = [Contender(_name_of(path), open_result(path)) for path in outputs.previous]
    lines = [*_about(result), *table_lines(result)]
    for baseline in baselines:
        lines += [f"against {baseline.name}:", *comparison_lines(baseline.result, result, only=_HEADLINES)]
    if outputs.json_file:
        write_result(outputs.json_file, result)
        lines.append(f"result: {outputs.json_file}")
    if outputs.report:
        pictures = shown.pictures()
        write_report(
            outputs.report,
            result,
            name=name,
            title=title,
            command=outputs.command,
            baselines=baselines,
            galleries=pictures.galleries,
            confusing=pictures.confusing,
            precision_recall=precision_recall_of(result),
            parents=shown.parents,
            settings=shown.settings,
        )
        lines.append(f"report: {outputs.report / REPORT_NAME}")
    return summary_tree(result), lines


def precision_recall_of(result: Result) -> list[PrecisionRecall]:
    """The curves of the sections that know one."""
    return [
        PrecisionRecall(name, RECALL_LEVELS.tolist(), [value / 100 for value in section.facts["precision_at_recall"]])
        for name, section in result.sections.items()
        if section.facts.get("precision_at_recall")
    ]


def _about(result: Result) -> list[str]:
    num_distractors, ties = result.record.get("num_distractors"), result.record.get("ties")
    about = f"{result.benchmark}: {result.record.get('protocol', '')}"
    lines = [about.rstrip(": ")]
    if num_distractors:
        lines.append(f"{num_distractors:,} distractors, ties by rule: {ties}")
    return [*lines, "in percent, with 95% intervals over clusters of queries that err together"]


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else path.stem
