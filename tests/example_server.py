"""The server of docs/, run in this process, and a client for it."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orthrus_rt.engine import Engine

HOW = dict(device="cpu", mode="two_pass", max_seq_len=256)
ENDLESS = dict(max_tokens=200, temperature=0, logit_bias={"256": -100})  # the tokenizer's end-of-text token


@pytest.fixture(scope="module")
def folder(text_folder):
    return text_folder


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("server", Path(__file__).parents[1] / "docs" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine(server, text_folder, monkeypatch):
    engine = Engine.from_pretrained(text_folder, **HOW)
    monkeypatch.setattr(server.orthrus_rt.Engine, "from_pretrained", lambda *_, **__: engine)
    return engine


def serve(server, client, number, model="model"):
    """Run it together with ``client(port, end)``, where ``end()`` sends signal ``number`` to the server."""
    listener, sent = server.bind(0), []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    listener.listen()  # so that no client is refused before the server is up
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)  # for its connections: small, as over a network
    port = listener.getsockname()[1]

    def end():
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        if not sent and signal.getsignal(number) not in defaults:  # else the server has ended, and this process would
            sent.append(os.kill(os.getpid(), number))

    def run():
        try:
            client(port, end)
        finally:
            end()

    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as last:
        for each, handler in before.items():
            last.callback(signal.signal, each, handler)
        done = pool.submit(run)
        asyncio.run(asyncio.wait_for(server.main(Engine.from_pretrained("model"), model, listener), 60))
        done.result(60)


def post(port, whole=None, path="/v1/completions", **asked):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, whole or json.dumps(asked))
    return connection.getresponse()


def failure(response):
    return response.status, json.load(response)["error"]["message"]


def exchange(port, sent):
    """The server's whole answer to these bytes, while the connection stays open."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(sent)
        return client.makefile("rb").read().decode()


def events(response):
    return [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
