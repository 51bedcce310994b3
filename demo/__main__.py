"""`lookalike demo`: the whole chain on real pictures."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lookalike.console import new_app, print_result, run_command
from lookalike.errors import ArtifactError
from lookalike.settings import validate_settings
from serving.settings import ServingSettings

_MARKER_NAME = "DEMO"

app = new_app("The whole chain on real pictures.")


@app.command()
def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value of the training recipe.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Your own pictures: one folder per class, or a flat folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where everything goes; demo_run, or demo_run_NAME.")] = None,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the search page at the end.")] = True,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Pictures -> shards -> training -> embeddings -> index -> report -> search page.

    Without --images: emoji drawn by six vendors, trained on half of the things drawn, searched among the other half.
    Interrupt it at any point; the same command continues.
    """
    started = time.monotonic()
    folder = out or Path("demo_run" if images is None else f"demo_run_{images.resolve().name}")
    settings = validate_settings(
        ServingSettings, {"index": folder / "index", "host": host, "port": port}, where="options of demo"
    )
    _claim(folder)
    if serve:
        from serving.server import require_free_port

        require_free_port(host, port)
    from demo.chain import emoji_demo, own_pictures_demo

    try:
        if images is None:
            result = emoji_demo(folder, overrides=overrides or [])
        else:
            result = own_pictures_demo(images, folder, overrides=overrides or [])
    except ArtifactError as error:
        raise ArtifactError(f"{error} To begin the demo anew, remove {folder}.") from error
    numbers = {
        "index": str(result.index),
        "report": str(result.report) if result.report else None,
        "seconds": round(time.monotonic() - started, 1),
        "evaluation": result.summary,
    }
    print_result(numbers, as_json=as_json, lines=lambda: [*result.lines, f"{numbers['seconds']} seconds in all"])
    sys.stdout.flush()
    if serve:
        from serving.server import serve as serve_index

        serve_index(
            settings,
            on_ready=lambda server: print(f"Search page: {server.url}  (Ctrl-C ends it)", file=sys.stderr, flush=True),
        )


def _claim(folder: Path) -> None:
    """Marks the demo's folder as its own, so that nobody is ever told to remove another one.

    Raises:
        ArtifactError: the folder holds something and was not begun by the demo.
    """
    marker = folder / _MARKER_NAME
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ArtifactError(f"{folder} holds something else than a demo. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("Made by `lookalike demo`; may be removed as a whole.\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None, *, program: str = "lookalike demo") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
