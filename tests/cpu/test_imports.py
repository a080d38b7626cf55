"""What importing costs and needs: no CUDA, no Triton, and no torch for --help."""

import ast
import inspect
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

import orthrus_rt

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3-tied-k8"


def python(code: str, **env) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": "", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_and_decodes_without_cuda_and_triton():
    out = python(f"""
import pkgutil, sys
sys.modules["triton"] = None  # importing it now fails, as where it is not installed
import orthrus_rt
for module in pkgutil.iter_modules(orthrus_rt.__path__):
    if not module.ispkg:
        __import__("orthrus_rt." + module.name)
engine = orthrus_rt.Engine.from_pretrained({str(GOLDEN)!r}, dtype="float32", max_seq_len=32)
print(len(engine.generate([1, 2, 3], orthrus_rt.SamplingParams(max_new_tokens=4, ignore_eos=True)).token_ids))
""")
    assert out == "4\n"


def test_help_is_quick_and_loads_nothing_heavy():
    code = """
import sys
from orthrus_rt.cli import main
try:
    main(["--help"])
except SystemExit as exit:
    assert exit.code == 0
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        out = python(code)
        seconds.append(time.perf_counter() - start)
    assert all(command in out for command in ("generate", "info", "verify"))
    assert min(seconds) < 1


def test_a_type_checker_sees_what_python_finds():
    """The same names from the same places, and the return type of every public method."""
    lines = ast.walk(ast.parse(Path(orthrus_rt.__file__).read_text()))
    imports = {n.names[0].asname: n.module for n in lines if isinstance(n, ast.ImportFrom) and n.names[0].asname}
    assert imports == {name: f"orthrus_rt.{home}" for name, home in orthrus_rt._HOME.items()}
    for owner in map(orthrus_rt.__getattr__, orthrus_rt.__all__):
        for name, method in inspect.getmembers(owner, lambda m: inspect.isfunction(m) or inspect.ismethod(m)):
            if not name.startswith("_"):
                for function in typing.get_overloads(method) or [method]:
                    assert "return" in function.__annotations__, (owner, name)


def test_public_names():
    for name in orthrus_rt.__all__:
        assert getattr(orthrus_rt, name).__module__.startswith("orthrus_rt.")
    assert orthrus_rt.__version__
    assert set(orthrus_rt.__all__) <= set(dir(orthrus_rt))
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = orthrus_rt.Engin
