"""Runs the very lines of the README's quick start, in order, on a small set of drawn pictures."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.drawn_pictures import draw_class_folders

ROOT = Path(__file__).resolve().parents[2]


def quick_start_lines() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- quick start.*?-->\n```\n(.*?)```", text, re.DOTALL)
    assert match is not None
    return match.group(1).strip().splitlines()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as a reader of the README would have it."""
    folder = tmp_path_factory.mktemp("desk")
    draw_class_folders(folder / "pictures", range(24), pictures_per_class=4)
    shutil.copy(folder / "pictures" / "class03" / "1.png", folder / "query.png")
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def test_the_readmes_quick_start_works_line_by_line(desk: Path) -> None:
    *lines, serve = quick_start_lines()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = {}
    for line in lines:
        command = [sys.executable, "-m", *line.split()]
        result = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        outputs[line] = result.stdout
    verbs = [" ".join(line.split()[1:3]) for line in [*lines, serve]]
    for verb in ("doctor", "data write", "data check", "data describe", "train", "embed", "index build", "evaluate"):
        assert any(found.startswith(verb) for found in verbs), f"the quick start does not show {verb}"
    search = next(output for line, output in outputs.items() if line.startswith("lookalike search"))
    assert re.search(r"^ +1 +\d\.\d{4} +class", search, re.MULTILINE)
    evaluate = next(output for line, output in outputs.items() if line.startswith("lookalike evaluate"))
    assert "hit_rate@1" in evaluate
    assert (desk / "report" / "report.html").stat().st_size > 10_000
    assert (desk / "shards.html").stat().st_size > 1_000
    check_server([sys.executable, "-m", *serve.split(), "--port", "0"], desk, environment)


def check_server(command: list[str], desk: Path, environment: dict[str, str]) -> None:
    server = subprocess.Popen(command, cwd=desk, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert url is not None
        with urllib.request.urlopen(f"{url.group()}/v1/info", timeout=30) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(url.group(), timeout=30) as page:
            assert b"<!doctype html>" in page.read().lower()
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0
        server.stdout.close()


def test_every_relative_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
