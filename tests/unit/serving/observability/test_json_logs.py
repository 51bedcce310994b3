import io
import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.observability.json_logs import JsonFormatter, current_request_id, set_log_format


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("serving")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagates


def test_a_line_is_one_json_object_even_with_line_breaks_in_it(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = logged
    logger.info("%s said\n%s", "Zoë", '"forged": true}', extra={"hits": 3})
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert told.keys() == {"time", "level", "logger", "process", "message", "hits"}
    assert told["message"] == 'Zoë said\n"forged": true}'
    assert told["level"] == "info"
    assert told["hits"] == 3


def test_an_error_comes_with_its_traceback(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = logged
    try:
        raise ValueError("seven")
    except ValueError:
        logger.exception("failed")
    told = json.loads(stream.getvalue())
    assert told["level"] == "error"
    assert told["error"].endswith("ValueError: seven")


def test_pictures_and_vectors_do_not_get_in(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = logged
    picture, vector = b"\x89PNG" * 5_000, np.full(512, 0.123456)
    logger.info("got %s", picture, extra={"picture": picture, "vector": vector, "text": "x" * 9_000})
    told = json.loads(stream.getvalue())
    assert told["picture"] == "<bytes>"
    assert told["vector"] == "<ndarray>"
    assert len(stream.getvalue()) < 9_000


def test_lines_of_a_request_carry_its_id(logged: tuple[logging.Logger, io.StringIO], client: TestClient) -> None:
    _, stream = logged
    client.get("/v1/items/123456", headers={"X-Request-ID": "order-7"})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines
    assert {line.get("request_id") for line in lines} == {"order-7"}
    assert current_request_id.get() is None  # outside of requests


def test_the_format_is_given_to_what_the_command_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    set_log_format("text")
    assert handler.formatter is None
    set_log_format("json")
    assert isinstance(handler.formatter, JsonFormatter)
