"""Exporting a network for other runtimes; decoding and NMS stay ours unless they are asked for in the file."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from yolonas.atomic import atomic_file
from yolonas.checkpoint import Checkpoint
from yolonas.errors import ExportError
from yolonas.exported import METADATA_KEY, SUFFIXES, Manifest
from yolonas.extras import openvino_core, require
from yolonas.model.config import STRIDES
from yolonas.onnx_nms import append_nms
from yolonas.tracing import OPSET, onnx_graph, quiet, torch_program

if TYPE_CHECKING:
    from yolonas.parity import Parity

__all__ = ["Exported", "export", "export_raw_onnx", "manifest_of"]

PRE_NMS_TOP_K = 1000
Format = Literal["onnx", "openvino", "pt2"]
Writer = Callable[[Manifest, Path], None]


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote: how large it is, how long it took, and how near to the model it came."""

    path: Path
    manifest: Manifest
    size: int  # bytes, of the .bin too
    seconds: float
    opset: int | None  # of ONNX
    parity: Parity


def export(
    checkpoint: Checkpoint,
    path: str | Path,
    format: Format | None = None,
    *,
    nms: bool = False,
    output_format: Literal["flat", "batch"] = "batch",
    half: bool = False,
    int8: bool = False,
    dynamic: bool = False,
    imgsz: int | tuple[int, int] | None = None,
    batch: int = 1,
    input: Literal["uint8", "float"] = "uint8",
    conf: float | None = None,
    iou: float | None = None,
    max_det: int = 300,
    images: Any = None,
    data: str | Path | None = None,
) -> Exported:
    """Write the network for another runtime, run the file there, and keep it only if it finds what the model finds.

    path ends in .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2, which `format` ("onnx", "openvino", "pt2")
    repeats; a file that is there is replaced. The file takes `images` [B, 3, H, W], uint8 or float 0..1, of `batch`
    and `imgsz` (a side, or height and width; None is the checkpoint's), or of any with `dynamic`. It gives the six raw
    maps, or with `nms` detections in canvas px: see `yolonas.onnx_nms.append_nms` for the two output formats. conf and
    iou replace the checkpoint's thresholds. half stores float16; int8 quantizes with NNCF (`yolonas.quantization`),
    calibrated on the images of the data set `data`. images, a source as of a Detector, are those on which file and
    model are compared; without them those of `data`, else sample images.
    Raises ValueError for options that do not go together, ExportError where the file cannot be written or does not
    give the model's results, DataError for images that cannot be read, MissingPackageError where a package is missing.
    """
    from yolonas import parity

    path = Path(path)
    target = _format(path, format)
    if half and int8:
        raise ValueError("half and int8 exclude each other: choose one")
    if int8 and target == "pt2":
        raise ValueError("int8 is not made for pt2: use onnx or openvino")
    if int8 and input != "uint8":
        raise ValueError("an int8 network takes uint8 images: leave input out")
    if int8 and data is None:
        raise ValueError("int8 is calibrated on images: give a data set as data")
    for name, value in (("batch", batch), ("max_det", max_det)):
        if value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
    _require_packages(target, int8)
    checkpoint = _changed(checkpoint, imgsz, conf, iou)
    plain = manifest_of(checkpoint)
    manifest = dataclasses.replace(
        plain,
        precision="int8" if int8 else "fp16" if half else "fp32",
        input="float32" if input == "float" else "uint8",
        output=output_format if nms else "raw",
        nms=_nms(plain, max_det) if nms else None,
        image_size=None if dynamic else plain.preprocessing.image_size,
        batch=None if dynamic else batch,
    )
    paths = None if data is None else _image_paths(data)
    with _folder_beside(path) as folder:
        canvases = parity.canvases(plain.preprocessing, paths if images is None else images)
        reference = parity.Reference(checkpoint.model, canvases)
        started = time.perf_counter()
        write = _writer(checkpoint, target, manifest, paths, folder)
        file = folder / path.name
        write(manifest, file)
        seconds = time.perf_counter() - started
        compared, judged = file, reference.shown(manifest)
        if judged.nms != manifest.nms:  # nothing is found above the threshold: compare a twin that has a lower one
            compared = folder / f"twin{path.suffix}"
            write(judged, compared)
        result = reference.compare(compared, judged)
        if not result.passed:
            raise ExportError(f"{path} is not kept, as it does not give the model's results: {result}")
        size = _publish(file, path)
    return Exported(path, manifest, size, seconds, OPSET if target == "onnx" else None, result)


def export_raw_onnx(checkpoint: Checkpoint, path: Path) -> Manifest:
    """Write the raw network as ONNX: uint8 in, any batch, height and width; the file appears complete or not at all."""
    _require_packages("onnx")
    manifest = manifest_of(checkpoint)
    data = _onnx_bytes(onnx_graph(checkpoint.model, manifest), manifest)
    with atomic_file(path) as stream:
        stream.write(data)
    return manifest


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    """The manifest of a checkpoint's raw float32 network for images of any size."""
    model = checkpoint.model
    return Manifest(
        model.variant, model.class_names, model.preprocessing, checkpoint.conf, checkpoint.iou,
        checkpoint.license, checkpoint.record,
    )  # fmt: skip


def _changed(
    checkpoint: Checkpoint, imgsz: int | tuple[int, int] | None, conf: float | None, iou: float | None
) -> Checkpoint:
    """The checkpoint with another canvas and other thresholds, where they are given; the weights are shared."""
    model = checkpoint.model
    if imgsz is not None:
        model = copy.copy(model)
        model.preprocessing = model.preprocessing.on_canvas(imgsz)
    conf, iou = checkpoint.conf if conf is None else conf, checkpoint.iou if iou is None else iou
    return dataclasses.replace(checkpoint, model=model, conf=conf, iou=iou)


def _nms(manifest: Manifest, max_det: int) -> dict[str, Any]:
    return {
        "score_threshold": manifest.conf,
        "iou_threshold": manifest.iou,
        "pre_nms_top_k": max(PRE_NMS_TOP_K, max_det),
        "max_detections": max_det,
    }


def _image_paths(data: str | Path) -> list[Path]:
    """The images of a data set, of its training part where it has parts: NNCF wants those the model knows."""
    from yolonas.data.readers import read_dataset, splits

    parts = splits(data)
    part = next((name for name in ("train", "val") if name in parts), next(iter(parts), None))
    return [image.path for image in read_dataset(data, part).images]


def _writer(
    checkpoint: Checkpoint, target: Format, manifest: Manifest, paths: list[Path] | None, folder: Path
) -> Writer:
    """A function that writes the format; the network is traced and quantized once."""
    if target == "pt2":
        return lambda wanted, file: _write_pt2(checkpoint, wanted, file)
    if manifest.precision == "int8":
        proto, record = _quantized(checkpoint, paths or [], folder / "int8.onnx")
        _fix_sizes(proto, manifest)
    else:
        half = manifest.precision == "fp16" and target == "onnx"  # OpenVINO stores float32 as float16 itself
        proto, record = onnx_graph(checkpoint.model, manifest, half), manifest.record

    def write(wanted: Manifest, file: Path) -> None:
        wanted = dataclasses.replace(wanted, record=record)
        whole = copy.deepcopy(proto)
        if wanted.nms is not None:
            classes = len(wanted.class_names)
            whole = append_nms(whole, wanted.output, classes, wanted.nms, for_openvino=target == "openvino")
        if target == "onnx":
            file.write_bytes(_onnx_bytes(whole, wanted))
        else:
            _write_openvino(whole, wanted, file)

    return write


def _quantized(checkpoint: Checkpoint, paths: list[Path], file: Path) -> tuple[Any, dict[str, Any]]:
    """The int8 ModelProto with dynamic sizes, and the record that says how it was made."""
    from yolonas.quantization import quantize  # which builds on this module

    made = quantize(checkpoint, file, paths)
    return require("onnx", "onnx", "an export to ONNX").load(str(file)), made.record


def _fix_sizes(proto: Any, manifest: Manifest) -> None:
    """Bind a raw ModelProto of any sizes to those of the manifest."""
    if manifest.image_size is None:
        return
    height, width = manifest.image_size
    for value, stride in zip((*proto.graph.input, *proto.graph.output), (1, *STRIDES, *STRIDES), strict=True):
        dims = value.type.tensor_type.shape.dim
        for place, size in ((0, manifest.batch), (2, height // stride), (3, width // stride)):
            dims[place].Clear()
            dims[place].dim_value = size
    del proto.graph.value_info[:]


def _onnx_bytes(proto: Any, manifest: Manifest) -> bytes:
    require("onnx", "onnx", "an export to ONNX").helper.set_model_props(proto, {METADATA_KEY: manifest.to_json()})
    data: bytes = proto.SerializeToString()
    return data


def _write_openvino(proto: Any, manifest: Manifest, file: Path) -> None:
    openvino = require("openvino", "openvino", "an export to OpenVINO")
    model = openvino_core().read_model(proto.SerializeToString())
    model.set_rt_info(manifest.to_json(), [METADATA_KEY])
    openvino.save_model(model, str(file), compress_to_fp16=manifest.precision == "fp16")


def _write_pt2(checkpoint: Checkpoint, manifest: Manifest, file: Path) -> None:
    program = torch_program(checkpoint.model, manifest)
    with quiet():
        torch.export.save(program, str(file), extra_files={METADATA_KEY: manifest.to_json()})


def _format(path: Path, format: str | None) -> Format:
    by_suffix = SUFFIXES.get(path.suffix.lower())
    suffixes = {name: suffix for suffix, name in SUFFIXES.items()}
    if format is not None and format not in suffixes:
        raise ValueError(f"format {format!r} is not one of {', '.join(suffixes)}")
    if by_suffix is None or format not in (None, by_suffix):
        wanted = f"{suffixes[format]} for the format {format}" if format else ", ".join(SUFFIXES)
        raise ValueError(f"{path} must end in {wanted}")
    return cast(Format, by_suffix)


def _require_packages(target: Format, int8: bool = False) -> None:
    if target == "pt2":
        return
    names = {"onnx": "ONNX", "openvino": "OpenVINO"}
    packages = ["onnx", "onnxscript", "onnxruntime" if target == "onnx" else "openvino"]
    for package in packages + (["nncf"] if int8 else []):
        extra = {"openvino": "openvino", "nncf": "quantize"}.get(package, "onnx")
        require(package, extra, f"an export to {names[target]}")


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`, so that what it holds can be renamed into place."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def _publish(file: Path, path: Path) -> int:
    """Rename the file into place, after the .bin that an .xml reads; the size of both."""
    size = 0
    for suffix in [".bin"] * (path.suffix.lower() == ".xml") + [path.suffix]:
        part = file.with_suffix(suffix)
        size += part.stat().st_size
        part.replace(path.with_suffix(suffix))
    return size
