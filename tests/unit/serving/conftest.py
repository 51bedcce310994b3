import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.unit.serving.small_index import LOCAL, SmallIndex, make_small_index


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return make_small_index(tmp_path_factory.mktemp("small_index"))


# Not for the session: a server at work draws random numbers, with which the type checks choose what they look at, and
# Hypothesis refuses any that are drawn beside its own.
@pytest.fixture(scope="module")
def engine(small_index: SmallIndex) -> Iterator[QueryEngine]:
    engine = QueryEngine.open(small_index.index)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: QueryEngine, small_index: SmallIndex) -> Iterator[TestClient]:
    app = create_app(engine, ServingSettings(index=small_index.index))
    with TestClient(app, base_url=LOCAL) as client:
        yield client


@pytest.fixture
def writing_client(small_index: SmallIndex, tmp_path: Path) -> Iterator[TestClient]:
    """Of a server over a gallery of its own, which clients may change."""
    index = tmp_path / "index"
    shutil.copytree(small_index.index, index)
    engine = QueryEngine.open(index, shards_folder=small_index.shards)
    app = create_app(engine, ServingSettings(index=index, allows_writes=True))
    with TestClient(app, base_url=LOCAL) as client:
        yield client
