"""Commands: embed, whiten, build, check, describe, search."""

from collections.abc import Sequence

from indexing.commands.build import build
from indexing.commands.check import check
from indexing.commands.describe import describe
from indexing.commands.embed import embed
from indexing.commands.milvus import load_milvus
from indexing.commands.search import search
from indexing.commands.versions import compact, publish, rollback, versions
from indexing.commands.whiten import whiten
from lookalike.console import new_app, run_command

app = new_app("Pictures -> vectors -> a searchable index.")
for command in (embed, whiten, build, check, describe, search, load_milvus, versions, publish, rollback, compact):
    app.command()(command)


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m indexing") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
