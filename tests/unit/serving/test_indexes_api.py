"""Versions over HTTP: listed, changed over to, made of changes, and refused with a code."""

import asyncio
import io
import shutil
import threading
from pathlib import Path

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from indexing.building.build import build_index
from indexing.living.journal import Journal
from indexing.living.live_index import LiveIndex
from indexing.living.live_view import LiveView
from indexing.sources.arrays import ArraySource
from indexing.versions import compacting
from lookalike.errors import ResourceError
from serving.app import create_app
from serving.engine.changes import Changes
from serving.engine.errors import without_folders
from serving.engine.query_engine import QueryEngine
from serving.engine.settings import EngineSettings
from serving.schemas.indexes import IndexesAnswer
from serving.schemas.search import SearchAnswer
from serving.settings import ServingSettings
from tests.small_index import units
from tests.unit.serving.small_index import LOCAL, NUM_PICTURES, SmallIndex, draw


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def folder_of(client: TestClient) -> Path:
    return client.app.state.engine.index.folder.parent  # type: ignore[attr-defined,no-any-return]


def picture() -> bytes:
    file = io.BytesIO()
    draw("disc", "navy").save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def client(writing_client: TestClient) -> TestClient:
    return writing_client


def test_changes_become_a_version_that_can_be_left_and_taken_again(client: TestClient) -> None:
    before = client.get("/v1/indexes").json()
    assert IndexesAnswer.model_validate(before, strict=True).model_dump() == before
    assert (before["current"], before["served"], before["num_changes"]) == ("v0001", "v0001", 0)
    [first] = before["versions"]
    info = client.get("/v1/info").json()
    assert first == {
        "version": "v0001",
        "is_current": True,
        "index_type": info["index_type"],
        "num_vectors": NUM_PICTURES,
        "dim": info["dim"],
        "encoder_fingerprint": info["encoder_fingerprint"],
        "num_changes_since": 0,
    }
    added = client.post("/v1/items", files={"image": picture()}).json()
    assert client.delete("/v1/items/3").status_code == 204
    assert client.get("/v1/indexes").json()["num_changes"] == 2

    assert client.post("/v1/indexes:compact").json() == {"current": "v0002"}
    after = client.get("/v1/indexes").json()
    assert (after["current"], after["served"], after["num_changes"]) == ("v0002", "v0002", 0)
    assert [version["num_vectors"] for version in after["versions"]] == [NUM_PICTURES, NUM_PICTURES]
    assert [version["num_changes_since"] for version in after["versions"]] == [2, 0]

    # Whatever version serves, the changes are in force.
    for method, body, version in (
        ("rollback", {}, "v0001"),
        ("swap", {"json": {"version": "v0002"}}, "v0002"),
        ("swap", {"json": {"version": "v0001"}}, "v0001"),
    ):
        answer = client.post(f"/v1/indexes:{method}", **body)
        assert answer.json() == {"current": version}
        found = client.post("/v1/search", files={"image": picture()}, data={"k": 30}).json()
        assert found["index_version"] == version
        ids = [hit["id"] for hit in found["hits"]]
        assert (ids[0], len(ids), 3 in ids) == (added["id"], NUM_PICTURES, False)


def test_versions_that_are_not_there_are_refused(client: TestClient) -> None:
    assert code(client.post("/v1/indexes:swap", json={"version": "v0007"})) == (404, "version.unknown")
    assert code(client.post("/v1/indexes:rollback")) == (404, "version.unknown")
    for version in ("", "../..", "v1", "latest"):
        assert code(client.post("/v1/indexes:swap", json={"version": version})) == (422, "request.invalid")
    assert code(client.post("/v1/indexes:swap", content=b"v0001")) == (415, "body.unsupported_type")


def test_a_damaged_version_is_refused_and_the_old_one_serves_on(client: TestClient) -> None:
    folder = folder_of(client)
    shutil.copytree(folder / "v0001", folder / "v0002")
    (folder / "v0002" / "vectors.npy").unlink()
    answer = client.post("/v1/indexes:swap", json={"version": "v0002"})
    assert code(answer) == (409, "version.refused")
    assert client.post("/v1/search", json={"id": 1}).json()["index_version"] == "v0001"
    assert client.get("/v1/indexes").json()["current"] == "v0001"


def test_a_search_names_a_version_however_it_is_written(client: TestClient) -> None:
    added = client.post("/v1/items", files={"image": picture()}).json()["id"]
    assert client.post("/v1/indexes:compact").json() == {"current": "v0002"}
    assert client.post("/v1/indexes:rollback").json() == {"current": "v0001"}
    vector = np.ones(512, "<f4").tobytes()
    numbers = {"content-type": "application/octet-stream"}

    def answers(version: str) -> list[httpx2.Response]:
        return [
            client.post("/v1/search", json={"id": added, "include_self": True, "version": version}),
            client.post("/v1/search", files={"image": picture()}, data={"version": version}),
            client.post(f"/v1/search?k=30&version={version}", content=vector, headers=numbers),
        ]

    for version in ("v0001", "v0002"):
        for answer in answers(version):
            assert SearchAnswer.model_validate(answer.json(), strict=True).index_version == version
            assert added in [hit["id"] for hit in answer.json()["hits"]]
    for answer in answers("v0003"):
        assert code(answer) == (404, "version.unknown")
        assert "there are v0001, v0002" in answer.json()["detail"]
    for answer in answers("latest"):
        assert code(answer) == (422, "request.invalid")
    searches = [{"id": 1, "version": version} for version in ("v0001", "v0002", "v0003", None)]
    results = client.post("/v1/search:batch", json={"searches": searches}).json()["results"]
    assert [result["answer"]["index_version"] for result in results if "answer" in result] == [
        *("v0001", "v0002"),
        "v0001",
    ]
    assert results[2]["problem"]["code"] == "version.unknown"
    listed = client.get("/v1/indexes").json()
    assert (listed["current"], listed["served"]) == ("v0001", "v0001")


def test_where_no_version_is_current_the_versions_cannot_be_listed_and_searches_go_on(client: TestClient) -> None:
    (folder_of(client) / "CURRENT").unlink()
    answer = client.get("/v1/indexes")
    assert code(answer) == (503, "index.busy")
    assert int(answer.headers["retry-after"]) > 0
    assert "searches go on with v0001" in answer.json()["detail"]
    assert client.post("/v1/search", json={"id": 1}).json()["index_version"] == "v0001"


def test_a_batch_may_be_as_long_as_the_vectors_of_any_version_make_it(tmp_path: Path) -> None:
    for number, dim in enumerate((1024, 8)):
        np.save(tmp_path / f"{number}.npy", units(*range(20), dim=dim))
        build_index(ArraySource(tmp_path / f"{number}.npy"), tmp_path / "index")
    long = {"searches": [{"vector": [0.5] * 1024, "k": 1, "version": "v0001"}] * 64}
    for most, status in ((2, 200), (0, 422)):
        engine = QueryEngine.open(tmp_path / "index", settings=EngineSettings(max_compared_versions=most))
        with TestClient(create_app(engine, ServingSettings(index=tmp_path / "index")), base_url=LOCAL) as client:
            answer = client.post("/v1/search:batch", json=long)
        assert answer.status_code == status
        assert status != 200 or all("answer" in result for result in answer.json()["results"])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/data/my shop/v0002/ids.npy is cut short", "v0002/ids.npy is cut short"),
        ("/data/my shop is not an index", "the index is not an index"),
        (
            "made from '/srv/shards/a-1', not /b/c. See https://d.example/e",
            "made from 'a-1', not c. See https://d.example/e",
        ),
        ("3/4 of /x are either/or", "3/4 of /x are either/or"),
    ],
)
def test_messages_for_clients_name_no_folders(message: str, told: str) -> None:
    assert without_folders(message, Path("/data/my shop")) == told


def test_a_damaged_version_is_refused_to_a_search_as_to_a_swap(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(client)
    shutil.copytree(folder / "v0001", folder / "v0002")
    (folder / "v0002" / "vectors.npy").unlink()
    for _ in range(2):
        answer = client.post("/v1/search", json={"id": 1, "version": "v0002"})
        assert code(answer) == (409, "version.refused")
    swap = client.post("/v1/indexes:swap", json={"version": "v0002"})
    assert swap.json()["detail"] == answer.json()["detail"]
    # Where the index lies is for the server's operator alone.
    assert "v0002/vectors.npy" in answer.json()["detail"]
    assert str(folder.parent) not in answer.json()["detail"]
    assert str(folder / "v0002" / "vectors.npy") in caplog.text
    searches = [{"id": 1, "version": "v0002"}, {"id": 1}]
    refused, found = client.post("/v1/search:batch", json={"searches": searches}).json()["results"]
    assert (refused["problem"]["code"], found["answer"]["index_version"]) == ("version.refused", "v0001")


def test_where_the_journal_cannot_be_read_the_client_is_to_wait(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(client)
    shutil.copytree(folder / "v0001", folder / "v0002")

    def fail(self: LiveIndex, version: str) -> LiveView:
        raise ResourceError("the journal cannot be used: too many open files")

    monkeypatch.setattr(LiveIndex, "open_version", fail)
    answer = client.post("/v1/search", json={"id": 1, "version": "v0002"})
    assert code(answer) == (503, "index.busy")
    assert int(answer.headers["retry-after"]) > 0


def test_a_server_that_compares_nothing_says_so(small_index: SmallIndex) -> None:
    engine = QueryEngine.open(small_index.index, settings=EngineSettings(max_compared_versions=0))
    with TestClient(create_app(engine, ServingSettings(index=small_index.index)), base_url=LOCAL) as client:
        assert client.get("/v1/info").json()["limits"]["max_compared_versions"] == 0
        assert client.post("/v1/search", json={"id": 1, "version": "v0001"}).status_code == 200
        assert code(client.post("/v1/search", json={"id": 1, "version": "v0002"})) == (422, "version.off")


def test_while_somebody_compacts_the_client_is_to_wait(client: TestClient) -> None:
    with compacting(folder_of(client)):
        for answer in (client.post("/v1/indexes:compact"), client.post("/v1/indexes:swap", json={"version": "v0001"})):
            assert code(answer) == (503, "index.busy")
            assert int(answer.headers["retry-after"]) > 0


def test_while_it_compacts_a_second_client_is_to_wait(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(Changes, "_compact", lambda self: "v0002" if may_end.wait(10) else "")
    running = client.app.state.engine._changes.compact()  # type: ignore[attr-defined]
    answer = client.post("/v1/indexes:compact")
    may_end.set()
    assert code(answer) == (503, "index.busy")
    assert running.result() == "v0002"
    assert client.post("/v1/indexes:compact").json() == {"current": "v0002"}


def test_a_compaction_that_fails_is_told_from_one_that_is_under_way(client: TestClient) -> None:
    assert client.delete("/v1/items/3").status_code == 204
    folder = folder_of(client)
    (folder / "v0001" / "metadata.arrow").rename(folder / "away")
    answer = client.post("/v1/indexes:compact")
    # Without a pause to wait for: a client that asked again would begin another one that fails.
    assert (code(answer), "retry-after" in answer.headers) == ((500, "index.compaction_failed"), False)
    assert "metadata.arrow" in answer.json()["detail"]
    assert str(folder.parent) not in answer.json()["detail"]
    (folder / "away").rename(folder / "v0001" / "metadata.arrow")
    assert client.post("/v1/indexes:compact").json() == {"current": "v0002"}


def test_listing_versions_looks_at_the_disk_beside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, num_changes_after = [], Journal.num_changes_after

    def watched(journal: Journal, sequence: int) -> int:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        seen.append(sequence)
        return num_changes_after(journal, sequence)

    monkeypatch.setattr(Journal, "num_changes_after", watched)
    assert client.get("/v1/indexes").json()["num_changes"] == 0
    assert seen


def test_where_the_current_version_cannot_be_opened_searches_go_on_and_changes_wait(client: TestClient) -> None:
    current = folder_of(client) / "CURRENT"
    good = current.read_text()
    current.write_text("v0009\n")
    changes = (
        client.post("/v1/items", files={"image": picture()}),
        client.put("/v1/items/3", files={"image": picture()}),
        client.delete("/v1/items/3"),
    )
    for answer in changes:
        assert code(answer) == (503, "index.busy")
        assert "retry-after" in answer.headers
    assert client.post("/v1/search", json={"id": 3}).status_code == 200
    listed = client.get("/v1/indexes").json()
    assert (listed["current"], listed["served"], listed["num_changes"]) == ("v0009", "v0001", 0)
    current.write_text(good)
    assert client.delete("/v1/items/3").status_code == 204
