"""A plan in lines for people."""

from indexing.planning.plan import CandidateRow, Plan
from lookalike.records import Effort

_HEADINGS = ("type", "recall", "effort", "ms/query", "memory", "build", "")


def plan_lines(plan: Plan) -> list[str]:
    """The table of candidates, `>` before the chosen one, and the explanation."""
    rows = [_HEADINGS, *(_cells(row) for row in plan.table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = []
    for number, row in enumerate(rows):
        is_chosen = number > 0 and row[0] == plan.index_type.name
        cells = [
            cell.ljust(width) if column in (0, 2, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("> " if is_chosen else "  ") + "  ".join(cells).rstrip())
    return [*lines, "", *plan.explanation]


def effort_text(effort: Effort) -> str:
    """`16 probes x2`: x2 where twice the hits are scored exactly."""
    parts = []
    if effort.num_probes is not None:
        parts.append(f"{effort.num_probes} probes")
    if effort.breadth is not None:
        parts.append(f"breadth {effort.breadth}")
    if effort.candidates_per_hit > 1:
        parts.append(f"x{effort.candidates_per_hit}")
    return " ".join(parts)


def _cells(row: CandidateRow) -> tuple[str, ...]:
    is_exact = row.effort == Effort()
    recall = "exact" if is_exact else "" if row.recall is None else f"{row.recall:.3f}"
    return (
        row.type,
        recall,
        effort_text(row.effort),
        f"{row.milliseconds:.2f}" if row.milliseconds >= 0.1 else f"{row.milliseconds:.3f}",
        f"{row.memory_bytes / 2**20:,.0f} MiB",
        _duration(row.build_seconds),
        row.remark,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
