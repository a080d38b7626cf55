"""The user's cache folder, where the embedded model's converted base and the measured costs of cycles are kept."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from orthrus_rt.config import CheckpointError


class NoCacheFolder(CheckpointError):
    """There is no usable cache folder. The embedded model needs one, so for it this is an error of the checkpoint."""


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/orthrus_rt`` if that is an absolute path, by default ``~/.cache/orthrus_rt``. If the user has
    no home, as in a container that runs under a random uid, it is a folder of this user among the temporary files.

    Raises:
        NoCacheFolder: that last folder exists and others can write to it, or there is nowhere to write.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the specification says to ignore a relative one
        return named / "orthrus_rt"
    with contextlib.suppress(RuntimeError):
        home = Path.home()
        if home != Path("/") or os.getuid() == 0:  # "/" is what containers give as the home of an unknown uid
            return home / ".cache" / "orthrus_rt"
    return _temporary_root()


def _temporary_root() -> Path:
    named = "as there is no home folder for a cache; let XDG_CACHE_HOME name one, by an absolute path"
    try:
        folder = Path(tempfile.gettempdir()) / f"orthrus_rt-{os.getuid()}"
    except FileNotFoundError as error:
        raise NoCacheFolder(f"a folder for temporary files is needed ({error}), {named}") from error
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # of the link itself, not its target: anybody may have put a link there
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NoCacheFolder(f"{folder}: must be a folder that this user alone can write to, {named}")
    return folder
