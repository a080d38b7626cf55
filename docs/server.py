"""An example of a server: completions over HTTP in OpenAI's form, with nothing but the standard library.

    python docs/server.py smollm2-135m 8000
    curl -N localhost:8000/v1/completions -d '{"prompt": "def add(a, b):", "max_tokens": 32, "stream": true}'

Prompts are completed as they are, without a chat template. Requests may have `max_tokens`, `stop`, `stream` and what
SAMPLING names; what else would change an answer is refused. All requests share one engine. A client that goes away, or
closes its side of the connection, ends its request; at SIGTERM or Ctrl-C what runs comes to its end.
"""

import asyncio
import contextlib
import json
import signal
import sys
import uuid

import orthrus_rt

SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias"}
KNOWN = {"prompt", "max_tokens", "stop", "stream", "model", "user", *SAMPLING}
HARMLESS = {"n": 1, "best_of": 1, "echo": False, "suffix": ""}  # where they ask for nothing


async def read_request(reader):
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").lower().split("\r\n")
    headers = dict(line.split(":", 1) for line in lines if line)
    if not start.startswith("post /v1/completions "):
        raise ValueError("this server answers POST /v1/completions")
    if "transfer-encoding" in headers:
        raise ValueError("a request in chunks is not supported: send its Content-Length")
    try:
        asked = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
        raise ValueError("the request must be an object whose prompt is a string")
    asked = {key: value for key, value in asked.items() if value is not None}
    if other := [key for key in asked if key not in KNOWN and asked[key] != HARMLESS.get(key, ())]:
        raise ValueError(f"this server does not support {', '.join(other)}")
    return asked


def sampling(asked):
    """As the engine has it; JSON's keys are strings, and temperature is 1 unless a request says otherwise."""
    options = {"temperature": 1.0} | {key: asked[key] for key in SAMPLING & asked.keys()}
    if "logit_bias" in options:
        options["logit_bias"] = {int(token): value for token, value in dict(options["logit_bias"]).items()}
    return orthrus_rt.SamplingParams(asked.get("max_tokens", 16), **options)


def send(writer, status, kind, body=""):
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n{body}".encode())


def failure(error):
    return json.dumps({"error": {"message": str(error) or repr(error)}})


async def abort_when_gone(shared, reader, name):
    with contextlib.suppress(OSError):
        await reader.read()  # to the end of what the client sends
    await shared.abort(name)


async def serve(shared, reader, writer):
    name, tokenizer, parts = uuid.uuid4().hex, shared.engine.tokenizer, []
    with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):  # the client may be gone
        try:
            asked = await read_request(reader)
            stop = asked.get("stop") or ()
            text = orthrus_rt.TextStream(tokenizer, [stop] if isinstance(stop, str) else stop)
            outputs = shared.stream(tokenizer(asked["prompt"]).input_ids, sampling(asked), name)
        except (ValueError, TypeError, RuntimeError, asyncio.LimitOverrunError) as error:
            status = "503 Service Unavailable" if isinstance(error, RuntimeError) else "400 Bad Request"
            return send(writer, status, "application/json", failure(error))
        if asked.get("stream"):
            send(writer, "200 OK", "text/event-stream")
        gone = asyncio.create_task(abort_when_gone(shared, reader, name))
        try:
            async with contextlib.aclosing(outputs):  # which ends a request that is not over
                async for out in outputs:
                    parts.append(text.push(out.new_token_ids) + (text.end() if out.finished else ""))
                    reason = "stop" if text.stopped else out.finish_reason
                    choice = {"index": 0, "text": parts[-1], "finish_reason": reason}
                    answer = {"id": name, "object": "text_completion", "choices": [choice]}
                    if asked.get("stream"):
                        writer.write(f"data: {json.dumps(answer)}\n\n".encode())
                        await writer.drain()
                    if reason:
                        break
            if reason in ("error", "abort"):
                raise RuntimeError(out.error or "the request ended as its client closed the connection")
            choice["text"] = "".join(parts)
            status, body, end = "200 OK", json.dumps(answer), "[DONE]"
        except Exception as error:  # of this request alone, or of the engine
            status, body = "500 Internal Server Error", failure(error)
            end = body
        finally:
            gone.cancel()
        if asked.get("stream"):
            writer.write(f"data: {end}\n\n".encode())
        else:
            send(writer, status, "application/json", body)


async def main(model, port, **options):
    async with orthrus_rt.AsyncEngine(orthrus_rt.Engine.from_pretrained(model, **options)) as shared:
        server = await asyncio.start_server(lambda *streams: serve(shared, *streams), "127.0.0.1", port)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        server.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(shared.close(drain=True), 60)
    await asyncio.sleep(0.5)  # for the last words on their way to clients


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
