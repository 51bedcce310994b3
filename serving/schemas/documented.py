"""Models that the OpenAPI document refers to by name only, because routes read and write them themselves."""

from typing import Literal

from pydantic import BaseModel

from serving.schemas.indexes import SwapRequest
from serving.schemas.items import NewItem, NewItemForm, ReplacingItem, ReplacingItemForm
from serving.schemas.problems import ProblemDetails
from serving.schemas.search import BatchRequest, SearchForm, SearchRequest

DOCUMENTED_MODELS: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
    (SearchRequest, "validation"),
    (SearchForm, "validation"),
    (BatchRequest, "validation"),
    (NewItem, "validation"),
    (NewItemForm, "validation"),
    (ReplacingItem, "validation"),
    (ReplacingItemForm, "validation"),
    (SwapRequest, "validation"),
    (ProblemDetails, "serialization"),
]
