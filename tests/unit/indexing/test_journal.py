"""What was acknowledged is on the disk, whatever happens next; what cannot be written is refused in clear words."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from indexing.living.journal import JOURNAL_NAME, Entry, Journal, StoredPicture
from lookalike.errors import ArtifactError, DamagedArtifact, ResourceError

_WRITES_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from indexing.living.journal import Entry, Journal
journal = Journal(Path(sys.argv[1]))
while True:
    with journal.writing() as transaction:
        [identifier] = transaction.assign_ids(1)
        vector = np.full(300, identifier, np.float32)
        transaction.put([Entry(identifier, vector, {"key": str(identifier)})], encoder=None)
        if identifier % 3 == 2:
            transaction.delete([identifier - 1])
    print(identifier, flush=True)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path, lock_seconds=0.2)) as opened:
        yield opened


def entry(identifier: int, value: float = 1.0, **metadata: object) -> Entry:
    return Entry(identifier, np.full(4, value, np.float32), metadata)


def put(journal: Journal, *entries: Entry) -> None:
    with journal.writing() as transaction:
        transaction.put(entries, encoder="maker")


def test_without_changes_there_is_no_file(journal: Journal) -> None:
    read = journal.changes_after(0)
    assert (read.changes, read.last_sequence, read.trimmed_through) == ([], 0, 0)
    assert journal.stamp() == -1
    assert journal.picture_of(3) is None
    assert not journal.path.exists()


def test_changes_come_back_in_their_order(journal: Journal) -> None:
    put(journal, entry(7, 0.5, key="a", label=3), entry(2, 0.25))
    with journal.writing() as transaction:
        transaction.delete([7])
    read = journal.changes_after(0)
    assert [(c.sequence, c.id, c.vector is None) for c in read.changes] == [(1, 7, False), (2, 2, False), (3, 7, True)]
    assert read.changes[0].metadata == {"key": "a", "label": 3}
    assert read.changes[0].encoder == "maker"
    assert read.changes[0].vector is not None
    np.testing.assert_array_equal(read.changes[0].vector, np.full(4, 0.5, np.float32))
    assert [c.sequence for c in journal.changes_after(1).changes] == [2, 3]
    assert [c.sequence for c in journal.changes_after(1, through=2).changes] == [2]
    assert journal.changes_after(1, through=2).last_sequence == 2


def test_a_failed_transaction_leaves_nothing(journal: Journal) -> None:
    put(journal, entry(0))

    def fail() -> None:
        with journal.writing() as transaction:
            transaction.put([entry(1)], encoder=None)
            transaction.delete([0])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert [c.id for c in journal.changes_after(0).changes] == [0]
    with journal.writing() as transaction:
        assert list(transaction.assign_ids(1)) == [1]


def test_ids_are_never_given_again(journal: Journal) -> None:
    put(journal, entry(41))
    with journal.writing() as transaction:
        assert list(transaction.assign_ids(2)) == [42, 43]
    with journal.writing() as transaction:
        transaction.delete([99])
        transaction.trim(2)
        assert list(transaction.assign_ids(1)) == [100]
    with closing(Journal(journal.path.parent)) as reopened, reopened.writing() as transaction:
        assert list(transaction.assign_ids(1)) == [101]


def test_sequence_numbers_go_on_after_everything_was_trimmed(journal: Journal) -> None:
    put(journal, entry(1), entry(2))
    with journal.writing() as transaction:
        transaction.trim(2)
    put(journal, entry(3))
    read = journal.changes_after(2)
    assert [(c.sequence, c.id) for c in read.changes] == [(3, 3)]
    assert read.trimmed_through == journal.trimmed_through() == 2


def test_the_number_of_changes_is_that_of_counting_them(journal: Journal) -> None:
    def check() -> None:
        for sequence in range(9):
            assert journal.num_changes_after(sequence) == len(journal.changes_after(sequence).changes)

    check()
    put(journal, entry(1), entry(2), entry(1))
    with suppress(KeyError), journal.writing() as transaction:
        transaction.put([entry(5)], encoder=None)
        raise KeyError("stop")
    check()
    with journal.writing() as transaction:
        transaction.delete([2])
        transaction.trim(2)
    put(journal, entry(7), entry(8))
    check()
    assert journal.num_changes_after(0) == 4


def test_a_journal_begun_anew_numbers_after_what_the_version_absorbed(journal: Journal) -> None:
    with journal.writing() as transaction:
        transaction.start_after(100, next_id=50)
        assert list(transaction.assign_ids(1)) == [50]
        transaction.put([entry(50)], encoder=None)
    read = journal.changes_after(100)
    assert [c.sequence for c in read.changes] == [101]
    assert read.trimmed_through == 100
    with journal.writing() as transaction:  # and one that is further on stays as it is
        transaction.start_after(7, next_id=3)
        assert transaction.fact("last_sequence") == 101
        assert transaction.fact("next_id") == 51


def test_other_connections_notice_changes(journal: Journal) -> None:
    with closing(Journal(journal.path.parent)) as other:
        assert other.stamp() == -1
        put(journal, entry(1))
        first = other.stamp()
        assert len(other.changes_after(0).changes) == 1
        assert other.stamp() == first != -1
        put(journal, entry(2))
        assert other.stamp() != first
        assert journal.stamp() == journal.stamp()  # reading changes nothing


def test_pictures_go_with_the_addition_they_came_with(journal: Journal) -> None:
    picture = StoredPicture(b"bytes", "s3://bucket/x.jpg")
    put(journal, Entry(5, np.ones(4, np.float32), {}, picture), Entry(6, np.ones(4, np.float32), {}, picture))
    with journal.writing() as transaction:
        transaction.trim(2)  # a version holds vectors and metadata, not pictures
    assert journal.picture_of(5) == journal.picture_of(6) == picture
    put(journal, entry(5))
    with journal.writing() as transaction:
        transaction.delete([6])
    assert journal.picture_of(5) is None
    assert journal.picture_of(6) is None


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITES_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        acknowledged = [int(next(lines)) for _ in range(20)]
        process.kill()
        acknowledged += [int(line) for line in lines if line.endswith("\n")]
    process.wait()
    with closing(Journal(tmp_path)) as journal:
        changes = journal.changes_after(0).changes
        put_ids = [c.id for c in changes if c.vector is not None]
        deleted = [c.id for c in changes if c.vector is None]
        assert acknowledged == list(range(len(acknowledged)))
        assert put_ids[: len(acknowledged)] == acknowledged
        assert len(put_ids) <= len(acknowledged) + 1  # one more may have been durable but not yet acknowledged
        assert deleted == [i - 1 for i in put_ids if i % 3 == 2]
        assert all((c.vector == c.id).all() for c in changes if c.vector is not None)
        put(journal, entry(10_000))


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    script = _WRITES_FOREVER.replace("while True", "for _ in range(15)")
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    answers = [[int(line) for line in process.communicate(timeout=60)[0].split()] for process in processes]
    assert sorted(answers[0] + answers[1]) == list(range(30))
    with closing(Journal(tmp_path)) as journal:
        changes = journal.changes_after(0).changes
        assert [c.sequence for c in changes] == list(range(1, 41))
        assert sorted(c.id for c in changes if c.vector is not None) == list(range(30))


def test_a_journal_that_stays_locked_is_a_clear_error(journal: Journal) -> None:
    put(journal, entry(1))
    with closing(sqlite3.connect(journal.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ResourceError, match=r"is locked: another process has been writing for 0\.2 s"):
            put(journal, entry(2))
        assert len(journal.changes_after(0).changes) == 1  # reading goes on meanwhile
        other.execute("ROLLBACK")
    put(journal, entry(2))
    assert len(journal.changes_after(0).changes) == 2


def test_a_full_disk_is_a_clear_error_and_loses_nothing(journal: Journal) -> None:
    put(journal, entry(1))
    assert journal._writer is not None
    journal._writer.execute("PRAGMA max_page_count=1")  # raised by SQLite to what the file has now
    with pytest.raises(ResourceError, match=r"full.*has room"):
        put(journal, Entry(2, np.ones(50_000, np.float32), {}))
    assert [c.id for c in journal.changes_after(0).changes] == [1]
    journal._writer.execute("PRAGMA max_page_count=100000")
    put(journal, Entry(2, np.ones(50_000, np.float32), {}))
    assert [c.id for c in journal.changes_after(0).changes] == [1, 2]


def test_a_read_only_journal_is_a_clear_error(journal: Journal) -> None:
    put(journal, entry(1))
    assert journal._writer is not None
    journal._writer.execute("PRAGMA query_only=ON")  # tests may run as root, whom no file mode stops
    with pytest.raises(ResourceError, match=r"readonly.*may be written to"):
        put(journal, entry(2))


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "none")) as journal, pytest.raises(ResourceError, match="cannot be used"):
        put(journal, entry(1))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b"not a database at all, but long enough to be taken for one" * 100)
    with closing(Journal(tmp_path)) as journal, pytest.raises(DamagedArtifact, match=JOURNAL_NAME):
        journal.changes_after(0)


def test_a_newer_format_is_refused(journal: Journal) -> None:
    put(journal, entry(1))
    with closing(sqlite3.connect(journal.path)) as connection:
        connection.execute("PRAGMA user_version=9")
    with closing(Journal(journal.path.parent)) as newer, pytest.raises(ArtifactError, match="format 9"):
        newer.changes_after(0)


def test_many_threads_share_one_journal(journal: Journal) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                with journal.writing() as transaction:
                    [identifier] = transaction.assign_ids(1)
                    transaction.put([entry(identifier)], encoder=None)
                assert identifier in [c.id for c in journal.changes_after(0).changes]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(c.id for c in journal.changes_after(0).changes) == list(range(40))
