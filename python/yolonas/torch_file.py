"""The files that `torch.save` writes, zip and legacy, read without executing anything."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from yolonas.pickle_records import RefusedPickleError, StorageRef, TensorRef
from yolonas.safe_pickle import read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ZIP_MAGIC = b"PK\x03\x04"


@dataclass
class TorchFile:
    """An open file: `tree` is what was saved, with TensorRef in place of each tensor."""

    tree: Any
    size: int
    _read: Callable[[StorageRef], bytes]
    _storages: dict[str, bytearray] = field(default_factory=dict)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor itself, contiguous, with memory of its own; ValueError where the file holds less than claimed."""
        key, expected = ref.storage.key, ref.storage.numel * ref.storage.dtype.itemsize
        if key not in self._storages:
            if expected + sum(map(len, self._storages.values())) > self.size:
                raise ValueError(f"its storages claim more than the {self.size} bytes of the file")
            self._storages[key] = bytearray(self._read(ref.storage))
            if len(self._storages[key]) != expected:
                raise ValueError(f"storage {key} has {len(self._storages[key])} bytes where {expected} belong")
        if not expected:
            return torch.empty(ref.shape, dtype=ref.dtype)
        flat = torch.frombuffer(self._storages[key], dtype=torch.uint8).view(ref.dtype)
        return flat.as_strided(ref.shape, ref.stride, ref.offset).clone(memory_format=torch.contiguous_format)


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file written by `torch.save`.

    Raises RefusedPickleError for a pickle that could run code, and ValueError, KeyError, IndexError, TypeError,
    zipfile.BadZipFile and others for a damaged file: everything but the first means that this is no checkpoint.
    """
    with path.open("rb") as stream:
        is_zip = stream.read(4) == ZIP_MAGIC
        stream.seek(0)
        if is_zip:
            with zipfile.ZipFile(stream) as archive:
                yield _open_zip(archive, path.stat().st_size)
        else:
            yield _open_legacy(stream, path.stat().st_size)


def _open_zip(archive: zipfile.ZipFile, size: int) -> TorchFile:
    names = set(archive.namelist())
    folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise ValueError("it is a zip archive, but not one written by torch.save")
    folder = folders[0]
    if f"{folder}/constants.pkl" in names:
        raise ValueError("it is a TorchScript archive, which is code; save the model's state_dict instead")

    def read(name: str) -> bytes:
        entry = archive.getinfo(f"{folder}/{name}")
        # torch.save never compresses, so an entry cannot unpack to more than the file
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"its entry {name} is compressed, which torch.save never does")
        return archive.read(entry)

    if f"{folder}/byteorder" in names and read("byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    tree = read_pickle(io.BytesIO(read("data.pkl")), {})
    return TorchFile(tree, size, lambda storage: read(f"data/{storage.key}"))


def _open_legacy(stream: IO[bytes], size: int) -> TorchFile:
    """Magic number, protocol, machine, tree and keys, each a pickle; then per key the element count and the data."""
    storages: dict[str, StorageRef] = {}
    try:
        magic = read_pickle(stream, {})
    except RefusedPickleError:
        raise
    except Exception as error:
        raise ValueError("it is neither safetensors nor written by torch.save") from error
    if magic != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one written by torch.save")
    _protocol, machine = read_pickle(stream, {}), read_pickle(stream, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    tree = read_pickle(stream, storages)
    keys = read_pickle(stream, {})
    if not isinstance(keys, list):
        raise ValueError("its list of storages is missing")
    positions: dict[str, int] = {}
    for key in keys:
        (numel,) = struct.unpack("<q", stream.read(8))
        storage = storages[key]
        if numel != storage.numel:
            raise ValueError(f"storage {key} has {numel} elements where {storage.numel} belong")
        positions[key] = stream.tell()
        if stream.seek(numel * storage.dtype.itemsize, 1) > size:
            raise ValueError("it ends in the middle of a storage")

    def read(storage: StorageRef) -> bytes:
        stream.seek(positions[storage.key])
        return stream.read(storage.numel * storage.dtype.itemsize)

    return TorchFile(tree, size, read)
