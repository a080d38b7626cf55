"""What ``bench_llama_cpp`` reads from llama-bench."""

import json

import pytest

from bench.bench_llama_cpp import theirs

ROWS = [
    {"build_commit": "0c1e570", "model_type": "llama 256M BF16", "avg_ns": 1_500_000_000, "avg_ts": 666.7},
    {"build_commit": "0c1e570", "model_type": "llama 256M BF16", "avg_ns": 800_000_000, "avg_ts": 80.0},
]


def program(tmp_path, text):
    path = tmp_path / "llama-bench"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_one_round(tmp_path):
    said = program(tmp_path, f"echo \"$@\" >'{tmp_path}/asked'; echo '{json.dumps(ROWS)}'")
    assert theirs(said, "a.gguf") == {
        "runtime": "llama.cpp 0c1e570", "weights": "BF16", "tok_s": 80.0, "prefill_s": 1.5,
    }  # fmt: skip
    assert (tmp_path / "asked").read_text().startswith("-m a.gguf -p 1000 -n 64 -t ")


def test_what_cannot_be_run(tmp_path):
    with pytest.raises(ValueError, match=r"--llama-bench: nowhere/llama-bench: No such file or directory"):
        theirs("nowhere/llama-bench", "a.gguf")
    fails = program(tmp_path, "echo 'loading' >&2; echo 'failed to load model' >&2; exit 1")
    with pytest.raises(ValueError, match=r"llama-bench -m a.gguf .*: failed to load model$"):
        theirs(fails, "a.gguf")
