"""What pip gets to build from."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_source_distribution_has_all_that_it_is_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = set((tmp_path / "orthrus_rt.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    for pattern in ("csrc/**/*", "orthrus_rt/*.py", "orthrus_rt/data/*.[jps]*", "triton_kernels/*.py"):
        needed |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
    assert needed <= listed, needed - listed
