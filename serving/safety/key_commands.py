"""Commands: serve keys add, list, remove."""

import datetime
from pathlib import Path
from typing import Annotated

import typer

from lookalike.console import new_app, print_result
from serving.safety.key_file import add_key, read_keys, remove_key

keys_app = new_app("API keys: who may search, and who may change the gallery.")

_File = Annotated[Path, typer.Option("--keys", help="File of the keys' hashes, as `lookalike serve --keys` reads it.")]
_Name = Annotated[str, typer.Argument(help="Whose key it is: letters, digits, dots, underscores, hyphens.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_DEFAULT_FILE = Path("keys.json")


@keys_app.command()
def add(
    name: _Name,
    keys: _File = _DEFAULT_FILE,
    writes: Annotated[bool, typer.Option("--write", help="Good for adding and deleting, too.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Make a key and print it, this once; the file keeps a hash of it only."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    key = add_key(keys, name, ("read", "write") if writes else ("read",), today=today)
    print_result({"name": name, "key": key, "keys": str(keys)}, as_json=as_json, lines=lambda: [key])


@keys_app.command("list")
def list_keys(keys: _File = _DEFAULT_FILE, as_json: _AsJson = False) -> None:
    """Show names, scopes and days of the keys."""
    entries = [entry.model_dump(mode="json", exclude={"sha256"}) for entry in read_keys(keys)]
    lines = [f"{entry['name']}  {'+'.join(entry['scopes'])}  {entry['created']}" for entry in entries]
    print_result({"keys": entries}, as_json=as_json, lines=lambda: lines or ["no keys"])


@keys_app.command()
def remove(name: _Name, keys: _File = _DEFAULT_FILE, as_json: _AsJson = False) -> None:
    """Take a key away; running servers refuse it a second later."""
    remove_key(keys, name)
    print_result({"removed": name}, as_json=as_json, lines=lambda: [f"{name} has no key any more"])
