import numpy as np

from evaluation.classes.protocols import leave_one_out, query_gallery, random_gallery
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks

KS = (1, 5)


def judge(world: World) -> list[tuple[tuple[str, ...], dict[str, bytes], str]]:
    """All protocols on 700 pictures, three blocks of queries, with copies and a query that cannot be answered."""
    generator = np.random.default_rng(0)
    labels = np.append(generator.permutation(np.repeat(np.arange(233), 3)), 999)
    vectors = generator.normal(size=(1000, 24))[labels] + generator.normal(size=(700, 24))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[:40] = vectors[40:80]
    ids = generator.permutation(700)
    sections = [
        leave_one_out(vectors, ids, labels, ks=KS, world=world),
        query_gallery(vectors, ids, labels, vectors[:600], ids[:600], labels[:600], ks=KS, world=world),
        random_gallery(vectors, ids, labels, ks=KS, num_seeds=2, world=world),
    ]
    return [
        (section.query_names, {name: v.tobytes() for name, v in section.per_query.items()}, repr(section.facts))
        for section in sections
    ]


def test_ranks_find_the_very_bits_of_one_process() -> None:
    [alone] = run_on_ranks(judge, 1)
    assert "num_unanswerable" in alone[1][2]
    assert run_on_ranks(judge, 2) == [alone, alone]
