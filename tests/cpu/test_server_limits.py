"""The server of docs/: more clients than it accepts, slow ones, and ones that never send a request or never read."""

import asyncio
import contextlib
import json
import signal
import socket
import time

import pytest

from orthrus_rt.sampling import SamplingParams
from tests import example_server
from tests.engines import a_beginning_each
from tests.example_server import ENDLESS, events, exchange, failure, post, serve, wait_until

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]
folder, server, engine = example_server.folder, example_server.server, example_server.engine
BULKY = 200_000 * "m"  # a model's name, which every event contains: more than all buffers hold


def test_more_connections_than_there_may_be_are_closed(server, engine, monkeypatch):
    monkeypatch.setattr(server, "MAX_REQUESTS", 1)
    monkeypatch.setattr(server, "MAX_WATCHING", 1)
    told = []

    def client(port, end):
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            told.append(exchange(port, b""))
        answer = ""
        while not answer:  # until the server has seen them leave
            with contextlib.suppress(ConnectionResetError):
                answer = exchange(port, b"GET / HTTP/1.1\r\n\r\n")
        told.append(answer.split()[1])

    serve(server, client, signal.SIGTERM)
    assert told == ["", "404"]


def test_who_watches_a_server_is_answered_beside_all_that_it_answers(server, engine, monkeypatch):
    monkeypatch.setattr(server, "MAX_REQUESTS", 1)
    told = []

    def client(port, end):
        with a_beginning_each(engine):
            first = post(port, prompt="hello", stream=True, **ENDLESS)
            told.append(failure(post(port, prompt="hello")))
            told.append(exchange(port, b"GET /health HTTP/1.1\r\n\r\n").split()[1])
        told.append(events(first)[-1])
        wait_until(lambda: not server.ANSWERING)
        told.append(post(port, prompt="hello").status)

    serve(server, client, signal.SIGTERM)
    assert told == [(503, "this server answers 1 requests at once"), "200", "[DONE]", 200]


@contextlib.contextmanager
def unread(port):
    """A client that sends a request and does not read."""
    body = json.dumps(dict(prompt="hello", stream=True, **ENDLESS))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 11)
        client.settimeout(60)
        client.connect(("127.0.0.1", port))
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        yield client


def test_a_client_that_does_not_read_ends_its_request(server, engine, monkeypatch):
    monkeypatch.setattr(server, "MAX_SECONDS", 1)
    told = []

    def client(port, end):
        with unread(port) as lazy, a_beginning_each(engine):
            wait_until(lambda: engine.metrics.finished["abort"])
            with contextlib.suppress(ConnectionResetError):
                while piece := lazy.recv(1 << 16):
                    told.append(piece)

    serve(server, client, signal.SIGTERM, BULKY)
    assert b"data: " in b"".join(told) and b"[DONE]" not in b"".join(told)


def test_what_is_read_slowly_is_told_to_the_end(server, engine):
    """Even from a server that is shutting down."""
    params = SamplingParams(200, logit_bias={256: -100})
    out = engine.generate(engine.tokenizer("hello").input_ids, params)
    text, told = engine.tokenizer.decode(out.token_ids, skip_special_tokens=True), bytearray()

    def client(port, end):
        with unread(port) as slow:
            told.extend(slow.recv(1))
            end()
            wait_until(lambda: engine.closed)
            at_the_next = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            time.sleep(0.6)  # longer than it waits for clients that have read everything
            while piece := slow.recv(1 << 16):
                told.extend(piece)
        assert at_the_next == {signal.SIG_DFL}  # the default handlers, which end it at once

    serve(server, client, signal.SIGTERM, BULKY)
    *pieces, end = told.partition(b"\r\n\r\n")[2].decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    assert "".join(json.loads(piece.removeprefix("data: "))["choices"][0]["text"] for piece in pieces) == text


def test_what_is_dropped_behind_an_answer_is_bounded(server):
    async def rest():
        reader = asyncio.StreamReader()
        reader.feed_data(bytes(10 << 16))
        await server.drop(reader, 3 << 16)
        reader.feed_eof()
        return await reader.read()

    assert len(asyncio.run(rest())) == 7 << 16


def test_clients_that_do_not_ask(server, engine, monkeypatch, caplog):
    """A client that takes too long is dropped; clients that are idle at the end leave no trace."""
    told, head = {}, b"POST /v1/completions HTTP/1.1\r\n"

    def client(port, end):
        with monkeypatch.context() as patch:
            patch.setattr(server, "MAX_SECONDS", 0.1)
            told["slow"] = exchange(port, head)
        told["idle"] = socket.create_connection(("127.0.0.1", port))
        told["idle"].sendall(head)
        time.sleep(0.1)

    serve(server, client, signal.SIGTERM)
    told["idle"].close()
    late = "a request must arrive within 0.1 seconds"
    assert told["slow"].startswith("HTTP/1.1 408") and late in told["slow"] and engine.closed
    assert not [record for record in caplog.records if record.name == "asyncio"]
