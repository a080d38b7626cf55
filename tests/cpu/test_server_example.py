"""The server of docs/: whole answers, streams, clients that go away, and SIGTERM."""

import asyncio
import http.client
import importlib.util
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from orthrus_rt import dispatch
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


def post(port, whole=None, path="/v1/completions", **asked):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(whole or asked))
    return connection.getresponse()


def events(response):
    return [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]


def test_a_server(server, text_folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = Engine.from_pretrained(text_folder, **HOW)
    out = engine.generate(engine.tokenizer("hello").input_ids, SamplingParams(8))
    text = engine.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    stop = next(char for char in text if char.isascii())
    monkeypatch.setattr(server.orthrus_rt.Engine, "from_pretrained", lambda *_, **__: engine)
    told = {}

    def client():
        for _ in range(100):
            try:
                told["whole"] = json.load(post(port, prompt="hello", max_tokens=8, temperature=0))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        try:
            asked = dict(prompt="hello", max_tokens=8, temperature=0)
            told["stream"] = events(post(port, stream=True, **asked))
            told["stopped"] = json.load(post(port, stop=stop, **asked | {"max_tokens": 100}))
            told["list"] = post(port, [1]).status
            for name, wrong in (("no prompt", {}), ("length", {"prompt": "x", "max_tokens": 0})):
                response = post(port, **wrong)
                told[name] = response.status, json.load(response)["error"]["message"]
            told["path"] = post(port, path="/").status
            step = engine.step
            engine.step = lambda: (time.sleep(0.01), step())[1]
            gone = post(port, prompt="gone", max_tokens=200, temperature=0, stream=True)
            gone.readline(), gone.close()
            while engine.metrics.requests["abort"] < 2:
                time.sleep(0.01)
            last = post(port, prompt="last", max_tokens=20, temperature=0, stream=True)
        finally:
            if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # or the server has ended, and this process would
                os.kill(os.getpid(), signal.SIGTERM)
        told["last"] = events(last)

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    asyncio.run(asyncio.wait_for(server.main(text_folder, port), 60))
    thread.join(60)

    (choice,) = told["whole"]["choices"]
    assert choice == {"index": 0, "text": text, "finish_reason": out.finish_reason}
    *pieces, end = told["stream"]
    assert end == "[DONE]" and "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == text
    assert told["stopped"]["choices"][0] == {"index": 0, "text": text.partition(stop)[0], "finish_reason": "stop"}
    assert told["no prompt"] == (400, "'prompt'") and told["path"] == told["list"] == 400
    assert told["length"] == (400, "SamplingParams: max_new_tokens must be >= 1, got 0")
    assert told["last"][-1] == "[DONE]" and json.loads(told["last"][-2])["choices"][0]["finish_reason"] == "length"
    assert engine.closed and engine.metrics.requests["abort"] == 2  # the stopped one and the gone one
