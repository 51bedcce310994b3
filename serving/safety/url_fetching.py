"""Gets a picture that a search names by address, without being sent where the server alone may go.

A server that fetches what strangers name can be made to ask its own network: a database without password, the address
at which clouds tell a machine its credentials. So hosts are allowed by name, a name must stand for public addresses
only, and the connection goes to the very address that was checked: looked up twice, a name may stand for another one.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx2

from serving.problems import Problem
from serving.settings import UrlFetching

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[IpAddress]]]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_URL = 2_048
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# IPv6 addresses that a gateway turns into IPv4 ones, of whatever network: NAT64, 6to4, Teredo.
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
# All that is given out so far; site-local addresses, which are not, pass for global ones elsewhere.
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_HEADERS = {
    "User-Agent": "lookalike",
    "Accept": "image/*",
    # Compressed bodies would be counted before they grow; pictures are compressed already.
    "Accept-Encoding": "identity",
}


def is_public(address: IpAddress) -> bool:
    """Whether anyone on the internet reaches this address, as opposed to this machine or its network."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in _TRANSLATED):
            return False
        if address not in _PUBLIC_IPV6:
            return False
    return address.is_global and not address.is_multicast


async def resolve(host: str, port: int) -> Sequence[IpAddress]:
    """The addresses of a host, by the system's own means; raises OSError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


async def fetch_picture(
    url: str,
    settings: UrlFetching,
    *,
    resolver: Resolver = resolve,
    is_allowed_address: Callable[[IpAddress], bool] = is_public,
) -> bytes:
    """The bytes at an address; whether they are a picture is for the decoder to tell, whatever the server calls them.

    Args:
        resolver, is_allowed_address: For tests, which have local servers only.

    Raises:
        Problem: `url.off`, `url.not_allowed`, `url.unreachable`, `url.too_large` or `url.too_slow`. What a server
            answered is not told, so that nobody learns from it what runs where.
    """
    if not settings.hosts:
        raise Problem("url.off", "this server fetches no pictures from addresses")
    try:
        async with asyncio.timeout(settings.max_seconds):
            return await _follow(_parsed(url), settings, resolver, is_allowed_address)
    except TimeoutError:
        raise Problem("url.too_slow", f"the picture did not come within {settings.max_seconds:g} seconds") from None


class PictureFetcher:
    """Fetches for all requests of a process, some at a time."""

    def __init__(self, settings: UrlFetching, *, fetch: Callable[..., Awaitable[bytes]] = fetch_picture) -> None:
        self._settings, self._fetch = settings, fetch
        self._places = asyncio.Semaphore(settings.max_at_once)

    async def fetch(self, url: str, *, hold: Callable[[int], None]) -> bytes:
        """As `fetch_picture`.

        Args:
            hold: Told how many bytes the request keeps from now on; raises a Problem where these are too many.

        Raises:
            Problem: also `server.busy`, where the others leave no room.
        """
        if not self._settings.hosts:
            return await self._fetch(url, self._settings)  # refuses it at once
        try:
            async with asyncio.timeout(self._settings.max_seconds):
                await self._places.acquire()
        except TimeoutError:
            detail = f"{self._settings.max_at_once} other pictures are being fetched"
            raise Problem("server.busy", detail, headers={"Retry-After": "1"}) from None
        try:
            picture = await self._fetch(url, self._settings)
            hold(len(picture))
        finally:
            self._places.release()
        return picture


async def _follow(
    url: httpx2.URL, settings: UrlFetching, resolver: Resolver, is_allowed_address: Callable[[IpAddress], bool]
) -> bytes:
    # The environment's proxies would look names up again, out of our sight.
    async with httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=settings.max_seconds) as client:
        for _ in range(settings.max_redirects + 1):
            _require_allowed_host(url, settings)
            addresses = await _checked_addresses(url, resolver, is_allowed_address)
            found = await _get(client, url, addresses, settings.max_bytes)
            if isinstance(found, bytes):
                return found
            # Each redirect is checked as the first address was, too: the host may stand for another address by now.
            require_harmless_redirect(url, found)
            url = found
    raise Problem("url.unreachable", f"the address leads on more than {settings.max_redirects} times")


def require_harmless_redirect(here: httpx2.URL, there: httpx2.URL) -> None:
    """Raises a Problem where `there` is another host, or where it can be read and changed on the way, unlike `here`."""
    if there.host != here.host:
        raise Problem("url.not_allowed", "the address leads to another host")
    if here.scheme == "https" and there.scheme != "https":
        raise Problem("url.not_allowed", "the address leads from https to http")


def _parsed(text: str) -> httpx2.URL:
    if len(text) > _LONGEST_URL:
        raise Problem("url.not_allowed", f"the address is longer than {_LONGEST_URL} characters")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise Problem("url.not_allowed", "the address is malformed") from error
    if url.scheme not in _DEFAULT_PORTS or not url.host:
        raise Problem("url.not_allowed", "the address is not http:// or https:// and a host")
    if url.userinfo:
        raise Problem("url.not_allowed", "the address holds a user name or password")
    return url


def _port(url: httpx2.URL) -> int:
    return url.port or _DEFAULT_PORTS[url.scheme]


def _require_allowed_host(url: httpx2.URL, settings: UrlFetching) -> None:
    # `raw_host` is what is asked for in DNS: lower case, and letters of other scripts as punycode.
    host, port = url.raw_host.decode("ascii").rstrip("."), _port(url)
    if not any(_fits(host, port, pattern.lower()) for pattern in settings.hosts):
        raise Problem("url.not_allowed", f"this server fetches nothing from {host[:253]}, port {port}")


def _fits(host: str, port: int, pattern: str) -> bool:
    name, colon, number = pattern.rpartition(":")
    if not (colon and number.isdecimal() and "]" not in number):
        name, number = pattern, ""
    if (port != int(number)) if number else (port not in _DEFAULT_PORTS.values()):
        return False
    return host.endswith(name[1:]) and host != name[2:] if name.startswith("*.") else host == name.strip("[]")


async def _checked_addresses(
    url: httpx2.URL, resolver: Resolver, is_allowed_address: Callable[[IpAddress], bool]
) -> Sequence[IpAddress]:
    try:
        addresses = await resolver(url.raw_host.decode("ascii"), _port(url))
    except (OSError, UnicodeError) as error:
        raise Problem("url.unreachable", "the host of the address is unknown") from error
    if not addresses:
        raise Problem("url.unreachable", "the host of the address is unknown")
    # One that is not public is enough: nobody mixes them with good intent.
    if not all(map(is_allowed_address, addresses)):
        raise Problem("url.not_allowed", "the host of the address is not on the public internet")
    return addresses


async def _get(
    client: httpx2.AsyncClient, url: httpx2.URL, addresses: Sequence[IpAddress], max_bytes: int
) -> bytes | httpx2.URL:
    """The body, or the address that it has moved to."""
    # The connection is made to the address; the host is named to the server, and its certificate is checked against it.
    host = url.raw_host.decode("ascii")
    headers = {**_HEADERS, "Host": url.netloc.decode("ascii")}
    for address in dict.fromkeys(addresses):
        pinned = url.copy_with(host=str(address), fragment=None)
        request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": host})
        try:
            response = await client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            continue
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _unreachable() from error
        try:
            return await _body_or_next(response, url, max_bytes)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise _unreachable() from error
        finally:
            await response.aclose()
    raise _unreachable()


async def _body_or_next(response: httpx2.Response, url: httpx2.URL, max_bytes: int) -> bytes | httpx2.URL:
    if response.status_code in _REDIRECTS and "location" in response.headers:
        try:
            return _parsed(str(url.join(response.headers["location"])))
        except (httpx2.InvalidURL, ValueError) as error:
            raise _unreachable() from error
    if response.status_code != 200:
        raise _unreachable()
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    # Raw: a body that came compressed all the same does not grow.
    async for part in response.aiter_raw():
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _unreachable() -> Problem:
    return Problem("url.unreachable", "there is no picture to be had at the address")


def _too_large(max_bytes: int) -> Problem:
    return Problem("url.too_large", f"the picture has more than {max_bytes} bytes")
