"""Python code in a process of its own that has torch and the package imported when it begins. It is forked from a
process that has done nothing else, so it has no threads, no state of other tests, and no two seconds of imports.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path


@functools.cache
def _from_where():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "orthrus_rt.engine", __name__])
    return context


def _main(code: str, environment: dict[str, str], folder: str, files: list[Path]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for fd, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = ["-c"]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Popen:
    """``code`` as it runs, with those attributes of subprocess.Popen that the tests use; output and errors are text."""

    def __init__(self, code: str):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("output", "errors")]
        args = code, dict(os.environ), os.getcwd(), self._files
        self._process = _from_where().Process(target=_main, args=args, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("code", timeout, *(file.read_text() for file in self._files))
        output, errors = (file.read_text() for file in self._files)
        return output, errors


def run(code: str, timeout: float = 120) -> str:
    """What ``code`` printed.

    Raises:
        AssertionError: it failed; the message is what it printed.
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    process = Popen(code)
    output, errors = process.communicate(timeout)
    assert process.returncode == 0, f"{process.returncode}\n{output}{errors}"
    return output
