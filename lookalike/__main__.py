"""`lookalike VERB ...`: hands over to the stage that the verb needs, and loads only that one."""

import importlib
import sys

from lookalike.artifacts import versions

# verb -> (module with a `main(arguments, program=...)`, arguments put in front, one line of help)
VERBS: dict[str, tuple[str, list[str], str]] = {
    "demo": ("demo.__main__", [], "The whole chain on real pictures, from download to search page"),
    "data": ("data_pipelines.__main__", [], "Turn pictures into shards: write, verify, check, describe"),
    "train": ("training.__main__", [], "Train an encoder on shards"),
    "embed": ("indexing.__main__", ["embed"], "Embed the pictures of shards"),
    "index": ("indexing.__main__", [], "Build and inspect indexes: build, check, describe, versions, ..."),
    "search": ("indexing.__main__", ["search"], "Search an index with a picture"),
    "evaluate": ("evaluation.__main__", [], "Measure retrieval quality"),
    "serve": ("serving.__main__", [], "Serve an index over HTTP, with a search page"),
    "launch": ("lookalike.launch", [], "Run a verb in several processes, on one node or many"),
    "doctor": ("lookalike.doctor", [], "Check this machine and installation"),
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, _, line) in VERBS.items())
    return (
        "Usage: lookalike VERB ...\n\nFinds the pictures that show the same thing as yours.\n\n"
        f"{verbs}\n\n`lookalike VERB --help` explains each; `lookalike --version` prints versions."
    )


def main(arguments: list[str] | None = None) -> None:
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
    elif verb == "--version":
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
    elif verb in VERBS:
        module, prefix, _ = VERBS[verb]
        program = f"lookalike {verb}"
        importlib.import_module(module).main([*prefix, *rest], program=program if not prefix else "lookalike")
    else:
        print(f"lookalike: there is no verb {verb!r}.\n\n{usage()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
