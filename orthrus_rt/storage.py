"""Tensors in safetensors files: headers are read and checked first, weights are read when they are accessed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from orthrus_rt.config import CheckpointError

WEIGHT_DTYPES = ("F32", "F16", "BF16")
SCALE_SUFFIX = "_scale"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored; ``scale`` names the fp32 scales, one per row, of an int8 tensor in the same file.

    ``version`` is the file's size and time of modification. (Its inode would tell more, but network filesystems invent
    new ones.)
    """

    file: Path
    version: tuple[int, int]
    key: str
    shape: tuple[int, ...]
    scale: str | None = None


class LazyTensors(Mapping):
    """Name -> tensor, read from its file on each access and checked for NaN and inf.

    The file is opened anew each time: its mapping, and the pages read through it, are released with the last tensor.
    """

    def __init__(self, stored: dict[str, StoredTensor]):
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._stored[name]
        file, version = _open(entry.file)
        if version != entry.version:  # its tensors and those read before would be a mixture
            raise CheckpointError(f"{entry.file}: has changed since it was opened")
        with file:
            tensor = file.get_tensor(entry.key)
            if entry.scale is not None:
                tensor = tensor.float() * file.get_tensor(entry.scale)[:, None]
        # NaN propagates through aminmax, so checking two numbers checks all, without a mask in memory.
        low, high = tensor.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{entry.file}: {name} holds NaN or inf")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def exists(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        CheckpointError: that cannot be told, as where its folder may not be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return True


def scan(folder: Path, *names: str) -> dict[str, StoredTensor]:
    """Headers of the first of ``names`` that exists in ``folder``, as a single file or sharded."""
    for name in names:
        if exists(folder / name):
            return _scan_files(folder, [name])
        index = folder / f"{name}.index.json"
        if exists(index):
            return _scan_shards(folder, index)
    expected = " or ".join(f"{name} or {name}.index.json" for name in names)
    raise CheckpointError(f"{folder}: must hold {expected}, found neither (only safetensors weights are read)")


def _scan_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: must hold weight_map, an object of tensor name to file, got {weight_map!r}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index}: weight_map must name files of its own folder, got {file!r}")
    stored = _scan_files(folder, sorted(set(weight_map.values())))
    held = {(name, entry.file.name) for entry in stored.values() for name in (entry.key, entry.scale)}
    for tensor, file in weight_map.items():
        if (tensor, file) not in held and not _ignored(tensor):
            raise CheckpointError(f"{index}: weight_map puts {tensor} into {file}, which does not hold it")
    return stored


def _scan_files(folder: Path, names: list[str]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for name in names:
        path = folder / name
        opened, version = _open(path)
        with opened as file:
            header = {key: file.get_slice(key) for key in file.keys() if not _ignored(key)}  # noqa: SIM118
            entries = [_entry(path, version, header, key) for key in sorted(header)]
        scales = {entry.scale for entry in entries}
        for entry in entries:
            if entry.key in scales:
                continue
            if entry.key in stored:
                raise CheckpointError(f"{path}: {entry.key} is in {stored[entry.key].file.name} too")
            stored[entry.key] = entry
    return stored


def _entry(path: Path, version: tuple[int, int], header: dict, key: str) -> StoredTensor:
    shape, dtype = tuple(header[key].get_shape()), header[key].get_dtype()
    if dtype == "I8" and is_diffusion(key) and len(shape) == 2:
        scale = key + SCALE_SUFFIX
        if scale not in header:
            raise CheckpointError(f"{path}: {key} is int8, so {scale} must be there too, but it is missing")
        found = header[scale].get_dtype(), tuple(header[scale].get_shape())
        if found != ("F32", shape[:1]):
            raise CheckpointError(
                f"{path}: {scale} must be F32 of shape {shape_text(shape[:1])}, got {found[0]} of shape "
                f"{shape_text(found[1])}"
            )
        return StoredTensor(path, version, key, shape, scale)
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{path}: {key} must be one of {', '.join(WEIGHT_DTYPES)}, got {dtype}")
    return StoredTensor(path, version, key, shape)


def _ignored(key: str) -> bool:
    """Whether it is a buffer that old checkpoints stored and that follows from the config."""
    return key.endswith("rotary_emb.inv_freq")


def _open(path: Path):
    """The open file, and its version as in :class:`StoredTensor`."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{os.fspath(path)!r}: must be UTF-8, as safetensors requires of a path") from None
    try:
        with open(path, "rb") as file:  # safetensors reports every file that it cannot open as missing
            before = os.fstat(file.fileno())
        opened, after = safe_open(path, framework="pt"), os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: is not a whole safetensors file, truncated or corrupt ({error}); fetch it again"
        ) from error
    except RuntimeError as error:  # torch's, of which the first line is for users
        raise CheckpointError(f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]})") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{path}: has changed while it was opened")
    return opened, (after.st_size, after.st_mtime_ns)


def is_diffusion(name: str) -> bool:
    return name.endswith("_diff.weight")


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for messages, as ``[2, 3]``."""
    return "[" + ", ".join(map(str, shape)) + "]"
