"""The server of docs/: whole answers, streams, clients that go away, requests that fail, SIGTERM and Ctrl-C."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from orthrus_rt import AsyncEngine, dispatch
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native module is not built")
HOW = dict(device="cpu", mode="two_pass", max_seq_len=256)


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("server", Path(__file__).parents[2] / "docs" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine(server, text_folder, monkeypatch):
    engine = Engine.from_pretrained(text_folder, **HOW)
    monkeypatch.setattr(server.orthrus_rt.Engine, "from_pretrained", lambda *_, **__: engine)
    return engine


def serve(server, client, number):
    """Run it beside ``client(port, end)``, whose ``end()`` sends the server that signal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sent = []

    def end():
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        if not sent and signal.getsignal(number) not in defaults:  # else the server has ended, and this process would
            sent.append(os.kill(os.getpid(), number))

    def run():
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        try:
            client(port, end)
        finally:
            end()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        asyncio.run(asyncio.wait_for(server.main("model", port), 60))
        done.result(60)


def post(port, whole=None, path="/v1/completions", **asked):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, whole or json.dumps(asked))
    return connection.getresponse()


def failure(response):
    return response.status, json.load(response)["error"]["message"]


def events(response):
    return [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]


def slow(engine):
    step = engine.step
    engine.step = lambda: (time.sleep(0.01), step())[1]


def test_a_server(server, engine):
    out = engine.generate(engine.tokenizer("hello").input_ids, SamplingParams(8))
    text = engine.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    stop = next(char for char in text if char.isascii())
    told = {}

    def client(port, end):
        asked = dict(prompt="hello", max_tokens=8, temperature=0)
        told["whole"] = json.load(post(port, **asked))
        told["stream"] = events(post(port, stream=True, **asked))
        told["stopped"] = json.load(post(port, stop=stop, **asked | {"max_tokens": 100}))
        told["list"] = post(port, "[1]").status
        told["no prompt"] = failure(post(port, max_tokens=8))
        told["length"] = failure(post(port, prompt="x", max_tokens=0))
        told["nested"] = failure(post(port, "[" * 100_000))
        told["path"] = post(port, path="/").status
        slow(engine)
        gone = post(port, prompt="gone", max_tokens=200, temperature=0, stream=True)
        gone.readline(), gone.close()
        while engine.metrics.requests["abort"] < 2:
            time.sleep(0.01)
        last = post(port, prompt="last", max_tokens=20, temperature=0, stream=True)
        end()
        told["last"] = events(last)

    serve(server, client, signal.SIGTERM)
    (choice,) = told["whole"]["choices"]
    assert choice == {"index": 0, "text": text, "finish_reason": out.finish_reason}
    *pieces, end = told["stream"]
    assert end == "[DONE]" and "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == text
    assert told["stopped"]["choices"][0] == {"index": 0, "text": text.partition(stop)[0], "finish_reason": "stop"}
    assert told["path"] == told["list"] == 400
    assert told["no prompt"] == (400, "the request must be an object whose prompt is a string")
    assert told["length"] == (400, "SamplingParams: max_new_tokens must be >= 1, got 0")
    assert told["nested"] == (400, "the request is nested too deeply")
    assert told["last"][-1] == "[DONE]" and json.loads(told["last"][-2])["choices"][0]["finish_reason"] == "length"
    assert engine.closed and engine.metrics.requests["abort"] == 2  # the stopped one and the gone one


def test_what_fails_is_no_success(server, engine, monkeypatch):
    stream, told, whys = AsyncEngine.stream, {}, {"no memory": "out of memory", "lost": "a step failed"}

    async def failing(shared, ids, params, name):
        how = engine.tokenizer.decode(ids)
        async for out in stream(shared, ids, params, name):
            if how == "lost":
                raise RuntimeError(whys[how])
            if how == "no memory":
                out = replace(out, finished=True, finish_reason="error", error=whys[how])
            yield out

    def client(port, end):
        for how in whys:
            told[how] = failure(post(port, prompt=how))
            told[f"{how}, streamed"] = events(post(port, prompt=how, stream=True))
        slow(engine)
        aborted = engine.metrics.requests["abort"]
        with socket.create_connection(("127.0.0.1", port)) as half:
            body = json.dumps({"prompt": "hello", "max_tokens": 200, "temperature": 0})
            half.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            half.shutdown(socket.SHUT_WR)
            told["half"] = half.makefile().read()
        with socket.create_connection(("127.0.0.1", port)) as reset:
            reset.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            while not any(engine.scheduler.slots):
                time.sleep(0.01)
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
        while engine.metrics.requests["abort"] < aborted + 2:
            time.sleep(0.01)
        last = post(port, prompt="last", max_tokens=20, temperature=0, stream=True)
        end()
        told["last"] = events(last)

    monkeypatch.setattr(AsyncEngine, "stream", failing)
    serve(server, client, signal.SIGINT)
    for how, why in whys.items():
        assert told[how] == (500, why)
        assert json.loads(told[f"{how}, streamed"][-1]) == {"error": {"message": why}}
    assert told["half"].startswith("HTTP/1.1 500") and "as its client closed the connection" in told["half"]
    assert told["last"][-1] == "[DONE]" and engine.closed


def test_what_a_request_may_ask_for(server, engine):
    """Sampling as the engine has it, null as what is left out; the rest is refused, not ignored."""
    asked = dict(prompt="hello", max_tokens=8, temperature=0)
    options = dict(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={72: 3.0, 101: -100.0})
    refused = {
        "n": (dict(n=2), "this server does not support n"),
        "two": (dict(logprobs=1, echo=True), "this server does not support logprobs, echo"),
        "bias": (dict(logit_bias=[1]), "cannot convert dictionary update sequence element #0 to a sequence"),
        "stop": (dict(stop={"a": 1}), "stop must be a sequence of strings that are not empty, got {'a': 1}"),
    }
    told, want = {}, {}
    for name, params in (("edited", SamplingParams(8, **options)), ("null", SamplingParams(16))):
        ids = engine.generate(engine.tokenizer("hello").input_ids, params).token_ids
        want[name] = engine.tokenizer.decode(ids, skip_special_tokens=True)

    def client(port, end):
        for name, (more, _) in refused.items():
            told[name] = failure(post(port, **asked, **more))
        told["edited"] = json.load(post(port, **asked, **options, n=1, echo=False, model="any"))
        told["null"] = json.load(post(port, prompt="hello", max_tokens=None, temperature=0, stop=None, logprobs=None))
        with socket.create_connection(("127.0.0.1", port)) as chunked:
            chunked.sendall(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
            told["chunked"] = chunked.makefile().read()

    serve(server, client, signal.SIGTERM)
    for name, (_, why) in refused.items():
        assert told[name] == (400, why)
    assert "send its Content-Length" in told["chunked"]
    assert {name: told[name]["choices"][0]["text"] for name in want} == want
