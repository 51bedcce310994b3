"""`lookalike data`: write, verify, check and describe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipelines.sources.registry import DATA_SETS, open_data_set
from lookalike.console import new_app, print_result, run_command

if TYPE_CHECKING:
    from data_pipelines.settings import ShardSettings
    from data_pipelines.shard_plan import ShardPlan
    from data_pipelines.shard_set import ShardSet
    from data_pipelines.sources import PictureSource

_NUM_NAMED = 20  # missing pictures that are printed; --json names all
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

app = new_app("Turn pictures into shards, check them, look at them.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Shards = Annotated[Path, typer.Argument(help="Folder of a shard set.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the data set, see docs/data.md.")
]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]


@app.command()
def write(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures (ROOT/class/picture, ROOT/{train,test}/class/picture or ROOT/picture), or a "
            "listing (.csv, .parquet) with the column path and optionally label, coarse_label, split, key; with "
            "--dataset the folder that a public data set was unpacked to."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make. An interrupted run continues.")],
    overrides: Overrides = None,
    dataset: Annotated[str | None, typer.Option(help=f"A public data set: {', '.join(DATA_SETS)}.")] = None,
    test_class_share: Annotated[
        float | None, typer.Option(help="About this share of the classes becomes the split `test`, the rest `train`.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the classes of the split `test`.")] = None,
    allow_shared_classes: Annotated[
        bool, typer.Option("--allow-shared-classes", help="Accept classes that are in more than one split.")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(parser=_bytes, metavar="SIZE", help="Largest shard, such as 500M. Default: 256M.")
    ] = None,
    max_bad_share: Annotated[
        float | None, typer.Option(help="More bad pictures than this share are an error. Default: 0.01.")
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option(help="Re-encode as JPEG with at most this longer side. Default: keep the files' bytes."),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG quality with --max-side. Default: 90.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a shard set of pictures; the same pictures give the same bytes."""
    from data_pipelines.shard_plan import plan_shards
    from data_pipelines.shard_writer import measure_seconds_per_picture, write_shards
    from lookalike.errors import SettingsError
    from lookalike.native_libraries import num_cores

    settings = _shard_settings(shard_size, max_bad_share, max_side, quality)
    num_processes = processes or num_cores()
    pictures: PictureSource
    if dataset is None:
        if overrides:
            raise SettingsError(f"{overrides[0]!r} has no effect without --dataset.")
        pictures = _source(source, test_class_share, seed, allow_shared_classes)
    else:
        if test_class_share is not None or seed is not None or allow_shared_classes:
            raise SettingsError(
                f"{dataset} has its own splits: leave out --test-class-share, --seed and --allow-shared-classes."
            )
        pictures = open_data_set(dataset, source, overrides or ())
    if dry_run:
        plan = plan_shards(pictures, settings)
        seconds = measure_seconds_per_picture(plan, settings) * plan.num_pictures / num_processes
        summary = {**_plan_summary(plan), "estimated_seconds": round(seconds, 1)}
    else:
        with write_shards(pictures, out, settings, num_processes=num_processes) as shard_set:
            summary = _summary(shard_set)
    print_result(summary, as_json=as_json, lines=lambda: _lines(summary))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(DATA_SETS)}.")],
    root: Annotated[Path, typer.Argument(help="Folder that the data set was unpacked to.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what of a public data set is missing, without opening a picture. Exit code 3 where it cannot be written."""
    examination = open_data_set(name, root, overrides or ()).examine()
    result = {
        "is_usable": not examination.problems,
        "problems": examination.problems,
        "missing_paths": list(examination.missing_paths),
        "missing_pictures": list(examination.missing_pictures),
        "images": len(examination.pictures),
        "data_set": examination.facts(),
    }
    verdict = "NOT USABLE" if examination.problems else "usable"
    lines = [
        *(f"missing: {path}" for path in examination.missing_pictures[:_NUM_NAMED]),
        *_data_set_lines(examination.facts()),
        *examination.problems,
        f"{name} in {root}: {verdict}; {len(examination.pictures):,} images found",
    ]
    print_result(result, as_json=as_json, lines=lambda: lines)
    if examination.problems:
        raise typer.Exit(3)


@app.command()
def check(
    shards: Shards,
    full: Annotated[bool, typer.Option("--full", help="Decode, compare and stream every picture.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find damaged files and pictures, and what splits share. Exit code 3 where the shard set is unfit for use."""
    from data_pipelines.shard_set import ShardSet

    with ShardSet.open(shards) as shard_set:
        from data_pipelines.check import check_shard_set

        report = check_shard_set(shard_set, full=full)
    result = {"is_sound": report.is_sound, **asdict(report)}
    lines = [f"[{finding.severity:>7}] {finding.kind}: {finding.message}" for finding in report.findings]
    verdict = "sound" if report.is_sound else "DAMAGED"
    lines.append(f"{shards}: {verdict}; {report.num_samples:,} samples, {report.num_pictures_read:,} decoded")
    print_result(result, as_json=as_json, lines=lambda: lines)
    if not report.is_sound:
        raise typer.Exit(3)


@app.command()
def describe(
    shards: Shards,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a contact sheet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print counts, class sizes and picture sizes."""
    from data_pipelines.describe import contact_sheet, describe_shard_set, html_page, text_lines
    from data_pipelines.shard_set import ShardSet
    from lookalike.artifacts import write_text_atomically

    with ShardSet.open(shards) as shard_set:
        description = describe_shard_set(shard_set)
        if html is not None:
            write_text_atomically(html, html_page(description, contact_sheet(shard_set)))
    print_result(description.as_dict(), as_json=as_json, lines=lambda: text_lines(description))


def _shard_settings(
    shard_size: int | None, max_bad_share: float | None, max_side: int | None, quality: int | None
) -> "ShardSettings":
    from data_pipelines.settings import ShardSettings
    from lookalike.errors import SettingsError
    from lookalike.settings import validate_settings

    if quality is not None and max_side is None:
        raise SettingsError("--quality has no effect without --max-side: the files' bytes are kept as they are.")
    encoding = None if max_side is None else _given(encoding="jpeg", max_side=max_side, quality=quality)
    tree = _given(max_shard_bytes=shard_size, max_quarantine_share=max_bad_share, encoding=encoding)
    return validate_settings(ShardSettings, tree, where="command line")


def _source(
    source: Path, test_class_share: float | None, seed: int | None, allow_shared_classes: bool
) -> "PictureSource":
    from data_pipelines.settings import ClassFoldersSettings, ListingSettings
    from data_pipelines.sources.class_folders import ClassFolders
    from data_pipelines.sources.listing import Listing
    from lookalike.errors import DataError, SettingsError
    from lookalike.settings import validate_settings

    if source.suffix.lower() in (".csv", ".parquet") and not source.is_dir():
        if test_class_share is not None or seed is not None or allow_shared_classes:
            raise SettingsError(
                "a listing names its splits itself: leave out --test-class-share, --seed and --allow-shared-classes."
            )
        return Listing(validate_settings(ListingSettings, {"file": source}, where="command line"))
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a listing (.csv, .parquet).")
    if seed is not None and test_class_share is None:
        raise SettingsError("--seed has no effect without --test-class-share.")
    tree = _given(
        folder=source, test_class_share=test_class_share, seed=seed, allows_shared_classes=allow_shared_classes
    )
    return ClassFolders(validate_settings(ClassFoldersSettings, tree, where="command line"))


def _given(**values: Any) -> dict[str, Any]:
    """Only what was given: the defaults live in the settings."""
    return {name: value for name, value in values.items() if value is not None}


def _plan_summary(plan: "ShardPlan") -> dict[str, Any]:
    return {
        "images": plan.num_pictures,
        "classes": len(plan.class_names),
        "bytes": plan.num_bytes,
        "shards": len(plan.shards),
        "splits": sorted({shard.split for shard in plan.shards}),
        "data_set": plan.data_set,
    }


def _summary(shard_set: "ShardSet") -> dict[str, Any]:
    return {
        "folder": str(shard_set.folder),
        "fingerprint": shard_set.fingerprint,
        "images": shard_set.num_samples,
        "classes": len(shard_set.class_names),
        "shards": len(shard_set.shard_names),
        "splits": dict(shard_set.manifest.details["splits"]),
        "quarantined": shard_set.manifest.details["num_quarantined"],
        "data_set": shard_set.manifest.details.get("data_set", {}),
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    plain = [f"{key}: {value}" for key, value in summary.items() if key != "data_set"]
    return [*plain, *_data_set_lines(summary["data_set"])]


def _data_set_lines(facts: Mapping[str, Any]) -> list[str]:
    """What a data set lacks, and its published counts beside those found."""
    from data_pipelines.sources.data_set import CountComparison

    if not facts:
        return []
    counts = [CountComparison(**count).text for count in facts["counts"]]
    return [f"listed pictures without a file: {facts['num_missing_pictures']:,}", *counts]


def main(arguments: Sequence[str] | None = None, *, program: str = "lookalike data") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
