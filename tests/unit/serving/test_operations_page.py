"""docs/operations.md tells every setting and metric, and its commands do what it says.

`python -m tests.unit.serving.test_operations_page` writes the tables anew.
"""

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import yaml
from prometheus_client.metrics import MetricWrapperBase

from indexing.living.live_index import LiveIndex
from lookalike.settings import Settings
from serving.observability.metrics import ServingMetrics
from serving.settings import ServingSettings
from tests.small_index import build, change, content, units

PAGE = Path("docs/operations.md")


def _settings_table() -> str:
    rows = [f"| `{path}` | {default} | {sentence} |" for path, default, sentence in _settings(ServingSettings, "")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def _settings(model: type[Settings], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and sentence of every setting, those of nested models included."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _settings(kind, f"{prefix}{name}.")
        else:
            sentence = " ".join((field.description or "").replace("|", r"\|").split())
            yield f"{prefix}{name}", "required" if field.is_required() else _shown(field.default), sentence


def _shown(default: object) -> str:
    match default:
        case None | ():
            return "none"
        case bool():
            return str(default).lower()
        case int():
            return f"{default:,}"
        case float():
            return f"{default:g}"
        case tuple():
            return ", ".join(map(str, default))
    return str(default)


def _metrics_table() -> str:
    rows = []
    metrics = ServingMetrics()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "none"
            rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])


def _with_table(page: str, name: str, table: str) -> str:
    start, end = rf"<!-- {name}: [^\n]*-->\n", f"<!-- end of {name} -->"
    renewed, count = re.subn(f"({start}).*?({end})", lambda found: f"{found[1]}{table}\n{found[2]}", page, flags=re.S)
    assert count == 1
    return renewed


def _renewed(page: str) -> str:
    return _with_table(_with_table(page, "metrics", _metrics_table()), "settings", _settings_table())


def _lines(name: str) -> str:
    (lines,) = re.findall(rf"<!-- {name}: .*?-->\n```bash\n(.*?)```\n<!-- end of {name} -->", PAGE.read_text(), re.S)
    return str(lines)


def _run(lines: str, **variables: Path) -> None:
    """In bash, which stops at the first error, with our own commands first."""
    commands = Path(sys.executable).parent
    environment = {"PATH": f"{commands}:/usr/bin:/bin", **{name: str(path) for name, path in variables.items()}}
    done = subprocess.run(["bash", "-euc", lines], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_setting_and_metric_is_on_the_page_as_the_code_has_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == _renewed(page), "Renew the tables: python -m tests.unit.serving.test_operations_page"


def test_every_setting_has_a_sentence() -> None:
    silent = [path for path, _, sentence in _settings(ServingSettings, "") if not sentence.endswith(".")]
    assert not silent


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load(Path("deploy/prometheus/alerts.yaml").read_text(encoding="utf-8"))
    fired = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert re.findall(r"^\| `(Lookalike\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M) == fired


def test_files_that_the_page_names_exist() -> None:
    names = re.findall(r"\b(?:deploy|docs|tests)/[\w./-]*\w", PAGE.read_text(encoding="utf-8"))
    made_by_its_commands = {"deploy/keys", "deploy/keys/keys.json", "deploy/metrics_key"}
    assert not [name for name in set(names) - made_by_its_commands if not Path(name).exists()]


def test_a_backup_holds_all_that_was_acknowledged_and_can_be_written_to(tmp_path: Path) -> None:
    folder, backup = tmp_path / "index", tmp_path / "backup"
    build(folder)
    with closing(LiveIndex.open(folder)) as live:
        change(live)
        live.compact()
        live.add(units(900), [{"key": "after the compaction"}])
        # The server goes on: the write-ahead log is not folded into the database yet.
        _run(_lines("backup"), INDEX=folder, BACKUP=backup)
        expected = content(live)
    shutil.rmtree(folder)
    with closing(LiveIndex.open(backup)) as restored:
        assert content(restored) == expected
        restored.add(units(901))
        assert restored.num_vectors == len(expected) + 1
    with closing(sqlite3.connect(backup / "changes.sqlite")) as journal:
        assert journal.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_backup_of_an_index_without_changes_is_one_too(tmp_path: Path) -> None:
    build(tmp_path / "index")
    _run(_lines("backup"), INDEX=tmp_path / "index", BACKUP=tmp_path / "backup")
    with closing(LiveIndex.open(tmp_path / "index")) as live, closing(LiveIndex.open(tmp_path / "backup")) as restored:
        assert content(restored) == content(live)


def test_readers_get_what_the_writer_compacted_while_they_serve(tmp_path: Path) -> None:
    folder, published = tmp_path / "index", tmp_path / "published"
    build(folder)
    shutil.copytree(folder, published)
    with closing(LiveIndex.open(published)) as reader, closing(LiveIndex.open(folder)) as writer:
        change(writer)
        for _ in range(2):  # the second time nothing is new
            _run(_lines("publish"), INDEX=folder, PUBLISHED=published)
            reader.refresh()
            writer.refresh()
            assert content(reader) == content(writer)
        assert not list(published.glob("changes.sqlite*"))
        assert not list(published.glob(".incoming*"))


if __name__ == "__main__":
    PAGE.write_text(_renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
