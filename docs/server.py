"""Example server: OpenAI-style completions over HTTP, with only the standard library and orthrus_rt.

    python docs/server.py smollm2-135m 8000  # MODEL PORT
    curl localhost:8000/v1/completions -d '{"prompt": "def add(a, b):", "max_tokens": 32, "temperature": 0}'

It listens on 127.0.0.1 without authentication; all requests share one engine. The prompt is one string, completed as
is, without a chat template. Requests may have `max_tokens` (default 16), `stop`, `stream`, `stream_options` and the
fields in SAMPLING (temperature is 1 by default, as at OpenAI's); other fields that would change an answer are refused.
A request may have MAX_BYTES and take MAX_SECONDS to arrive; with MAX_REQUESTS under way, further ones get 503, and
beyond MAX_WATCHING more, connections are closed. A client that disconnects, closes its sending side or reads too slowly
for MAX_SECONDS ends its request. GET (or HEAD) /health answers between two steps of the engine, 503 if its device has
failed; GET /metrics in Prometheus format. SIGTERM or Ctrl-C gives requests 60 seconds to finish; a second one ends the
process.
"""

import asyncio
import contextlib
import functools
import json
import math
import os
import re
import signal
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import orthrus_rt

SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
            "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"}  # fmt: skip
KNOWN = {"prompt", "max_tokens", "stop", "stream", "stream_options", "model", "user", *SAMPLING}
NAMES = {"SamplingParams: ": "", "max_new_tokens": "max_tokens", "prompt_ids": "prompt"}  # the engine's, the requests'
HARMLESS = {"n": 1, "best_of": 1, "echo": False, "suffix": ""}  # accepted with these values, which ask for nothing
MAX_BYTES, MAX_STOPS, MAX_SECONDS = 1 << 16, 4, 30  # of a request: its body, stop strings, time to arrive
MAX_REQUESTS, MAX_WATCHING = 256, 16  # at once: completions, and further connections, such as for PAGES
PAGES = {"/health": lambda engine: engine.memory_report() and "ok\n", "/metrics": lambda e: e.metrics.as_prometheus()}
MAX_UNREAD = 1 << 12  # unsent bytes of a stream, beyond which writing waits for the client
ANSWERING = set()  # tasks that are answering a completion
TOKENIZING = ThreadPoolExecutor(1)  # so that a long prompt does not block the event loop


class Refused(Exception):
    """Its arguments are the status and the body of the answer."""


class Asked(Exception):
    """A request for one of PAGES: which one, and whether its body is wanted."""


async def read_request(reader, writer):
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise ValueError("the headers of a request must be at most 64 KiB") from None
    start, *lines = head.decode("latin1").lower().split("\r\n")
    if len(words := start.split(" ")) != 3:
        raise ValueError("a request must begin with METHOD PATH HTTP/1.1")
    if words[0] in ("get", "head") and words[1] in PAGES:
        raise Asked(words[1], words[0] == "get")
    if words[:2] != ["post", "/v1/completions"]:
        not_post = "405 Method Not Allowed\r\nAllow: POST"  # a 405 must name the allowed methods
        status = not_post if words[1] == "/v1/completions" else "404 Not Found"
        raise Refused(status, "" if words[0] == "head" else failure("this server answers POST /v1/completions"))
    headers = {}
    for name, colon, value in (line.partition(":") for line in lines if line):
        if not colon or not name or name != name.strip():
            raise ValueError("a header must be a name, a colon and a value")
        headers.setdefault(name, set()).add(value.strip())
    if "transfer-encoding" in headers:
        raise ValueError("a request in chunks is not supported: send its Content-Length")
    length = " and ".join(sorted(headers.get("content-length", {"0"})))
    if not re.fullmatch("[0-9]{1,7}", length) or int(length) > MAX_BYTES:
        raise ValueError(f"Content-Length must be one number of bytes, at most {MAX_BYTES}, got {length}")
    if "100-continue" in headers.get("expect", ()):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        return json.loads(await reader.readexactly(int(length)))
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the request must be JSON: {error}") from None


def is_harmless(key, value):
    return value == HARMLESS.get(key, ()) and isinstance(value, bool) == isinstance(HARMLESS[key], bool)


def check(asked):
    """The fields of a request that this server supports, without the nulls."""
    if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
        raise ValueError("the request must be an object whose prompt is a string")
    asked = {key: value for key, value in asked.items() if value is not None and (key, value) != ("stop", "")}
    if other := [key for key in asked if key not in KNOWN and not is_harmless(key, asked[key])]:
        raise ValueError(f"this server does not support {', '.join(other)}")
    if re.search(r"[\ud800-\udfff]", asked["prompt"]):
        raise ValueError("the prompt must be whole characters, not one half of a surrogate pair")
    if not isinstance(asked.get("stream", False), bool):
        raise ValueError(f"stream must be true or false, got {asked['stream']!r}")
    if (options := asked.get("stream_options", {})) not in ({}, {"include_usage": True}, {"include_usage": False}):
        raise ValueError(f"stream_options must be an object with include_usage, got {options!r}")
    if isinstance(stop := asked.get("stop"), list) and len(stop) > MAX_STOPS:
        raise ValueError(f"stop must be at most {MAX_STOPS} strings, got {len(stop)}")
    return asked


def sampling(asked):
    """The engine's parameters of a request; JSON's keys are strings, and temperature is 1 by default."""
    options = {"temperature": 1.0} | {key: asked[key] for key in SAMPLING & asked.keys()}
    options |= {"top_k": 0} if options.get("top_k") == -1 else {}  # elsewhere -1 keeps all
    if isinstance(bias := options.get("logit_bias"), dict):  # a key that is no id stays as it is, to be refused
        ids = (int(token) if re.fullmatch("-?[0-9]{1,10}", token) else token for token in bias)
        options["logit_bias"] = tuple(zip(ids, bias.values(), strict=True))
    return orthrus_rt.SamplingParams(asked.get("max_tokens", 16), **options)


def send(writer, status, kind, body=""):
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n{body}".encode())


def failure(error):
    return json.dumps({"error": {"message": str(error) or repr(error)}})


@contextlib.contextmanager
def by_its_names():
    """Errors of the engine name a request's fields."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for ours, theirs in NAMES.items():
            message = message.replace(ours, theirs)
        raise ValueError(message) from None


async def drop(reader, most=math.inf):
    """Read and discard what the client still sends, to its end or until ``most`` bytes are reached."""
    while most > 0 and (piece := await reader.read(1 << 16)):
        most -= len(piece)


async def abort_when_gone(shared, reader, name):
    with contextlib.suppress(OSError):
        await drop(reader)
    await shared.abort(name)


async def drain(writer):
    """Wait until the client has read enough; it is cut off if that takes too long."""
    try:
        async with asyncio.timeout(MAX_SECONDS):
            await writer.drain()
    except TimeoutError:
        writer.transport.abort()
        raise ConnectionAbortedError from None


async def answer(shared, model, reader, writer):
    name, tokenizer, parts, num_tokens = uuid.uuid4().hex, shared.engine.tokenizer, [], 0
    try:
        async with asyncio.timeout(MAX_SECONDS):
            asked = await read_request(reader, writer)
        if len(ANSWERING) >= MAX_REQUESTS:
            raise RuntimeError(f"this server answers {MAX_REQUESTS} requests at once")
        ANSWERING.add(task := asyncio.current_task())
        task.add_done_callback(ANSWERING.discard)
        asked = check(asked)
        stop = asked.get("stop", ())
        text = orthrus_rt.TextStream(tokenizer, [stop] if isinstance(stop, str) else stop)
        tokenize = functools.partial(tokenizer, asked["prompt"], verbose=False)  # the engine checks the length
        encoding = await asyncio.get_running_loop().run_in_executor(TOKENIZING, tokenize)
        prompt = encoding.input_ids
        with by_its_names():
            outputs = shared.stream(prompt, sampling(asked), name)
    except Asked as asked:
        page, whole = asked.args
        try:
            body = await shared.call(PAGES[page])
            return send(writer, "200 OK", "text/plain", body if whole else "")
        except Exception as error:  # raised by the engine
            return send(writer, "503 Service Unavailable", "application/json", failure(error) if whole else "")
    except Refused as refused:
        status, body = refused.args
        return send(writer, status, "application/json", body)
    except TimeoutError:
        late = failure(f"a request must arrive within {MAX_SECONDS} seconds")
        return send(writer, "408 Request Timeout", "application/json", late)
    except (ValueError, TypeError, RuntimeError) as error:
        status = "503 Service Unavailable" if isinstance(error, RuntimeError) else "400 Bad Request"
        return send(writer, status, "application/json", failure(error))
    if streams := asked.get("stream"):
        writer.transport.set_write_buffer_limits(MAX_UNREAD)
        send(writer, "200 OK", "text/event-stream")
    about = {"id": name, "object": "text_completion", "created": int(time.time()), "model": model}
    gone = asyncio.create_task(abort_when_gone(shared, reader, name))
    try:
        async with contextlib.aclosing(outputs):  # ends the request if it has not finished
            async for out in outputs:
                parts.append("")
                for token in out.new_token_ids:
                    if not text.stopped:  # tokens behind a stop string are not counted
                        parts[-1] += text.push([token])
                        num_tokens += 1
                parts[-1] += text.end() if out.finished else ""
                reason = "stop" if text.stopped else out.finish_reason
                choice = {"index": 0, "text": parts[-1], "finish_reason": reason}
                if streams:
                    writer.write(f"data: {json.dumps(about | {'choices': [choice]})}\n\n".encode())
                    await drain(writer)
                if reason:
                    break
        if reason in ("error", "abort"):
            raise RuntimeError(out.error or "the request ended as its client closed the connection")
        choice["text"] = "".join(parts)
        count = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
        usage = count | {"total_tokens": sum(count.values())}
        status, body, end = "200 OK", json.dumps(about | {"choices": [choice], "usage": usage}), "[DONE]"
        if streams and asked.get("stream_options", {}).get("include_usage"):
            writer.write(f"data: {json.dumps(about | {'choices': [], 'usage': usage})}\n\n".encode())
    except Exception as error:  # of this request only, or of the engine
        status, body = "500 Internal Server Error", failure(error)
        end = body
    finally:
        gone.cancel()
        await asyncio.wait([gone])
    if streams:
        writer.write(f"data: {end}\n\n".encode())
    else:
        send(writer, status, "application/json", body)


async def serve(shared, model, room, reader, writer):
    if room.locked():
        return writer.close()
    # The client may be gone or too slow; or this process ends, and Python 3.11 would log every cancelled task.
    with contextlib.suppress(OSError, EOFError, asyncio.CancelledError), contextlib.closing(writer):
        async with room:
            await answer(shared, model, reader, writer)
            writer.transport.set_write_buffer_limits(0)  # so that drain() waits for all of it
            await drain(writer)
            ANSWERING.discard(asyncio.current_task())
            writer.write_eof()
            async with asyncio.timeout(1):  # closing with unread input would reset the connection, and lose the answer
                await drop(reader, 256 * MAX_BYTES)


def bind(port):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(MAX_REQUESTS)  # clients that connect before the engine is ready wait
    return listener


async def main(engine, model, listener):
    room = asyncio.Semaphore(MAX_REQUESTS + MAX_WATCHING)
    async with orthrus_rt.AsyncEngine(engine) as shared:
        server = await asyncio.start_server(lambda *streams: serve(shared, model, room, *streams), sock=listener)
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        server.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(shared.close(drain=True), 60)
    if ANSWERING:  # whose clients have not read the whole answer yet
        await asyncio.wait(ANSWERING, timeout=MAX_SECONDS)
    await asyncio.sleep(0.5)  # for the last bytes on their way to the other clients


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name = sys.argv[1]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's waiting threads must not spin: others need the CPU
    try:
        listener = bind(int(sys.argv[2]))  # first, so that an unavailable port is reported before a model is loaded
        print(f"loading {name} and warming up", file=sys.stderr, flush=True)
        engine = orthrus_rt.Engine.from_pretrained(name)
        engine.tokenizer  # noqa: B018 (loaded here, so that the first request need not wait for it)
        engine.warmup(sampling=True)  # nor for recordings; it reserves memory for logits too
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    asyncio.run(main(engine, name, listener))
