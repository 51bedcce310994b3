"""What can be searched by, and how it is written."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Numbers = Float[ndarray, "numbers"] | Sequence[int | float]
JsonObject = Mapping[str, Any]
Extra = Literal["metadata", "vector", "timings"]

_KINDS = ("image", "url", "id", "vector")


@dataclass(frozen=True, slots=True, eq=False)
class QueryPart:
    """One of several things that are searched by together: exactly one of `image`, `url`, `id` and `vector`."""

    image: bytes | None = None  # a picture file
    url: str | None = None  # where a picture is, for servers that fetch some
    id: int | None = None  # a picture of the index
    vector: Numbers | None = None  # an embedding made by the index's encoder
    roi: Numbers | None = None  # with image or url: left, top, right and bottom in pixels of the upright picture
    weight: float = 1.0  # below 0: an example of what is not wanted

    def __post_init__(self) -> None:
        _require_one(_given(self, _KINDS), "image, url, id and vector")
        _require_fitting_region(self)


@dataclass(frozen=True, slots=True, eq=False)
class SearchQuery:
    """One search, see `ApiClient.search`; ValueError where it cannot be meant."""

    image: bytes | None = None
    url: str | None = None
    id: int | None = None
    vector: Numbers | None = None
    roi: Numbers | None = None
    parts: Sequence[QueryPart] | None = None
    k: int = 10
    exact: bool = False
    recall: float | None = None
    filter: JsonObject | None = None
    rerank: str | JsonObject | None = None
    include_self: bool = False
    include: Sequence[Extra] | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        _require_one(_given(self, (*_KINDS, "parts")), "image, url, id, vector and parts")
        _require_fitting_region(self)
        if self.include_self and self.id is None and all(part.id is None for part in self.parts or ()):
            raise ValueError("include_self has a meaning only with id")

    def tree(self) -> dict[str, Any]:
        """As JSON, pictures in base64."""
        tree = _tree_of(self)
        if self.parts is not None:
            tree["parts"] = [{**_tree_of(part), "weight": part.weight} for part in self.parts]
        return tree | self._how()

    def content(self) -> dict[str, Any]:
        """Arguments of httpx2's `request`: a form where there are pictures, which are then sent as they are."""
        files: dict[str, tuple[str, bytes]] = {}
        fields: dict[str, Any] = {}
        if self.image is not None:
            files["image"] = ("image", self.image)
            if self.roi is not None:
                fields["roi"] = ",".join(map(repr, finite_numbers(self.roi, name="roi")))
        elif any(part.image is not None for part in self.parts or ()):
            trees = []
            for place, part in enumerate(self.parts or ()):
                tree = {**_tree_of(part, without_image=True), "weight": part.weight}
                if part.image is not None:
                    tree["image"] = f"image{place}"
                    files[tree["image"]] = (tree["image"], part.image)
                trees.append(tree)
            fields["parts"] = json.dumps(trees)
        else:
            return {"json": self.tree()}
        how = {name: _form_value(name, value) for name, value in self._how().items()}
        return {"files": files, "data": fields | how}

    def _how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"k": self.k, "exact": self.exact}
        for name in ("recall", "filter", "rerank", "version"):
            if getattr(self, name) is not None:
                how[name] = getattr(self, name)
        if self.include_self:
            how["include_self"] = True
        if self.include is not None:
            how["include"] = list(self.include)
        return how


def finite_numbers(values: Numbers, *, name: str) -> list[float]:
    """Raises ValueError for what is no list of finite numbers."""
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, found an array of shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return numbers.tolist()


def written_vector(values: Numbers) -> str | list[float]:
    """float32 values in base64, which is shorter than numbers in JSON and as exact; others as numbers."""
    numbers = finite_numbers(values, name="vector")
    if isinstance(values, ndarray) and values.dtype == np.float32:
        return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return numbers


def written_picture(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def _tree_of(query: QueryPart | SearchQuery, *, without_image: bool = False) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    if query.image is not None and not without_image:
        tree["image"] = written_picture(query.image)
    if query.url is not None:
        tree["url"] = query.url
    if query.id is not None:
        tree["id"] = int(query.id)
    if query.vector is not None:
        tree["vector"] = written_vector(query.vector)
    if query.roi is not None:
        tree["roi"] = finite_numbers(query.roi, name="roi")
    return tree


def _form_value(name: str, value: Any) -> Any:
    if name == "include":
        return ",".join(value)
    return json.dumps(value) if isinstance(value, Mapping) else value


def _given(query: QueryPart | SearchQuery, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(query, name) is not None]


def _require_one(given: list[str], names: str) -> None:
    if len(given) != 1:
        raise ValueError(f"give exactly one of {names}; found {' and '.join(given) or 'none'}")


def _require_fitting_region(query: QueryPart | SearchQuery) -> None:
    if query.roi is not None and query.image is None and query.url is None:
        raise ValueError("roi has a meaning only with image or url")
