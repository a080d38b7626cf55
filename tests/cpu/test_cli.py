"""The command line on a tiny checkpoint: what it prints, how it fails, how it ends."""

import io
import json
import os
import platform
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from orthrus_rt import info
from orthrus_rt.cli import build_parser, main
from orthrus_rt.cli_options import in_options
from orthrus_rt.engine import Engine
from tests import byte_tokenizer

NEEDED = "orthrus-rt generate: a prompt is needed: as an argument, from --file, or on standard input\n"


@pytest.fixture
def run(text_folder, capsys):
    def call(command, *args):
        options = ["--model", text_folder, "--device", "cpu"]
        if command != "info":
            options += ["--max-seq-len", "256"]
        code = main([command, *options, *args])
        return code, *capsys.readouterr()

    return call


def generate(run, *args):
    code, out, err = run("generate", "--json", "--max-new-tokens", "24", "--ignore-eos", *args)
    assert code == 0, err
    return json.loads(out)


def test_prompt_from_argument_file_and_stdin_is_the_same(run, tmp_path, monkeypatch):
    text = "Grüße,\r\n世界\r\n"
    want = generate(run, text)
    for begins in ("", "\ufeff"):  # some editors put a byte order mark there
        (tmp_path / "prompt.txt").write_text(begins + text, encoding="utf-8", newline="")
        assert generate(run, "--file", str(tmp_path / "prompt.txt"))["prompt_token_ids"] == want["prompt_token_ids"]
        for args in ([], ["-"]):
            monkeypatch.setattr(sys, "stdin", io.StringIO(begins + text))
            assert generate(run, *args)["token_ids"] == want["token_ids"]


@pytest.mark.parametrize("source", ("argument", "--file", "standard input", "standard input, surrogates"))
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", r"the prompt ({}) must be UTF-8 text, got b'\xe9' at position 3"),
        (b"", "the prompt is empty"),
    ],
)
def test_a_prompt_that_is_no_text(run, tmp_path, monkeypatch, source, data, message):
    args, name = [], source.split(",")[0]
    if source == "argument":
        args = [os.fsdecode(data)]
    elif source == "--file":
        name = str(tmp_path / "prompt.txt")
        (tmp_path / "prompt.txt").write_bytes(data)
        args = ["--file", name]
    else:
        errors = "surrogateescape" if "surrogates" in source else "strict"  # with LANG=C and with UTF-8, respectively
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))
    code, out, err = run("generate", *args)
    assert (code, out, err) == (2, "", f"orthrus-rt generate: {message.format(name)}\n")


def test_chat_is_the_default_where_there_is_a_template(run):
    tokenizer = byte_tokenizer.build()
    for options in ([], ["--chat"]):
        ids = generate(run, "hi", *options)["prompt_token_ids"]
        assert tokenizer.decode(ids) == "<user>hi<|end|><assistant>" and ids.count(byte_tokenizer.END) == 1
    assert tokenizer.decode(generate(run, "hi", "--raw")["prompt_token_ids"]) == "hi"


def test_text_and_table_agree_with_json(run):
    options = ("--compare-ar", "--mode", "two_pass")  # auto decides by measured times
    want = generate(run, "hello", *options)
    code, out, err = run("generate", "hello", "--max-new-tokens", "24", "--ignore-eos", "--stats", *options)
    assert code == 0 and err == ""
    assert out.startswith(want["text"] + "\n")
    lines = out[len(want["text"]) :].strip().splitlines()
    for line, stats in zip(lines[1:3], (want["stats"], want["ar"]["stats"]), strict=True):
        names = ("mode", "block_len", "tokens", "cycles", "passes")
        assert line.split()[:5] == [str(stats[name]) for name in names]
        assert line.split()[5:7] == [f"{stats[name]:.2f}" for name in ("tokens_per_cycle", "tokens_per_pass")]
    assert want["stats"]["mode"] == "two_pass" and want["stats"]["tokens_per_cycle"] > 1.2
    assert want["identical_tokens"] and lines[-1] == "identical tokens: yes (24 of 24)"


def test_the_table_of_auto_tells_what_ran(run):
    code, out, _ = run("generate", "hello", "--max-new-tokens", "24", "--ignore-eos", "--compare-ar")
    auto, ar, plans = out.splitlines()[-5:-2]
    assert code == 0 and auto.startswith("auto       up to 8 ") and ar.split()[:3] == ["ar", "1", "24"]
    assert re.fullmatch(r"cycles of auto: (\w+(/\w+)? \d+)(, \w+(/\w+)? \d+)*", plans)
    assert sum(int(n) for n in re.findall(r" (\d+)(?:,|$)", plans)) == int(auto.split()[5])
    assert generate(run, "hello")["mode"] == "auto"


def test_draft_len_mode_and_sampling_reach_the_engine(run):
    assert generate(run, "x", "--mode", "two_pass", "--draft-len", "3")["stats"]["block_len"] == 4
    assert generate(run, "x", "--mode", "ar")["stats"]["mode"] == "ar"
    sampled = generate(run, "x", "--temperature", "1", "--top-k", "20", "--seed", "7")
    assert sampled["stats"]["seed"] == 7
    assert "ar" in generate(run, "x", "--temperature", "1", "--top-k", "20", "--compare-ar")  # exit 0: identical
    assert sampled["token_ids"] == generate(run, "x", "--temperature", "1", "--top-k", "20", "--seed", "7")["token_ids"]


def test_edits_reach_the_engine(run):
    plain = generate(run, "x", "--max-new-tokens", "12")["token_ids"]
    biased = generate(run, "x", "--logit-bias", f"{plain[0]}=-50", "--logit-bias", "7=60", "--max-new-tokens", "12")
    assert biased["token_ids"] == [7] * 12
    penalties = ("--frequency-penalty", "2", "--repetition-penalty", "5", "--presence-penalty", "1")
    varied = generate(run, "x", "--min-tokens", "12", "--max-new-tokens", "12", *penalties, "--compare-ar")["token_ids"]
    assert len(varied) == len(set(varied)) == 12  # no token twice


def test_what_the_terminals_encoding_lacks_is_replaced(run, monkeypatch):
    want = generate(run, "--raw", "Grüße")["text"]
    assert not want.isascii()
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run("generate", "--max-new-tokens", "24", "--ignore-eos", "--raw", "Grüße")[0] == 0
    assert out.buffer.getvalue() == want.encode("ascii", "replace") + b"\n"


def test_an_error_before_the_first_token_leaves_the_output_empty(run, monkeypatch):
    monkeypatch.setattr("orthrus_rt.runner.Runner.prefill", lambda *_: 1 / 0)
    assert run("generate", "a") == (2, "", "orthrus-rt generate: division by zero\n")


def test_a_character_that_remains_a_beginning_is_told(run):
    begins = byte_tokenizer.build()("é").input_ids[0]
    options = ("--logit-bias", f"{begins}=60", "--max-new-tokens", "1")
    assert generate(run, "x", *options)["text"] == "\ufffd"
    assert run("generate", "x", *options)[1] == "\ufffd\n"


def test_compare_ar_says_no(run, break_token):
    break_token(2, "ar")
    code, out, _ = run("generate", "hello", "--max-new-tokens", "8", "--ignore-eos", "--compare-ar")
    assert code == 1 and "identical tokens: no, first difference at token 2: " in out


def test_info_names_every_op_and_the_model(run, text_folder):
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["ops"]["row_linear"] == "cpu"
    assert all(facts["ops"][op] in available for op, available in facts["ops_available"].items())
    assert facts["model"]["name"] == text_folder and facts["model"]["block_len"] == 8
    assert facts["device"]["type"] == "cpu" and facts["versions"]["torch"]
    code, out, _ = run("info")
    assert code == 0 and all(op in out for op in facts["ops"])


def test_processors_of_one_name_are_told_apart():
    """The costs of cycles are kept under the name that is made here."""
    processor = "processor\t: {}\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: a: b\n\n"
    two = processor.format(0) + processor.format(1).replace("EPYC", "another")
    assert info.cpu_name(two) == "AMD EPYC (family 26, model 2)"
    arm = "processor\t: 0\nBogoMIPS\t: 2000.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    assert info.cpu_name(arm) == f"{platform.machine()} (implementer 0x41, part 0xd4f)"
    assert info.cpu_name("processor\t: 0\nBogoMIPS\t: 243.75\n") == info.cpu_name("") == platform.machine()


def test_bench_prints_rates_or_a_profile(run):
    options = ("-n", "1", "--max-new-tokens", "8")
    code, out, _ = run("bench", *options, "--json")
    (table,) = json.loads(out)["tables"]
    assert code == 0 and [r["mode"] for r in table["rows"]] == ["ar", "two_pass"] * 2
    code, out, _ = run("bench", *options, "--batch", "4")
    assert code == 0 and re.search(r"prompts +batch +tokens", out) and re.search(r"code +two_pass +4 +1 +1 +8 ", out)
    code, out, _ = run("bench", "--profile", "--context", "40", "--modes", "one_pass", "--fan-out", "2")
    assert code == 0 and re.search(r"mode one_pass, block_len 4, fan_out 2, ", out)
    code, out, _ = run("bench", "--profile", "--context", "40", "--modes", "ar")
    assert code == 0 and re.search(r"mode ar, block_len 1, fan_out 0, batch 1, context 40, read_gb_s", out)
    assert re.search(r"dual_attn +2 ", out)
    code, _, err = run("bench", "--profile", "--context", "400")
    assert code == 2 and "--context must be within [1, 248] (--max-seq-len less a block), got 400\n" in err


def test_bench_runs_auto(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = run("bench", "-n", "1", "--max-new-tokens", "8", "--modes", "auto", "--fan-out", "2", "--json")
    assert code == 0, err
    for row in json.loads(out)["tables"][0]["rows"]:
        assert (row["mode"], row["block_len"], row["prompts"], row["batch"]) == ("auto", 8, 1, 1)
        assert row["ms_per_cycle"] > 0 and row["tokens"] == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-n", "0"], "--num-prompts must be >= 1, got 0"),
        (["--batch", "0"], "--batch must be >= 1, got 0"),
        (["--max-seq-len", "20"], r"built-in prompt, [\w-]+ has \d+ tokens: --max-seq-len must be above that, got 20"),
        (
            ["--modes", "ar", "--draft-len", "3"],
            "--draft-len belongs to auto, .*: --modes must name one of them, got ar",
        ),
        (["--profile", "--context", "-1", "--model", "/nowhere"], "--context must be >= 1, got -1"),
        (["--profile", "--context", "0", "--model", "/nowhere"], "--context must be >= 1, got 0"),
        (["--profile", "--max-new-tokens", "2"], "--max-new-tokens has no use with --profile"),
        (["--context", "10"], "--context has no use without --profile"),
        (["--profile", "-n", "2"], "--num-prompts has no use with --profile"),
        (["--profile", "--modes", "ar", "auto"], "--modes must be among ar, two_pass, one_pass, got auto"),
        (
            ["--modes", "one_pass", "--fan-out", "99"],
            r"--fan-out must be within \[1, 22\] for at most 7 drafts per cycle, got 99",
        ),
    ],
)
def test_what_bench_refuses(run, args, message):
    code, out, err = run("bench", *args)
    assert code == 2 and out == ""
    assert re.fullmatch(f"orthrus-rt bench: (?!bench).*{message}\n", err)


def test_built_in_prompts_that_are_too_long_for_the_model(run):
    code, out, err = run("verify", "-n", "3")
    want = "built-in prompt, lighthouse has 1548 tokens: this model takes fewer than 512; --prompts names others"
    assert (code, out, err) == (2, "", f"orthrus-rt verify: {want}\n")


def test_info_reports_a_model_that_cannot_be_opened(run):
    for options in ([], ["--json"]):
        code, out, err = run("info", "--model", "/nowhere", *options)
        assert code == 2 and "/nowhere" in out and "row_linear" in out
        assert err.startswith("orthrus-rt info: '/nowhere': is neither a folder here") and err.count("\n") == 1
        assert ("is neither a folder" in out) == (options == ["--json"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--draft-len", "8", "x"], r": --draft-len must be within \[1, 7\]"),
        (["--draft-len", "3", "--mode", "ar", "x"], "--draft-len belongs to .*: --mode must name one of them, got ar"),
        (["--fan-out", "3", "--mode", "two_pass", "x"], "--fan-out belongs to auto, one_pass: --mode .*, got two_pass"),
        (["--max-new-tokens", "0", "x"], ": --max-new-tokens must be >= 1, got 0"),
        (["--temperature", "-1", "x"], ": --temperature must be 0, or finite and >= 1e-6, got -1.0"),
        (["--min-tokens", "300", "x"], r": --min-tokens must be in \[0, 128\] \(--max-new-tokens\), got 300"),
        (["--top-p", "0.5", "x"], ": --top-p is for sampling: --temperature must be above 0, got 0"),
        (["--min-p", "0.5", "x"], ": --min-p is for sampling: --temperature must be above 0, got 0"),
        (["--seed", "0", "x"], ": --seed is for sampling: --temperature must be above 0, got 0"),
        (["--file", "/nowhere/prompt.txt"], "generate: /nowhere/prompt.txt: No such file or directory"),
        (["--base-gguf", "/nope", "x"], "--base-gguf: applies to 'smollm2-135m' only"),
        (["--model", "/nowhere", "x"], "/nowhere"),
        (["--adapter", "/nope", "x"], "adapter: '/nope' is neither a folder with a diffusion view, nor a hub id"),
        (["--raw", "x" * 300], "the prompt has 300 tokens: --max-seq-len must be above that, got 256"),
        (["--raw", "x" * 600], "the prompt has 600 tokens: this model takes fewer than 512"),
        (["--raw", "x" * 512], "the prompt has 512 tokens: this model takes fewer than 512"),
        (["--device", "tpu", "x"], ": --device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_errors_are_one_line(run, args, message):
    code, out, err = run("generate", *args)
    assert code == 2 and out == ""
    assert re.search(message, err) and err.startswith("orthrus-rt generate: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            "/nope: does not exist (named by the base_gguf argument)",
            "/nope: does not exist (named by the --base-gguf argument)",
        ),
        (
            "x: is a plain base model: pass adapter=FOLDER with it",
            "x: is a plain base model: pass --adapter FOLDER with it",
        ),
        ("/max_seq_len/x-max_seq_len: model must be", "/max_seq_len/x-max_seq_len: model must be"),
        ("making max_batch_size 8, num_pages 9, max_seq_len.", "making max_batch_size 8, num_pages 9, --max-seq-len."),
        (
            "out of memory: lower max_batch_size, num_pages or max_seq_len (5 GiB)",
            "out of memory: lower --max-seq-len (5 GiB)",
        ),
        ("rows: lower draft_len, fan_out, max_batch_size or num_pages", "rows: lower --draft-len or --fan-out"),
        ("cache: lower num_pages or max_batch_size", "cache: lower num_pages or max_batch_size"),
        ("seed must be drawn for a model of any seed", "--seed must be drawn for a model of any seed"),
        ("'base_gguf': is neither; owner/x@seed=3?mode=ar", "'base_gguf': is neither; owner/x@seed=3?mode=ar"),
    ],
)
def test_parameters_are_called_by_their_options(message, says):
    args = build_parser().parse_args(["generate"])
    assert in_options(message, args) == says


@pytest.mark.parametrize(
    ("how", "tokens", "reason"), [("--chat", 1, "stop"), ("--raw", 8, "length"), ("--chat --ignore-eos", 8, "length")]
)
def test_an_answer_ends_with_the_tokenizers_end_of_a_turn(text_folder, tmp_path, capsys, how, tokens, reason):
    """Even if config.json does not name that token. Raw text that is continued is not divided into turns."""
    folder = shutil.copytree(text_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    always = ["--logit-bias", f"{byte_tokenizer.END}=10000", "--max-new-tokens", "8", "--max-seq-len", "64"]
    assert main(["generate", "--model", str(folder), "--device", "cpu", "--json", *how.split(), *always, "hi"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["token_ids"], out["finish_reason"]) == ([byte_tokenizer.END] * tokens, reason)


def test_an_answer_that_is_cut_says_so(run):
    """Raw text that is continued has no end that could be missing, nor has an answer with ``--ignore-eos``."""
    for options, said in (
        (["--chat"], "orthrus-rt generate: cut at --max-new-tokens 3\n"),
        (["--raw"], ""),
        (["--chat", "--ignore-eos"], ""),
    ):
        code, out, err = run("generate", *options, "hello", "--max-new-tokens", "3")
        assert (code, err) == (0, said) and out


def test_text_that_is_cut_by_the_engine_says_so(run):
    code, out, err = run("generate", "--raw", "hello", "--ignore-eos", "--max-new-tokens", "300", "--mode", "two_pass")
    assert (code, err) == (0, "orthrus-rt generate: cut at --max-seq-len 256, after 251 new tokens\n") and out


@pytest.mark.parametrize("text", ("5", "5=", "x=1"))
def test_a_bias_that_is_none(run, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        run("generate", "--logit-bias", text, "x")
    assert f"argument --logit-bias: expected ID=X, got '{text}'" in capsys.readouterr().err


def test_a_bug_is_no_difference(run, monkeypatch):
    """Exit code 1 says that tokens differ, so a bug must exit with another."""
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: {}["a bug"])
    code, _, err = run("verify", "-n", "1", "--max-new-tokens", "4")
    assert code == 2 and "Traceback" in err and err.endswith("KeyError: 'a bug'\n")


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        ("stdin", NEEDED),
        ("stdout", "orthrus-rt generate: standard output is closed\n"),
    ],
)
def test_closed_streams(run, monkeypatch, closed, message):
    """Python puts None in their place."""
    monkeypatch.setattr(sys, closed, None)
    assert run("generate", *(["x"] if closed == "stdout" else [])) == (2, "", message)


def test_a_terminal_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run("generate") == (2, "", NEEDED)


def test_standard_input_is_utf8_whatever_the_locale_says(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo".encode()), encoding="ascii"))
    ids = generate(run, "--raw")["prompt_token_ids"]
    assert ids == generate(run, "--raw", "héllo")["prompt_token_ids"]
