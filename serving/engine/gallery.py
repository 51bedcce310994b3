"""Items of the gallery: described, listed in order, picked at random."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from indexing.living.delta import is_among
from indexing.living.live_view import LiveView
from indexing.searching.filtering import matching_rows
from lookalike.filters import Filter
from serving.engine.queries import Item


def item_of(identifier: int, row: Mapping[str, Any], picture: str | None) -> Item:
    """Columns with our names are taken where they hold what we mean; people's own may use the names otherwise."""
    rest = dict(row)

    def taken(name: str, kind: type) -> Any:
        value = rest.get(name)
        return rest.pop(name, None) if value is None or isinstance(value, kind) else None

    return Item(
        identifier,
        taken("key", str),
        taken("class_name", str),
        taken("width", int),
        taken("height", int),
        rest,
        picture,
    )


def ids_after(view: LiveView, after: int, limit: int, condition: Filter | None) -> Int64[ndarray, "items"]:
    """The `limit` lowest ids above `after` whose metadata fit, ascending; reads no more of the index than it needs.

    Raises:
        ValueError: the condition names an unknown column, or compares it with something of another type.
    """
    in_base = view.base.ids() if condition is None else view.base.selection_of(condition).ids
    added = view.delta.ids
    if condition is not None:
        added = added[matching_rows(condition, view.delta.metadata)]
    added = added[np.searchsorted(added, after, side="right") :][:limit]
    kept: list[ndarray] = []
    num_kept, start = 0, int(np.searchsorted(in_base, after, side="right"))
    while num_kept < limit and start < len(in_base):
        block = np.asarray(in_base[start : start + limit])
        kept.append(block[~is_among(block, view.delta.hidden)])
        num_kept, start = num_kept + len(kept[-1]), start + limit
    return np.union1d(np.concatenate([*kept, np.zeros(0, np.int64)]), added)[:limit].astype(np.int64)


def random_ids(view: LiveView, count: int, seed: int) -> Int64[ndarray, "items"]:
    """Different ids in random order; all of them where there are fewer than `count`."""
    in_base, hidden, added = view.base.ids(), view.delta.hidden, view.delta.ids
    total = len(in_base) + len(added)
    # As many more as could turn out not to be here any more.
    size = min(total, count + len(hidden))
    places = np.random.default_rng(seed).choice(total, size=size, replace=False)
    is_added = places >= len(in_base)
    ids = np.empty(len(places), np.int64)
    ids[is_added] = added[places[is_added] - len(in_base)]
    of_base = np.asarray(in_base[places[~is_added]])
    ids[~is_added] = of_base
    is_here = is_added.copy()
    is_here[~is_added] = ~is_among(of_base, hidden)
    return ids[is_here][:count]
