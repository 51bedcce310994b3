import ctypes
import gc
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from serving.problems import PROBLEM_KINDS, PROBLEM_MEDIA_TYPE
from tests.unit.serving.hostile_requests import FINE, HostileRequest, hostile_request, upright_and_turned
from tests.unit.serving.small_index import LOCAL

# From 400 requests that have all been sent before, with what the allocator merely keeps given back: 27 kB left behind
# by each, the pixels of one small picture, would be 11 MB. A leak grows each time; what a thread needs that takes its
# first large picture late, once.
MOST_GROWTH = 6 << 20
# While any of them is answered. The largest picture within the limits, 25 million pixels, takes 75 MB, and once more
# while it is converted.
MOST_AT_ONCE = 256 << 20


def test_1000_hostile_requests_end_well_and_leave_no_memory_behind(client: TestClient) -> None:
    _send_all(client, range(1000))
    kept = [_kept_bytes()]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is the peak from here on.
    for _ in range(3):
        _send_all(client, range(400))
        kept.append(_kept_bytes())
    assert _status_bytes("VmHWM") - kept[0] < MOST_AT_ONCE
    assert min(after - before for before, after in pairwise(kept)) < MOST_GROWTH, kept


def test_hostile_requests_end_well_where_they_can_change_something(writing_client: TestClient) -> None:
    _send_all(writing_client, range(100, 400))


def test_pictures_turned_by_exif_find_what_upright_ones_find(client: TestClient) -> None:
    for pair in upright_and_turned():
        upright, turned = (client.post("/v1/search", files={"image": data}).json()["hits"] for data in pair)
        assert upright == turned


def test_nothing_is_written_to_a_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a temporary file was made")

    for name in ("NamedTemporaryFile", "TemporaryFile", "mkstemp", "_TemporaryFileWrapper"):
        monkeypatch.setattr(f"tempfile.{name}", refuse)
    # The parser of forms would write what is longer than a megabyte.
    answer = client.post("/v1/search", files={"image": b"\xff\xd8\xff" + bytes(5 << 20)})
    assert answer.json()["code"] == "image.truncated"


def _send_all(client: TestClient, numbers: Iterable[int]) -> None:
    complaints = []
    for number in numbers:
        request = hostile_request(number)
        complaint = _complaint(client.request(request.method, LOCAL + request.path, **request.how), request)
        if complaint:
            complaints.append(f"{number}: {request.story}: {complaint}")
    assert not complaints, "\n".join(complaints)


def _complaint(answer: httpx2.Response, request: HostileRequest) -> str | None:
    """What is wrong with an answer; None where all is well."""
    if answer.status_code >= 500:
        return f"status {answer.status_code}: {answer.text}"
    if request.method == "HEAD":
        return None
    if answer.status_code < 400:
        if request.endings and FINE not in request.endings:
            return f"accepted, instead of {' or '.join(request.endings)}"
        return _complaint_about_hits(answer) if request.path == "/v1/search" else None
    if answer.headers["content-type"] != PROBLEM_MEDIA_TYPE:
        return f"{answer.headers['content-type']} is no problem"
    problem = answer.json()
    if problem["code"] == "writes.off":
        return None if answer.status_code == 403 and request.path.startswith("/v1/items") else problem["detail"]
    if request.endings and problem["code"] not in request.endings:
        return f"{problem['code']} ({problem['detail']}), instead of {' or '.join(request.endings)}"
    if PROBLEM_KINDS[problem["code"]].status != answer.status_code or len(answer.content) > 8_000:
        return f"{answer.status_code} {answer.text[:300]}"
    return None


def _complaint_about_hits(answer: httpx2.Response) -> str | None:
    found = json.loads(answer.content, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    scores = [hit["score"] for hit in found["hits"]]
    return None if scores == sorted(scores, reverse=True) and all(map(math.isfinite, scores)) else f"scores {scores}"


def _kept_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(name)
