"""tools/test.py: a process that dies takes the other files of its tier with it neither here nor in the summary."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runner(monkeypatch):
    spec = importlib.util.spec_from_file_location("tools_test", ROOT / "tools" / "test.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "tools_test", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_files_apart(runner, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_good.py").write_text("def test_a(): pass\ndef test_b(): assert False, 'as it should'\n")
    (tmp_path / "test_bad.py").write_text("import os\ndef test_c(): pass\ndef test_d(): os._exit(9)\n")
    (tmp_path / "test_slow.py").write_text("import time\ndef test_e(): time.sleep(60)\n")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    result = runner.run(runner.Tier("gpu", [], apart=".", timeout_s=2), full=False)
    assert (result.passed, result.failed) == (1, 3)
    assert {name: row[:2] for name, row in result.files.items()} == {
        "test_good": [1, 1], "test_bad": [0, 1], "test_slow": [0, 1],
    }  # fmt: skip
    assert "as it should" in capsys.readouterr().out
    runner.print_per_op(result)
    assert "FAILED" in capsys.readouterr().out


def test_a_process_that_hangs_at_its_end(runner, tmp_path, monkeypatch, capsys):
    """It is ended, what it reported counts, and that it hung is a failure; the longest file starts first."""
    (tmp_path / "test_quick.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_stuck.py").write_text(
        "import atexit, time\natexit.register(time.sleep, 600)\ndef test_b(): print('ran to its end')\n"
    )
    for name, value in {"ROOT": tmp_path, "LONGEST": ("test_stuck.py",), "APART_AT_ONCE": 1}.items():
        monkeypatch.setattr(runner, name, value)
    result = runner.run(runner.Tier("gpu", ["-s"], apart=".", process_timeout_s=10), full=False)
    assert (result.passed, result.failed) == (2, 1)
    assert {name: row[:2] for name, row in result.files.items()} == {"test_quick": [1, 0], "test_stuck": [1, 1]}
    out = capsys.readouterr().out
    assert "ran to its end" in out and "not finished in 10 s" in out
    assert out.index("-- test_stuck.py") < out.index("-- test_quick.py")


def test_the_longest_files_exist(runner):
    assert all((ROOT / "tests" / "gpu" / name).exists() for name in (*runner.LONGEST, *runner.TIMED))
