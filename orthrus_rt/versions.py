"""Versions of what is installed."""

from importlib import metadata


def installed(package: str) -> str | None:
    """None if it is not, or runs from a plain folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own() -> str:
    return installed("orthrus-rt") or "(from a plain folder)"
