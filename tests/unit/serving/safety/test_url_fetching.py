import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from serving.problems import Problem
from serving.safety.url_fetching import IpAddress, PictureFetcher, fetch_picture, is_public, require_harmless_redirect
from serving.settings import UrlFetching

PICTURE = bytes(range(256)) * 40
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes = PICTURE, *, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def local_server(*answers: bytes | Answer) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Gives its port and what it was asked; the n-th connection gets the n-th answer."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        answer = answers[min(len(asked), len(answers)) - 1]
        try:
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(asked[-1], writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


class Names:
    """A resolver that knows some hosts, and counts; a list of answers is given one by one."""

    def __init__(self, **known: str | list[str]) -> None:
        self.known, self.asked = known, 0

    async def __call__(self, host: str, port: int) -> Sequence[IpAddress]:
        self.asked += 1
        found = self.known.get(host.partition(".")[0])
        if found is None:
            raise OSError("unknown host")
        addresses = found if isinstance(found, str) else found[min(self.asked, len(found)) - 1]
        return [ipaddress.ip_address(address) for address in addresses.split()]


def this_machine_only(address: IpAddress) -> bool:
    return str(address) == "127.0.0.1"


async def fetch(url: str, port: int, *, names: Names | None = None, **settings: Any) -> bytes:
    """As in production, but for the one address that local servers listen on."""
    settings = {"hosts": (f"img.example:{port}",), "max_seconds": 5, **settings}
    return await fetch_picture(
        url.format(port=port),
        UrlFetching.model_validate(settings),
        resolver=names or Names(img="127.0.0.1", other="127.0.0.1"),
        is_allowed_address=this_machine_only,
    )


async def refusal(fetching: Awaitable[bytes]) -> str:
    with pytest.raises(Problem) as problem:
        await fetching
    return problem.value.code


URL = "http://img.example:{port}/a.jpg?size=2#top"


class TestWhatIsFetched:
    def test_bytes_come_as_they_are_from_the_address_that_was_checked(self) -> None:
        async def scenario() -> None:
            names = Names(img="127.0.0.1")
            async with local_server(response(Content_Type="text/html")) as (port, asked):
                assert await fetch(URL, port, names=names) == PICTURE
            assert names.asked == 1
            lines = asked[0].decode().split("\r\n")
            assert lines[0] == "GET /a.jpg?size=2 HTTP/1.1"
            assert f"Host: img.example:{port}" in lines

        asyncio.run(scenario())

    def test_the_next_address_is_tried_where_one_is_dead(self) -> None:
        async def scenario() -> None:
            async with local_server(response()) as (port, _):
                settings = UrlFetching(hosts=(f"img.example:{port}",), max_seconds=5)
                # Nothing listens on the other address of this machine.
                names = Names(img="127.0.0.99 127.0.0.1")
                assert (
                    await fetch_picture(
                        URL.format(port=port), settings, resolver=names, is_allowed_address=lambda _: True
                    )
                    == PICTURE
                )

        asyncio.run(scenario())

    def test_redirects_on_the_host_are_followed_and_checked_anew(self) -> None:
        async def scenario() -> None:
            moved = response(b"", status="302 Found", Location="/b.jpg", Connection="close")
            names = Names(img="127.0.0.1")
            async with local_server(moved, moved, response()) as (port, asked):
                assert await fetch(URL, port, names=names) == PICTURE
            assert [request.split()[1] for request in asked] == [b"/a.jpg?size=2", b"/b.jpg", b"/b.jpg"]
            assert names.asked == 3

        asyncio.run(scenario())

    def test_a_certificate_is_checked_against_the_name_not_the_address(self) -> None:
        async def scenario() -> None:
            greetings: list[bytes] = []

            async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                greetings.append(await reader.read(2048))
                writer.close()

            async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                assert await refusal(fetch("https://img.example:{port}/", port)) == "url.unreachable"
            (hello,) = greetings
            assert hello[0] == 22  # a TLS handshake
            assert b"img.example" in hello  # the name that certificates are chosen by and checked against

        assert ssl.HAS_SNI
        asyncio.run(scenario())


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "url",
        [
            "http://other.example:{port}/",
            "http://img.example/",  # port 80 is not the allowed one
            "http://img.example.evil.example:{port}/",
            "http://evil.example:{port}/?http://img.example:{port}/",
            "http://evil.example:{port}\\@img.example:{port}/",
            "http://127.0.0.1:{port}/",
            "http://0x7f.1:{port}/",
            "http://2130706433:{port}/",
            "http://[::1]:{port}/",
            "http://[::ffff:127.0.0.1]:{port}/",
            "http://user@img.example:{port}/",
            "http://user:password@img.example:{port}/",
            "ftp://img.example:{port}/",
            "file:///etc/passwd",
            "gopher://img.example:{port}/",
            "data:image/png;base64,AAAA",
            "//img.example:{port}/",
            "http://",
            "http://img.example:99999/",
            "http://img.example:port/",
            "http://[img.example]/",
            "http://img.example:{port}/\r\nHost: evil",
            "",
            "\0",
            "http://img.example:{port}/" + "a" * 3000,
        ],
    )
    def test_whatever_is_not_on_the_list(self, url: str) -> None:
        async def scenario() -> None:
            async with local_server(response()) as (port, asked):
                assert await refusal(fetch(url, port)) == "url.not_allowed"
            assert not asked

        asyncio.run(scenario())

    def test_everything_as_long_as_no_host_is_allowed(self) -> None:
        assert asyncio.run(refusal(fetch_picture("http://img.example/", UrlFetching()))) == "url.off"

    def test_a_server_of_this_machine_unless_a_test_lets_it(self) -> None:
        async def scenario() -> None:
            async with local_server(response()) as (port, asked):
                for host in ("localhost", "127.0.0.1", "[::1]"):
                    settings = UrlFetching(hosts=(f"{host}:{port}",), max_seconds=5)
                    assert await refusal(fetch_picture(f"http://{host}:{port}/", settings)) == "url.not_allowed"
            assert not asked

        asyncio.run(scenario())

    @pytest.mark.parametrize("addresses", ["10.0.0.1", "93.184.215.14 127.0.0.1", "169.254.169.254", "fd00:ec2::254"])
    def test_an_allowed_name_that_stands_for_an_address_that_is_not_public(self, addresses: str) -> None:
        settings, names = UrlFetching(hosts=("img.example",)), Names(img=addresses)
        fetching = fetch_picture("http://img.example/", settings, resolver=names)
        assert asyncio.run(refusal(fetching)) == "url.not_allowed"

    def test_a_name_that_stands_for_another_address_after_a_redirect(self) -> None:
        async def scenario() -> None:
            moved = response(b"", status="307 Temporary Redirect", Location="/b.jpg", Connection="close")
            async with local_server(moved, response()) as (port, asked):
                names = Names(img=["127.0.0.1", "10.0.0.1"])
                assert await refusal(fetch(URL, port, names=names)) == "url.not_allowed"
                assert len(asked) == 1

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        ("location", "code"),
        [
            ("http://other.example:{port}/", "url.not_allowed"),
            ("http://169.254.169.254/latest/meta-data/", "url.not_allowed"),
            ("//127.0.0.1:{port}/", "url.not_allowed"),
            ("http://img.example:81/", "url.not_allowed"),
            ("file:///etc/passwd", "url.not_allowed"),
            ("http://user@img.example:{port}/", "url.not_allowed"),
            ("http://[", "url.unreachable"),
            (URL, "url.unreachable"),  # for ever
        ],
    )
    def test_a_redirect_elsewhere(self, location: str, code: str) -> None:
        async def scenario() -> None:
            async def lead_on(request: bytes, writer: asyncio.StreamWriter) -> None:
                port = writer.get_extra_info("sockname")[1]
                moved = {"status": "301 Moved", "Location": location.format(port=port), "Connection": "close"}
                writer.write(response(b"", **moved))

            async with local_server(lead_on) as (port, asked):
                settings = {"hosts": (f"img.example:{port}", f"other.example:{port}")}
                found = await refusal(fetch(URL, port, **settings))
                assert found in (code, "url.not_allowed") if location == "http://[" else found == code
                assert len(asked) == (4 if location == URL else 1)

        asyncio.run(scenario())

    def test_a_redirect_from_https_to_http(self) -> None:
        secure, plain = httpx2.URL("https://img.example/a"), httpx2.URL("http://img.example/b")
        require_harmless_redirect(plain, secure)
        require_harmless_redirect(secure, secure)
        with pytest.raises(Problem, match="https to http"):
            require_harmless_redirect(secure, plain)

    def test_what_is_announced_or_turns_out_too_large(self) -> None:
        async def scenario() -> None:
            sent = 0

            async def endless(request: bytes, writer: asyncio.StreamWriter) -> None:
                nonlocal sent
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while sent < 50_000_000:
                    writer.write(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
                    sent += 10_000
                    await writer.drain()

            async with local_server(response(length=10**12), endless) as (port, _):
                assert await refusal(fetch(URL, port, max_bytes=len(PICTURE))) == "url.too_large"
                assert await refusal(fetch(URL, port, max_bytes=len(PICTURE))) == "url.too_large"
            assert sent < 50_000_000
            async with local_server(response()) as (port, _):
                assert len(await fetch(URL, port, max_bytes=len(PICTURE))) == len(PICTURE)
                assert await refusal(fetch(URL, port, max_bytes=len(PICTURE) - 1)) == "url.too_large"

        asyncio.run(scenario())

    def test_compression_does_not_make_it_grow(self) -> None:
        async def scenario() -> None:
            async with local_server(response(b"not gzip", Content_Encoding="gzip")) as (port, asked):
                assert await fetch(URL, port) == b"not gzip"
                assert b"identity" in asked[0]

        asyncio.run(scenario())

    def test_what_comes_slowly_however_busily(self) -> None:
        async def scenario() -> None:
            async def trickle(request: bytes, writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.02)

            async with local_server(trickle) as (port, _):
                started = asyncio.get_running_loop().time()
                assert await refusal(fetch(URL, port, max_seconds=0.3)) == "url.too_slow"
                assert asyncio.get_running_loop().time() - started < 3

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"220 mail.example ESMTP\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
            response(status="404 Not Found"),
            response(status="500 Oh"),
            response(status="302 Found"),
            response(b"abc", length=10),
        ],
    )
    def test_answers_without_a_picture_look_all_the_same(self, answer: bytes) -> None:
        # What runs on a port, or which files there are, is none of the asker's business.
        async def scenario() -> str:
            async with local_server(answer) as (port, _):
                with pytest.raises(Problem) as problem:
                    await fetch(URL, port)
            assert problem.value.code == "url.unreachable"
            return problem.value.detail

        assert asyncio.run(scenario()) == "there is no picture to be had at the address"

    def test_an_unknown_host(self) -> None:
        async def scenario() -> None:
            assert await refusal(fetch(URL, 80, names=Names())) == "url.unreachable"
            assert await refusal(fetch(URL, 80, names=Names(img=""))) == "url.unreachable"

        asyncio.run(scenario())


class TestHosts:
    @pytest.mark.parametrize(
        ("pattern", "url", "fits"),
        [
            ("img.example", "http://img.example/", True),
            ("img.example", "https://IMG.example./", True),
            ("img.example", "http://img.example:8080/", False),
            ("img.example", "http://a.img.example/", False),
            ("*.img.example", "http://a.b.img.example/", True),
            ("*.img.example", "http://img.example/", False),
            ("*.img.example", "http://ximg.example/", False),
            ("*.img.example:8443", "https://a.img.example:8443/", True),
            ("xn--ksbild-bua.example", "http://käsbild.example/", True),
        ],
    )
    def test_patterns(self, pattern: str, url: str, fits: bool) -> None:
        async def unknown(host: str, port: int) -> Sequence[IpAddress]:
            raise OSError

        fetching = fetch_picture(url, UrlFetching(hosts=(pattern,)), resolver=unknown)
        assert asyncio.run(refusal(fetching)) == ("url.unreachable" if fits else "url.not_allowed")


def test_no_more_are_fetched_at_once_than_may_be_and_none_is_kept_for_which_there_is_no_room() -> None:
    running, most, held = 0, 0, 0

    async def slow(url: str, settings: UrlFetching) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return PICTURE

    def hold(num_bytes: int) -> None:
        nonlocal held
        if held + num_bytes > 8 * len(PICTURE):
            raise Problem("server.busy", "full")
        held += num_bytes

    async def scenario() -> list[bytes | BaseException]:
        fetcher = PictureFetcher(UrlFetching(hosts=("img.example",), max_at_once=3), fetch=slow)
        fetching = [fetcher.fetch("http://img.example/", hold=hold) for _ in range(10)]
        return await asyncio.gather(*fetching, return_exceptions=True)

    found = asyncio.run(scenario())
    assert (most, running, held) == (3, 0, 8 * len(PICTURE))
    assert [one.code if isinstance(one, Problem) else "" for one in found] == [""] * 8 + ["server.busy"] * 2


def test_who_gets_no_turn_in_time_is_to_come_again() -> None:
    async def endless(url: str, settings: UrlFetching) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def scenario() -> None:
        settings = UrlFetching(hosts=("img.example",), max_at_once=1, max_seconds=0.05)
        fetcher = PictureFetcher(settings, fetch=endless)
        first = asyncio.create_task(fetcher.fetch("http://img.example/", hold=lambda _: None))
        await asyncio.sleep(0)  # lets it take its turn
        assert await refusal(fetcher.fetch("http://img.example/", hold=lambda _: None)) == "server.busy"
        first.cancel()

    asyncio.run(scenario())


PRIVATE_IPV4 = """0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.9.9.9 169.254.169.254 172.16.0.1 192.0.0.1 192.0.2.1
192.168.1.1 198.18.0.1 203.0.113.7 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255"""
PRIVATE_IPV6 = """:: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2001::1 fc00::1
fd00:ec2::254 fe80::1 fec0::1 ff02::1 2001:db8::1"""


@pytest.mark.parametrize("address", [*PRIVATE_IPV4.split(), *PRIVATE_IPV6.split()])
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
