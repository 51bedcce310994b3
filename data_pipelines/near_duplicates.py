"""Pictures that look the same though their bytes differ: resized, re-encoded, lightly retouched."""

import imagehash
import numpy as np
from jaxtyping import Int64, UInt8, UInt64
from numpy import ndarray
from PIL import Image

HASH_BITS = 64
MAX_DISTANCE = 3  # bits; one band fewer than there are always stays equal
_NUM_BANDS = 4


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, of which few change when a picture is resized or compressed; ImageHash's phash."""
    return int(str(imagehash.phash(image)), 16)


def twins_across_groups(
    hashes: UInt64[ndarray, "pictures"], groups: Int64[ndarray, "pictures"]
) -> Int64[ndarray, "pictures"]:
    """For each picture another one of another group whose hash differs in at most `MAX_DISTANCE` bits, -1 for none.

    Two such hashes agree in one of four bands of 16 bits at least, so only those are compared that do. Memory grows
    with the number of pictures, time with that of agreeing hashes; equal hashes of a group count as one.
    """
    distinct, first, members = np.unique(
        np.stack([hashes, groups.astype(np.uint64)], axis=1), axis=0, return_index=True, return_inverse=True
    )
    values, owners = distinct[:, 0], groups[first]
    twins = np.full(len(values), -1, dtype=np.int64)
    for band in range(_NUM_BANDS):
        part = (values >> np.uint64(band * HASH_BITS // _NUM_BANDS)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if len(run) > 1 and (owners[run] != owners[run[0]]).any():
                _match(run, values, owners, twins)
    found = twins[members.reshape(-1)]
    return np.where(found >= 0, first[found], -1)


def _match(
    run: Int64[ndarray, "run"],
    values: UInt64[ndarray, "hashes"],
    owners: Int64[ndarray, "hashes"],
    twins: Int64[ndarray, "hashes"],
) -> None:
    """Fills in the twins of those in `run` that have none yet."""
    for index in run[twins[run] < 0].tolist():
        others = run[owners[run] != owners[index]]
        near = others[_num_set_bits(values[others] ^ values[index]) <= MAX_DISTANCE]
        if len(near):
            twins[index] = near[0]


def _num_set_bits(values: UInt64[ndarray, "hashes"]) -> UInt8[ndarray, "hashes"]:
    return np.unpackbits(values[:, None].view(np.uint8), axis=1).sum(axis=1, dtype=np.uint8)
