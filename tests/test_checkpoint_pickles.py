"""Hostile and damaged files: nothing in them runs, nothing grows without bounds, one sentence refuses them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.errors import CheckpointError
from yolonas.model import YoloNAS
from yolonas.pickle_records import CALLS, Global, RefusedPickleError, Stub, TensorRef
from yolonas.safe_pickle import read_pickle


class Calls:
    """Pickles into a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return YoloNAS("n", 3).state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A zip file like torch's around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", entries.pop("byteorder", b"little"))
        for name, content in entries.items():
            file.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def legacy(path: Path, data: bytes) -> Path:
    head = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + data + pickle.dumps([], 2))
    return path


def bare(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def run(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), {})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# --- code -------------------------------------------------------------------------------------------------------------

CONTAINERS = pytest.mark.parametrize("container", [archive, legacy, bare])


@CONTAINERS
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "nest",
    [
        lambda evil: evil,
        lambda evil: {"net": {}, "metrics": [{"a": (1, {"b": evil})}]},
        lambda evil: {evil: 1},
        lambda evil: {"ema_net": Calls(torch._utils._rebuild_parameter, evil, True, {})},
        lambda evil: {"processing_params": {"class_names": [evil]}},
        lambda evil: Calls(bytes, evil),
    ],
    ids=["alone", "nested", "key", "argument", "class name", "inside a call"],
)
def test_code_is_refused_by_name_and_does_not_run(
    path: Path, container: Callable[[Path, bytes], Path], protocol: int, nest: Callable[[Any], Any]
) -> None:
    marker = path.with_name("it-ran")
    data = pickle.dumps(nest(Calls(os.system, f"touch {marker}")), protocol)
    with pytest.raises(CheckpointError, match=r"weights\.pth is refused: its pickle refers to posix\.system"):
        checkpoint.load(container(path, data))
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_good_weights_is_refused(path: Path, state: dict[str, torch.Tensor], zipped: bool) -> None:
    marker = path.with_name("it-ran")
    tree = {"ema_net": state, "hook": Calls(exec, f"open({str(marker)!r}, 'w')")}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refers to builtins\.exec"):
        checkpoint.load(path)
    assert not marker.exists()


DANGEROUS = [
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.getattr",
    "builtins.open",
    "__builtin__.eval",
    "operator.attrgetter",
    "operator.methodcaller",
    "functools.partial",
    "importlib.import_module",
    "runpy.run_path",
    "pickle.loads",
    "_pickle.loads",
    "marshal.loads",
    "types.FunctionType",
    "types.CodeType",
    "code.InteractiveInterpreter",
    "pty.spawn",
    "webbrowser.open",
    "socket.socket",
    "shutil.rmtree",
    "ctypes.CDLL",
    "copyreg.add_extension",
    "copy_reg.__newobj__",
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_from_type_v2",
    "torch.package.PackageImporter",
    "torch.utils.cpp_extension.load",
    "torch._dynamo.eval",
    "torch.nnx.Conv2d",
    "numpy.load",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.compile",
    "super_gradientsX.models.Net",
    "__main__.Net",
    "pip.main",
    "yolonas.checkpoint.load",
    "pathlib.Path",
    "collections.namedtuple",
]


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("opcode", ["REDUCE", "NEWOBJ", "OBJ", "INST", "STACK_GLOBAL"])
def test_any_call_off_the_list_is_refused_by_name(name: str, opcode: str) -> None:
    module, _, attribute = name.rpartition(".")
    target = f"c{module}\n{attribute}\n".encode()
    data = {
        "REDUCE": target + b"(V1\ntR.",
        "NEWOBJ": b"\x80\x02" + target + b"(V1\nt\x81.",
        "OBJ": b"(" + target + b"V1\no.",
        "INST": f"(V1\ni{module}\n{attribute}\n.".encode(),
        "STACK_GLOBAL": b"\x80\x04" + text(module) + text(attribute) + b"\x93(V1\ntR.",
    }[opcode]
    assert data[-1:] == b"."
    expected = name.replace("__builtin__", "builtins").replace("copy_reg", "copyreg")
    with pytest.raises(RefusedPickleError) as caught:
        run(data)
    assert caught.value.name == expected


@pytest.mark.parametrize("name", ["os.system", "builtins.getattr", "subprocess.Popen", "sys.modules"])
def test_the_standard_library_is_refused_even_unused(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(RefusedPickleError):
        run(f"c{module}\n{attribute}\n.".encode())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn", "Module.__init__.__globals__"),
        ("torch.nn.modules.conv", "Conv2d.__init__"),
        ("collections", "OrderedDict.__reduce__"),
        ("super_gradients", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.nn os", "system"),
        ("torch.nn\x00", "Conv2d"),
        ("", "eval"),
        ("torch.nn.", "Conv2d"),
    ],
)
def test_attribute_chains_are_refused(module: str, name: str) -> None:
    with pytest.raises(RefusedPickleError):
        run(b"\x80\x04" + text(module) + text(name) + b"\x93.")


def test_instances_are_inert_records() -> None:
    stub = run(b"\x80\x02csuper_gradients.modules\nBlock\n(V/bin/sh\nt\x81}(V__class__\nV1\nV_modules\n}ub.")
    assert type(stub) is Stub
    assert (stub.kind, stub.args) == ("super_gradients.modules.Block", ("/bin/sh",))
    assert stub.state == {"__class__": "1", "_modules": {}}
    assert not callable(stub)


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch.nn\nModule\n}(V__init__\nV1\nub.",  # attributes of a class
        b"ctorch._utils\n_rebuild_parameter\n(N}(V__code__\nV1\nutb.",  # of a function, as slots
        b"V1\n}b.",  # of a string
        b"]}b.",
        b"csuper_gradients.a\nB\n)R(V1\ntR.",  # an instance called
        b"}(V1\ntR.",
        b"(i\n\n.",
        b"\x80\x02\x82\x01.",  # EXT1: the extension registry of the process
        b"\x80\x02\x84\x01\x00\x00\x00.",
        b"Pstorage\n.",  # PERSID
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x05\x97\x98.",
        b"(V1\nQ.",  # a persistent id that is not torch's
    ],
)
def test_misused_instructions_are_errors(data: bytes) -> None:
    before = dict(CALLS), vars(torch.nn.Module).copy()
    with pytest.raises((ValueError, TypeError, IndexError)):
        run(data)
    assert before == (CALLS, vars(torch.nn.Module))


def test_attributes_of_plain_dictionaries_are_dropped() -> None:
    ordered = b"ccollections\nOrderedDict\n)R}(V__reduce__\nV1\nV_metadata\nV2\nub."
    assert run(ordered) == {}


def test_what_is_mentioned_but_not_called_stays_a_name() -> None:
    assert run(b"ctorch\nfloat32\n.") == Global("torch", "float32")
    assert run(b"cnumpy\nload\n.") == Global("numpy", "load")


# --- size -------------------------------------------------------------------------------------------------------------

FLOATS = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + FLOATS + b"I%d\n%s%sI00\nNtR"


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def pack(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"

    return TENSOR % (numel, offset, pack(size), pack(stride))


def test_an_honest_tensor_is_described() -> None:
    ref = run(tensor(12, 0, (2, 3), (6, 2)) + b".")
    assert type(ref) is TensorRef
    assert (ref.shape, ref.stride, ref.dtype, ref.storage.numel) == ((2, 3), (6, 2), torch.float32, 12)
    assert run(tensor(0, 0, (0, 3), (3, 1)) + b".").shape == (0, 3)


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (1, 0, (10**12,), (0,)),  # expanded: one element that would become 4 TB
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 2)),
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (2,), ()),
        (4, 0, (1,) * 9, (1,) * 9),
        (-1, 0, (1,), (1,)),
        (4, 0, (2**50,), (1,)),
    ],
)
def test_tensors_larger_than_their_storage_are_refused(
    numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError):
        run(tensor(numel, offset, size, stride) + b".")


KEY = "backbone.stem.conv.branch_3x3.conv.weight"


def test_storages_larger_than_the_file_are_refused(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Descriptions that fit together, over data that is not there."""
    parts = [b"}("]
    for number, (key, value) in enumerate(state.items()):
        kind = b"FloatStorage" if value.is_floating_point() else b"LongStorage"
        shape = b"(" + b"".join(b"I%d\n" % v for v in value.shape) + b"t"
        stride = b"(" + b"".join(b"I%d\n" % v for v in value.stride()) + b"t"
        storage = b"(Vstorage\nctorch\n%s\nV%d\nVcpu\nI%d\ntQ" % (kind, number % 2, 10**9)
        call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I0\n" + shape + stride + b"I00\nNtR"
        parts.append(b"V%s\n" % key.encode() + call.replace(b"LongStorage\nV", b"LongStorage\nVL"))
    data = b"".join([*parts, b"u."])
    with pytest.raises(CheckpointError, match="storages claim more than"):
        checkpoint.load(archive(path, data, data__0=bytes(100)))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(legacy(path, data))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # BINBYTES8 of 1 TB
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # LONG4
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"1" * 100_000 + b"}\x8b" + struct.pack("<i", 0) + b".",
        b"(" * 100_000,
        b"\x80\x02}" + b"\x8b" + struct.pack("<i", 1000) + b"1" * 1000 + b"Ns.",  # a key that is slow to hash
        b"N" + b"\x85" * 200_000 + b"}\x94" + b".",
    ],
)
def test_absurd_lengths_end_quickly(data: bytes) -> None:
    start = time.perf_counter()
    with contextlib.suppress(ValueError, IndexError, TypeError, OverflowError):
        run(data)
    assert time.perf_counter() - start < 20


def test_deep_keys_do_not_overflow_the_stack() -> None:
    """hash() of a tuple 300,000 deep is a segmentation fault."""
    with pytest.raises(TypeError):
        run(b"}N" + b"\x85" * 300_000 + b"Ns.")
    deep = run(b"N" + b"\x85" * 300_000 + b".")
    assert len(deep) == 1
    stubs = run(b"N" + b"".join(b"\x85p%d\n0ctorch.nn\nModule\ng%d\n\x81" % (i, i) for i in range(100_000)) + b".")
    assert type(stubs) is Stub


def test_a_memo_index_takes_no_memory() -> None:
    assert run(b"Nr\xff\xff\xff\xff.") is None  # CPython's unpickler makes room for 2^32 entries


def test_copies_are_counted() -> None:
    items = b"(" + b"I1\n" * 100_000 + b"lp0\n0"
    with pytest.raises(ValueError, match="without bounds"):
        run(items + b"cbuiltins\nset\np1\n0" + b"g1\ng0\n\x85R0" * 2000 + b"N.")
    long_text = b"V" + b"x" * 100_000 + b"\np0\n0c_codecs\nencode\np1\n0"
    with pytest.raises(ValueError, match="without bounds"):
        run(long_text + b"(" + b"g1\ng0\nVlatin1\n\x86R" * 2000 + b"l.")
    state = b"}(" + b"".join(b"I%d\nN" % i for i in range(50_000)) + b"up0\n0csuper_gradients\nA\np1\n0"
    with pytest.raises(ValueError, match="without bounds"):
        run(state + b"(" + b"g1\n)Rg0\nb" * 5000 + b"l.")


def test_laughing_lists_cost_nothing(path: Path) -> None:
    """Each list holds the one before ten times: printing or walking it would take forever."""
    laughs = b"(Vha\nl" + b"".join(b"p%d\n0(" % i + b"g%d\n" % i * 10 + b"l" for i in range(60))
    assert len(run(laughs + b".")) == 10
    for use in (
        b"}(Vnet\n%su." % laughs,
        b"%sp99\n." % laughs,
        b"}(Vprocessing_params\n}(Vclass_names\n%sVimage_processor\ng59\nVconf\ng59\nuu." % laughs,
        b"cnumpy\ndtype\n%s\x85R." % laughs,
        b"c_codecs\nencode\nVx\n%s\x86R." % laughs,
        b"ctorch\ndevice\n%s\x85R." % laughs,
        b"ctorch._utils\n_rebuild_tensor_v3\n(%sI0\n))I00\nNg58\ntR." % laughs,
    ):
        start = time.perf_counter()
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(archive(path, use))
        assert time.perf_counter() - start < 20
        assert len(str(caught.value)) < 1000


def test_processing_that_contains_itself(path: Path, state: dict[str, torch.Tensor]) -> None:
    for step in ({"NormalizeImage": {"mean": None, "std": None}}, ["self"], {"ComposeProcessing": {}}):
        loop: list[Any] = []
        loop.append(loop)
        if isinstance(step, dict) and "NormalizeImage" in step:
            step["NormalizeImage"] = {"mean": loop, "std": loop}
            processor: Any = [step]
        elif isinstance(step, list):
            processor = loop
        else:
            step["ComposeProcessing"] = {"processings": step}
            processor = step
        torch.save({"net": state, "processing_params": {"image_processor": processor}}, path)
        with pytest.raises(CheckpointError, match="cannot be used as it is"):
            checkpoint.load(path)


def test_numpy_values(path: Path) -> None:
    values = {
        "text": np.str_("Zelle"),
        "float": np.float64(0.5),
        "big": np.dtype(">i4").type(7),
        "array": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "names": np.array(["a", "bc"]),
        "objects": np.array(["a", "bc"], dtype=object),
        "bool": np.bool_(True),
    }
    for protocol in range(5):
        found = run(pickle.dumps(values, protocol))
        assert found["text"] == "Zelle"
        assert type(found["text"]) is str
        assert (found["float"], found["big"], found["bool"]) == (0.5, 7, True)
        for key in ("array", "fortran", "names", "objects"):
            assert found[key].values == values[key].tolist()
    empty = pickle.dumps(np.zeros((0, 3)), 2)
    assert run(empty).values == []
    with pytest.raises(ValueError, match="not Unicode"):
        run(pickle.dumps(np.str_("ab"), 4).replace(b"a\0\0\0", b"a\0\0\x7f"))
    for bad in (b"cnumpy\ndtype\n(VV100\ntR.", b"cnumpy\ndtype\n(I5\ntR.", b"cnumpy\ndtype\n(Vi3\ntR."):
        with pytest.raises((ValueError, TypeError)):
            run(bad)


def test_an_empty_array_has_no_rows() -> None:
    array = pickle.dumps(np.zeros((1, 0)), 2).replace(b"K\x01K\x00\x86", b"J\x00\xca\x9a;K\x00\x86")
    assert run(array).values == []  # a billion empty rows otherwise


# --- containers -------------------------------------------------------------------------------------------------------


def test_compressed_entries_are_refused(path: Path) -> None:
    data = pickle.dumps({"net": "x" * 1_000_000}, 2)
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.load(archive(path, data, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"byteorder": b"big"}, "big-endian"),
        ({"constants__pkl": b""}, "YOLO-NAS"),
        ({"constants.pkl": b""}, "TorchScript"),
    ],
)
def test_archives_of_another_kind(path: Path, entries: dict[str, bytes], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.load(archive(path, pickle.dumps({}, 2), **entries))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("document.xml", b"text")
    with pytest.raises(CheckpointError, match="not one written by torch"):
        checkpoint.load(path)


def test_a_storage_that_is_not_there(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            if not name.endswith("/data/5"):
                file.writestr(name, content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zip", "legacy", "safetensors"])
def good_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("good") / "weights.pth"
    model = YoloNAS("n", 2)
    if request.param == "safetensors":
        checkpoint.save(Checkpoint(model), path)
    else:
        tree = {"ema_net": model.state_dict(), "processing_params": {"class_names": [np.str_("a"), np.str_("b")]}}
        torch.save(tree, path, _use_new_zipfile_serialization=request.param == "zip")
    assert checkpoint.load(path).model.num_classes == 2
    return path


def test_truncated_files(good_file: Path, path: Path) -> None:
    content = good_file.read_bytes()
    lengths = [int(len(content) * i / 20) for i in range(20)] + [1, 8, 9, 100, len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"weights\.pth is damaged.*copy or download it again") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)


def test_flipped_bytes(good_file: Path, path: Path) -> None:
    """Changed weights cannot be told from others without a checksum, which only zip files have; the rest is noticed."""
    content = good_file.read_bytes()
    rng = random.Random(0)
    metadata = [rng.randrange(min(len(content), 60_000)) for _ in range(16)]
    anywhere = [rng.randrange(len(content)) for _ in range(4)]
    for position in metadata + anywhere + [len(content) - 5]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_pickles_raise_nothing_unforeseen(state: dict[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    few = {key: state[key] for key in list(state)[:4]}
    torch.save({"net": few, "names": [np.str_("a")], "x": {1, 2}}, buffer)
    with zipfile.ZipFile(buffer) as file:
        data = file.read("archive/data.pkl")
    rng = random.Random(1)
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(3000):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(mutated))
            mutated[start : start + rng.randint(0, 3)] = rng.choice([rng.choice(opcodes), rng.randbytes(2), b""])
        # `load` turns all of these into a CheckpointError; a crash, a hang or a full memory it could not
        with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError, AttributeError, struct.error):
            run(bytes(mutated))
