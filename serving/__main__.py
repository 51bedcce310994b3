"""Commands: serve; serve keys ..."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookalike.console import new_app, print_result, run_command
from lookalike.errors import SettingsError
from lookalike.settings import apply_overrides, load_settings, validate_settings
from serving.safety.key_commands import keys_app
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from serving.server import RunningServer

app = new_app("Serve an index over HTTP, with a search page at /.")
_DEFAULTS = {name: field.default for name, field in ServingSettings.model_fields.items()}


@app.command()
def serve(
    index: Annotated[Path | None, typer.Option(help="Index folder, made by `lookalike index build`.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=str(_DEFAULTS["host"]))] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default=str(_DEFAULTS["port"]))
    ] = None,
    shards: Annotated[Path | None, typer.Option(help="Shards of the pictures, if they have moved.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that share the port.", show_default=str(_DEFAULTS["num_processes"])),
    ] = None,
    vectors_only: Annotated[
        bool, typer.Option("--vectors-only", help="Serve without the encoder: no search by new pictures, no torch.")
    ] = False,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="YAML file with these and more settings; options win over it.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, made by `serve keys add`; clients then need one.")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let everyone in who reaches --host, also from other machines.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once the server listens.")] = False,
) -> None:
    """Serve an index over HTTP until Ctrl-C, with a search page at /. `serve keys` makes and removes API keys."""
    options = {"index": index, "host": host, "port": port, "shards": shards, "keys": keys}
    options["requires_keys"] = False if no_keys else None
    options["num_processes"] = workers
    options["engine.vectors_only"] = True if vectors_only else None
    settings = _settings({name: value for name, value in options.items() if value is not None}, settings_file)
    from serving.observability.json_logs import set_log_format
    from serving.server import serve as serve_until_stopped

    set_log_format(settings.observability.log_format)

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


def _settings(options: dict[str, Path | str | int], file: Path | None) -> ServingSettings:
    """The file's settings, with `options` in their place where given."""
    # Overrides are read as YAML, and JSON is YAML in which a path stays text whatever its characters.
    overrides = [f"{name}={json.dumps(value, default=str, ensure_ascii=False)}" for name, value in options.items()]
    if file is not None:
        return load_settings(ServingSettings, file, overrides)
    if "index" not in options:
        raise SettingsError("no index to serve: give --index, or --settings with a file that names one.")
    return validate_settings(ServingSettings, apply_overrides({}, overrides), where="options of serve")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m serving") -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["keys"]:
        run_command(keys_app, given[1:], program=f"{program} keys")
    run_command(app, given, program=program)


if __name__ == "__main__":
    main()
