import numpy as np

from lookalike.counter_random import counter_hash


def test_the_numbers_are_those_of_the_published_generator() -> None:
    """SplitMix64 from state 0 and 1 in plain Python integers, modulo 2^64."""

    def plain(state: int) -> int:
        mask = 2**64 - 1
        mixed = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return mixed ^ (mixed >> 31)

    assert int(counter_hash(0)) == plain(0) == 0xE220A8397B1DCDAF
    assert int(counter_hash(7, 5)) == plain(plain(7) ^ 5)
    assert int(counter_hash(-1, 2)) == plain(plain(2**64 - 1) ^ 2)
    rows = counter_hash(3, np.arange(4), np.arange(4)[::-1])
    assert [int(row) for row in rows] == [plain(plain(plain(3) ^ i) ^ (3 - i)) for i in range(4)]


def test_neighbouring_counters_share_nothing() -> None:
    bits = counter_hash(0, np.arange(4096))[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    # Each bit is set in about half of the 4,096 numbers: 6 standard deviations.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 6 * 0.5 / 64
    assert np.abs(np.corrcoef(bits.T) - np.eye(64)).max() < 6 / 64
    assert len(np.unique(counter_hash(np.arange(1000), np.arange(1000)[:, None]))) == 1_000_000
