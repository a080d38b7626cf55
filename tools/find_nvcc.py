"""Finds nvcc for setup.py, tools/with-env and the tests. As a command, prints its path or nothing."""

import os
import re
import shutil
from pathlib import Path

LOCAL = Path("/usr/local")


def find_nvcc() -> str | None:
    """From CUDACXX, PATH, CUDA_HOME or CUDA's default locations, the newest first; None where there is none."""
    versions = sorted(LOCAL.glob("cuda-*"), key=lambda home: [*map(int, re.findall(r"\d+", home.name))], reverse=True)
    homes = [os.environ.get("CUDA_HOME"), LOCAL / "cuda", *versions]
    tried = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(os.path.join(h, "bin", "nvcc") for h in homes if h)]
    return next((nvcc for nvcc in tried if nvcc and os.access(nvcc, os.X_OK)), None)


if __name__ == "__main__":
    print(find_nvcc() or "")
