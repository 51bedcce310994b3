"""What all commands share: logging to stderr, results to stdout, known errors as one line and an exit code."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from lookalike.errors import LookalikeError
from lookalike.native_libraries import set_thread_policy

_INTERRUPTED, _TERMINATED = 130, 143  # 128 + the number of the signal


def run_command(app: typer.Typer, arguments: Sequence[str] | None = None, *, program: str) -> None:
    """Runs a typer application and exits.

    Codes: 0 done, 2 usage or settings, 3 data, 4 resources, 5 artifacts, 130 Ctrl-C, 143 SIGTERM.
    """
    set_thread_policy()
    signal.signal(signal.SIGTERM, _stop)
    level = os.environ.get("LOOKALIKE_LOG", "INFO").upper()
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells every request
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name=program)
    except LookalikeError as error:
        print(f"{program}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):  # typer turns Ctrl-C into the former
            print(f"{program}: interrupted. Run the same command again to continue.", file=sys.stderr)
        raise
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        advice = "Check that the place exists, may be written to, and has room."
        print(f"{program}: {error.strerror or error}{place}. {advice}", file=sys.stderr)
        sys.exit(4)


def _stop(signal_number: int, frame: object) -> None:
    """Ends on SIGTERM as on Ctrl-C: by an exception, so that files are closed and worker processes ended."""
    sys.exit(_TERMINATED)


def print_result(result: Mapping[str, Any], *, as_json: bool, lines: Callable[[], Sequence[str]] | None = None) -> None:
    """Prints one JSON object for programs, or lines for people (`key: value` where none are given)."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        for line in lines() if lines else [f"{key}: {value}" for key, value in result.items()]:
            print(line)


def new_app(help_text: str) -> typer.Typer:
    """A typer application in the project's manner: no shell-completion options, plain tracebacks."""
    return typer.Typer(help=help_text, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
