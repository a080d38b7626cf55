"""The user's cache folder, where the embedded model's converted base and the measured costs of cycles are kept."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from orthrus_rt.config import CheckpointError


class NoCacheFolder(CheckpointError):
    """Nowhere to keep anything. The embedded model needs that, so there it is an error of the checkpoint."""


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/orthrus_rt`` if that is an absolute path, by default ``~/.cache/orthrus_rt``; for a user that
    has no home, as in a container that runs under a random uid, a folder of this user's beside the temporary files.

    Raises:
        NoCacheFolder: the latter is there already and others can write to it, or nothing can be written anywhere.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # a relative one is to be ignored, its specification says
        return named / "orthrus_rt"
    with contextlib.suppress(RuntimeError):
        home = Path.home()
        if home != Path("/") or os.getuid() == 0:  # what containers name as the home of a uid that they do not know
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
    found = folder.lstat()  # not of what a link points to: anybody may have put it there
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NoCacheFolder(f"{folder}: must be a folder that this user alone can write to, {named}")
    return folder
