"""How hits are re-ranked; imports neither torch nor faiss.

Defaults gain a little where a query has a handful of relevant pictures, and harm none much: `benchmarks/rerank.py`
measures them on such a collection beside the papers' values, which were chosen where there are dozens or hundreds.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError

from lookalike.errors import SettingsError
from lookalike.settings import Settings

LONGEST_SHORTLIST = 2000
MOST_NEIGHBOURS = 1000
Shortlist = Annotated[int, Field(ge=1, le=LONGEST_SHORTLIST)]
Neighbours = Annotated[int, Field(ge=1, le=MOST_NEIGHBOURS)]


class AverageQueryExpansion(Settings):
    """Searches again with the mean of the query and its first hits (Chum 2007)."""

    name: Literal["average_query_expansion"] = "average_query_expansion"
    """Which method."""
    num_neighbours: Neighbours = 1
    """First hits that join the query: as many as are surely right. 10 is usual for landmarks."""


class AlphaQueryExpansion(Settings):
    """Searches again with the query and its first hits, weighted by similarity (Radenović 2018)."""

    name: Literal["alpha_query_expansion"] = "alpha_query_expansion"
    """Which method."""
    num_neighbours: Neighbours = 3
    """First hits that join the query; 50 in the paper."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Weights are similarities to this power; 0 weighs all alike, 3 in the paper."""


class DatabaseAugmentation(Settings):
    """Compares the query with each hit's mean over its own neighbours (Arandjelović 2012)."""

    name: Literal["database_augmentation"] = "database_augmentation"
    """Which method."""
    shortlist: Shortlist = 100
    """First hits that are re-ranked; each of them is searched with once."""
    num_neighbours: Neighbours = 1
    """Neighbours of a hit that join it, with evenly falling weights; 20 in the paper of the weights."""


class KReciprocal(Settings):
    """Prefers hits that share their mutual neighbours with the query (Zhong 2017)."""

    name: Literal["k_reciprocal"] = "k_reciprocal"
    """Which method."""
    shortlist: Shortlist = 100
    """First hits that are re-ranked, and among which neighbours are looked for."""
    num_neighbours: PositiveInt = 5
    """Two pictures are mutual neighbours where each is among so many nearest of the other; k1 = 20 in the paper."""
    num_averaged: PositiveInt = 2
    """Nearest pictures, itself one of them, over which a picture's neighbourhood is averaged; k2 = 6 in the paper."""
    cosine_share: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Weight of the cosine in the new score, beside the overlap of neighbourhoods; lambda = 0.3 in the paper."""


class Diffusion(Settings):
    """Ranks by a random walk from the query's first hits over the graph of mutual neighbours (Iscen 2017)."""

    name: Literal["diffusion"] = "diffusion"
    """Which method."""
    shortlist: Shortlist = 200
    """First hits that are re-ranked: the nodes of the graph."""
    num_neighbours: PositiveInt = 10
    """Edges join pictures each of which is among so many nearest of the other; 50 in the paper."""
    num_seeds: PositiveInt = 5
    """First hits from which the walk starts; 10 in the paper."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Probability to walk on; with the rest the walk starts anew. 0.99 in the paper."""
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Edges weigh similarities to this power; 3 in the paper."""


RerankSettings = Annotated[
    AverageQueryExpansion | AlphaQueryExpansion | DatabaseAugmentation | KReciprocal | Diffusion,
    Field(discriminator="name"),
]
METHODS: tuple[type[Settings], ...] = (
    AverageQueryExpansion,
    AlphaQueryExpansion,
    DatabaseAugmentation,
    KReciprocal,
    Diffusion,
)
METHOD_NAMES = tuple(str(method.model_fields["name"].default) for method in METHODS)


def parse_rerank(method: str | dict[str, Any]) -> RerankSettings:
    """A method's name, which stands for its defaults, or its settings as a tree with `name`.

    Raises:
        SettingsError: there is no such method, or a setting is refused.
    """
    try:
        return read_rerank({"name": method} if isinstance(method, str) else method)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise SettingsError(f"rerank: {'; '.join(lines)}.") from None


def read_rerank(tree: Mapping[str, Any]) -> RerankSettings:
    """The settings of the method that the tree's `name` says; raises ValidationError, which says what there is."""
    method = next((one for one in METHODS if one.model_fields["name"].default == tree.get("name")), None)
    if method is None:
        raise _refusal("name", f"must be one of {', '.join(METHOD_NAMES)}")
    known = list(method.model_fields)
    for name in tree:
        if name not in known:
            raise _refusal(name, f"there is no such setting; {tree['name']} has {', '.join(known[1:])}")
    settings: Any = method.model_validate(tree, strict=True)
    return settings


def _refusal(field: str, message: str) -> ValidationError:
    error = PydanticCustomError("rerank", "{message}", {"message": message})
    return ValidationError.from_exception_data("rerank", [{"type": error, "loc": (field,), "input": None}])
