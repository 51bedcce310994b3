"""`docs/api.md` tells every route, every field of a search and every problem, and nothing that is not there."""

import json
import re
from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient

from serving.problems import PROBLEM_KINDS
from serving.schemas.search import SearchRequest

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_problem_is_told_with_its_status_and_when_it_comes() -> None:
    told = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (\d{3}) \| (.{10,}) \|$", PAGE, re.MULTILINE)
    assert [(code, int(status)) for code, status, _ in told] == [
        (code, kind.status) for code, kind in PROBLEM_KINDS.items()
    ]
    assert all(kind.fix for kind in PROBLEM_KINDS.values())


def test_every_route_is_told(client: TestClient) -> None:
    for path in client.get("/openapi.json").json()["paths"]:
        prefix, colon, action = path.partition(":")
        assert path in PAGE or (colon and prefix in PAGE and f"`:{action}`" in PAGE), path


def test_every_field_of_a_search_is_told() -> None:
    for name in SearchRequest.model_fields:
        assert f"`{name}`" in PAGE, name


def test_its_searches_are_taken(client: TestClient) -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    searches = [block for block in blocks if block.keys() & {"parts", "id"} and "hits" not in block]
    assert len(searches) == 2
    for search in searches:
        # The page's gallery is larger than ours.
        text = json.dumps(search).replace("90", "9")
        assert client.post("/v1/search", content=text, headers={"content-type": "application/json"}).status_code == 200


def test_its_address_of_a_vector_is_taken(client: TestClient) -> None:
    [address] = re.findall(r"'http://127.0.0.1:8000(/v1/search\?[^']*)'", PAGE)
    vector = np.ones(512, "<f4").tobytes()
    answer = client.post(address, content=vector, headers={"content-type": "application/octet-stream"})
    assert (answer.status_code, len(answer.json()["hits"])) == (200, 5)


def test_its_problem_and_answer_look_as_real_ones(client: TestClient) -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    [answer] = [block for block in blocks if "hits" in block]
    [problem] = [block for block in blocks if "code" in block]
    real_answer = client.post("/v1/search", json={"id": 1}).json()
    assert answer.keys() == real_answer.keys()
    assert answer["hits"][0].keys() == real_answer["hits"][0].keys()
    real_problem = client.post("/v1/search", json={"id": 99}).json()
    assert (problem.keys(), problem["code"], problem["fix"]) == (
        real_problem.keys(),
        real_problem["code"],
        real_problem["fix"],
    )
