"""Versions of installed packages."""

from importlib import metadata


def installed(package: str) -> str | None:
    """The package's version; None if it is not installed, or runs from a plain folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own() -> str:
    return installed("orthrus-rt") or "(from a plain folder)"
