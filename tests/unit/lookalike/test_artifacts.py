import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lookalike.artifacts import (
    Manifest,
    fingerprint,
    publishing,
    read_manifest,
    require_parent,
    verify_files,
    write_manifest,
    write_text_atomically,
)
from lookalike.errors import ArtifactError, ChecksumMismatch, ManifestMismatch


def publish(folder: Path, text: str = "hello", parents: dict[str, str] | None = None) -> Manifest:
    with publishing(folder) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file.txt").write_text(text)
        return write_manifest(temporary, Manifest("test", 1, parents=parents or {}, details={"count": 1}))


def test_a_published_folder_reads_back_and_verifies(tmp_path: Path) -> None:
    written = publish(tmp_path / "a", parents={"shards": "abc"})
    read = read_manifest(tmp_path / "a", kind="test", newest_version=1)
    assert read == written
    assert read.fingerprint == written.fingerprint
    verify_files(tmp_path / "a", read)


def test_the_fingerprint_is_of_content_and_parents(tmp_path: Path) -> None:
    first = publish(tmp_path / "a").fingerprint
    assert publish(tmp_path / "b").fingerprint == first
    assert publish(tmp_path / "c", text="hallo").fingerprint != first
    assert publish(tmp_path / "d", parents={"shards": "x"}).fingerprint != first


def test_one_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "a")
    file = tmp_path / "a" / "deep" / "file.txt"
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=r"file\.txt"):
        verify_files(tmp_path / "a", manifest)
    file.unlink()
    with pytest.raises(ChecksumMismatch, match="missing"):
        verify_files(tmp_path / "a", manifest)


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["details"]["count"] = 2
    path.write_text(json.dumps(tree))
    with pytest.raises(ChecksumMismatch, match="changed after it was written"):
        read_manifest(tmp_path / "a", kind="test", newest_version=1)


def test_wrong_kind_newer_format_and_no_manifest_are_told_apart(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(ArtifactError, match="found test, expected other"):
        read_manifest(tmp_path / "a", kind="other", newest_version=1)
    with pytest.raises(ArtifactError, match="Upgrade"):
        read_manifest(tmp_path / "a", kind="test", newest_version=0)
    with pytest.raises(ArtifactError, match="not a finished test"):
        read_manifest(tmp_path, kind="test", newest_version=1)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with publishing(tmp_path / "a") as temporary:
            (temporary / "half").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_replacing_is_asked_for(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(ArtifactError, match="exists already"), publishing(tmp_path / "a"):
        pass
    with publishing(tmp_path / "a", replace=True) as temporary:
        (temporary / "new").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_writer_killed_midway_publishes_nothing_and_is_cleaned_up(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from lookalike.artifacts import publishing\n"
        "with publishing(Path(sys.argv[1])) as t:\n"
        "    (t / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not (tmp_path / "a").exists()
    publish(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_foreign_parent_is_refused_with_both_named(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "a", parents={"shards": "1" * 64})
    require_parent(tmp_path / "a", manifest, "shards", found="1" * 64, parent=tmp_path / "s")
    with pytest.raises(ManifestMismatch, match=r"1{12}.*2{12}"):
        require_parent(tmp_path / "a", manifest, "shards", found="2" * 64, parent=tmp_path / "s")


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "CURRENT", "v0001\n")
    write_text_atomically(tmp_path / "CURRENT", "v0002\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("CURRENT", "v0002\n")]


def test_fingerprints_ignore_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_living_publication_beside_is_let_alone(tmp_path: Path) -> None:
    with publishing(tmp_path / "e-b") as other:
        (other / "file").write_text("x")
        publish(tmp_path / "e")
        with publishing(tmp_path / "e-b", replace=True) as twin:
            (twin / "file").write_text("y")
        assert other.exists()
        shutil.rmtree(tmp_path / "e-b")
    assert (tmp_path / "e-b" / "file").read_text() == "x"


def test_a_folder_that_a_killed_replacement_had_moved_away_comes_back(tmp_path: Path) -> None:
    publish(tmp_path / "a", text="old")
    (tmp_path / "a").rename(tmp_path / ".unpublished-a-0123abcd-outgoing")
    (tmp_path / ".unpublished-a-0123abcd").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        publish(tmp_path / "a", text="new")
    assert (tmp_path / "a" / "deep" / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_replacement_that_cannot_be_renamed_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "a", text="old")
    rename = Path.rename

    def fail_into_place(self: Path, target: Path) -> Path:
        if target == tmp_path / "a" and not self.name.endswith("outgoing"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="Input/output"), publishing(tmp_path / "a", replace=True):
        pass
    assert (tmp_path / "a" / "deep" / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_known_checksums_are_taken_as_they_are(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("parts/known", "new"):
        (tmp_path / name).write_bytes(b"bytes")
    manifest = write_manifest(tmp_path, Manifest("test", 1), known_sha256={"parts/known": "0" * 64})
    assert manifest.files["parts/known"] == {"bytes": 5, "sha256": "0" * 64}
    assert manifest.files["new"] == {"bytes": 5, "sha256": hashlib.sha256(b"bytes").hexdigest()}
