"""`lookalike index describe`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result


def describe(
    index: Annotated[Path, typer.Argument(help="Index folder.")],
    version: Annotated[str | None, typer.Option(help="This version; the current one where absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what an index holds and how well it searches."""
    from indexing.published_index import PublishedIndex
    from indexing.versions import details_of, versions_of

    if version is not None:
        details_of(index, version)  # names the versions there are, if this is none of them
    opened = PublishedIndex.open(index, version=version)
    described = {
        "index": str(index),
        "versions": versions_of(index),
        **summary(opened),
        "columns": {field.name: str(field.type) for field in opened.metadata.schema},
        "parents": dict(opened.manifest.parents),
        "bytes": sum(entry["bytes"] for entry in opened.manifest.files.values()),
    }
    print_result(described, as_json=as_json, lines=lambda: _lines(described))


def summary(index: Any) -> dict[str, Any]:
    """What a build or a look at an index reports."""
    details = index.manifest.details
    names = ("type", "num_vectors", "dim", "target_recall", "measured_depth", "default_effort", "recall_curve", "norms")
    return {"version": index.version, "fingerprint": index.fingerprint, **{name: details[name] for name in names}}


def summary_lines(described: dict[str, Any]) -> list[str]:
    """The same for people, with the recall curve as a table."""
    from indexing.planning.report import effort_text
    from lookalike.records import Effort

    tables = ("recall_curve", "columns", "parents", "versions")
    lines = [f"{name}: {_text(value)}" for name, value in described.items() if name not in tables]
    if described["recall_curve"]:
        lines.append(f"share of the exact {described['measured_depth']} nearest that is found, by effort:")
        lines += [
            f"  {point['recall']:.4f}  {effort_text(Effort(**point['effort']))}" for point in described["recall_curve"]
        ]
    else:
        lines.append("every search is exact")
    return lines


def _lines(described: dict[str, Any]) -> list[str]:
    return [
        f"versions: {', '.join(described['versions'])}",
        *summary_lines(described),
        f"columns: {_text(described['columns'])}",
        *(f"made from {name}: {fingerprint[:12]}" for name, fingerprint in described["parents"].items()),
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return str(value)
