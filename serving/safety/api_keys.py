"""Who sent a request, whether they may, and how much: before anything of the body is read.

What is public needs no key: the page, the health checks and the OpenAPI document, which tell nothing of the pictures.
Everything else needs `read`; routes that change something add `Depends(requires_scope("write"))`.
"""

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lookalike.errors import SettingsError
from serving.addresses import is_loopback
from serving.problems import Problem
from serving.safety.key_file import KeyRing, KeyScope
from serving.safety.rate_limit import TokenBuckets, retry_after
from serving.settings import ServingSettings

_PUBLIC_PATHS = frozenset({"/", "/livez", "/readyz", "/openapi.json", "/favicon.ico"})
_PUBLIC_FOLDER = "/page/"
_LONGEST_KEY = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    name: str  # of the key; of the address where there is no key
    has_key: bool
    scopes: frozenset[KeyScope]


class Gate:
    """Lets through whoever has a key, where keys are required, and not more often than the rate limit says.

    Without keys, and on a server that only this machine reaches, nobody is counted: whoever is on the machine can use
    up its time in other ways, and evaluation asks as fast as it can.
    """

    def __init__(self, app: ASGIApp, *, settings: ServingSettings, keys: KeyRing | None) -> None:
        self._app, self._keys = app, keys
        self._buckets = TokenBuckets(settings.rate_limit)
        self._counts_addresses = not is_loopback(settings.host)
        self._open_scopes: frozenset[KeyScope] = frozenset({"read", "write"} if settings.allows_writes else {"read"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_public(scope["path"].removeprefix(scope.get("root_path", ""))):
            caller = self._caller(scope)
            scope.setdefault("state", {})["caller"] = caller
            if caller.has_key or self._counts_addresses:
                scope["state"]["buckets"] = self._buckets
                take_tokens(self._buckets, caller, 1)
            _require_scope(caller, "read")
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        address = _network(scope.get("client"))
        if self._keys is None:
            return Caller(address, has_key=False, scopes=self._open_scopes)
        given = _given_key(scope)
        entry = self._keys.find(given) if given is not None and len(given) <= _LONGEST_KEY else None
        if entry is not None:
            return Caller(entry.name, has_key=True, scopes=frozenset(entry.scopes))
        # Whoever tries keys is held up, too.
        take_tokens(self._buckets, Caller(address, has_key=False, scopes=frozenset()), 1)
        if given is None:
            headers = {"WWW-Authenticate": 'Bearer realm="lookalike"'}
            raise Problem("key.missing", "this server wants an API key, the request has none", headers=headers)
        headers = {"WWW-Authenticate": 'Bearer realm="lookalike", error="invalid_token"'}
        raise Problem("key.unknown", "the API key is not one of this server's", headers=headers)


def open_keys(settings: ServingSettings) -> KeyRing | None:
    """The keys that clients need; None where they need none. To be called before anything slow.

    Raises:
        SettingsError: other machines would reach the server, and neither are there keys nor are they waived by name; or
            the key file cannot be read.
    """
    is_local = is_loopback(settings.host)
    requires_keys = settings.requires_keys
    if requires_keys is None:
        requires_keys = settings.keys is not None or not is_local
    if not requires_keys:
        if settings.keys is not None:
            raise SettingsError(f"keys are given ({settings.keys}), but requires_keys is false. Leave one of them out.")
        return None
    if settings.allows_writes:
        raise SettingsError("allows_writes is for servers without keys; give keys the scope `write` instead.")
    if settings.keys is None:
        reached = "" if is_local else f", because other machines reach {settings.host}"
        raise SettingsError(
            f"clients need API keys{reached}, and there are none. Make one (lookalike serve keys add NAME --keys FILE) "
            "and serve with --keys FILE, or let everyone in with --no-keys."
        )
    return KeyRing(settings.keys)


def requires_scope(needed: KeyScope) -> Callable[[Request], Awaitable[Caller]]:
    """For `Depends(...)` of a route: who asks, if they may."""

    async def require(request: Request) -> Caller:
        caller: Caller = request.state.caller
        _require_scope(caller, needed)
        if needed == "write" and not caller.has_key:
            _require_own_origin(request)
        return caller

    return require


def _require_scope(caller: Caller, needed: KeyScope) -> None:
    if needed in caller.scopes:
        return
    if not caller.has_key:
        raise Problem("writes.off", "this server has neither keys nor the setting allows_writes")
    held = " and ".join(sorted(caller.scopes))
    headers = {"WWW-Authenticate": f'Bearer realm="lookalike", error="insufficient_scope", scope="{needed}"'}
    raise Problem("key.lacks_scope", f"key {caller.name!r} is good to {held}, not to {needed}", headers=headers)


def charge(request: Request, num_queries: int) -> None:
    """Counts a batch as so many requests; one of them has been counted when it came.

    Raises:
        Problem: the client has used up what it may ask.
    """
    if num_queries > 1 and hasattr(request.state, "buckets"):
        take_tokens(request.state.buckets, request.state.caller, num_queries - 1)


def take_tokens(buckets: TokenBuckets, caller: Caller, num_tokens: int) -> None:
    """Raises a Problem where `caller` has not as many left."""
    client = ("key " if caller.has_key else "address ") + caller.name
    wait = buckets.take(client, num_tokens)
    if wait > 0:
        detail = f"{client} asks more than this server allows; the next {num_tokens} can come in {wait:.1f} seconds"
        raise Problem("rate.exceeded", detail, headers={"Retry-After": retry_after(wait)})


def _is_public(path: str) -> bool:
    return path in _PUBLIC_PATHS or path.startswith(_PUBLIC_FOLDER)


def _given_key(scope: Scope) -> str | None:
    headers = Headers(scope=scope)
    kind, _, rest = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    # No cookie: browsers send those along with whatever other sites make them ask.
    return headers.get("x-api-key")


def _network(client: tuple[str, int] | None) -> str:
    """The client's address, of IPv6 the network: a single customer has 2^64 addresses."""
    host = client[0] if client else "unknown"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _require_own_origin(request: Request) -> None:
    """Without keys, any website could make the browser of somebody on this machine add and delete pictures."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    is_own = origin is None or origin.partition("://")[2].lower() == request.headers.get("host", "").lower()
    if not is_own or site not in ("none", "same-origin"):
        raise Problem("origin.not_allowed", f"a page of {origin or 'another site'} may not change this gallery")
