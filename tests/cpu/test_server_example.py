"""The server of docs/: whole answers, streams, requests that fail or are refused, clients that go away, and SIGTERM or
Ctrl-C.
"""

import asyncio
import contextlib
import json
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest

from orthrus_rt import AsyncEngine
from orthrus_rt.sampling import SamplingParams
from tests import example_server
from tests.engines import a_beginning_each
from tests.example_server import ENDLESS, events, exchange, failure, post, serve, wait_until

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]
folder, server, engine = example_server.folder, example_server.server, example_server.engine


def test_a_server(server, engine):
    out = engine.generate(engine.tokenizer("hello").input_ids, SamplingParams(8))
    text = engine.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    stop = next(char for char in text if char.isascii())
    told = {}

    def client(port, end):
        asked = dict(prompt="hello", max_tokens=8, temperature=0)
        told["whole"] = json.load(post(port, **asked))
        told["stream"] = events(post(port, stream=True, **asked))
        told["usage"] = events(post(port, stream=True, stream_options={"include_usage": True}, **asked))
        with a_beginning_each(engine):
            told["stopped"] = json.load(post(port, stop=stop, **asked | {"max_tokens": 100}))
        told["list"] = post(port, "[1]").status
        told["no prompt"] = failure(post(port, max_tokens=8))
        told["length"] = failure(post(port, prompt="x", max_tokens=0))
        told["nested"] = failure(post(port, "[" * 60_000))
        with a_beginning_each(engine):
            gone = post(port, prompt="gone", max_tokens=200, temperature=0, stream=True)
            gone.readline(), gone.close()
            wait_until(lambda: engine.metrics.finished["abort"] >= 2)
            last = post(port, prompt="last", max_tokens=20, temperature=0, stream=True)
            end()
        told["last"] = events(last)

    serve(server, client, signal.SIGTERM)
    (choice,), name = told["whole"]["choices"], told["whole"]["id"]
    usage = {"prompt_tokens": 5, "completion_tokens": len(out.token_ids), "total_tokens": 5 + len(out.token_ids)}
    about = {"id": name, "object": "text_completion", "model": "model", "created": pytest.approx(time.time(), abs=60)}
    assert told["whole"] == about | {"choices": [choice], "usage": usage}
    assert json.loads(told["stream"][0]).keys() == {*about, "choices"}
    assert choice == {"index": 0, "text": text, "finish_reason": out.finish_reason}
    *pieces, end = told["stream"]
    assert end == "[DONE]" and "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == text
    *pieces, last, end = map(json.loads, [*told["usage"][:-1], "0"])
    assert last["choices"] == [] and last["usage"] == usage
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text and "usage" not in pieces[-1]
    assert told["stopped"]["choices"][0] == {"index": 0, "text": text.partition(stop)[0], "finish_reason": "stop"}
    assert told["list"] == 400
    assert told["no prompt"] == (400, "the request must be an object whose prompt is a string")
    assert told["length"] == (400, "max_tokens must be >= 1, got 0")
    assert told["nested"] == (400, "the request is nested too deeply")
    assert told["last"][-1] == "[DONE]" and json.loads(told["last"][-2])["choices"][0]["finish_reason"] == "length"
    assert engine.closed and engine.metrics.finished["abort"] == 2  # one was stopped, one client went away


def stop_amid_an_output(engine, **how):
    """``(prompt, stop, tokens up to it)`` such that more tokens follow the stop in the same output."""
    for prompt in map(str, range(1000)):
        seen = []
        with contextlib.closing(engine.stream(engine.tokenizer(prompt).input_ids, SamplingParams(**how))) as pieces:
            for piece in pieces:
                for token in piece.token_ids[:-1]:
                    seen.append(engine.tokenizer.decode([token]))
                    if seen[-1].isascii() and seen[-1].isprintable() and seen[-1] not in seen[:-1]:
                        return prompt, seen[-1], len(seen)
                seen.append(engine.tokenizer.decode(piece.token_ids[-1:]))


def test_tokens_behind_a_stop_string_are_not_counted(server, engine):
    told, (prompt, stop, want) = {}, stop_amid_an_output(engine, max_new_tokens=200, logit_bias={256: -100})

    def client(port, end):
        told.update(json.load(post(port, prompt=prompt, stop=stop, **ENDLESS)))

    serve(server, client, signal.SIGTERM)
    assert told["choices"][0]["finish_reason"] == "stop" and told["usage"]["completion_tokens"] == want


def test_what_fails_is_no_success(server, engine, monkeypatch):
    stream, told, whys = AsyncEngine.stream, {}, {"no memory": "out of memory", "lost": "a step failed"}

    async def failing(shared, ids, params, name):
        how = engine.tokenizer.decode(ids)
        async for out in stream(shared, ids, params, name):
            if how == "lost":
                raise RuntimeError(whys[how])
            if how == "no memory":
                out = replace(out, finish_reason="error", error=whys[how])
            yield out

    def client(port, end):
        for how in whys:
            told[how] = failure(post(port, prompt=how))
            told[f"{how}, streamed"] = events(post(port, prompt=how, stream=True))
        wait_until(lambda: not engine.has_unfinished())
        aborted = engine.metrics.finished["abort"]
        with a_beginning_each(engine):
            with socket.create_connection(("127.0.0.1", port)) as half:
                body = json.dumps({"prompt": "hello", "max_tokens": 200, "temperature": 0})
                half.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                half.shutdown(socket.SHUT_WR)
                told["half"] = half.makefile().read()
            with socket.create_connection(("127.0.0.1", port)) as reset:
                reset.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                wait_until(lambda: any(engine.scheduler.slots))
                reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
            wait_until(lambda: engine.metrics.finished["abort"] >= aborted + 2)
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
    """Sampling options work as in the engine, and null means the default. Anything else is refused, not ignored."""
    asked = dict(prompt="hello", max_tokens=8, temperature=0)
    options = dict(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={72: 3.0, 101: -100.0})
    refused = {
        "n": (dict(n=2), "this server does not support n"),
        "other's": (dict(max_new_tokens=2), "this server does not support max_new_tokens"),
        "true": (dict(n=True), "this server does not support n"),
        "two": (dict(logprobs=1, echo=True), "this server does not support logprobs, echo"),
        "bias": (dict(logit_bias=5), "logit_bias must be {token id: value}, got 5"),
        "pair": (dict(logit_bias=[[1.7, 2]]), "logit_bias: every token id must be an integer, got 1.7"),
        "id": (dict(logit_bias={"a": 2}), "logit_bias: every token id must be an integer, got 'a'"),
        "surrogate": (dict(prompt="\ud800"), "the prompt must be whole characters, not one half of a surrogate pair"),
        "stream": (dict(stream="false"), "stream must be true or false, got 'false'"),
        "stops": (dict(stop=["x"] * 5), "stop must be at most 4 strings, got 5"),
        "empty": (dict(prompt=""), "prompt must hold at least one token, got none"),
        "false": (dict(stop=False), "stop must be a sequence of strings that are not empty, got False"),
        "usage": (dict(stream_options=[1]), "stream_options must be an object with include_usage, got [1]"),
        "stop": (dict(stop={"a": 1}), "stop must be a sequence of strings that are not empty, got {'a': 1}"),
    }
    told, want = {}, {}
    more = dict(repetition_penalty=1.5, min_tokens=3, stop_token_ids=[98], ignore_eos=True)
    for name, params in (
        ("edited", SamplingParams(8, **options)), ("null", SamplingParams(16)), ("more", SamplingParams(8, **more))
    ):  # fmt: skip
        ids = engine.generate(engine.tokenizer("hello").input_ids, params).token_ids
        want[name] = engine.tokenizer.decode(ids, skip_special_tokens=True)

    def client(port, end):
        for name, (wrong, _) in refused.items():
            told[name] = failure(post(port, **asked | wrong))
        told["edited"] = json.load(post(port, **asked, **options, n=1, echo=False, model="any"))
        told["null"] = json.load(post(port, prompt="hello", max_tokens=None, temperature=0, stop=None, logprobs=None))
        told["more"] = json.load(post(port, **asked, **more, top_k=-1, stop=""))

    serve(server, client, signal.SIGTERM)
    for name, (_, why) in refused.items():
        assert told[name] == (400, why)
    assert {name: told[name]["choices"][0]["text"] for name in want} == want


def test_pages_for_those_who_watch_it(server, engine):
    told = []

    def get(port, path):
        told.append(exchange(port, f"GET {path} HTTP/1.1\r\n\r\n".encode()).partition("\r\n\r\n")[::2])

    def client(port, end):
        post(port, prompt="hello", max_tokens=8).read()
        get(port, "/health"), get(port, "/metrics")
        told.append(exchange(port, b"HEAD /health HTTP/1.1\r\n\r\n").partition("\r\n\r\n")[::2])
        engine.torn, engine._recover = True, lambda: 1 / 0  # a step has failed and the device is lost
        get(port, "/health")
        told.append(exchange(port, b"HEAD /health HTTP/1.1\r\n\r\n").partition("\r\n\r\n")[::2])
        del engine._recover

    serve(server, client, signal.SIGTERM)
    (healthy, ok), (_, metrics), head, (lost, why), head_lost = told
    assert healthy.startswith("HTTP/1.1 200") and ok == "ok\n" and head == (healthy, "")
    assert 'orthrus_finished_total{reason="length"} 1' in metrics
    assert head_lost == (lost, "")
    assert lost.startswith("HTTP/1.1 503") and json.loads(why)["error"]["message"] == "division by zero"


def test_heads_that_are_refused(server, engine):
    only, told = "this server answers POST /v1/completions", []
    begin, chunks = "POST /v1/completions HTTP/1.1\r\n", "a request in chunks is not supported: send its Content-Length"
    length = "Content-Length must be one number of bytes, at most 65536, got"
    refused = [
        (f"{begin}Transfer-Encoding: chunked\r\n", 400, chunks),
        (f"{begin}Content-Length: -5\r\n", 400, f"{length} -5"),
        (f"{begin}Content-Length: 65537\r\n", 400, f"{length} 65537"),
        (f"{begin}Content-Length: 5\r\nContent-Length: 6\r\n", 400, f"{length} 5 and 6"),
        (f"{begin}no colon\r\n", 400, "a header must be a name, a colon and a value"),
        (f"{begin}long: {'x' * 70_000}\r\n", 400, "the headers of a request must be at most 64 KiB"),
        (begin, 400, "the request must be JSON: Expecting value: line 1 column 1 (char 0)"),
        ("hello\r\n", 400, "a request must begin with METHOD PATH HTTP/1.1"),
        ("POST / HTTP/1.1\r\n", 404, only),
        ("GET /v1/completions HTTP/1.1\r\n", 405, only),
        ("HEAD /v1/completions HTTP/1.1\r\n", 405, None),
        ("HEAD / HTTP/1.1\r\n", 404, None),
    ]

    def client(port, end):
        told.extend(exchange(port, f"{head}\r\n".encode()).partition("\r\n\r\n") for head, *_ in refused)

    serve(server, client, signal.SIGTERM)
    for (_, status, why), (answer, _, body) in zip(refused, told, strict=True):
        assert int(answer.split()[1]) == status and ("Allow: POST" in answer) == (status == 405)
        assert (json.loads(body)["error"]["message"] if body else None) == why


def test_more_than_a_request(server, engine, monkeypatch):
    """A refusal arrives however much data follows the request, and that data is not collected."""
    read, asked, told, much = asyncio.StreamReader.read, [], [], b"x" * (5 << 20)
    body = b'{"prompt": "hello", "max_tokens": 8}'

    def client(port, end):
        for length, content in ((len(much), much), (len(body), body + much)):
            head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
            told.append(exchange(port, head.encode() + content))

    monkeypatch.setattr(asyncio.StreamReader, "read", lambda self, n=-1: asked.append(n) or read(self, n))
    serve(server, client, signal.SIGTERM)
    assert told[0].startswith("HTTP/1.1 400") and told[1].startswith("HTTP/1.1 200")
    assert all(0 < n <= 1 << 16 for n in asked)


def test_a_client_that_waits_to_be_told_to_go_on(server, engine):
    told, body = [], b'{"prompt": "hello", "max_tokens": 8}'

    def client(port, end):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as waits:
            waits.sendall(
                f"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            answer = waits.makefile("rb")
            told.append(answer.readline() + answer.readline())
            waits.sendall(body)
            told.append(answer.readline())

    serve(server, client, signal.SIGTERM)
    assert told == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"]


def test_nobody_waits_for_a_prompt_that_is_being_tokenized(server, engine):
    tokenizer, others, told = engine.tokenizer, threading.Event(), {}
    engine._tokenizer = mock.Mock(wraps=tokenizer, all_special_ids=tokenizer.all_special_ids)
    engine._tokenizer.side_effect = lambda text, **how: others.wait(30) and tokenizer(text, **how)

    def client(port, end):
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(post, port, prompt="hello", max_tokens=8)
            wait_until(lambda: engine._tokenizer.called)
            told["other"] = failure(post(port, max_tokens=8))
            others.set()
            told["waits"] = waits.result(60).status

    serve(server, client, signal.SIGTERM)
    assert told == {"other": (400, "the request must be an object whose prompt is a string"), "waits": 200}
