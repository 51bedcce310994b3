"""Which index to build: candidates are tried on held-out queries, their cost is predicted, one is chosen."""

from collections.abc import Sequence

from indexing.index_types import IndexType
from indexing.planning.calibration import MachineRates, measure_rates, nominal_rates, rates_to_tree
from indexing.planning.candidates import candidate_types
from indexing.planning.choice import Candidate, choose
from indexing.planning.cost_model import SearchWork, build_seconds, memory_bytes, query_seconds
from indexing.planning.explanation import explain
from indexing.planning.plan import CandidateRow, Plan
from indexing.planning.trials import Partitioning, Trial, draw_trial_set, graph_trial
from indexing.settings import IndexSettings
from indexing.vector_store import VectorStore
from lookalike.progress import track
from lookalike.records import Effort


def plan_index(store: VectorStore, settings: IndexSettings) -> Plan:
    """Tries every candidate and chooses.

    Costs an exact search of a few hundred queries and a few passes of k-means; memory stays within some 400 MiB.

    Raises:
        SettingsError: `settings.type` names no index type, or one that needs more vectors.
    """
    types = candidate_types(store.num_vectors, store.dim, settings)
    rates = measure_rates(store.dim)
    trials = _try_all(types, store, settings)
    candidates = [_candidate(index_type, trial, store, settings, rates) for index_type, trial in trials]
    chosen = choose(candidates, settings, ram=settings.ram)
    return Plan(
        index_type=chosen.index_type,
        effort=chosen.trial.effort,
        is_reachable=not chosen.broken_wishes(settings, ram=settings.ram),
        table=tuple(_row(candidate, settings) for candidate in candidates),
        explanation=tuple(explain(chosen, candidates, settings)),
        measurements={"rates": rates_to_tree(rates)},
    )


def _try_all(types: Sequence[IndexType], store: VectorStore, settings: IndexSettings) -> list[tuple[IndexType, Trial]]:
    trial_set = draw_trial_set(store, settings) if any(kind.family != "flat" for kind in types) else None
    partitioning: Partitioning | None = None
    tried = []
    for index_type in track(types, total=len(types), description="trying index types", unit="types"):
        if index_type.family == "flat" or trial_set is None:
            trial = Trial(Effort(), 1.0, SearchWork(scanned=float(store.num_vectors)))
        elif index_type.family == "hnsw":
            trial = graph_trial(trial_set, index_type, recall=settings.recall)
        else:
            if partitioning is None or partitioning.num_partitions != index_type.num_partitions:
                partitioning = Partitioning(trial_set, index_type.num_partitions)
            trial = partitioning.trial(
                index_type,
                recall=settings.recall,
                rates=nominal_rates(store.dim),
                in_batches=settings.mode != "single",
            )
        tried.append((index_type, trial))
    return tried


def _candidate(
    index_type: IndexType, trial: Trial, store: VectorStore, settings: IndexSettings, rates: MachineRates
) -> Candidate:
    num_vectors, dim, in_batches = store.num_vectors, store.dim, settings.mode != "single"
    return Candidate(
        index_type=index_type,
        trial=trial,
        memory=memory_bytes(index_type, num_vectors, dim),
        nominal_seconds=query_seconds(index_type, trial.work, dim, nominal_rates(dim), in_batches=in_batches),
        seconds=query_seconds(index_type, trial.work, dim, rates, in_batches=in_batches),
        build_seconds=build_seconds(index_type, num_vectors, dim, rates, settings),
    )


def _row(candidate: Candidate, settings: IndexSettings) -> CandidateRow:
    broken = candidate.broken_wishes(settings, ram=settings.ram)
    return CandidateRow(
        type=candidate.index_type.name,
        memory_bytes=candidate.memory,
        build_seconds=round(candidate.build_seconds, 3),
        milliseconds=round(1000 * candidate.seconds, 4),
        recall=round(candidate.trial.recall, 4),
        effort=candidate.trial.effort,
        remark="misses " + " and ".join(broken) if broken else "",
    )
