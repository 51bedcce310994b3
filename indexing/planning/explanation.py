"""Why a candidate was chosen, in a few lines."""

from collections.abc import Sequence

from indexing.planning.choice import PRICE_OF_EXACTNESS, Candidate, choose
from indexing.settings import IndexSettings

_GIBIBYTE = 1 << 30
_NUM_RUNNERS_UP = 2


def explain(chosen: Candidate, candidates: Sequence[Candidate], settings: IndexSettings) -> list[str]:
    """The grounds, the runners-up, and what one more GiB would buy; or which wish cannot be kept and what could be."""
    broken = chosen.broken_wishes(settings, ram=settings.ram)
    if broken:
        return _unreachable(chosen, candidates, settings)
    lines = [_grounds(chosen, settings)]
    kept = [c for c in candidates if c is not chosen and not c.broken_wishes(settings, ram=settings.ram)]
    if kept:
        runners_up = sorted(kept, key=Candidate.cost)[:_NUM_RUNNERS_UP]
        lines.append("Runners-up: " + "; ".join(_in_short(candidate) for candidate in runners_up) + ".")
    if settings.type == "auto" and len(candidates) > 1:
        lines.append(_one_more_gibibyte(chosen, candidates, settings))
    return lines


def _grounds(chosen: Candidate, settings: IndexSettings) -> str:
    name = chosen.index_type.name
    if settings.type != "auto":
        return f"{name} was asked for."
    if chosen.index_type.family == "flat":
        if settings.mode == "evaluation":
            return "Flat: an evaluation compares every vector and needs no approximation."
        if chosen.is_fast_enough(settings):
            return f"Flat: comparing every vector is exact, and fast enough ({_time(chosen)} per query)."
        return (
            f"Flat: nothing that finds {settings.recall:g} of the exact {settings.at} nearest is "
            f"{PRICE_OF_EXACTNESS:g} times as fast as exact search, {_time(chosen)} per query."
        )
    return (
        f"{name} finds {settings.recall:g} of the exact {settings.at} nearest at the lowest cost "
        "(time, and the fourth root of memory): " + _in_short(chosen).split(": ", 1)[1] + "."
    )


def _one_more_gibibyte(chosen: Candidate, candidates: Sequence[Candidate], settings: IndexSettings) -> str:
    if settings.ram is None:
        larger = [
            c
            for c in candidates
            if not c.broken_wishes(settings, ram=None)
            and chosen.memory < c.memory <= chosen.memory + _GIBIBYTE
            and c.nominal_seconds < chosen.nominal_seconds
        ]
        if not larger:
            return "One more GiB of memory would not make it faster."
        return f"One more GiB of memory could buy {_in_short(min(larger, key=lambda c: c.nominal_seconds))}."
    richer = choose(candidates, settings, ram=settings.ram + _GIBIBYTE)
    if richer is chosen:
        return "One more GiB of memory would not change the choice."
    return f"One more GiB of memory would buy {_in_short(richer)}."


def _unreachable(chosen: Candidate, candidates: Sequence[Candidate], settings: IndexSettings) -> list[str]:
    wishes = [f"recall {settings.recall:g} at {settings.at}"]
    wishes += [f"{settings.ram / 2**20:,.0f} MiB"] if settings.ram is not None else []
    wishes += [f"{settings.latency:g} ms"] if settings.latency is not None else []
    broken = chosen.broken_wishes(settings, ram=settings.ram)
    lines = [
        f"Nothing keeps all wishes ({', '.join(wishes)}).",
        f"Nearest: {_in_short(chosen)}; it misses {' and '.join(broken)}.",
    ]
    remedies = [remedy for wish in ("ram", "latency", "recall") if (remedy := _remedy(wish, candidates, settings))]
    if remedies:
        lines.append("Enough would be any one of: " + ", ".join(remedies) + ". --accept-nearest builds the nearest.")
    return lines


def _remedy(wish: str, candidates: Sequence[Candidate], settings: IndexSettings) -> str | None:
    """The least change of one wish that lets all others be kept."""
    able = [c for c in candidates if set(c.broken_wishes(settings, ram=settings.ram)) == {wish}]
    if not able:
        return None
    if wish == "ram":
        return f"--ram {-(-min(c.memory for c in able) // 2**20)}MiB"
    if wish == "latency":
        return f"--latency {1.05 * min(1000 * c.seconds for c in able):.2g}ms"
    return f"--recall {int(1000 * max(c.trial.recall for c in able)) / 1000:g}"


def _in_short(candidate: Candidate) -> str:
    recall = "exact" if candidate.index_type.family == "flat" else f"recall {candidate.trial.recall:.3f}"
    return f"{candidate.index_type.name}: {recall}, {_time(candidate)}, {candidate.memory / 2**20:,.0f} MiB"


def _time(candidate: Candidate) -> str:
    return f"{1000 * candidate.seconds:.2g} ms"
