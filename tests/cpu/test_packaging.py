"""What pip gets to build from, and where Python finds the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv/.packages").exists(),
    reason="not the environment of tools/with-env",
)
def test_the_package_is_found_in_a_folder_that_holds_a_clone(tmp_path):
    (tmp_path / "orthrus_rt").mkdir()
    script = "import orthrus_rt, orthrus_rt.triton_kernels as t; print(orthrus_rt.__file__, t.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("orthrus_rt", "triton_kernels")]


def test_a_source_distribution_has_all_that_it_is_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = set((tmp_path / "orthrus_rt.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "orthrus_rt/py.typed"}
    needed.add("tools/find_nvcc.py")
    for pattern in ("csrc/**/*", "orthrus_rt/*.py", "orthrus_rt/data/*.[jps]*", "triton_kernels/*.py"):
        needed |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
    assert needed <= listed, needed - listed
