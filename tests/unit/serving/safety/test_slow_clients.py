"""Against a real server on a real port: what slow, greedy and broken connections can do to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from serving.middleware import BodyLimit, RequestEnvelope
from serving.problems import add_problem_handlers
from serving.safety.slow_clients import guarded_protocol
from serving.settings import ServingLimits

# Short, so that the tests are; the server's clock is the real one. What must not happen is given several times as long.
WAIT, BODY = 0.4, 0.6
LIMITS = ServingLimits(
    max_wait_seconds=WAIT,
    max_body_seconds=BODY,
    max_body_bytes=1 << 20,
    max_bytes_at_once=3 << 19,
    max_connections=8,
)
_ANSWER = b"x" * (8 << 20)  # more than all buffers on the way hold


def small_app(left: list[str]) -> FastAPI:
    app = FastAPI()
    add_problem_handlers(app)

    @app.get("/short")
    async def short() -> str:
        return "short"

    @app.api_route("/slow", methods=["GET", "POST"])
    async def slow() -> str:
        await asyncio.sleep(3 * WAIT)
        return "slow"

    @app.get("/long")
    async def long() -> Response:
        return Response(_ANSWER)

    @app.post("/own_reader")
    async def own_reader(request: Request) -> int:
        try:
            return len(await request.body())
        except BaseException as error:
            left.append(type(error).__name__)
            raise

    @app.post("/framework_reader")
    async def framework_reader(values: list[int]) -> int:
        return len(values)

    @app.post("/no_reader", status_code=403)
    async def no_reader() -> str:
        return "refused"

    app.add_middleware(
        BodyLimit,
        max_bytes=LIMITS.max_body_bytes,
        max_seconds=LIMITS.max_body_seconds,
        max_bytes_at_once=LIMITS.max_bytes_at_once,
    )
    app.add_middleware(RequestEnvelope)
    return app


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def trickle(self, data: bytes) -> None:
        """Sends a byte at a time, for as long as the server listens."""
        try:
            for position in range(len(data)):
                self.writer.write(data[position : position + 1])
                await self.writer.drain()
                await asyncio.sleep(WAIT / 10)
        except ConnectionError:
            pass

    async def answer(self) -> tuple[int, Any]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await self.reader.readexactly(length)
        return int(head.split()[1]), json.loads(body)

    async def rest(self, *, within: float) -> bytes:
        """All that still comes; fails where the server has not ended the connection by then."""
        async with asyncio.timeout(within):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def is_cut_off(self, *, within: float = 10 * WAIT) -> bool:
        return await self.rest(within=within) == b""


@dataclass
class Served:
    server: uvicorn.Server
    left: list[str]  # kinds of errors that readers of bodies ended with
    clients: list[Client] = field(default_factory=list)

    async def connect(self, first: bytes = b"") -> Client:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26))
        self.clients.append(client)
        client.writer.write(first)
        return client

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections

    @property
    def tasks(self) -> set[Any]:
        return self.server.server_state.tasks


@asynccontextmanager
async def running_server() -> AsyncIterator[Served]:
    left: list[str] = []
    config = uvicorn.Config(
        small_app(left), port=0, log_config=None, http=guarded_protocol(LIMITS), ws="none", timeout_keep_alive=60
    )
    served = Served(uvicorn.Server(config), left)
    serving = asyncio.create_task(served.server.serve())
    while not served.server.started:
        await asyncio.sleep(0.01)
    try:
        yield served
    finally:
        for client in served.clients:
            client.writer.transport.abort()
        served.server.should_exit = True
        await serving


def post(path: str, length: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


GET = b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("start", [b"", b"GET /short HTTP/1.1\r\nX-A: "])
def test_headers_that_do_not_come_end_the_connection(start: bytes) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            silent = await served.connect(start)
            busy = await served.connect(start)
            trickling = asyncio.create_task(busy.trickle(b"GET /short HTTP/1.1\r\nX: " + b"y" * 1000))
            assert await silent.is_cut_off()
            assert await busy.is_cut_off()
            await trickling
            assert not served.connections

    run(scenario())


def test_headers_without_end_are_cut_off() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(b"GET /short HTTP/1.1\r\n" + b"X-A: y\r\n" * 100_000)
            status, problem = await client.answer()
            assert (status, problem["code"]) == (400, "request.malformed")
            await client.is_cut_off()

    run(scenario())


_CHUNKED = post("/own_reader", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "start",
    [GET % b"slow" + b"GET /short HTTP/1.1\r\nX-A: ", _CHUNKED + b"0\r\nX-A: ", _CHUNKED + b"1;a="],
    ids=["sent ahead", "trailer", "extension of a chunk"],
)
def test_headers_without_end_are_cut_off_while_a_request_is_answered(start: bytes) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(start)
            await asyncio.sleep(WAIT / 8)  # The first request runs.
            client.writer.write(b"y" * (16 << 20))
            status, problem = await client.answer()
            assert (status, problem["code"]) == (400, "request.malformed")
            await client.is_cut_off()

    run(scenario())


@pytest.mark.parametrize(("num_ahead", "is_allowed"), [(60, True), (1000, False)])
def test_only_so_many_requests_are_sent_ahead(num_ahead: int, is_allowed: bool) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(GET % b"slow" + GET % b"short" * num_ahead)
            if is_allowed:
                answers = [(await client.answer())[1] for _ in range(1 + num_ahead)]
                assert answers == ["slow"] + ["short"] * num_ahead
            else:
                assert (await client.answer())[1]["code"] == "request.malformed"
                await client.is_cut_off()

    run(scenario())


def test_a_body_that_nobody_reads_waits_at_the_client() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(_CHUNKED.replace(b"own_reader", b"slow") + b"4000000\r\n" + b"1" * (64 << 20))
            await asyncio.sleep(WAIT)
            [connection] = served.connections
            assert 0 < len(connection.cycle.body) < 1 << 20
            assert await client.answer() == (200, "slow")

    run(scenario())


def test_a_request_that_is_worked_on_is_waited_for_and_the_next_one_has_its_own_time() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect()
            for path, answer in ((b"slow", "slow"), (b"short", "short"), (b"slow", "slow")):
                client.writer.write(GET % path)
                assert await client.answer() == (200, answer)
                await asyncio.sleep(WAIT / 2)
            # Sent ahead: while the first is answered, the second has begun already.
            client.writer.write(GET % b"short" + GET % b"slow")
            assert [(await client.answer())[1] for _ in range(2)] == ["short", "slow"]
            assert await client.is_cut_off()

    run(scenario())


@pytest.mark.parametrize("path", ["/own_reader", "/framework_reader"])
@pytest.mark.parametrize("is_busy", [False, True])
def test_a_body_that_does_not_come_is_a_problem_and_ends_the_connection(path: str, is_busy: bool) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(post(path, 1000) + b"[1,")
            trickling = asyncio.create_task(client.trickle(b"1," * 400 if is_busy else b""))
            status, problem = await client.answer()
            assert (status, problem["code"]) == (408, "body.too_slow")
            assert await client.is_cut_off()
            await trickling
            assert not served.tasks

    run(scenario())


@pytest.mark.parametrize("path", ["/own_reader", "/framework_reader"])
def test_a_body_without_end_is_a_problem_and_ends_the_connection(path: str) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            head = post(path, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            client = await served.connect(head + b"10000\r\n%s\r\n" % (b"1" * 65536) * 1)
            client.writer.write(b"10000\r\n%s\r\n" % (b"1" * 65536) * 20)
            status, problem = await client.answer()
            assert (status, problem["code"]) == (413, "body.too_large")
            await client.rest(within=10 * WAIT)

    run(scenario())


def test_bodies_that_are_too_much_together_are_turned_away() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            length = 1 << 20
            most = b" " * (length - 1)
            first = await served.connect(post("/framework_reader", length) + most)
            await asyncio.sleep(BODY / 4)  # It is read by then, and not yet too slow.
            second = await served.connect(post("/own_reader", length) + most)
            status, problem = await second.answer()
            assert (status, problem["code"]) == (503, "server.busy")
            await second.rest(within=10 * WAIT)
            # Neither it nor what was refused counts once it is over.
            assert (await first.answer())[1]["code"] == "body.too_slow"
            await first.rest(within=10 * WAIT)
            third = await served.connect(post("/own_reader", length) + most + b"1")
            assert await third.answer() == (200, length)

    run(scenario())


def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(post("/no_reader", 1000))
            trickling = asyncio.create_task(client.trickle(b"1" * 1000))
            assert await client.answer() == (403, "refused")
            assert await client.is_cut_off()
            await trickling

    run(scenario())


def test_a_client_that_leaves_within_its_body_is_let_go() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(post("/own_reader", 1000) + b"[1,")
            while not served.tasks:
                await asyncio.sleep(0.01)
            client.writer.close()
            async with asyncio.timeout(BODY / 2):
                while served.tasks:
                    await asyncio.sleep(0.01)
            assert served.left == ["ClientDisconnect"]

    run(scenario())


def test_an_answer_that_is_not_taken_ends_the_connection() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(GET % b"long")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(10 * WAIT):
                while not served.connections:
                    await asyncio.sleep(0.01)
                while served.connections:
                    await asyncio.sleep(0.01)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert len(await client.rest(within=WAIT)) < len(_ANSWER)

    run(scenario())


def test_an_answer_that_is_taken_slowly_but_steadily_comes_whole() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(GET % b"long")
            await client.reader.readuntil(b"\r\n\r\n")
            started = asyncio.get_running_loop().time()
            for part in range(16):
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await asyncio.sleep(WAIT / 4)
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                assert len(await client.reader.readexactly(len(_ANSWER) // 16)) == len(_ANSWER) // 16, part
            assert asyncio.get_running_loop().time() - started > 3 * WAIT

    run(scenario())


def test_more_connections_than_allowed_are_turned_away() -> None:
    async def scenario() -> None:
        async with running_server() as served:
            clients = [await served.connect(GET % b"slow") for _ in range(LIMITS.max_connections)]
            await asyncio.sleep(0.05)
            status, problem = await (await served.connect(GET % b"short")).answer()
            assert (status, problem["code"]) == (503, "server.busy")
            assert [await client.answer() for client in clients] == [(200, "slow")] * len(clients)
            for client in clients:
                client.writer.close()
            await asyncio.sleep(0.05)
            assert await (await served.connect(GET % b"short")).answer() == (200, "short")

    run(scenario())


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTPS\r\n\r\n",
        b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /short HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /own_reader HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /short HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_problem(noise: bytes) -> None:
    async def scenario() -> None:
        async with running_server() as served:
            client = await served.connect(noise)
            answer = await client.rest(within=10 * WAIT)
            if answer:
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 ")
                assert b"application/problem+json" in head
                assert json.loads(body)["code"] == "request.malformed"
            assert await (await served.connect(GET % b"short")).answer() == (200, "short")

    run(scenario())
