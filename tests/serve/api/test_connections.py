"""Connections on a real socket: limits, timeouts and invalid HTTP."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from uvicorn.server import ServerState

from skyloom.serve.api.connections import Connection, Connections, ConnectionTimeouts, _network
from skyloom.serve.main import _bind

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n"
SOON = 0.1


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Tests reach this machine, and no other."""
    connect = socket.socket.connect

    def reach(self, address):
        assert str(address[0]).startswith("127."), f"a test tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", reach)


@dataclass
class App:
    """ASGI application that reads a body once `may_read` is set.

    It responds with the length of the body, or with `answer`.
    """

    may_read: asyncio.Event = field(default_factory=asyncio.Event)
    reads: bool = True
    answer: bytes | None = None
    pieces: int = 1

    async def __call__(self, scope, receive, send) -> None:
        read, more = 0, self.reads
        if self.reads:
            await self.may_read.wait()
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            read, more = read + len(message["body"]), message["more_body"]
        content = self.answer or str(read).encode()
        length = str(len(content) * self.pieces).encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
        )
        for number in range(self.pieces):
            await send(
                {
                    "type": "http.response.body",
                    "body": content,
                    "more_body": number + 1 < self.pieces,
                }
            )


@dataclass
class Edge:
    """A running server with the protocol under test."""

    app: App
    table: Connections
    port: int

    async def open(self, content: bytes = b"", source: str = "127.0.0.1"):
        """Open a connection and send `content`."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, local_addr=(source, 0)
        )
        writer.write(content)
        await writer.drain()
        return reader, writer

    async def send(self, content: bytes) -> bytes:
        """Send `content` and return what is received until the server closes the connection."""
        reader, writer = await self.open(content)
        received = await to_end(reader)
        writer.close()
        return received


async def to_end(reader: asyncio.StreamReader) -> bytes:
    """Return what is received until the connection ends."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65_536):
            received += piece
    return received


async def until(holds) -> None:
    """Wait until a condition holds."""
    while not holds():
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def edge(total: int = 100, per_address: int = 100, **times: float) -> AsyncIterator[Edge]:
    """Run a server; its application may read bodies at once."""
    app, table = App(), Connections(total, per_address, ConnectionTimeouts(**times))
    app.may_read.set()
    config = uvicorn.Config(
        app, ws="none", lifespan="off", log_config=None, h11_max_incomplete_event_size=65_536
    )
    config.load()
    loop, state = asyncio.get_running_loop(), ServerState()
    listener = _bind("127.0.0.1", 0)
    server = await loop.create_server(
        lambda: Connection(table, config=config, server_state=state, app_state={}, _loop=loop),
        sock=listener,
    )
    try:
        yield Edge(app, table, listener.getsockname()[1])
    finally:
        server.close()
        for one in list(table._open):
            one.abort()
        await until(lambda: not len(table) and not state.tasks)


def error_of(response: bytes) -> tuple[int, str]:
    """Return status and code of an error response, and check its headers."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"x-request-id: req_" in head
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_accepted_connections_send_at_once():
    async def run():
        async with edge() as server:
            _, writer = await server.open()
            await until(lambda: len(server.table) == 1)
            accepted = next(iter(server.table._open)).transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"GET /heal", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: "])
def test_an_incomplete_head_times_out_with_408(sent):
    async def run():
        async with edge(head=SOON) as server:
            return await server.send(sent)

    assert error_of(asyncio.run(run())) == (408, "request_timeout")


def test_a_silent_connection_is_closed_without_response():
    async def run():
        async with edge(head=SOON) as server:
            return await server.send(b"")

    assert asyncio.run(run()) == b""


@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nx-a: ", POST])
def test_slow_heads_and_bodies_time_out_also_after_a_good_request(before, start):
    """Bytes keep coming until the server closes the connection."""

    async def run():
        async with edge(head=SOON, body=SOON) as server:
            reader, writer = await server.open(before)
            if before:
                await reader.readuntil(b"\r\n\r\n0")
            writer.write(start)
            end = asyncio.create_task(to_end(reader))
            while not end.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"a")
                    await writer.drain()
                await asyncio.sleep(0.01)
            writer.close()
            return end.result()

    assert error_of(asyncio.run(run())) == (408, "request_timeout")


def test_a_body_earns_time_by_its_bytes():
    """Timeout of 50 s, plus one second for each 1,000 of 100,000 bytes."""

    async def run():
        async with edge(body=50.0, body_rate=1_000.0) as server:
            reader, writer = await server.open(POST)
            await until(lambda: [one.phase for one in server.table._open] == ["body"])
            writer.write(b"a" * 100_000)
            one = next(iter(server.table._open))
            await until(lambda: one._received == 100_000)
            one._since -= 145
            one._expire()
            assert not one._closed
            one._since -= 10
            one._expire()
            received = await to_end(reader)
            writer.close()
            return received

    assert error_of(asyncio.run(run())) == (408, "request_timeout")


def test_a_body_that_the_application_does_not_read_does_not_time_out():
    async def run():
        async with edge(body=0.02) as server:
            server.app.may_read.clear()
            reader, writer = await server.open(POST + b"a" * 190_000)
            await until(lambda: server.table._open)
            one = next(iter(server.table._open))
            await until(lambda: one.phase == "body" and one.flow.read_paused)
            since = one._since
            await until(lambda: one._since > since)
            server.app.may_read.set()
            writer.write(b"a" * 10_000)
            received = await reader.readuntil(b"200000")
            writer.close()
            return received

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 ")


def test_the_rest_of_an_answered_body_times_out():
    async def run():
        async with edge(rest=SOON, body=1_000.0) as server:
            server.app.reads = False
            return await server.send(POST)

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_is_disconnected():
    async def run():
        async with edge(unread=SOON) as server:
            server.app.answer, server.app.pieces = bytes(2**20), 64
            _, writer = await server.open(GET)
            writer.transport.pause_reading()
            await until(lambda: server.table._open)
            await until(lambda: not server.table._open)
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(("total", "per_address"), [(3, 100), (100, 3)])
def test_idle_connections_are_closed_for_new_ones_and_requests_are_not(total, per_address):
    async def run():
        async with edge(total, per_address) as server:
            idle = [await server.open(b"GET / HT") for _ in range(3)]
            assert (await server.send(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")))[
                -1:
            ] == b"0"
            assert await to_end(idle[0][0]) == b"", "the oldest is closed"
            server.app.may_read.clear()
            busy = [await server.open(POST) for _ in range(3)]
            await until(lambda: [one.phase for one in server.table._open] == ["body"] * 3)
            refused = await server.send(GET)
            server.app.may_read.set()
            for _, writer in idle + busy:
                writer.close()
            return refused

    response = asyncio.run(run())
    assert error_of(response) == (503, "too_many_connections")
    assert b"retry-after: 5" in response


def test_one_address_leaves_room_for_another():
    async def run():
        async with edge(total=100, per_address=2) as server:
            server.app.may_read.clear()
            busy = [await server.open(POST) for _ in range(2)]
            await until(lambda: [one.phase for one in server.table._open] == ["body"] * 2)
            assert error_of(await server.send(GET)) == (503, "too_many_connections")
            server.app.may_read.set()
            reader, writer = await server.open(GET, source="127.0.0.2")
            assert await reader.readuntil(b"\r\n\r\n0")
            for _, one in [*busy, (None, writer)]:
                one.close()

    asyncio.run(run())


@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\nhost: a\n\n",
        b"GET / HTTP/1.1\r\nhost: a\nx-b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx-b: c\r\n d\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx-b: c\r\n\td\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n\r\n",
    ],
)
def test_invalid_http_is_answered_with_400(before, sent):
    async def run():
        async with edge() as server:
            return await server.send(before + sent)

    response = asyncio.run(run())
    if before:
        first, _, response = response.partition(b"\r\n\r\n0")
        assert first.startswith(b"HTTP/1.1 200 ")
    assert error_of(response) == (400, "invalid_http")


def test_an_invalid_chunked_body_is_answered_with_400():
    async def run():
        async with edge() as server:
            return await server.send(
                b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab\r\nZZ"
            )

    assert error_of(asyncio.run(run())) == (400, "invalid_http")


def test_addresses_of_one_ipv6_network_count_as_one():
    assert _network("2001:db8::1") == _network("2001:db8::ffff") != _network("2001:db8:0:1::1")
    assert _network("::ffff:192.0.2.1") == _network("192.0.2.1") == "192.0.2.1"
    assert _network("fe80::1%eth0") == _network("fe80::2")
    assert _network("") == ""
