"""A typed client of a running server's HTTP API, blocking (`ApiClient`) or for asyncio (`AsyncApiClient`).

Both take their requests (`calls`), their patience and the reading of answers (`exchange`) from the same functions, and
differ only in how they wait. Fields of answers are described in the server's OpenAPI document; those that a newer
server adds are ignored. Imports no torch.
"""

from lookalike.api_client.asynchronous import AsyncApiClient
from lookalike.api_client.blocking import ApiClient
from lookalike.api_client.exchange import ApiClientSettings, ApiProblem
from lookalike.api_client.queries import QueryPart, SearchQuery

__all__ = ["ApiClient", "ApiClientSettings", "ApiProblem", "AsyncApiClient", "QueryPart", "SearchQuery"]
