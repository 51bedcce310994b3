"""Command: serve."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookalike.console import new_app, print_result, run_command
from lookalike.settings import validate_settings
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from serving.server import RunningServer

app = new_app("Serve an index over HTTP, with a search page at /.")
_DEFAULTS = {name: field.default for name, field in ServingSettings.model_fields.items()}


@app.command()
def serve(
    index: Annotated[Path, typer.Option(help="Index folder, made by `lookalike index build`.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _DEFAULTS["host"],
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = _DEFAULTS["port"],
    shards: Annotated[Path | None, typer.Option(help="Shards of the pictures, if they have moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once the server listens.")] = False,
) -> None:
    """Serve an index over HTTP until Ctrl-C, with a search page at /."""
    tree = {"index": index, "host": host, "port": port, "shards": shards}
    settings = validate_settings(ServingSettings, tree, where="options of serve")
    from serving.server import serve as serve_until_stopped

    def announce(server: "RunningServer") -> None:
        result = {
            "url": server.url,
            "host": server.host,
            "port": server.port,
            "index_version": server.index_version,
            "num_vectors": server.num_vectors,
        }
        line = f"{server.num_vectors:,} pictures (index {server.index_version}) at {server.url} - Ctrl-C stops"
        print_result(result, as_json=as_json, lines=lambda: [line])
        sys.stdout.flush()  # Whoever started us through a pipe waits for this line.

    serve_until_stopped(settings, on_ready=announce)


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m serving") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
