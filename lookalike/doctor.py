"""`lookalike doctor`: versions, cores, BLAS, import order of torch and faiss, GPU, disk; says what to change."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Literal

import typer

from lookalike.artifacts import versions
from lookalike.console import new_app, print_result, run_command
from lookalike.native_libraries import load_faiss, load_torch, num_cores

_FREE_BYTES_WANTED = 5 << 30

app = new_app("Check this machine and installation, and say what to change.")


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked thing; `advice` says what to change, and is empty where nothing needs to be."""

    name: str
    state: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at versions, cores, BLAS, the import order of torch and faiss, GPU and disk, and say what to change."""
    findings = examine()
    result = {"findings": [asdict(finding) for finding in findings]}
    print_result(result, as_json=as_json, lines=lambda: [_line(finding) for finding in findings])
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(4)


def examine() -> list[Finding]:
    checks = (_python, _packages, _cores, _torch, _import_order, _faiss, _gpu, _disk)
    return [check() for check in checks]


def _line(finding: Finding) -> str:
    return f"[{finding.state:>7}] {finding.name}: {finding.found}" + (
        f"\n          {finding.advice}" * bool(finding.advice)
    )


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _packages() -> Finding:
    return Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))


def _cores() -> Finding:
    limit = os.environ.get("OMP_NUM_THREADS")
    if limit is not None and limit.isdigit() and int(limit) < num_cores():
        advice = "OMP_NUM_THREADS holds native code below the cores you have; unset it unless you share the machine."
        return Finding("cores", "warning", f"{num_cores()} usable, OMP_NUM_THREADS={limit}", advice)
    return Finding("cores", "ok", f"{num_cores()} usable")


def _torch() -> Finding:
    torch = load_torch()
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("torch", "ok", f"{torch.__version__}, {blas}, {capability}, {torch.get_num_threads()} threads")


def _import_order() -> Finding:
    """Runs the project's import order, and a product of each library, in a fresh process: a crash cannot hide."""
    program = (
        "from lookalike.native_libraries import load_torch, load_faiss; torch = load_torch(); faiss = load_faiss();"
        "import numpy; x = torch.ones(256, 256) @ torch.ones(256, 256);"
        "i = faiss.IndexFlatIP(256); i.add(x.numpy()); print(i.search(x.numpy(), 1)[1].shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if result.returncode == 0:
        return Finding("import order", "ok", "torch, then faiss: both compute")
    last_line = (result.stderr.strip().splitlines() or [f"signal {-result.returncode}"])[-1]
    return Finding("import order", "error", last_line, "Reinstall faiss with the extra [cpu] or [gpu], never both.")


def _faiss() -> Finding:
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    if not installed:
        return Finding("faiss", "error", "not installed", "Install lookalike with the extra [cpu] or [gpu].")
    if len(installed) > 1:
        advice = "They overwrite each other's files: pip uninstall both, then install one extra again."
        return Finding("faiss", "error", " and ".join(installed), advice)
    return Finding("faiss", "ok", f"{load_faiss().__version__} ({installed[0]})")


def _gpu() -> Finding:
    torch = load_torch()
    if torch.cuda.is_available():
        return Finding("gpu", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    return Finding("gpu", "ok", "none; everything runs on the CPU")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    if free < _FREE_BYTES_WANTED:
        return Finding("disk", "warning", f"{free / 2**30:.1f} GiB free here", "Shards and embeddings need room.")
    return Finding("disk", "ok", f"{free / 2**30:.1f} GiB free here")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: Sequence[str] | None = None, *, program: str = "lookalike doctor") -> None:
    run_command(app, arguments, program=program)
