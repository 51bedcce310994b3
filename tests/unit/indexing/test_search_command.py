import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from indexing.__main__ import main
from indexing.building.build import build_index
from indexing.embedding_set import EmbeddingSet
from indexing.settings import IndexSettings
from indexing.sources.embeddings import EmbeddingSource


@pytest.fixture(scope="module")
def index(embeddings: EmbeddingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "index"
    build_index(EmbeddingSource(embeddings), folder, IndexSettings(type="IVF2,SQ8", recall=0.5))
    return folder


@pytest.fixture
def picture(picture_folder: Path) -> str:
    return str(sorted((picture_folder / "test").rglob("*.png"))[0])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        main(["search", *map(str, arguments)])
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def hits(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    [answer] = json.loads(out)["answers"]
    return answer["hits"]


def test_a_picture_finds_itself_however_it_is_searched(
    index: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in (["--exact"], ["--recall", "1"], ["--recall", "0.95"], []):
        found = hits(capsys, index, picture, "-k", 4, *how)
        assert len(found) == 4
        if how in (["--exact"], ["--recall", "1"]):
            assert found[0]["score"] == pytest.approx(1, abs=1e-4)
            assert Path(picture).stem in str(found[0]["key"])
    code, out, _ = run(capsys, index, picture, "--exact")
    assert code == 0
    assert len(out.splitlines()) == 11
    assert "1.0000" in out


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ("split = train", lambda hit: hit["split"] == "train"),
        ("split = train and not label in (0, 1)", lambda hit: hit["split"] == "train" and hit["label"] not in (0, 1)),
        ('{"column": "width", "at_least": 1}', lambda hit: True),
    ],
)
def test_answers_fit_what_was_asked_for(
    index: Path, picture: str, where: str, fits, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    everything = hits(capsys, index, picture, "-k", 1000, "--exact")
    found = hits(capsys, index, picture, "-k", 1000, "--exact", "--where", where)
    assert found == [hit for hit in everything if fits(hit)]
    assert found


def test_nothing_that_fits_is_said(index: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, index, picture, "--where", "width > 100000")
    assert code == 0
    assert "nothing fits" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "width >"], "expected a value, found the end"),
        (["--where", '{"column": "width"}'], "beside column, expected equals"),
        (["--where", "{"], "--where '{'"),
        (["--where", "colour = red"], "there is no column 'colour'; there are key"),
        (["--where", "width = wide"], "cannot be compared with 'wide'"),
        (["--recall", "2"], "above 0 and at most 1"),
        (["--exact", "--recall", "0.9"], "no effect beside --exact"),
        (["-k", "0"], "-k"),
    ],
)
def test_a_mistake_is_named_and_ends_with_code_2(
    index: Path, picture: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, index, picture, *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_a_second_look_is_that_of_the_method(index: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = hits(capsys, index, picture, "-k", 20, "--exact")
    for method in ("k_reciprocal", '{"name": "diffusion", "num_seeds": 3}'):
        found = hits(capsys, index, picture, "-k", 20, "--exact", "--rerank", method, "--where", "label >= 0")
        assert len(found) == 20
        assert [hit["score"] for hit in found] != [hit["score"] for hit in plain]
    for wrong in ("magic", '{"name": "diffusion", "alpha": 7}', '{"name": '):
        code, _, err = run(capsys, index, picture, "--rerank", wrong)
        assert (code, "rerank" in err, len(err.splitlines())) == (2, True, 1)


@pytest.fixture(scope="module")
def url(index: Path) -> Iterator[str]:
    from serving.app import create_app
    from serving.engine.query_engine import QueryEngine
    from serving.settings import ServingSettings

    app = create_app(QueryEngine.open(index), ServingSettings(index=index))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture
def two_versions(index: Path, tmp_path: Path) -> Path:
    """The second, which is current, finds little."""
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    shutil.copytree(folder / "v0001", folder / "v0002")
    vectors = np.load(folder / "v0002" / "vectors.npy")
    np.save(folder / "v0002" / "vectors.npy", np.roll(vectors, 1, axis=0))
    (folder / "CURRENT").write_text("v0002\n")
    return folder


def test_another_version_is_searched_where_it_is_named(
    index: Path, two_versions: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = hits(capsys, index, picture, "--exact")
    assert hits(capsys, two_versions, picture, "--exact", "--version", "v0001") == expected
    assert hits(capsys, two_versions, picture, "--exact") != expected
    code, _, err = run(capsys, two_versions, picture, "--version", "v0003")
    assert (code, "has no version v0003; it has v0001, v0002" in err) == (5, True)


class TestOnAServer:
    def test_finds_what_a_search_here_finds(
        self, index: Path, url: str, picture: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for how in (["--exact"], ["-k", 3, "--where", "label >= 1"], ["--rerank", "alpha_query_expansion"]):
            here = hits(capsys, index, picture, *how)
            there = hits(capsys, picture, *how, "--url", url)
            assert [hit["id"] for hit in there] == [hit["id"] for hit in here]
            for ours, theirs in zip(here, there, strict=True):
                assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5)
                assert theirs.keys() == ours.keys()

    def test_its_refusals_and_absence_are_one_line(
        self, url: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "text.png").write_text("no picture")
        code, _, err = run(capsys, tmp_path / "text.png", "--url", url)
        assert (code, "image.not_an_image" in err) == (4, True)
        code, _, err = run(capsys, tmp_path / "gone.png", "--url", url)
        assert (code, "gone.png cannot be read" in err) == (3, True)
        code, _, err = run(capsys, picture, "--url", url, "--version", "v0003")
        assert (code, "there is no version v0003; there are v0001" in err) == (4, True)
        code, _, err = run(capsys, tmp_path, picture, "--url", url)
        assert (code, f"--url takes no INDEX: {tmp_path} is a folder" in err) == (2, True)
        code, _, err = run(capsys, picture, "--url", "localhost")
        assert (code, "not the address of a server" in err) == (2, True)


def test_an_index_alone_is_nothing_to_search_with(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, index)
    assert (code, "give pictures after the index" in err) == (2, True)
