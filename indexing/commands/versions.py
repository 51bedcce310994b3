"""`lookalike index versions`, `publish`, `rollback` and `compact`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result

IndexFolder = Annotated[Path, typer.Argument(help="Index folder.")]


def versions(index: IndexFolder, as_json: AsJson = False) -> None:
    """List the versions of an index, and how many changes each has yet to take in."""
    from indexing.living.journal import Journal
    from indexing.versions import absorbed_sequence, current_version, details_of, versions_of

    current, journal = current_version(index), Journal(index)
    rows: list[dict[str, Any]] = []
    for name in versions_of(index):
        details = details_of(index, name)
        changes = journal.num_changes_after(absorbed_sequence(details))
        facts = {fact: details.get(fact) for fact in ("type", "num_vectors", "dim")}
        rows.append({"version": name, "is_current": name == current, **facts, "changes_since": changes})
    journal.close()
    print_result(
        {"index": str(index), "current": current, "versions": rows},
        as_json=as_json,
        lines=lambda: [
            f"{'*' if row['is_current'] else ' '} {row['version']}  {row['type']}, {row['num_vectors']} vectors of "
            f"{row['dim']} numbers, {row['changes_since']} changes since"
            for row in rows
        ],
    )


def publish(
    index: IndexFolder,
    version: Annotated[str, typer.Argument(help="Name of a version, as `lookalike index versions` lists it.")],
    as_json: AsJson = False,
) -> None:
    """Make a version the current one; servers change over by themselves, and no change made since is lost."""
    from indexing.published_index import PublishedIndex
    from indexing.versions import details_of
    from indexing.versions import publish as publish_version

    details_of(index, version)  # names the versions there are, if this is none of them
    PublishedIndex.open(index, version=version)  # what cannot be opened must not become current
    publish_version(index, version)
    print_result({"index": str(index), "current": version}, as_json=as_json)


def rollback(index: IndexFolder, as_json: AsJson = False) -> None:
    """Make the version before the current one current; no change made since is lost."""
    from indexing.versions import current_version, version_before

    publish(index, version_before(index, current_version(index)), as_json=as_json)


def compact(
    index: IndexFolder,
    keep: Annotated[int, typer.Option(min=1, help="Versions that are left afterwards.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Build and publish a version that holds all changes made so far, and remove old ones; works while it serves."""
    from indexing.living.compaction import compact_index

    done = compact_index(index, keep_versions=keep)
    result = {"index": str(index), "current": done.version, "changes": done.num_changes, "removed": list(done.removed)}
    print_result(result, as_json=as_json)
