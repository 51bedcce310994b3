"""The headline table as text to quote: a Markdown table, and rows of a LaTeX one."""

import re
from collections.abc import Sequence

from evaluation.reporting.headlines import Column, Row

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "[": "{[}",  # a row that begins with a bracket would be an argument of the line break before it
    }
)


def markdown_rows(columns: Sequence[Column], rows: Sequence[Row], *, with_intervals: bool = False) -> list[str]:
    """A whole table with its heading."""
    heading = ["", *(f"{column.section} {column.label}" for column in columns)]
    lines = [heading, *(_cells(row, columns, with_intervals=with_intervals) for row in rows)]
    table = ["| " + " | ".join(escape_markdown(cell) for cell in cells) + " |" for cells in lines]
    return [table[0], "|---" + "|---:" * len(columns) + "|", *table[1:]]


def latex_rows(columns: Sequence[Column], rows: Sequence[Row], *, with_intervals: bool = False) -> list[str]:
    """A comment that names the columns, then a line per row for the body of a tabular."""
    heading = " & ".join(["method", *(escape_latex(f"{column.section} {column.label}") for column in columns)])
    lines = [_cells(row, columns, with_intervals=with_intervals) for row in rows]
    return [f"% {heading}", *(" & ".join(escape_latex(cell) for cell in cells) + r" \\" for cells in lines)]


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def escape_latex(text: str) -> str:
    return " ".join(text.split()).translate(_LATEX)


def _cells(row: Row, columns: Sequence[Column], *, with_intervals: bool) -> list[str]:
    name = f"{row.name} (published, not measured here)" if row.is_published else row.name
    values = [row.values.get(column) for column in columns]
    shown = [(value.number, value.interval if with_intervals else "") if value else ("-",) for value in values]
    return [name, *(" ".join(filter(None, parts)) for parts in shown)]
