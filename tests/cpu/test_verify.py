"""``orthrus-rt verify``: it finds no difference where there is none, and every one that is planted."""

import dataclasses
import json
import re

import pytest

from orthrus_rt import prompts, transformers_model, verify
from orthrus_rt.cli import main
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import GenerationOutput, Stats, complete
from orthrus_rt.sampling import SamplingParams
from tests import byte_tokenizer, checkpoints

PROMPTS = ("abc", "def", "a longer line")


@pytest.fixture
def run(text_folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")

    def call(*args, model=text_folder):
        options = ["--model", model, "--device", "cpu", "--max-seq-len", "128", "--max-new-tokens", "12"]
        code = main(["verify", *options, "--prompts", str(path), *args])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def break_transformers(monkeypatch):
    """``break_transformers(choose)``: token 4 of transformers' output becomes ``choose(that token)``."""

    def install(choose):
        honest = transformers_model.greedy

        def broken(*args, **kwargs):
            out = honest(*args, **kwargs)
            out[4] = choose(out[4])
            return out

        monkeypatch.setattr(transformers_model, "greedy", broken)

    return install


@pytest.fixture
def misread_rope(monkeypatch):
    """``misread_rope(factor)``: transformers' model uses a rope theta that is ``factor`` times ours."""
    honest = transformers_model.build

    def install(factor):
        def build(checkpoint, **kwargs):
            rope = checkpoint.config.rope | {"rope_theta": factor * checkpoint.config.rope["rope_theta"]}
            raw = checkpoint.raw | {"rope_parameters": rope}
            return honest(dataclasses.replace(checkpoint, raw=raw), **kwargs)

        monkeypatch.setattr(transformers_model, "build", build)

    return install


def check_paces(facts, batch: int, two_pass: float) -> None:
    """Each prompt takes as many cycles in a batch as alone, and two_pass has about ``two_pass`` tokens per cycle."""
    rates = {}
    for way in (way for entry in facts["prompts"] for way in entry["ways"]):
        rates.setdefault(way["way"], []).append(way["tokens_per_cycle"])
    together = [rates[f"{mode} in batches of {batch}"] for mode in ("ar", "two_pass", "one_pass")]
    assert together == [[1.0] * len(facts["prompts"]), rates["two_pass"], rates["one_pass"]]
    assert sum(rates["two_pass"]) / len(rates["two_pass"]) == pytest.approx(two_pass, abs=0.1)


def test_no_difference(run):
    code, out, err = run("--batch", "2")
    assert code == 0 and err == ""
    assert len(re.findall(r" 1\.00 / \d\.\d\d / \d\.\d\d tokens/cycle  identical\n", out)) == 3
    check_paces(json.loads(run("--batch", "2", "--json")[1]), batch=2, two_pass=1.455)
    ways = ", ".join(["two_pass", "one_pass", *(f"{mode} in batches of 2" for mode in MODES)])
    assert f"ar against {ways} (bfloat16, greedy):\n" in out
    assert out.endswith("3 of 3 prompts identical, 180 tokens compared\n")


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.*factor"),  # the factor is missing
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "NoneType"),
        ({"text_config": {"a": 1}}, "to_dict"),
    ],
)
def test_a_config_that_transformers_refuses(run, monkeypatch, refused, why):
    honest = transformers_model.build

    def build(checkpoint, **kwargs):
        return honest(dataclasses.replace(checkpoint, raw=checkpoint.raw | refused), **kwargs)

    monkeypatch.setattr(transformers_model, "build", build)
    code, out, err = run("--against", "transformers")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert re.search(rf"transformers cannot read its config \(\w+: .*{why}", err)


def test_sampled(run):
    code, out, _ = run("--temperature", "0.9", "--seed", "3", "--batch", "3", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["different"] == 0 and facts["tokens_compared"] == 180
    check_paces(facts, batch=3, two_pass=1.502)


def test_built_in_prompts_by_default(text_folder, capsys):
    options = ("--model", text_folder, "--device", "cpu", "--max-seq-len", "256", "--max-new-tokens", "4")
    assert main(["verify", *options, "-n", "2"]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "2 prompts, at most 4 tokens each, in ar, two_pass, one_pass:"
    assert second.startswith(prompts.load()[0].name) and rest[-1].startswith("2 of 2 prompts identical")


def test_a_planted_difference_is_reported(run, break_token):
    break_token(5, "two_pass")
    code, out, _ = run("--modes", "ar", "two_pass", "--json")
    facts = json.loads(out)
    assert code == 1 and facts["different"] == 3
    for entry in facts["prompts"]:
        (way,) = entry["ways"]
        right, wrong = way["difference"]["tokens"]
        assert way["way"] == "two_pass" and way["tokens"] == way["difference"]["index"] == 5
        assert right ^ 1 == wrong and way["difference"]["gap"] > 0 and not way["difference"]["near_tie"]
    code, out, _ = run("--modes", "ar", "two_pass")
    assert code == 1 and out.endswith("0 of 3 prompts identical, 3 differ, 15 tokens compared\n")
    pattern = r"line 1 .*  differs\n  two_pass: differs at token 5: \d+ '.*' against \d+ '.*', logit gap \d"
    assert re.search(pattern, out)


def test_a_difference_in_a_batch_alone(run, break_token):
    break_token(0, "ar", together=True)
    code, out, _ = run("--modes", "ar", "--batch", "3")
    assert code == 1 and "2 of 3 prompts identical, 1 differ, " in out
    assert re.search(r"line 5 .*  differs\n  ar in batches of 3: differs at token 0: ", out)


def test_the_last_batch_is_as_large_as_the_others(run, monkeypatch):
    """Of three prompts in batches of two, the second one runs once more, together with the third."""
    honest, sizes = Engine.generate, []

    def counted(self, ids, *args, **kwargs):
        sizes.append(len(ids) if isinstance(ids[0], list) else 1)
        return honest(self, ids, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", counted)
    assert run("--modes", "ar", "--batch", "2")[0] == 0
    assert sizes == [2, 1, 1, 2, 1]


def test_an_output_that_ends_early(text_folder):
    engine = Engine.from_pretrained(text_folder, device="cpu", mode="two_pass", max_seq_len=128, max_batch_size=1)
    ids, params = [1, 2, 3], SamplingParams(max_new_tokens=6, ignore_eos=True)
    short = engine.generate(ids, params).token_ids[:4]
    ((_, _, (comparison,)),) = verify.verify(
        engine, [ids], params, ["ar"], against=verify.Other("other", lambda _: short, None)
    )
    assert comparison.difference.tokens[1] is None and comparison.difference.index == comparison.tokens == 4
    assert comparison.difference.gap is None and not comparison.difference.near_tie


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--modes", "ar"], "two modes, a batch of at least 2 or another implementation are needed"),
        (["--against", "transformers", "--temperature", "1"], "only greedy decoding can be compared"),
        (["--batch", "9"], r"batch must be within \[1, \d\] \(the prompts there are\), got 9"),
        (["--batch", "0"], r"batch must be within \[1, \d\] \(the prompts there are\), got 0"),
        (["--seed", "0"], "--seed is for sampling: --temperature must be above 0, got 0"),
        (["-n", "0"], "--num-prompts must be >= 1, got 0"),
        (["-n", "-1"], "--num-prompts must be >= 1, got -1"),
        (["--modes", "ar", "ar"], "--modes must differ from one another, got ar ar"),
        (["--modes", "ar", "two_pass", "ar", "--batch", "2"], "--modes must differ .*, got ar two_pass ar"),
        (["--modes", "ar", "two_pass", "--fan-out", "2"], "--fan-out belongs to auto, one_pass: --modes must name one"),
    ],
)
def test_errors(run, args, message):
    code, _, err = run(*args)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    assert re.match("orthrus-rt verify: (?!verify)", err)


@pytest.mark.parametrize(
    ("params", "modes", "message"),
    [
        (SamplingParams(4, temperature=1.0), ["ar", "two_pass"], "sampling needs a seed"),
        (SamplingParams(4), ["ar"], "two modes"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(params, modes, message):
    with pytest.raises(ValueError, match=message):
        next(verify.verify(None, [[1]], params, modes))


def test_a_mode_that_is_none(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--modes", "ar", "foo")
    assert re.search(
        "argument --modes: invalid choice: 'foo' .*auto.*, .*ar.*, .*two_pass.*one_pass", capsys.readouterr().err
    )


def test_auto_against_ar(run):
    code, out, _ = run("--modes", "ar", "auto", "-n", "1")
    assert code == 0 and "ar against auto (bfloat16, greedy):\n1 of 1 prompts identical, 12 tokens compared\n" in out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ncaf\xe9\n", "the prompt ({}) must be UTF-8 text, got b'\\xe9' at position 7"),
        (b"\n \n", "--prompts must name a file with a prompt a line, {} holds none"),
        (b"\xef\xbb\xbf" + b"x" * 128, "{}, line 1 has 128 tokens: --max-seq-len must be above that, got 128"),
        (b"one\n\n" + b"x" * 128, "{}, line 3 has 128 tokens: --max-seq-len must be above that, got 128"),
    ],
)
def test_a_file_that_holds_no_prompts_or_too_long_ones(run, tmp_path, data, message):
    path = tmp_path / "other.txt"
    path.write_bytes(data)
    code, out, err = run("--prompts", str(path))
    assert (code, out, err) == (2, "", f"orthrus-rt verify: {message.format(path)}\n")


@pytest.mark.parametrize("family", ("qwen3", pytest.param("llama", marks=pytest.mark.full)))
def test_against_transformers_in_float32(run, family, tmp_path, break_transformers):
    kwargs = dict(vocab_size=258, mask_token_id=257, eos_token_id=256, diff_noise=0.02)
    checkpoints.make(tmp_path / "model", family, **kwargs)
    byte_tokenizer.build().save_pretrained(tmp_path / "model")
    options = ("--against", "transformers", "--dtype", "float32")
    code, out, _ = run(*options, model=str(tmp_path / "model"))
    assert code == 0 and "ar against two_pass, one_pass, transformers (float32, greedy):" in out
    assert out.endswith("3 of 3 prompts identical, 108 tokens compared\n")
    break_transformers(lambda token: token ^ 1)
    code, out, _ = run(*options, "--json", model=str(tmp_path / "model"))
    assert code == 1 and json.loads(out)["different"] == 3 and json.loads(out)["near_ties"] == 0


def test_a_wrong_model_does_not_pass_for_a_near_tie(run, tmp_path, misread_rope):
    """It first differs from ours at close choices, and is found out by its choices for the tokens after them."""
    (tmp_path / "prompts.txt").write_text("def\n")
    options = ("--modes", "ar", "--against", "transformers", "--json")
    code, out, _ = run(*options)
    assert code == 0 and json.loads(out)["tokens_compared"] == 12
    misread_rope(2)
    code, out, _ = run(*options)
    assert code == 1 and json.loads(out)["different"] == 1


def test_many_near_ties_are_not_all_listed(run, monkeypatch, break_transformers):
    break_transformers(lambda token: token ^ 1)
    honest = transformers_model.logits
    monkeypatch.setattr(transformers_model, "logits", lambda *args: honest(*args).roll(1, -1))
    monkeypatch.setattr(verify, "near_tie_bound", lambda *_: float("inf"))
    code, out, _ = run("--modes", "ar", "--against", "transformers", "-n", "1")
    count, more = (int(n) for n in re.search(r" (\d+) near-ties\n(?:.*\n){4}.* (\d+) more near-ties", out).groups())
    assert code == 0 and out.count("transformers: near-tie at token") == count - more == 4


def test_a_wrong_token_is_no_near_tie(run, break_transformers):
    code, out, _ = run("--against", "transformers", "--json")
    honest = json.loads(out)
    assert code == 0 and honest["different"] == 0
    break_transformers(lambda token: (token + 128) % 256)
    code, out, _ = run("--against", "transformers", "--json")
    facts = json.loads(out)
    assert code == 1 and facts["different"] == 3 and facts["near_ties"] == 0


def test_a_near_tie_is_neither_identical_nor_different(run, monkeypatch, break_transformers):
    break_transformers(lambda token: (token + 128) % 256)
    monkeypatch.setattr(verify, "near_tie_bound", lambda *_: float("inf"))
    code, out, _ = run("--modes", "ar", "--against", "transformers", "-n", "1")
    assert code == 0
    ids = r"\d+ '.*' against \d+ '.*'"
    pattern = rf"tokens/cycle  \d near-ties?\n  transformers: near-tie at token 4: {ids}, logit gap \d.*, its own -\d"
    assert re.search(pattern, out)
    assert out.endswith("\n0 of 1 prompts identical, 1 with near-ties within rounding, 12 tokens compared\n")


def test_a_near_tie_excuses_no_difference_beside_it(run, monkeypatch, break_token, break_transformers):
    break_token(5, "two_pass")
    break_transformers(lambda token: (token + 128) % 256)
    monkeypatch.setattr(verify, "near_tie_bound", lambda *_: float("inf"))
    options = ("--modes", "ar", "two_pass", "--against", "transformers", "-n", "1", "--json")
    code, out, _ = run(*options)
    facts = json.loads(out)
    mine, theirs = (way["difference"] for way in facts["prompts"][0]["ways"])
    assert theirs["near_tie"] and not mine["near_tie"]
    assert code == 1 and (facts["different"], facts["near_ties"]) == (1, 0)


def test_rounding_excuses_nothing_in_float32(run, monkeypatch, break_transformers):
    break_transformers(lambda token: (token + 128) % 256)
    monkeypatch.setattr(verify, "near_tie_bound", lambda *_: float("inf"))
    code, out, _ = run("--modes", "ar", "--against", "transformers", "--dtype", "float32", "--json")
    assert code == 1 and json.loads(out)["different"] == 3


def test_ways_end_where_max_seq_len_does_and_none_reads_what_another_left(run, tmp_path, monkeypatch):
    """With prompts of 120 tokens, of which prefix caching would keep a page."""
    honest, cached = Engine.generate, []

    def counted(self, *args, **kwargs):
        out = honest(self, *args, **kwargs)
        cached.extend(o.stats.cached_tokens for o in (out if isinstance(out, list) else [out]))
        return out

    monkeypatch.setattr(Engine, "generate", counted)
    (tmp_path / "prompts.txt").write_text(f"{'a longer line ' * 9:.120}\n" * 2)
    code, out, _ = run("--against", "transformers", "--dtype", "float32", "--batch", "2")
    assert code == 0 and out.endswith("2 of 2 prompts identical, 96 tokens compared\n")
    assert cached == [0] * 12


def test_a_wrong_token_of_ours_is_no_near_tie(run, monkeypatch):
    """Our least likely token in place of token 4, in every mode: the gap is negative, and no rounding explains it."""
    honest, wrong = Engine.generate, {}

    def broken(self, ids, *args, **kwargs):
        out = honest(self, ids, *args, **kwargs)
        if tuple(ids) not in wrong:
            wrong[tuple(ids)] = int(self.next_logits(ids + out.token_ids[:4]).argmin())
        out.token_ids[4] = wrong[tuple(ids)]
        return out

    monkeypatch.setattr(Engine, "generate", broken)
    code, out, _ = run("--against", "transformers", "--json")
    facts = json.loads(out)
    assert code == 1 and facts["different"] == 3 and facts["near_ties"] == 0
    for entry in facts["prompts"]:
        *modes, theirs = entry["ways"]
        assert all(way["difference"] is None for way in modes)
        assert theirs["difference"]["index"] == 4 and theirs["difference"]["gap"] < 0


def test_a_prompt_that_could_not_go_on_is_no_difference():
    fine = GenerationOutput([1], "length", Stats("ar", 1, 0))
    failed = GenerationOutput([1], "error", Stats("ar", 1, 0), "no memory")
    assert complete([fine]) == [fine]
    with pytest.raises(RuntimeError, match="prompt 2 of 2: no memory"):
        complete([fine, failed])
