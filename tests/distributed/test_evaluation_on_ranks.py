"""Any number of processes give the numbers of one, to the last bit, and fail together."""

from pathlib import Path

import numpy as np
import pytest

from evaluation.revisited import distractors as distractors_module
from evaluation.revisited.evaluate import RevisitedOutcome, evaluate_descriptors
from evaluation.revisited.ground_truth import GroundTruth, QueryLabels
from lookalike.errors import DataError
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks

NUM_DISTRACTORS = 1000
Numbers = dict[str, list[float]]


def evaluate(world: World, file: Path, progress_file: Path | None) -> RevisitedOutcome:
    distractors_module._BLOCK_ROWS = 64  # a process of its own: nothing to put back
    distractors_module._BLOCKS_PER_SAVE = 2
    generator = np.random.default_rng(0)
    labels = tuple(QueryLabels(*np.split(generator.permutation(200)[:30], [10, 20])) for _ in range(5))
    truth = GroundTruth(tuple(map(str, range(200))), tuple("abcde"), np.zeros((5, 4)), labels, "")
    vectors = generator.normal(size=(205, 16)).astype(np.float32)
    distractors = np.load(file, mmap_mode="r")
    return evaluate_descriptors(
        vectors[:5],
        vectors[5:],
        truth,
        distractors=[distractors[:333], distractors[333:]],
        curve_at=[100, 640, 700],
        progress_file=progress_file,
        world=world,
    )


def numbers(world: World, file: Path, progress_file: Path | None = None) -> Numbers:
    outcome = evaluate(world, file, progress_file)
    found = {
        f"{setup} {metric}": values.tolist()
        for setup, section in outcome.sections.items()
        for metric, values in section.per_query.items()
    }
    found |= {f"curve at {point.num_distractors}": list(point.maps.values()) for point in outcome.curve}
    found |= {f"{setup} tie gap": [section.facts["tie_gap"]] for setup, section in outcome.sections.items()}
    return found | {"distractors": [outcome.num_distractors]}


def kill_at(world: World, file: Path, progress_file: Path, first_row: int) -> None:
    """The rank that would count this block is killed there; the others count theirs and are killed when they wait."""
    score_blocks = distractors_module.score_blocks

    def blocks_until_killed(*arguments):  # type: ignore[no-untyped-def]
        for start, scores in score_blocks(*arguments):
            if start == first_row:
                raise KeyboardInterrupt
            yield start, scores

    def killed(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distractors_module, "score_blocks", blocks_until_killed)
        patch.setattr(distractors_module, "any_rank", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(world, file, progress_file)


def refusal(world: World, file: Path, progress_file: Path | None = None) -> str:
    try:
        evaluate(world, file, progress_file)
    except DataError as error:
        return str(error)
    return "evaluated"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("distractors") / "d.npy"
    np.save(file, np.random.default_rng(1).normal(size=(NUM_DISTRACTORS, 16)).astype(np.float16))
    return file


@pytest.fixture(scope="module")
def alone(file: Path) -> Numbers:
    [found] = run_on_ranks(numbers, 1, file)
    assert found["distractors"] == [NUM_DISTRACTORS]
    assert [name for name in found if "curve" in name] == [f"curve at {n}" for n in (0, 100, 640, 700, 1000)]
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_find_the_very_bits_of_one_process(num_ranks: int, file: Path, alone: Numbers) -> None:
    assert run_on_ranks(numbers, num_ranks, file) == [alone] * num_ranks


def test_killed_ranks_go_on_from_their_own_counts(file: Path, alone: Numbers, tmp_path: Path) -> None:
    progress = tmp_path / "progress.npz"
    # Of 16 blocks rank 1 counts the odd ones, and dies before the fourth of its eight.
    run_on_ranks(kill_at, 2, file, progress, 7 * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.npz", "progress.npz.1"]
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Counts of two processes are of no use to one, and those of one rank not to another.
    [message] = run_on_ranks(refusal, 1, file, progress)
    assert "of another number of processes" in message
    for path, other in zip(kept, reversed(kept), strict=True):
        path.write_bytes(kept[other])
    assert all("of another number of processes" in message for message in run_on_ranks(refusal, 2, file, progress))
    for path, content in kept.items():
        path.write_bytes(content)
    assert run_on_ranks(numbers, 2, file, progress) == [alone, alone]
    assert list(tmp_path.iterdir()) == []


def test_what_one_rank_cannot_count_fails_on_all(file: Path, tmp_path: Path) -> None:
    distractors = np.load(file)
    distractors[70] = np.nan  # in the second block, that of rank 1
    np.save(tmp_path / "d.npy", distractors)
    first, second = run_on_ranks(refusal, 2, tmp_path / "d.npy")
    assert "distractors 64 to 128" in second
    assert "another rank" in first
