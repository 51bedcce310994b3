"""What import-linter does not say: who may import which library, and that our import names are ours."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lookalike", "data_pipelines", "training", "indexing", "evaluation", "serving", "demo")

# library -> files or folders that may import it
ALLOWED_IMPORTERS = {
    "deepspeed": ("training/backends/deepspeed.py",),
    "faiss": ("indexing/", "lookalike/native_libraries.py"),
    "fastapi": ("serving/",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
    "prometheus_client": ("serving/observability/",),
    "opentelemetry": ("serving/observability/tracing.py",),
    "webdataset": ("data_pipelines/",),
    "torch.distributed": ("lookalike/collectives.py", "training/backends/fsdp2.py"),
    "torch.nn.parallel": ("training/backends/ddp.py",),
    "timm": ("lookalike/encoder.py",),
    "typer": (
        "lookalike/console.py",
        "lookalike/doctor.py",
        "indexing/commands/",
        "serving/safety/key_commands.py",
        *(f"{package}/__main__.py" for package in PACKAGES),
    ),
    "scipy": (
        "data_pipelines/sources/mat_files.py",
        "indexing/reranking/diffusion.py",
        "training/reporting/comparison.py",
    ),
    "sklearn": ("evaluation/classes/mutual_information.py",),
    "matplotlib": ("evaluation/reporting/figures.py", "training/reporting/curves.py"),
    "resvg_py": ("demo/emoji_pictures.py",),
    "fsspec": ("data_pipelines/shard_cache.py",),
    "pymilvus": ("indexing/searching/milvus_collection.py",),
    "milvus_lite": ("indexing/searching/milvus_collection.py",),
    "triton": ("training/losses/triton_comparisons.py",),
    "imagehash": ("data_pipelines/near_duplicates.py",),
    "simplejpeg": ("data_pipelines/fast_jpeg.py",),
    "tenacity": ("data_pipelines/shard_cache.py", "lookalike/api_client/"),
    "httpx2": ("lookalike/api_client/", "serving/safety/url_fetching.py"),
}

# Kernels are made when their module is imported, so it cannot be without the library that makes them.
MODULES_OF_OPTIONAL_LIBRARIES = {"training.losses.triton_comparisons": "triton"}


def python_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)  # torch.distributed.all_reduce, with no import of its own


@pytest.mark.parametrize("library", ALLOWED_IMPORTERS)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    offenders = [
        file.relative_to(ROOT).as_posix()
        for file in python_files()
        if any(name == library or name.startswith(f"{library}.") for name in imported_modules(file))
        and not file.relative_to(ROOT).as_posix().startswith(tuple(ALLOWED_IMPORTERS[library]) or ("nobody",))
    ]
    assert offenders == []


def test_collectives_are_called_in_one_file_only() -> None:
    """The back end that spreads tensors may name what spreads them, and nothing else of torch.distributed."""
    names = {
        name
        for name in imported_modules(ROOT / "training/backends/fsdp2.py")
        if name.startswith("torch.distributed")
        and not name.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))
    }
    assert names == set()


def test_the_scan_sees_imports_inside_functions_and_from_submodules(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    from torch import distributed\n    import faiss.contrib\n    typer.a.b()\n")
    assert {"torch.distributed", "faiss.contrib", "typer.a"} <= set(imported_modules(file))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_third_party_owns_our_import_names(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py", f"{package} is imported from {spec.origin}"
    owners = set(metadata.packages_distributions().get(package, ["lookalike"]))
    assert owners == {"lookalike"}, f"{package} is also shipped by {owners - {'lookalike'}}"


def test_every_package_is_one_of_the_house() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_nothing_happens_on_import() -> None:
    """Imports every module in a fresh process: environment, logging, signals and threads stay as they were."""
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in python_files()]
    absent = {name for name, library in MODULES_OF_OPTIONAL_LIBRARIES.items() if not importlib.util.find_spec(library)}
    own = [module.removesuffix(".__init__") for module in modules if module not in absent]
    program = f"""
import importlib, logging, os, signal, sys, threading
import torch, timm, faiss, uvicorn, fastapi, pyarrow, webdataset, tqdm, typer, PIL.Image  # what others do is theirs
def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), list(logging.root.handlers), logging.root.level, handlers, torch.get_num_threads()
before = state()
for module in {own!r}:
    importlib.import_module(module)
    assert state() == before, module
"""
    shim = "from lookalike.torchvision_import import make_torchvision_importable as m; m()\n"
    result = subprocess.run(
        [sys.executable, "-c", shim + program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_files_stay_small_enough_to_hold_in_mind() -> None:
    longest = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in python_files()}
    assert {name: lines for name, lines in longest.items() if lines > 500} == {}
