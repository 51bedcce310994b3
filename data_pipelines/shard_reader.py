"""Reads a shard from its first byte to its last, through the webdataset library; nothing else imports it."""

from collections.abc import Generator, Iterator
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipelines.shard_set import ShardSet
from lookalike.errors import ChecksumMismatch, DataError, LookalikeError


def read_shard(shard_set: ShardSet, shard_name: str) -> Generator[tuple[int, bytes], None, None]:
    """Yields (row, encoded picture) of every sample of a shard, in row order.

    The library ends quietly where a tar is garbled, so every sample is compared with the sample table.

    Raises:
        DataError: the tar is missing, cut, garbled, or holds other samples than the table says.
    """
    path = shard_set.folder / shard_name
    rows = shard_set.rows_of_shard(shard_name)
    expected = shard_set.samples.slice(rows.start, len(rows)).select(["key", "extension", "size"]).to_pylist()
    num_read = 0
    for sample in _samples(shard_set, shard_name):
        if num_read == len(rows):
            raise DataError(f"{path} holds more than the {len(rows)} samples of its table. Make the shard set again.")
        row = expected[num_read]
        data = sample.get(row["extension"])
        if sample["__key__"] != row["key"] or data is None or len(data) != row["size"]:
            raise DataError(
                f"{path} is damaged: sample {num_read} should be {row['key']}.{row['extension']} of {row['size']} "
                f"bytes, found {_description(sample)}. Make the shard set again."
            )
        yield rows[num_read], data
        num_read += 1
    if num_read != len(rows):
        raise DataError(
            f"{path} is damaged: reading ended after {num_read} of {len(rows)} samples. Make the shard set again."
        )


def _samples(shard_set: ShardSet, shard_name: str) -> Iterator[dict[str, Any]]:
    """The samples that the library finds, with one error for all the ways a tar can be unreadable."""
    path = shard_set.folder / shard_name
    try:
        with shard_set.open_file(shard_name) as file:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    except ChecksumMismatch as error:
        raise DataError(str(error)) from None
    except LookalikeError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as a tar: {error}. Make the shard set again.") from error


def _description(sample: dict[str, Any]) -> str:
    files = [f"{name} ({len(data)} bytes)" for name, data in sample.items() if isinstance(data, bytes)]
    return f"{sample['__key__']} with {', '.join(files) or 'no file'}"
