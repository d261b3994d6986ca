"""What the globals of a pickle become here: records of tensors, arrays and instances, which never run anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Classes of model pickles: their instances become stubs. Everything else that is called must be in `CALLS`.
STUB_PACKAGES = ("torch.nn.", "super_gradients.", "modern_yolonas.", "omegaconf.")

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype): dtype for dtype in STORAGE_DTYPES.values()}  # "torch.float32": torch.float32, ...


class RefusedPickleError(ValueError):
    """The pickle names a global that could run code."""

    def __init__(self, name: str) -> None:
        super().__init__(f"its pickle refers to {name[:200]}, which could run code")
        self.name = name[:200]


@dataclass(frozen=True)
class Global:
    """The name of a class or function, never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stub:
    """An instance of a class that was not imported: the class's name, constructor arguments and attributes."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class StorageRef:
    """A storage in the file: `numel` elements of `dtype` under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor in the file: a strided view of a storage, in elements of `dtype`."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def storage_ref(pid: Any, storages: dict[str, StorageRef]) -> StorageRef | Global:
    """The storage (or, in the legacy format, the class) that a persistent id of torch stands for."""
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
        return pid[1]  # the legacy format stores the source code of a module's class beside it; it is not looked at
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], Global):
        raise ValueError("a persistent id is not torch's")
    kind, key, numel = pid[1], pid[2], pid[4]
    if kind.module not in ("torch", "torch.storage", "torch.cuda") or kind.name not in STORAGE_DTYPES:
        raise ValueError(f"storage type {kind} is not supported")
    if not isinstance(key, str) or type(numel) is not int or numel < 0 or pid[5:] not in ((), (None,)):
        raise ValueError("a storage is described wrongly")
    ref = StorageRef(key, STORAGE_DTYPES[kind.name], numel)
    if storages.setdefault(key, ref) != ref:
        raise ValueError(f"storage {key!r} is described in two ways")
    return ref


def checked_key(value: Any) -> Any:
    """A dict key or set member that is cheap to hash: hashing deep tuples can even overflow the C stack."""
    if isinstance(value, tuple) and len(value) <= 8 and not any(isinstance(v, tuple) for v in value):
        return tuple(map(checked_key, value))
    if isinstance(value, int) and abs(value) < 2**64:
        return value
    if value is None or isinstance(value, str | bytes | float | Stub | Global):
        return value
    raise TypeError(f"its pickle uses a {type(value).__name__} as a key")


def instance_of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"its pickle treats a {type(value).__name__} as a {kind.__name__}")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None) -> TensorRef:
    size, stride = instance_of(size, tuple), instance_of(stride, tuple)
    if not isinstance(storage, StorageRef) or len(size) != len(stride) or len(size) > 8:
        raise ValueError("a tensor is described wrongly")
    if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has an absurd size")
    dtype = dtype or storage.dtype
    numel, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        numel, last = numel * length, last + max(length - 1, 0) * step
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if numel and (last >= available or numel > available):
        raise ValueError(f"a tensor of shape {list(size)} is larger than its storage")
    return TensorRef(storage, dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRef:
    if not isinstance(dtype, Global) or str(dtype) not in DTYPES:
        raise ValueError("a tensor has a dtype that is not supported")
    return _tensor(storage, offset, size, stride, dtype=DTYPES[str(dtype)])


def _parameter(data: Any, *_: Any) -> Any:
    return instance_of(data, TensorRef)


def _reconstructor(kind: Any, base: Any, state: Any) -> Stub:
    name = str(instance_of(kind, Global))
    if not name.startswith(STUB_PACKAGES):
        raise RefusedPickleError(name)
    return Stub(name, ())


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if encoding not in ("latin1", "utf-8"):
        raise ValueError("its pickle holds text in an encoding that NumPy does not use")
    return str.encode(instance_of(text, str), encoding)


class NumpyDtype:
    """A NumPy dtype of plain numbers or text; `set` receives its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|[US]\d{1,6}|O8?)", instance_of(code, str)):
            raise ValueError(f"NumPy dtype {code[:20]} is not supported")
        self.dtype = np.dtype(code)

    def set(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("the byte order of a NumPy array is unknown")
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """A NumPy array as nested lists; `set` receives its shape, dtype and bytes (or, for objects, a list)."""

    def __init__(self, *_: Any) -> None:
        self.values: Any = []

    def set(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        kind = instance_of(dtype, NumpyDtype).dtype
        if kind.hasobject:
            self.values = instance_of(data, list)
        else:
            array = _numpy_values(kind, data)
            # an array without elements could have any number of empty rows
            self.values = array.reshape(shape, order="F" if fortran else "C").tolist() if array.size else []


def _scalar(dtype: Any, data: Any) -> Any:
    kind = instance_of(dtype, NumpyDtype).dtype
    if kind.hasobject:
        raise ValueError("a NumPy scalar holds an object")
    return _numpy_values(kind, data)[0].item()


def _numpy_values(kind: np.dtype[Any], data: Any) -> Any:
    if kind.kind == "U":  # NumPy hands code points that do not exist to Python unchecked
        codes = np.frombuffer(instance_of(data, bytes), dtype=np.dtype("u4").newbyteorder(kind.byteorder))
        if codes.size and codes.max() > sys.maxunicode:
            raise ValueError("a NumPy text is not Unicode")
    return np.frombuffer(instance_of(data, bytes), dtype=kind)


# The calls that checkpoints consist of, each replaced by a function that only describes or copies its arguments.
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda size=(): tuple(instance_of(size, tuple)),
    "torch.device": lambda *args: args,
    "collections.OrderedDict": lambda: {},
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda items=None: dict(instance_of(items or {}, dict)),
    "builtins.set": lambda items=(): set(map(checked_key, items)),
    "builtins.frozenset": lambda items=(): frozenset(map(checked_key, items)),
    "builtins.bytes": lambda: b"",
    "copyreg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "numpy.dtype": NumpyDtype,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")
        for name, function in (("scalar", _scalar), ("_reconstruct", NumpyArray))
    },
}
# Types that may be mentioned (the default of a defaultdict, the base of a class) but not called.
TYPES = {f"builtins.{name}" for name in ("object", "dict", "list", "tuple", "int", "float", "str", "bool", "bytes")}
