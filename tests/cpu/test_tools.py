"""tools/test.py: when a process dies, its tier's other files still run, and their results are in the summary.
tools/first_on_a_card.py: a step that fails or hangs does not keep others from running.
tools/variant.py: its changes are still possible.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import common

ROOT = Path(__file__).parents[2]


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for the module here
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def light(monkeypatch):
    """pytest processes started here load only the plugin they need, and not hypothesis, which takes a second."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout")


@pytest.fixture
def runner(monkeypatch, light):
    return load("test", monkeypatch)


def test_files_apart(runner, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_good.py").write_text("def test_a(): pass\ndef test_b(): assert False, 'as it should'\n")
    (tmp_path / "test_bad.py").write_text("import os\ndef test_c(): pass\ndef test_d(): os._exit(9)\n")
    (tmp_path / "test_slow.py").write_text("import time\ndef test_e(): time.sleep(60)\n")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    result = runner.run(runner.Tier("gpu", [], apart=".", timeout_s=3), full=False)
    assert (result.passed, result.failed) == (1, 3)
    assert {name: row[:2] for name, row in result.files.items()} == {
        "test_good": [1, 1], "test_bad": [0, 1], "test_slow": [0, 1],
    }  # fmt: skip
    assert "as it should" in capsys.readouterr().out
    runner.print_per_file(result)
    assert "FAILED" in capsys.readouterr().out


def test_a_process_that_hangs_at_its_end(runner, tmp_path, monkeypatch, capsys):
    """It is ended, the results that it reported count, and the hang is a failure. The longest file starts first."""
    (tmp_path / "test_quick.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_stuck.py").write_text(
        "import atexit, time\natexit.register(time.sleep, 600)\ndef test_b(): print('ran to its end')\n"
    )
    for name, value in {"ROOT": tmp_path, "LONGEST": ("test_stuck.py",), "APART_AT_ONCE": 1}.items():
        monkeypatch.setattr(runner, name, value)
    result = runner.run(runner.Tier("gpu", ["-s"], apart=".", process_timeout_s=5), full=False)
    assert (result.passed, result.failed) == (2, 1)
    assert {name: row[:2] for name, row in result.files.items()} == {"test_quick": [1, 0], "test_stuck": [1, 1]}
    out = capsys.readouterr().out
    assert "ran to its end" in out and "not finished in 5 s" in out
    assert out.index("-- test_stuck.py") < out.index("-- test_quick.py")


def test_the_whole_grids_may_take_longer(runner, monkeypatch):
    asked = []

    def run(command, timeout, **_):
        asked.append(([option for option in command if option.startswith("--timeout=")], timeout))
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(runner.subprocess, "run", run)
    for full in (False, True):
        runner.run_pytest(runner.Tier("gpu", [], timeout_s=5, process_timeout_s=7), full)
    assert asked == [(["--timeout=5"], 7), (["--timeout=20"], 28)]


def test_what_triton_says_as_it_ends_is_left_out(runner, tmp_path, monkeypatch, capfd):
    (tmp_path / "test_a.py").write_text(
        "import atexit, os\n"
        "said = b'nanobind: leaked 1 types!\\n - leaked type \"ir\"\\n - ... skipped remainder\\nas it should\\n'\n"
        "atexit.register(lambda: os.write(2, said))\n"
        "def test_a(): pass\n"
    )
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.run(runner.Tier("cpu", ["-s", "."]), full=False).passed == 1
    assert capfd.readouterr().err == "as it should\n"


def test_a_tier_that_was_asked_for_and_cannot_run_has_failed(runner, monkeypatch, capsys):
    monkeypatch.setattr(runner, "TIERS", [runner.Tier("gpu", [], why_not=lambda: "no CUDA device")])
    monkeypatch.setattr(sys, "argv", ["test.py", "gpu"])
    assert runner.main() == 1
    assert "gpu        failed: requested, but no CUDA device\n0 passed, 1 failed" in capsys.readouterr().out


def test_the_longest_files_exist(runner):
    assert all((ROOT / "tests" / "gpu" / name).exists() for name in (*runner.LONGEST, *runner.TIMED))


@pytest.fixture
def card(tmp_path, monkeypatch):
    """The script in a project of its own, where the module is "built" by a step that writes two files."""
    module = load("first_on_a_card", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BROUGHT", tmp_path / "build" / "card")
    monkeypatch.setattr(module, "REPORTS", tmp_path / "build" / "reports")
    (tmp_path / "orthrus_rt").mkdir()
    build = """
        mkdir -p build
        [ -e build/.native ] || { echo built; echo key >build/.native; echo new >orthrus_rt/_native.so; }
        echo python: /there/bin/python3
    """
    steps = [module.Step("machine", 9, ["echo", "capability 9.0"]), module.Step("build", 9, ["bash", "-c", build])]
    monkeypatch.setattr(module, "PREPARATION", steps)
    return module


def test_the_first_time_on_a_card(card, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("ORTHRUS_CUDA_ARCHS", raising=False)
    steps = [
        card.Step("good", 9, ["bash", "-c", "echo $PATH; echo $PDL $ORTHRUS_CUDA_ARCHS"], {"PDL": "0"}),
        card.Step("bad", 9, ["bash", "-c", "echo as it should; exit 3"]),
        card.Step("stuck", 3, ["bash", "-c", "echo begun; sleep 600 & wait"]),
        card.Step("last", 9, ["echo", "== 1 passed =="]),
    ]
    monkeypatch.setattr(card, "GROUPS", {"ops": steps, "engine": [card.Step("other", 9, ["false"])]})
    assert card.main(["--out", str(tmp_path / "out"), "ops"]) == 1
    summary = capsys.readouterr().out.split("== summary\n")[1]
    assert re.sub(r"\d+\.\d s", "T", summary).split("\n") == [
        "ok             T  machine: capability 9.0", "ok             T  build: python: /there/bin/python3",
        "ok             T  good: 0 90a-real", "FAILED         T  bad: as it should", "timed out      T  stuck: begun",
        "ok             T  last: 1 passed", "",
    ]  # fmt: skip
    results = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert [r["rc"] for r in results] == [0, 0, 0, 3, None, 0] and 3 <= results[4]["seconds"] < 9
    log = (tmp_path / "out" / "steps.log").read_text()
    assert "== bad\nas it should" in log and "\n/there/bin:" in log
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"steps.json", "steps.log", "_native.so", "native-key"}
    assert card.Calls(tmp_path / "late", 0).run(steps[0])["state"] == "not reached"
    last = card.Step("longer than the call", 9, ["sleep", "9"])
    assert card.Calls(tmp_path / "late", 2).run(last)["state"] == "cut short"


def test_reports_are_brought_back_in_one_file(card, tmp_path, monkeypatch, capsys):
    """Those of every call on the machine, also if a later step is ended."""
    write = 'mkdir -p "$REPORTS/{0}"; echo "{0} of table"; echo figures > "$REPORTS/{0}/report.md"'
    steps = [card.Step(name, 9, ["bash", "-c", write.format(name)]) for name in ("speed", "variant")]
    monkeypatch.setattr(card, "GROUPS", {"speed": steps[:1], "variants": [steps[1], card.Step("bad", 9, ["false"])]})
    for group, said in {"speed": "speed of table", "variants": "variant of table"}.items():
        card.main(["--out", str(tmp_path / group), group])
        assert said in capsys.readouterr().out.split("== summary")[0]
    names = {"reports.tar.gz", "steps.json", "steps.log", "_native.so", "native-key"}
    assert {f.name for f in (tmp_path / "variants").iterdir()} == names
    with tarfile.open(tmp_path / "variants" / "reports.tar.gz") as archive:
        files = [name for name in archive.getnames() if name.endswith(".md")]
    assert sorted(files) == ["reports/speed/report.md", "reports/variant/report.md"]


@pytest.mark.parametrize(("last", "state"), [("3 passed, 1 skipped in 2 s", "ok"), ("23 skipped in 1 s", "SKIPPED")])
def test_a_step_whose_tests_are_all_skipped_is_not_ok(card, tmp_path, last, state):
    """This is what happens if the GPU has stopped answering."""
    step = card.Step("tests", 9, ["bash", "-c", f"echo '=== {last} ==='; echo a warning at exit", "pytest"])
    assert card.Calls(tmp_path / "out", 9).run(step)["state"] == state


def test_a_module_that_is_brought_is_not_built_again(card, tmp_path, capsys):
    """It is copied to the output again, and Triton's kernels are found beside it."""
    card.BROUGHT.mkdir(parents=True)
    for name, text in {"native-key": "key", "_native.so": "brought"}.items():
        (card.BROUGHT / name).write_text(text)
        (card.BROUGHT / name).chmod(0o444)
    (tmp_path / "triton_kernels").mkdir()
    for _ in range(2):
        assert card.main(["--out", str(tmp_path / "out")]) == 0
    assert "built" not in capsys.readouterr().out
    assert (tmp_path / "out" / "_native.so").read_text() == "brought"
    assert (tmp_path / "orthrus_rt" / "triton_kernels").samefile(tmp_path / "triton_kernels")


def test_what_passed_in_an_earlier_call_is_not_repeated(card, tmp_path, monkeypatch):
    """Until something changes; calls for other groups in between make no difference."""
    good = card.Step("good", 9, ["bash", "-c", "echo >>ran"])
    broken = card.Step("broken", 9, ["bash", "-c", "[ -e mended ]"])
    other = card.Step("other", 9, ["bash", "-c", "echo >>ran"])
    monkeypatch.setattr(card, "GROUPS", {"ops": [good, broken], "engine": [other]})
    out, ran = tmp_path / "out", tmp_path / "ran"

    def call(*groups):
        code = card.main(["--out", str(out), *groups])
        states = {r["step"]: r["state"] for r in json.loads((out / "steps.json").read_text())}
        shutil.copytree(out, card.BROUGHT, dirs_exist_ok=True)
        return code, [states.get(step.name) for step in (good, broken, other)], len(ran.read_text().splitlines())

    assert call("ops") == (1, ["ok", "FAILED", None], 1)
    (tmp_path / "mended").touch()
    assert call("engine") == (0, ["ok", "FAILED", "ok"], 2)
    assert call("ops") == (0, ["ok before", "ok", "ok"], 2)
    assert call("ops", "engine") == (0, ["ok before"] * 3, 2)
    (tmp_path / "orthrus_rt" / "changed.py").write_text("pass")
    assert call("ops") == (0, ["ok", "ok", None], 3)
    monkeypatch.setenv("ORTHRUS_CUDA_ARCHS", "90a-real")
    assert call("ops") == (0, ["ok before", "ok before", None], 3)
    monkeypatch.setenv("ORTHRUS_CUDA_PDL", "0")
    assert call("ops") == (0, ["ok", "ok", None], 4)
    stale = [result | {"tested": "something else"} for result in json.loads((out / "steps.json").read_text())]
    (out / "steps.json").write_text(json.dumps(stale))
    assert call("ops") == (0, ["ok before", "ok before", None], 4)  # by what was brought
    for folder in (out, card.BROUGHT):
        (folder / "steps.json").write_text("[")
    assert call("ops") == (0, ["ok", "ok", None], 5)


def test_calls_with_one_folder_keep_each_others_results(card, tmp_path, monkeypatch):
    names = "ops", "engine"
    monkeypatch.setattr(card, "GROUPS", {name: [card.Step(name, 9, ["echo", f"by {name}"])] for name in names})
    out = tmp_path / "out"
    for name in names:
        assert card.main(["--out", str(out), name]) == 0
    working = card.PREPARATION[1]
    for state, build in {"FAILED": card.Step("build", 9, ["false"]), "ok": working}.items():
        monkeypatch.setattr(card, "PREPARATION", [card.PREPARATION[0], build])
        assert card.main(["--out", str(out)]) == (state == "FAILED")
        states = {r["step"]: r["state"] for r in json.loads((out / "steps.json").read_text())}
        assert states == {"machine": "ok", "build": state, "ops": "ok", "engine": "ok"}
    assert card.main(["--out", str(out), "--within", "0", *names]) == 1
    assert states == {r["step"]: r["state"] for r in json.loads((out / "steps.json").read_text())}
    assert all(f"by {name}" in (out / "steps.log").read_text() for name in names)


def test_what_is_to_run_on_a_card_exists(monkeypatch, light):
    """Steps cover every file of tests/gpu; each word that selects tests matches one; the sanitizer's cases exist."""
    from tests.gpu.test_sanitizer import CASES

    collected = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(collected, cwd=ROOT, capture_output=True, text=True)
    ids = {line.removeprefix("tests/gpu/") for line in done.stdout.splitlines() if "::" in line}
    assert set(CASES) <= ids, done.stderr
    chosen = {}
    groups = load("first_on_a_card", monkeypatch).GROUPS
    for step in (step for name, steps in groups.items() if name not in ("speed", "variants") for step in steps):
        path, *only = (a for a in step.command if a.startswith("tests/gpu/") or " " in a)
        chosen.setdefault(path.removeprefix("tests/gpu/"), set()).update(re.findall(r"\w+", " ".join(only)))
    assert set(chosen) == {i.split("::")[0] for i in ids}
    for file, words in chosen.items():
        for word in words - {"and", "or", "not"}:
            assert any(i.startswith(file) and word in i for i in ids), (file, word)


def test_what_is_to_be_measured_on_a_card_exists(tmp_path, monkeypatch):
    """Scripts and options, whose parser ends the process if it does not know one; no report replaces another."""
    parse, reports = common.Parser.parse_args, []

    def parse_and_stop(parser, arguments=None):
        raise KeyError(parse(parser, arguments))

    monkeypatch.setattr(common.Parser, "parse_args", parse_and_stop)
    monkeypatch.chdir(tmp_path)
    groups = load("first_on_a_card", monkeypatch).GROUPS
    for step in groups["speed"] + groups["variants"]:
        command = shlex.split(step.command[-1])
        if step in groups["variants"]:
            assert command[1] == "tools/variant.py" and command[2] in load("variant", monkeypatch).VARIANTS
            command = command[3:]
        _, _, script, *arguments = command
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--device", "cpu"])
        with pytest.raises(KeyError) as parsed:
            importlib.import_module(script).main()
        (options,) = parsed.value.args
        reports.append((script, getattr(options, "model", None), options.out))
    assert len(set(reports)) == len(reports) == 11 + len(groups["variants"])
    assert {out for *_, out in reports[:11]} == {"$REPORTS/speed", "$REPORTS/speed-one_pass"}


def test_variants_change_what_they_name(tmp_path, monkeypatch, capsys):
    """Each changes one place of one file and is named where it is explained. Only what differs between two variants is
    written again.
    """
    variant = load("variant", monkeypatch)
    explained = re.findall(r"\[([a-z0-9-]+)\](?!\()", (ROOT / "bench/GPU_EXPERIMENTS.md").read_text())
    assert {"none", *explained} == set(variant.VARIANTS)
    monkeypatch.setattr(variant, "COPY", tmp_path / "copy")
    changes = {name: change for name, change in variant.VARIANTS.items() if change}
    for name, (file, _, new) in changes.items():
        text = variant.content(Path(file), name).decode()
        assert text != (ROOT / file).read_text() and new in text
    assert variant.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(variant.VARIANTS)

    def copied(name):
        before = {path: path.stat().st_mtime_ns for path in variant.COPY.rglob("*") if path.is_file()}
        variant.copy(name)
        written = {path for path in variant.COPY.rglob("*.*") if before.get(path) != path.stat().st_mtime_ns}
        return {path.relative_to(variant.COPY).as_posix() for path in written if path.is_file()}

    assert {"setup.py", "csrc/cuda/dual_attn.cu", "bench/common.py"} < copied("none")
    assert copied("none") == set()
    assert copied("merge-36") == {"csrc/cuda/dual_attn_merge.cuh"}
    assert copied("prefetch-0") == {"csrc/cuda/dual_attn_merge.cuh", "csrc/cuda/row_linear_plan.h"}
    monkeypatch.setitem(variant.VARIANTS, "gone", (variant.PLAN, "no such text", ""))
    with pytest.raises(SystemExit, match=r"row_linear_plan.h must have once, but has 0 times"):
        variant.copy("gone")


def test_a_tier_that_was_asked_for_and_ran_nothing_has_failed(runner, tmp_path, monkeypatch, capsys):
    """All of its tests were skipped, or its process ended without a report."""
    for name, code in {"skips": "import pytest\n@pytest.mark.skip\n", "leaves": "import os\nos._exit(0)\n"}.items():
        file = tmp_path / f"test_{name}.py"
        file.write_text(f"{code}def test_a(): pass\n")
        tier = runner.Tier("cpu", [str(file)])
        monkeypatch.setattr(runner, "TIERS", [tier])
        monkeypatch.setattr(sys, "argv", ["test.py", "cpu"])
        assert runner.main() == 1
        assert "0 passed, 1 failed, " in capsys.readouterr().out.splitlines()[-1]
