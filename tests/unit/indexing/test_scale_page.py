"""What docs/scale.md shows is what the script prints, what the code does and what the commands take."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer

from indexing.__main__ import app
from indexing.embedding_set import EmbeddingSet
from indexing.sources.arrays import ArraySource

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_table", REPOSITORY / "benchmarks" / "scale_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_prints(script: ModuleType) -> None:
    """Where the cost model has changed: run the script, and paste its first table."""
    for line in script.estimated(512):
        assert line in PAGE.splitlines()


def test_counted_bytes_of_the_table_are_those_of_arrays(script: ModuleType) -> None:
    [flat] = [layout for layout in script.LAYOUTS if layout.num_vectors == 5_000]
    vectors, ids = np.zeros((5_000, 512), np.float32), np.zeros(5_000, np.int64)
    assert f"| {script.size(vectors.nbytes + ids.nbytes)} |" in script.row(flat, 512, script.nominal_rates(512))


def indexing_commands() -> list[list[str]]:
    # Every second part lies between fences; the first line of such a part names its language.
    blocks = PAGE.replace("\\\n", " ").split("```")[1::2]
    lines = [shlex.split(line) for block in blocks if block.startswith("\n") for line in block.splitlines()]
    words = [line[line.index("lookalike", 1) :] if line[1:2] == ["launch"] else line for line in lines if line]
    return [line[1:] for line in words if line[0] == "lookalike"]


def test_its_commands_and_their_options_exist() -> None:
    known: Any = typer.main.get_command(app)
    seen = set()
    for verb, *arguments in indexing_commands():
        name = arguments.pop(0) if verb == "index" else verb
        options = {option for parameter in known.commands[name].params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("--")}
        assert used <= options, f"{name}: {used - options}"
        seen.add(name)
    assert seen == {"embed", "build", "load-milvus"}


def test_its_cut_into_parts_leaves_nothing_out(
    embeddings: EmbeddingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = re.search(r"<!-- parts.*?```python\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    (tmp_path / "embeddings").symlink_to(embeddings.folder)
    monkeypatch.chdir(tmp_path)
    exec(match.group(1), {})
    parts = [
        ArraySource(*(tmp_path / f"part{part}{suffix}" for suffix in (".npy", ".parquet", ".parquet")))
        for part in range(2)
    ]
    vectors = dict(zip(embeddings.ids.tolist(), embeddings.vectors(), strict=True))
    found = {
        int(i): v for part in parts for block in part.blocks() for i, v in zip(block.ids, block.vectors, strict=True)
    }
    assert sum(part.num_vectors for part in parts) == len(found)
    assert sorted(found) == sorted(vectors)
    assert all((found[i] == vectors[i]).all() for i in found)
    assert parts[0].metadata_of(parts[0].ids()).column_names[-1] == "key"
