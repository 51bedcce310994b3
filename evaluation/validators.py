"""What makes a score doubtful, as sentences: what was found, what it does to the score, and what to do.

Nothing here raises for what it finds: a person judges. No sentence means that nothing was found.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Bool, Float, Float32, Float64, UInt64
from numpy import ndarray
from pyarrow import compute

from data_pipelines.shard_set import ShardSet
from evaluation.record import PictureCounts, Role
from evaluation.result import mean_of_known
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, Setup
from lookalike.ranking_metrics import recall_at_k

LARGEST_NORM_DEVIATION = 1e-2  # float16 and bfloat16 round unit vectors by less
MAX_SAMPLED_ROWS = 100_000
_ROWS_AT_A_TIME = 4096
_NUM_EXAMPLES = 3
_METRIC_NAME = re.compile(r"map(@r)?|r_precision|(?P<kind>mp|mr|hit_rate|recall|rs_target)@(?P<k>\d+)", re.IGNORECASE)


def norms(name: str, *parts: Float[ndarray, "_ dim"]) -> list[str]:
    """Whether the rows of all parts are of unit length, among at most 100,000 of them."""
    with np.errstate(all="ignore"):
        deviations = [np.abs(np.linalg.norm(block, axis=1) - 1) for block in _sampled_blocks(parts)]
    found = np.concatenate([np.zeros(0, np.float32), *deviations])
    is_off = ~(found <= LARGEST_NORM_DEVIATION)  # so that NaN is off
    if not is_off.any():
        return []
    return [
        f"{name}: {_percent(float(is_off.mean()))} of {_examined(len(found), parts)} are not of unit length (off by up "
        f"to {found.max():.2g}). Their inner products are no cosine similarities: long vectors come first for many a "
        "query. Divide each vector by its length."
    ]


def precision(name: str, *parts: Float[ndarray, "_ dim"]) -> list[str]:
    """Whether values are coarser than the float32 that they are compared in, among at most 100,000 rows."""
    num_examined, is_bfloat16, is_float16 = 0, True, True
    for block in _sampled_blocks(parts):
        num_examined += len(block)
        is_bfloat16 = is_bfloat16 and not (block.view(np.uint32) & 0xFFFF).any()
        with np.errstate(over="ignore"):
            is_float16 = is_float16 and np.array_equal(block.astype(np.float16).astype(np.float32), block)
        if not (is_bfloat16 or is_float16):
            return []
    examined = _examined(num_examined, parts)
    if not num_examined:
        return []
    if is_bfloat16:
        return [
            f"{name}: all values of {examined} are bfloat16 numbers, of 8 significant bits. The vectors were rounded "
            "coarsely, and similarities in bfloat16 tie so often that the order among ties moves mAP by up to 0.35 "
            "points at a million distractors. Embed in float32 or float16, and compare in float32."
        ]
    return [
        f"{name}: all values of {examined} are float16 numbers, of 11 significant bits. Compared in float32 this moves "
        "scores by a few hundredths of a point: say so beside the score."
    ]


def row_hashes(*parts: Float[ndarray, "_ dim"]) -> UInt64[ndarray, "rows"]:
    """A number of 64 bits per row of all parts, equal for rows of the same float32 bits.

    Reads every row; a million rows of 2048 take ten to thirty seconds. That any two different ones of a million share a
    number has a probability of 3e-8.
    """
    hashes = np.empty(sum(map(len, parts)), np.uint64)
    for number, values in enumerate(row for part in parts for block in _blocks(part) for row in _float32(block)):
        hashes[number] = int.from_bytes(hashlib.blake2b(values.data, digest_size=8).digest(), "little")
    return hashes


def share_of_copies(hashes: UInt64[ndarray, "rows"]) -> float:
    """Share of rows that equal an earlier one."""
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def has_copy(hashes: UInt64[ndarray, "queries"], gallery: UInt64[ndarray, "gallery"]) -> Bool[ndarray, "queries"]:
    """Which queries equal a row of a gallery that they are not part of."""
    return np.isin(hashes, gallery)


def has_twin(hashes: UInt64[ndarray, "rows"]) -> Bool[ndarray, "rows"]:
    """Which rows equal another row: those with a copy in the gallery where every row searches all others."""
    _, members, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.asarray(sizes[members] > 1)


def duplicates(name: str, hashes: UInt64[ndarray, "rows"]) -> list[str]:
    """Whether rows are copies of others; see `row_hashes`."""
    share = share_of_copies(hashes)
    if not share:
        return []
    return [
        f"{name}: {_percent(share)} of {len(hashes):,} vectors are bit for bit copies of an earlier one. Copies tie, "
        "and a query's own copy is found first, whether it counts as right or wrong. Remove copies of pictures; where "
        "the pictures differ, the encoder or its input is at fault."
    ]


def effect_of_duplicates(
    metric: str, values: Float64[ndarray, "queries"], is_copied: Bool[ndarray, "queries"], *, share: float
) -> list[str]:
    """What the queries with a copy in the gallery do to a mean.

    Args:
        values: In [0, 1]; NaN where a query has none.
        is_copied: Of `has_copy` or `has_twin`.
        share: Of copies among all vectors.
    """
    is_known = ~np.isnan(values)
    num_copied, num_queries = int((is_copied & is_known).sum()), int(is_known.sum())
    if not num_copied:
        return []
    start = f"{_percent(share)} of the vectors are copies; "
    if num_copied == num_queries:
        return [f"{start}all {num_queries:,} queries have a copy in the gallery, so {metric} says little."]
    without, all_of_them = (100 * mean_of_known(values[kept]) for kept in (~is_copied, is_known))
    return [
        f"{start}without the {num_copied:,} of {num_queries:,} queries that have a copy in the gallery, {metric} is "
        f"{without:.2f} instead of {all_of_them:.2f}. Report both, or remove the copies."
    ]


def recall_ceiling(truth: GroundTruth, setup: Setup, k: int) -> float:
    """The mR@k of a perfect ranking, in percent: the mean over queries of min(k, relevant) / relevant."""
    ideal = [np.arange(num_relevant) for num_relevant in _nums_relevant(truth, setup)]
    return 100 * mean_of_known(np.array([recall_at_k(positions, k) for positions in ideal], np.float64))


def impossible_values(tree: Mapping[str, Any], truth: GroundTruth) -> list[str]:
    """Values that no ranking can have, in a result of ours or of anybody: section -> metric -> percent.

    Metrics are `map`, `mp@k`, `mr@k` and those of `lookalike.ranking_metrics`; all else, and null, is passed over. A
    value counts as rounded to the decimals that it is written with, so that published numbers can be checked.
    """
    found = []
    for section, metrics in tree.items():
        if not isinstance(metrics, Mapping):
            continue
        for name, value in metrics.items():
            match = _METRIC_NAME.fullmatch(name)
            if match is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            kind, k = (match["kind"] or "").lower(), int(match["k"] or 0)
            reasons = _reasons(section, kind, k, float(value), truth, rounding=_rounding(str(value)))
            found += [f"{section} {name} is {value}: {reason}" for reason in reasons]
    return found


def missing_pictures(counts: Mapping[Role, PictureCounts]) -> list[str]:
    """Whether the pictures of a role are those that its benchmark prescribes."""
    found = []
    for role, own in counts.items():
        failed = f", {own.failed:,} could not be embedded" if own.failed else ""
        if own.expected is None:
            if own.failed:
                found.append(f"{role}: {own.found:,} pictures have a vector{failed}. {_EFFECT_OF_MISSING}")
        elif own.found < own.expected:
            missing = own.expected - own.found
            found.append(
                f"{role}: {own.found:,} of {own.expected:,} pictures have a vector, {missing:,} are missing{failed}. "
                f"{_EFFECT_OF_MISSING}"
            )
        elif own.found > own.expected or own.failed:
            found.append(
                f"{role}: {own.found:,} pictures have a vector{failed}, {own.expected:,} are expected. The list of "
                "pictures is another one, and scores cannot be compared. Compare it with the official list."
            )
    return found


_EFFECT_OF_MISSING = (
    "Without a distractor or a wrong picture the task is easier, without a right one or a query it is another. Embed "
    "the missing ones, or state the count beside the score."
)


_COMPARED_COLUMNS = ["key", "class_name", "sha256"]


def training_overlap(training: ShardSet, test: ShardSet, *, training_split: str | None, split: str | None) -> list[str]:
    """Classes of the same name, and pictures of the same bytes, in training and test; None takes all splits.

    Names that are mere numbers are compared within one data set only: elsewhere they number other things.

    Raises:
        DataError: there is no such split.
    """
    learned = training.samples.select(_COMPARED_COLUMNS).take(training.rows(training_split))
    judged = test.samples.select(_COMPARED_COLUMNS).take(test.rows(split))
    if not judged.num_rows:
        return []
    return [
        *_class_overlap(learned, judged, numbers_mean_the_same=_data_set(training) == _data_set(test)),
        *_picture_overlap(learned, judged),
    ]


def landmark_overlap(training_class_names: Iterable[str], test_names: Iterable[str]) -> list[str]:
    """Landmarks of a test whose names training classes have, or begin with.

    Case, accents, punctuation, spaces and a leading `Category:` do not matter: `musee_dorsay` is `Musée d'Orsay,
    Paris`. What is named otherwise is not found, and a namesake elsewhere is.

    Args:
        training_class_names: Names of landmarks, not their numbers.
        test_names: Names of landmarks, not of pictures.
    """
    wanted = {"".join(_words(name)): name for name in test_names}
    wanted.pop("", None)
    found: dict[str, str] = {}
    for class_name in training_class_names:
        for opening in accumulate(_words(class_name)):
            if opening in wanted:
                found.setdefault(wanted[opening], class_name)
    if not found:
        return []
    return [
        f"{len(found):,} of {len(wanted):,} test landmarks are named as classes of training, such as "
        f"{_examples(f'{name} ({class_name})' for name, class_name in found.items())}. Their queries are easier than "
        "unseen ones, so the score is too high. Train without these classes, or report the score without these queries."
    ]


def _reasons(section: str, kind: str, k: int, value: float, truth: GroundTruth, *, rounding: float) -> Iterator[str]:
    if not 0 <= value <= 100:
        yield "percentages lie in [0, 100]. Look for a wrong unit or a wrong denominator."
        return
    setup = next((setup for setup in SETUPS if setup == section), None)
    if setup is None:
        return
    if kind == "mr" and value > (ceiling := recall_ceiling(truth, setup, k)) + rounding:
        yield (
            f"a perfect ranking has {ceiling:.2f}, since most queries have more than {k} relevant pictures. It is "
            "another metric, such as a hit rate, or of another ground truth."
        )
    if kind == "mp" and k == 1:
        num_queries = sum(num > 0 for num in _nums_relevant(truth, setup))
        nearest = 100 * round(value * num_queries / 100) / num_queries
        if abs(value - nearest) > rounding:
            yield (
                f"each of {num_queries} queries has its first answer right or wrong, so the nearest possible value is "
                f"{nearest:.2f}. Queries were lost or added, or a wrong average was taken."
            )


def _rounding(number: str) -> float:
    """Half a unit of the last decimal that is written, and what binary fractions are off by."""
    exponent = Decimal(number).as_tuple().exponent  # a letter for NaN and infinity
    return 0.5 * 10.0**exponent + 1e-9 if isinstance(exponent, int) else 0.0


def _nums_relevant(truth: GroundTruth, setup: Setup) -> list[int]:
    return [int(labels.is_relevant(setup).sum()) for labels in truth.labels]


def _class_overlap(learned: pyarrow.Table, judged: pyarrow.Table, *, numbers_mean_the_same: bool) -> Iterator[str]:
    classes = set(compute.unique(judged["class_name"].drop_null()).to_pylist())
    shared = classes & set(compute.unique(learned["class_name"].drop_null()).to_pylist())
    if not numbers_mean_the_same:
        shared = {name for name in shared if not name.isdecimal()}
    if shared:
        num_pictures = _num_in(judged["class_name"], shared)
        yield (
            f"{_part(len(shared), len(classes))} test classes, with {_part(num_pictures, judged.num_rows)} test "
            f"pictures, are named as classes of training, such as {_examples(sorted(shared))}. The score is not that "
            "of unseen classes and likely too high. Train without these classes, or test without them."
        )


def _picture_overlap(learned: pyarrow.Table, judged: pyarrow.Table) -> Iterator[str]:
    is_shared = compute.is_in(judged["sha256"], value_set=learned["sha256"].combine_chunks())
    shared = judged.filter(is_shared)
    if shared.num_rows:
        yield (
            f"{_part(shared.num_rows, judged.num_rows)} test pictures were trained on, byte for byte, such as "
            f"{_examples(shared['key'].to_pylist())}. Their classes are known by heart, so the score is too high. "
            "Train without them, or test without them."
        )


def _num_in(column: pyarrow.ChunkedArray, values: set[str]) -> int:
    return int(compute.sum(compute.is_in(column, value_set=pyarrow.array(sorted(values)))).as_py())


def _data_set(shard_set: ShardSet) -> str | None:
    name = shard_set.manifest.details.get("data_set", {}).get("name")
    return None if name is None else str(name)


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).casefold().removeprefix("category:")
    return re.findall(r"[^\W_]+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


def _percent(share: float) -> str:
    """Of three digits: one vector of a million shows."""
    return f"{100 * share:.3g}%"


def _part(number: int, of: int) -> str:
    return f"{number:,} of {of:,} ({_percent(number / of)})"


def _examples(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:_NUM_EXAMPLES])


def _examined(num_examined: int, parts: Sequence[ndarray]) -> str:
    num_rows = sum(map(len, parts))
    if num_examined == num_rows:
        return f"{num_rows:,} vectors"
    return f"{num_examined:,} vectors, spread evenly over all {num_rows:,},"


def _sampled_blocks(parts: Sequence[Float[ndarray, "_ dim"]]) -> Iterator[Float32[ndarray, "_ dim"]]:
    """At most `MAX_SAMPLED_ROWS` rows, spread evenly, a few at a time: memory-mapped files may be of any size."""
    num_rows = sum(map(len, parts))
    rows = np.linspace(0, max(num_rows - 1, 0), min(num_rows, MAX_SAMPLED_ROWS)).round().astype(np.int64)
    first = 0
    for part in parts:
        own = rows[(rows >= first) & (rows < first + len(part))] - first
        yield from (_float32(part[few]) for few in _blocks(own))
        first += len(part)


def _blocks(rows: ndarray) -> Iterator[ndarray]:
    return (rows[start : start + _ROWS_AT_A_TIME] for start in range(0, len(rows), _ROWS_AT_A_TIME))


def _float32(rows: Float[ndarray, "block dim"]) -> Float32[ndarray, "block dim"]:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, np.float32)
